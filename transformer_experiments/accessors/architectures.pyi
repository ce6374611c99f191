# Made from architectures.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from dataclasses import dataclass
import torch
from fastcore.basics import patch
from .activations import Activations
from .forward_pass import reassemble
from .layout_context import LayoutModelContext
from .reassembly import check_reassembly
from .registry import ActivationLocationType
from .sites import SiteListener, site_of
from ..models.transformer import eval_mode

__all__ = ['A', 'COLUMNS', 'own_values', 'editable_locations', 'ArchitectureRow', 'architecture_row', 'acts_dtype']
A: Any
def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float: ...
def own_values(ctx: LayoutModelContext, tokens: torch.Tensor) -> dict: ...
def editable_locations(ctx: LayoutModelContext, tokens: torch.Tensor, tolerance: float=1e-06) -> tuple[ActivationLocationType, ...]: ...
def _last(model, tokens: torch.Tensor) -> torch.Tensor: ...
@dataclass(frozen=True)
class ArchitectureRow:
    name: str
    rebuilt: float
    locations: tuple[ActivationLocationType, ...]
    editable: tuple[ActivationLocationType, ...]
    read: float
    grows: float
    own: dict[ActivationLocationType, float]

    def missing(self) -> list[str]: ...

    def __str__(self): ...
def architecture_row(ctx: LayoutModelContext, tokens: torch.Tensor) -> ArchitectureRow: ...
def acts_dtype(ctx: LayoutModelContext) -> torch.dtype: ...
def _growth(ctx: LayoutModelContext, acts: Activations) -> list[float]: ...
COLUMNS: Any
