# Made from moe_transformer.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import json
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
import torch
import torch.distributed as dist
from fastcore.basics import patch
from torch import nn
from ..common.headers import check_header, list_of, maybe, number, one_of, record, whole
from .inputs import check_mask
from .speed import Dropout, KVCache
from .transformer import TransformerConfig, TransformerLanguageModel, eval_mode
from ..moe.block import SparseMoE
from ..moe.losses import load_balancing_loss, router_z_loss
from ..moe.routing import CHOICES, ROUTERS, RULE_CHOICES, MoEConfig, Routing, ScoreRule
from ..moe.scored import ScoredRouter
from ..moe.token_choice import NoisyTopKRouter, SwitchRouter, TopKRouter

__all__ = ['MoETransformerConfig', 'config_from_dict', 'MoEFeedForward', 'MoETransformer', 'upcycle']
@dataclass(frozen=True)
class MoETransformerConfig(TransformerConfig):
    moe: MoEConfig | None = None
    moe_layers: tuple[int, ...] | None = None
    balance_loss: float = 0.01
    z_loss: float = 0.0
    balance_over: str = 'call'

    def __post_init__(self): ...

    @property
    def sparse_blocks(self) -> tuple[int, ...]: ...

    def build(self, vocab_size: int, device='cpu') -> 'MoETransformer': ...
_SIZE: Any
_MANY: Any
_DENSE: Any
_CHOICES: Any
_COUNTS: Any
_RATES: Any
_FLAG: Any
_RULE: Any
_MORE: Any
_MOE: Any
_SPARSE: Any
def config_from_dict(d: dict, source: str | os.PathLike='the configuration') -> TransformerConfig: ...
def _made_config(d: dict) -> MoETransformerConfig: ...
class MoEFeedForward(nn.Module):
    moe: Any
    dropout: Any
    token_ids: torch.Tensor | None
    mask: torch.Tensor | None
    record: list[Routing] | None

    def __init__(self, config: MoETransformerConfig, name: str): ...

    def forward(self, x: torch.Tensor) -> torch.Tensor: ...
class MoETransformer(TransformerLanguageModel):
    watcher: Callable[[list[Routing]], object] | None

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

    def balance(self, routings: Sequence) -> torch.Tensor | float: ...

    def after_step(self) -> None: ...
def _balanced_by_loss(router: nn.Module) -> bool: ...
def _sums_to_one(moe: MoEConfig) -> bool: ...
def _check_exact(moe: MoEConfig) -> None: ...
def _copy_into_experts(net: nn.Module, experts: nn.Module) -> None: ...
def upcycle(m: TransformerLanguageModel, n_experts: int=8, layers: Sequence[int] | None=None, exact: bool=True, **moe) -> MoETransformer: ...
