# Made from execution.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from heapq import heappop, heappush
from typing import NamedTuple
import torch
from .batches import Batch
from .errors import TraceError, node_error
from .graph import node_refs, show_where
from .schedule import site_name
from .state import PENDING, SKIPPED, STATE
from .steps import CompiledGraph, first_of, with_first
from .values import copy_value, lazy_copy, lazy_copy_or_none, map_places, map_tensors, tensors_in
from collections.abc import Callable
from transformer_experiments.tracing.interleave import Run

__all__ = ['Cell', 'Origin', 'Overlay', 'Execution', 'is_skipped', 'retain', 'check_operands', 'protect', 'back_up', 'as_saved', 'results_of', 'line', 'name_of_value', 'fail', 'blockers', 'check_complete']
class Cell:
    ex: 'Execution'
    original: object
    site: tuple
    in_place: bool
    value: Any
    members: Any
    shared: Any

    def __init__(self, ex: 'Execution', value: object, members: list, in_place: bool, site: tuple=...): ...

    def part(self, prompt: int | None): ...

    def _cut(self, t: torch.Tensor, prompt: int, place: tuple, axes: list) -> torch.Tensor: ...

    def _note_origins(self, part: object, prompt: int | None, axes: list): ...

    def replace(self, id: int, new: object): ...

    def refresh(self): ...

    def check_shared(self): ...
class Origin(NamedTuple):
    part: torch.Tensor
    whole: torch.Tensor
    original: torch.Tensor
    prompt: int | None
    axis: int | None
    members: dict
class Overlay:
    values: list
    kept: dict

    def __init__(self, values: list, kept: dict): ...

    def __getitem__(self, i): ...

    def __setitem__(self, i, value): ...
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
    partial: Any
    cells: Any
    origins: Any
    handles: Any
    watched: Any
    awaited: Any
    environments: Any
    in_backward: int

    def __init__(self, graph: CompiledGraph, values: list | None=None, model: object=None, batch: Batch | None=None, may_stop: bool=True, changes: dict | None=None, constants: dict | None=None): ...

    def start(self): ...

    def run_ready(self, heap: list): ...

    def run_node(self, p: int): ...

    def finish(self, p: int, value: object, heap: list): ...

    def release(self, p: int, heap: list): ...

    def collect(self, p: int, value: object): ...

    def has_run(self, p: int) -> bool: ...

    def keep(self, value: object, id: int): ...

    def replace(self, id: int, new: object): ...

    def watch(self, p: int, t: torch.Tensor): ...

    def run_backward(self, p: int, call: Callable): ...

    def require_grad(self, id: int, values: list, call: Callable): ...

    def fire(self, site: tuple, n: int, value: object): ...

    def hook(self, site: tuple, run: Run) -> Callable: ...
def is_skipped(ex: Execution, p: int) -> bool: ...
def retain(ex: Execution, p: int): ...
def check_operands(ex: Execution, p: int): ...
def protect(ex: Execution, p: int): ...
def back_up(ex: Execution, p: int, value: object): ...
def as_saved(ex: Execution, value: object, entries: list, p: int): ...
def results_of(ex: Execution) -> tuple[dict, dict]: ...
def line(ex: Execution, p: int) -> str: ...
def name_of_value(ex: Execution, p: int) -> str: ...
def fail(ex: Execution, p: int, error: Exception): ...
def blockers(ex: Execution, p: int) -> list[int]: ...
def _is_there(ex: Execution, p: int) -> bool: ...
def check_complete(ex: Execution): ...
