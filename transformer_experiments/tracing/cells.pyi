# Made from cells.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from collections.abc import Sequence
from typing import NamedTuple
import torch
from fastcore.basics import patch
from .aliasing import OTHER
from ..common.hooks import first_input
from .values import copy_value, map_places, map_tensors, tensors_in, version_of

__all__ = ['SharedValue', 'Cell', 'Origin', 'EarlierValues']
class SharedValue:
    ex: Any
    site: tuple
    in_place: bool
    edits: tuple
    original: object
    value: Any
    readers: Any
    copies: Any
    unreplaced: bool
    shared: Any

    def __init__(self, ex, value: object, readers: Sequence[tuple], in_place: bool, site: tuple=..., edits: tuple=...): ...

    def part(self, prompt: int | None): ...

    def _cut(self, t: torch.Tensor, prompt: int, place: tuple, axes: list) -> torch.Tensor: ...

    def _note_origins(self, part: object, prompt: int | None, axes: list): ...

    def edits_of(self, prompt: int | None) -> list: ...

    def is_edited(self, t: torch.Tensor, prompt: int | None) -> bool: ...

    def is_untouched(self, t: torch.Tensor) -> bool: ...
class Cell(SharedValue):
    value: Any
    unreplaced: bool

    def model_value(self) -> object: ...

    def replace(self, id: int, new: object): ...

    def refresh(self): ...

    def check_shared(self): ...
class Origin(NamedTuple):
    part: torch.Tensor
    whole: torch.Tensor
    original: torch.Tensor
    prompt: int | None
    axis: int | None
    cell: SharedValue
class EarlierValues:
    values: list
    kept: dict

    def __init__(self, values: list, kept: dict): ...

    def __getitem__(self, i): ...

    def __setitem__(self, i, value): ...
