# Made from moe_transformer.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
import torch
from fastcore.basics import patch
from torch import nn
from .transformer import Dropout, KVCache, TransformerConfig, TransformerLanguageModel, check_mask, eval_mode
from ..moe.block import SparseMoE
from ..moe.losses import load_balancing_loss, router_z_loss
from ..moe.routing import ROUTERS, MoEConfig, Routing
from ..moe.token_choice import NoisyTopKRouter, SwitchRouter, TopKRouter

__all__ = ['MoETransformerConfig', 'config_from_dict', 'MoEFeedForward', 'MoETransformer', 'upcycle']
@dataclass(frozen=True)
class MoETransformerConfig(TransformerConfig):
    moe: MoEConfig | None = None
    moe_layers: tuple[int, ...] | None = None
    balance_loss: float = 0.01
    z_loss: float = 0.0

    def __post_init__(self): ...

    @property
    def sparse_blocks(self) -> tuple[int, ...]: ...

    def build(self, vocab_size: int, device='cpu') -> 'MoETransformer': ...
def config_from_dict(d: dict) -> TransformerConfig: ...
class MoEFeedForward(nn.Module):
    moe: Any
    dropout: Any
    token_ids: torch.Tensor | None
    mask: torch.Tensor | None
    record: list[Routing] | None

    def __init__(self, config: MoETransformerConfig, name: str): ...

    def forward(self, x: torch.Tensor) -> torch.Tensor: ...
class MoETransformer(TransformerLanguageModel):

    def __init__(self, vocab_size: int, device: str | torch.device='cpu', config: MoETransformerConfig | None=None): ...

    @property
    def sparse_layers(self) -> list[MoEFeedForward]: ...

    @contextmanager
    def _watched(self, idx: torch.Tensor, mask: torch.Tensor | None=None): ...

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None=None, cache: KVCache | None=None, mask: torch.Tensor | None=None) -> tuple: ...

    @property
    def can_cache(self) -> bool: ...

    @property
    def sees_batch(self) -> bool: ...

    def route(self, idx: torch.Tensor, mask: torch.Tensor | None=None) -> list[Routing]: ...

    def balance(self, routings: Sequence[Routing]) -> torch.Tensor | float: ...

    def after_step(self) -> None: ...
_BALANCED_BY_LOSS: tuple
def _sums_to_one(moe: MoEConfig) -> bool: ...
def _check_exact(moe: MoEConfig) -> None: ...
def _copy_into_experts(net: nn.Module, experts: nn.Module) -> None: ...
def upcycle(m: TransformerLanguageModel, n_experts: int=8, layers: Sequence[int] | None=None, exact: bool=True, **moe) -> MoETransformer: ...
