# Made from block.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from dataclasses import replace
import torch
import torch.nn.functional as F
from fastcore.basics import patch
from torch import nn
from .expert_choice import make_router
from .experts import ACTIVATIONS, Experts, check_backend
from .routing import MoEConfig, Routing

__all__ = ['PER_EXPERT', 'NAMES', 'SparseMoE', 'SharedExperts', 'stacked_experts']
class SparseMoE(nn.Module):
    config: MoEConfig
    backend: str
    name: str
    router: Any
    experts: Any
    shared: Any

    def __init__(self, config: MoEConfig, backend: str='auto', name: str=''): ...

    def forward(self, x: torch.Tensor, token_ids: torch.Tensor | None=None) -> tuple[torch.Tensor, Routing]: ...

    def decide(self, x: torch.Tensor, token_ids: torch.Tensor | None=None) -> Routing: ...

    def _check(self, x): ...

    def _check_logits(self, routing): ...

    @classmethod
    def from_hf(cls, block: nn.Module, backend: str='auto') -> SparseMoE: ...
class SharedExperts(nn.Module):
    activate: Any
    first: Any

    def __init__(self, config: MoEConfig): ...

    def forward(self, x: torch.Tensor) -> torch.Tensor: ...
PER_EXPERT: tuple
NAMES: dict
def _find(block: nn.Module, *names: str): ...
def stacked_experts(experts: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None: ...
def _activation_name(block: nn.Module) -> str | None: ...
def _hf_config(block: nn.Module, gate_up: torch.Tensor, k: int, act: str) -> MoEConfig: ...
def _compare_on_random_tokens(moe: SparseMoE, block: nn.Module): ...
