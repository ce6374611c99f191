# Made from sessions.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from collections import defaultdict
from collections.abc import Iterable
from types import SimpleNamespace
import torch
from fastcore.basics import patch
from torch import nn
from .graph import Graph, Node, Ref, node_refs, show_where, walk
from .interleave import SKIPPED, STATE, compile_step, is_told, node_error
from .model import Context, TracedModel, Tracer
from .operations import OPERATIONS, refuse
from .plan import Plan, as_function
from .proxy import Proxy, Recorder, lower, open_recorder, record

__all__ = ['write_optimizers', 'Session', 'Iterator', 'ExitBlock', 'Program', 'run_session']
def _new_optimizer(cls, *args, **kwargs): ...
def write_optimizers(): ...
class Session(Context):
    traces: tuple
    in_session: tuple
    rec: Any
    models: Any

    def __init__(self): ...

    @property
    def graph(self) -> Graph: ...

    def __enter__(self): ...

    def __exit__(self, kind, error, traceback): ...

    def add_trace(self, tracer: Tracer): ...

    def exit(self): ...

    def _finish(self): ...
class Iterator(Context):
    traces: tuple
    in_session: tuple
    outer: Any
    rec: Any
    values: Any
    return_context: bool
    before: Any
    body: Any
    item: Any

    def __init__(self, outer, values: object, return_context: bool): ...

    def __enter__(self): ...

    def __exit__(self, kind, error, traceback): ...

    def add_trace(self, tracer: Tracer): ...

    def _session(self) -> Session: ...

    def exit(self): ...
def _iter(self, values: Iterable, return_context: bool=False) -> Iterator: ...
class ExitBlock(Exception):
    item: int | None

    def __init__(self, item: int | None): ...
class Program:
    graph: Graph
    models: list[TracedModel]
    values: Any
    by_id: Any
    ready: Any
    results: Any
    reasons: Any
    backwards: int
    order: Any
    kept: Any
    done: Any

    def __init__(self, graph: Graph, models: list[TracedModel]): ...

    def _used_elsewhere(self) -> frozenset: ...

    def run(self) -> dict: ...

    def _was_skipped(self, node: Node) -> bool: ...

    def block(self, nodes: list[Node], top: bool=False): ...

    def _one(self, n: Node): ...

    def _loop(self, n: Node): ...

    def _trace(self, n: Node): ...
def run_session(graph: Graph, *models: TracedModel) -> dict: ...
