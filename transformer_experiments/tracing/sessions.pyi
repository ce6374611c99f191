# Made from sessions.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from collections.abc import Iterable
from typing import Any, Self
import torch
from fastcore.basics import patch
from torch import nn
from .backends import remote_backend
from .graph import Graph
from .nodes import Node, node_refs, walk
from .errors import without_frames
from .execution import Execution, results_of, run_first
from .missing import check_complete
from .model import TracedModel
from .tracer import Context, Tracer, assign_gradients
from .operations import OPERATIONS, refuse
from .proxy import Proxy, lower, open_recorder, record
from .recorder import Recorder
from .state import SKIPPED, STATE
from .steps import CompiledGraph, as_function, step_for

__all__ = ['write_optimizers', 'Session', 'Iterator', 'ExitBlock', 'SessionRun', 'run_session']
def _new_optimizer(cls, *args, **kwargs) -> Any: ...
def write_optimizers(): ...
class Session(Context):
    traces: tuple
    in_session: tuple
    models: list[TracedModel]
    rec: Any

    def __init__(self): ...

    @property
    def graph(self) -> Graph: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind, error, traceback): ...

    def add_trace(self, tracer: Tracer): ...

    def exit(self): ...

    def _finish(self): ...

    def iter(self, values: Iterable, return_context: bool=False) -> Iterator: ...
class Iterator(Context):
    traces: tuple
    in_session: tuple
    item: Node
    body: list[Node]
    before: tuple
    outer: 'Session|Iterator'
    rec: Any
    return_context: bool
    values: Any

    def __init__(self, outer: 'Session|Iterator', values: object, return_context: bool): ...

    def __enter__(self) -> Any: ...

    def __exit__(self, kind, error, traceback): ...

    def add_trace(self, tracer: Tracer): ...

    def exit(self): ...

    def iter(self, values: Iterable, return_context: bool=False) -> Iterator: ...
def _iter(self, values: Iterable, return_context: bool=False) -> Iterator: ...
class ExitBlock(BaseException):
    item: int | None

    def __init__(self, item: int | None): ...
class SessionRun:
    graph: Graph
    models: list[TracedModel]
    values: list
    constants: Any
    results: Any
    reasons: Any
    compiled: dict[int, CompiledGraph]
    elsewhere: Any

    def __init__(self, graph: Graph, models: list[TracedModel]): ...

    def run(self) -> dict[int, object]: ...

    def compile(self, node: Node, body: list[Node]) -> CompiledGraph: ...

    def block(self, graph: CompiledGraph): ...

    def was_skipped(self, node: Node) -> bool: ...

    def parameter(self, path: str): ...

    def _similar_calls(self, path: str) -> str: ...
def _trace(node: Node, by_id: dict): ...
def _loop(node: Node, by_id: dict): ...
def _exit(node: Node, by_id: dict): ...
def run_session(graph: Graph, *models: TracedModel) -> dict: ...
