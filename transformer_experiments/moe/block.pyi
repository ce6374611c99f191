# Made from block.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import inspect
from dataclasses import replace
import torch
import torch.nn.functional as F
from fastcore.basics import patch
from torch import nn
from .expert_choice import make_router
from .backends import check_backend
from .experts import Experts
from .routing import MoEConfig, Routing, token_mask

__all__ = ['SparseMoE', 'SharedExperts']
class SparseMoE(nn.Module):
    config: MoEConfig
    backend: str
    name: str
    router: Any
    experts: Any
    shared: Any

    def __init__(self, config: MoEConfig, backend: str='auto', name: str=''): ...

    def forward(self, x: torch.Tensor, token_ids: torch.Tensor | None=None, mask: torch.Tensor | None=None) -> tuple[torch.Tensor, Routing]: ...

    def decide(self, x: torch.Tensor, token_ids: torch.Tensor | None=None, mask: torch.Tensor | None=None) -> Routing: ...

    def _plus_shared(self, y, x): ...

    def _without_padding(self, x, mask): ...

    def _check(self, x): ...

    def _check_logits(self, routing): ...

    @classmethod
    def from_hf(cls, block: nn.Module, backend: str='auto') -> SparseMoE: ...
class SharedExperts(nn.Module):
    down: torch.Tensor
    activate: Any
    first: Any
    scale: Any

    def __init__(self, config: MoEConfig): ...

    def forward(self, x: torch.Tensor) -> torch.Tensor: ...
