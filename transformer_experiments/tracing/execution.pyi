# Made from execution.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from heapq import heappop, heappush
import torch
from .batches import Batch
from .cells import Overlay
from .errors import TraceError, node_error
from .graph import node_refs, show_where
from .hook_points import site_name
from .overtaking import kept_for, retain, take_earlier
from .state import PENDING, SKIPPED, STATE
from .steps import CompiledGraph, with_first
from .values import copy_value, lazy_copy, lazy_copy_or_none, map_tensors, tensors_in
from collections.abc import Callable
from transformer_experiments.tracing.interleave import Run

__all__ = ['Execution', 'is_skipped', 'check_operands', 'refuse_unlike', 'sites_of', 'refuse_gradient', 'protect', 'back_up', 'as_saved', 'results_of', 'line', 'name_of_value', 'fail']
class Execution:
    graph: CompiledGraph
    schedule: Any
    steps: Any
    model: object
    batch: Batch | None
    changes: dict | None
    values: Any
    constants: Any
    remaining: Any
    uses: Any
    left: Any
    may_stop: Any
    checks_skips: Any
    stopping: bool
    returned: bool
    only: Any
    calls: Any
    kept: Any
    collected: Any
    number: Any
    backups: Any
    retained: Any
    retained_each: Any
    partial: Any
    cells: Any
    origins: Any
    handles: Any
    edited: Any
    watched: Any
    awaited: Any
    carried: Any
    turns: Any
    fresh: Any
    skipped: Any
    grad: Any
    ready: list
    in_backward: int

    def __init__(self, graph: CompiledGraph, values: list | None=None, model: object=None, batch: Batch | None=None, may_stop: bool=True, changes: dict | None=None, constants: dict | None=None): ...

    def start(self): ...

    def run_ready(self, heap: list): ...

    def run_node(self, p: int): ...

    def finish(self, p: int, value: object, heap: list): ...

    def release(self, p: int, heap: list): ...

    def collect(self, p: int, value: object): ...

    def note_operand(self, d: int, p: int): ...

    def count(self, p: int) -> int: ...

    def has_run(self, p: int) -> bool: ...

    def show(self, id: int, value: object): ...

    def keep(self, value: object, id: int): ...

    def replace(self, id: int, new: object): ...

    def watch(self, p: int, t: torch.Tensor): ...

    def run_backward(self, p: int, call: Callable): ...

    def require_grad(self, id: int, values: list, call: Callable): ...

    def fire(self, site: tuple, n: int, value: object): ...

    def hook(self, site: tuple, run: Run) -> Callable: ...
def is_skipped(ex: Execution, p: int) -> bool: ...
def check_operands(ex: Execution, p: int): ...
def refuse_unlike(ex: Execution, p: int): ...
def sites_of(ex: Execution, p: int) -> list[int]: ...
def refuse_gradient(ex: Execution, p: int): ...
def protect(ex: Execution, p: int): ...
def back_up(ex: Execution, p: int, value: object): ...
def as_saved(ex: Execution, value: object, entries: list, p: int): ...
def _is_written(entries: list) -> bool: ...
def results_of(ex: Execution) -> tuple[dict, dict]: ...
def line(ex: Execution, p: int) -> str: ...
def name_of_value(ex: Execution, p: int) -> str: ...
def fail(ex: Execution, p: int, error: Exception): ...
