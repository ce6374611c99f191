# Made from plan.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from collections import defaultdict
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple
from fastcore.basics import patch
from .graph import Node, Ref, is_constant, node_refs, refs
from .operations import changes_operand, is_view

__all__ = ['GRADIENTS', 'ORDERS', 'MAX_ORDERS', 'roots_of', 'operand', 'find_roots', 'order_by_changes', 'Slot', 'make_slots', 'fetcher', 'as_function', 'call_step', 'Order', 'is_delicate', 'Program', 'shape_of', 'new_order', 'Plan']
def roots_of(ids: list[int], roots: dict[int, tuple]) -> tuple[int, ...]: ...
def operand(node: Node) -> list[int]: ...
def find_roots(nodes: list[Node]) -> tuple[dict[int, tuple], dict[int, tuple]]: ...
def order_by_changes(nodes: list[Node], roots: dict[int, tuple], written: dict[int, tuple]) -> tuple[dict[int, list], dict[int, list]]: ...
class Slot:
    __slots__ = ('path', 'kind', 'call', 'sites', 'edits', 'mutated', 'on_path', 'whole', 'program')
    path: str
    kind: str
    call: int | str
    sites: Any
    edits: Any
    mutated: Any
    program: Any
    whole: bool
    on_path: bool

    def __init__(self, path: str, kind: str, call: int | str): ...

    def __repr__(self): ...
GRADIENTS: tuple
def make_slots(nodes: list[Node], roots: dict[int, tuple]=..., written: dict[int, tuple]=...) -> dict[tuple[str, str], dict]: ...
def fetcher(value: object) -> tuple[bool, object]: ...
def as_function(value: object) -> Callable: ...
def call_step(f: Callable, args: tuple, kwargs: dict=...) -> Callable: ...
class Order:
    nodes: list[Node]
    n: Any
    ids: Any
    position: Any
    data: Any
    needs: Any
    roots: Any
    written: Any
    overtakes: Any
    grads: Any
    grad_edits: Any
    mutated: Any
    guarded: Any
    slots: Any
    special: Any
    n_once: Any
    simple: bool
    blank: Any
    repeats: Any
    again: Any
    once: Any
    dependents: Any
    remaining: Any
    first: Any
    saves: Any
    saved: Any
    uses: Any
    frees: Any
    home: Any
    n_slots: Any

    def __init__(self, nodes: list[Node], keep: frozenset=...): ...

    def is_mutated(self, id: int) -> bool: ...

    def _order_changes(self): ...

    def _repeat(self): ...

    def _schedule(self, keep: frozenset): ...

    def _make_programs(self): ...
def is_delicate(node: Node) -> bool: ...
class Program(NamedTuple):
    slot: Slot
    sites: list[int]
    mutated: bool
    nodes: list[tuple]
    edited: int | None
    unused: list[int]
ORDERS: Any
MAX_ORDERS: Any
def shape_of(nodes: list[Node]) -> tuple: ...
def new_order(nodes: list[Node], shape: tuple | None, keep: frozenset) -> Order: ...
class Plan:
    nodes: list[Node]
    steps: Any
    order: Any

    def __init__(self, nodes: list[Node], compile_step: Callable, keep: frozenset=...): ...

    def __repr__(self): ...
