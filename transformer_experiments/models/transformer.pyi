# Made from transformer.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
import torch
import torch.nn as nn
import torch.nn.functional as F
from fastcore.basics import patch
from .inputs import check_mask, check_tokens, counted_targets, padding_first
from .sampling import check_sampling, sample_token
from .speed import Dropout, KVCache, Linear

__all__ = ['block_size', 'n_embed', 'n_head', 'n_layer', 'dropout', 'TransformerConfig', 'causal_mask', 'SelfAttention', 'FeedForward', 'Block', 'init_weights', 'TransformerLanguageModel', 'eval_mode']
@dataclass(frozen=True)
class TransformerConfig:
    block_size: int = 512
    n_embed: int = 192
    n_head: int = 3
    n_layer: int = 6
    dropout: float = 0.1

    def __post_init__(self): ...

    def build(self, vocab_size: int, device='cpu') -> 'TransformerLanguageModel': ...
block_size: Any
n_embed: Any
n_head: Any
n_layer: Any
dropout: Any
def causal_mask(new: int, seen: int, mask: torch.Tensor | None, device: torch.device) -> torch.Tensor: ...
class SelfAttention(nn.Module):
    n_head: Any
    qkv: Any
    proj: Any
    dropout: Any

    def __init__(self, config: TransformerConfig): ...

    def heads(self, x: torch.Tensor) -> torch.Tensor: ...

    def forward(self, x: torch.Tensor, cache: KVCache | None=None, layer: int=0, mask: torch.Tensor | None=None) -> torch.Tensor: ...
class FeedForward(nn.Module):
    net: Any

    def __init__(self, config: TransformerConfig): ...

    def forward(self, x: torch.Tensor) -> torch.Tensor: ...
class Block(nn.Module):
    sa: Any
    ffwd: Any
    ln1: Any
    ln2: Any

    def __init__(self, config: TransformerConfig): ...

    def forward(self, x: torch.Tensor, cache: KVCache | None=None, layer: int=0, mask: torch.Tensor | None=None) -> torch.Tensor: ...
def init_weights(m: nn.Module, config: TransformerConfig): ...
class TransformerLanguageModel(nn.Module):
    config: TransformerConfig
    token_embedding_table: Any
    position_embedding_table: Any
    dropout: Any
    blocks: Any
    ln_f: Any
    lm_head: Any

    def __init__(self, vocab_size: int, device: str | torch.device='cpu', config: TransformerConfig=...): ...

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None=None, cache: KVCache | None=None, mask: torch.Tensor | None=None) -> tuple: ...

    def embed(self, idx: torch.Tensor, start: int=0, mask: torch.Tensor | None=None) -> torch.Tensor: ...

    def unembed(self, x: torch.Tensor) -> torch.Tensor: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def can_cache(self) -> bool: ...

    def after_step(self) -> None: ...

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float=1.0, top_k: int | None=None, generator: torch.Generator | None=None, mask: torch.Tensor | None=None) -> torch.Tensor: ...
@contextmanager
def eval_mode(m: nn.Module) -> Iterator[nn.Module]: ...
