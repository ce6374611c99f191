# Made from experts.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from collections.abc import Callable
from typing import NamedTuple
import torch
import torch.nn.functional as F
from torch import nn
from .gates import Gate
from .routing import MoEConfig, Routing, assignments
from transformer_experiments.moe.routing import Routing

__all__ = ['ExpertWeights', 'Experts', 'by_loop']
class ExpertWeights(NamedTuple):
    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def apply(self, f: Callable[[torch.Tensor], torch.Tensor]) -> 'ExpertWeights': ...

    def of_expert(self, e: int) -> 'ExpertWeights': ...
class Experts(nn.Module):
    down: torch.Tensor
    down_bias: torch.Tensor | None
    config: MoEConfig
    gated: Any
    gate: Any
    first: Any

    def __init__(self, config: MoEConfig): ...

    def weights(self, x: torch.Tensor) -> ExpertWeights: ...

    def one(self, e: int, x: torch.Tensor) -> torch.Tensor: ...

    def activate(self, h: torch.Tensor) -> torch.Tensor: ...

    def extra_repr(self) -> str: ...

    def forward(self, x: torch.Tensor, routing: Routing, backend: str='auto') -> torch.Tensor: ...
def by_loop(experts: Experts, x: torch.Tensor, routing: Routing) -> torch.Tensor: ...
