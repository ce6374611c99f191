# Made from tracer.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self
from weakref import ref
import torch
from fastcore.basics import patch
from .envoy import Envoy, refuse_alone
from .errors import has_line, without_frames
from .graph import Graph
from .nodes import Node, refs, show_where
from .frames import PACKAGE_FOLDER
from .recorder import CLOSED, Recorder
from .proxy import apply, lower, open_recorder, record
from .report import Report
from .scan import Scan, scan_model
from .state import STATE
from .steps import CompiledGraph
from .values import map_tensors
from collections.abc import Sequence
from transformer_experiments.tracing.cache import Cache
from transformer_experiments.tracing.generating import Steps

__all__ = ['Condition', 'Context', 'begin_in_session', 'Tracer', 'assign_gradients', 'Invoker', 'open_tracer', 'Scanner', 'Editor']
class Condition:
    before: int | None
    rec: Recorder
    id: Any

    def __init__(self, rec: Recorder, condition: object): ...

    def __enter__(self): ...

    def __exit__(self, *error): ...
class Context:
    rec: Recorder

    def cond(self, condition: object) -> Condition: ...

    def log(self, *values: object): ...

    def apply(self, f: Callable, *args, **kwargs): ...
def begin_in_session(tracer: 'Tracer', outer: Any) -> None: ...
class Tracer(Context):
    traces: bool
    default_call: int | str = 0
    calls: Mapping[str, int | str] = ...
    invokers: tuple['Invoker', ...] = ...
    prompt: int | None = None
    nodes: list[Node]
    in_session: bool
    outer: Any = None
    saved: tuple
    skipped_alone: tuple | None = None
    _over: tuple | None = None
    model: Any
    method: str
    args: tuple
    kwargs: dict
    invoker_args: Any
    scan: bool
    validate: bool
    sites: Any
    rec: Any

    def __init__(self, model, method: str, args: tuple, kwargs: dict, invoker_args: dict | None=None, scan: bool=False, validate: bool=False): ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind, error, traceback): ...

    def cache(self, modules: Sequence | None=None, to=None) -> Cache | None: ...

    def _called_modules(self) -> list[str]: ...

    def steps(self, *bounds: int | None) -> Steps: ...

    @property
    def graph(self) -> Graph: ...

    @property
    def report(self) -> Report: ...

    @property
    def invoker(self) -> 'Invoker|None': ...

    def finish(self, scan: Scan | None=None) -> None: ...

    def move(self, envoy: Envoy, k: int | str, propagate: bool): ...

    def invoke(self, *args, **kwargs) -> Invoker: ...

    def _look_ahead(self): ...

    def _look_at_prompt(self, invoker: Invoker): ...

    def _check_looked(self, scan: Scan | None): ...

    def _scan_prompt(self, prompt: int | None, args: tuple, kwargs: dict, invoker_args: dict): ...
def _end_at_user(traceback): ...
def assign_gradients(gradients: Sequence[Node], backwards: int): ...
class Invoker:
    calls: Mapping[str, int | str]
    model: Any
    args: tuple
    kwargs: dict
    invoker_args: dict
    prompt: int | None

    def __init__(self, model, args: tuple, kwargs: dict, invoker_args: dict, prompt: int | None=None): ...

    @property
    def inputs(self) -> tuple[tuple, dict]: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error): ...
def open_tracer() -> Tracer: ...
def _signature(inputs: tuple) -> str: ...
class Scanner(Tracer):

    def finish(self, scan: Scan | None=None) -> None: ...
class Editor(Tracer):
    default_call: int | str = 'all'
    edited: Any

    def __init__(self, model, inplace: bool): ...

    def __enter__(self) -> Any: ...

    def finish(self, scan: Scan | None=None) -> None: ...
