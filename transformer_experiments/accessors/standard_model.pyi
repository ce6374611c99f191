# Made from standard_model.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import torch
import torch.nn.functional as F
from fastcore.basics import patch
from torch import nn

__all__ = ['ACTIVATIONS', 'UNSUPPORTED', 'StandardAttention', 'StandardMLP', 'StandardBlock', 'StandardTransformer', 'fold_norm']
ACTIVATIONS: Any
class StandardAttention(nn.Module):
    n_heads: int
    q_proj: Any
    k_proj: Any
    v_proj: Any
    out_proj: Any

    def __init__(self, width: int, inner: int, n_heads: int): ...

    def forward(self, x: torch.Tensor) -> torch.Tensor: ...
class StandardMLP(nn.Module):
    in_layer: Any
    out_layer: Any
    act: Any

    def __init__(self, width: int, hidden: int, act: str): ...

    def forward(self, x: torch.Tensor) -> torch.Tensor: ...
class StandardBlock(nn.Module):
    ln_1: Any
    attn: Any
    ln_2: Any
    mlp: Any

    def __init__(self, config: dict): ...

    def forward(self, x: torch.Tensor) -> torch.Tensor: ...
UNSUPPORTED: dict
def _refuse_unsupported(given: tuple, by_name: dict): ...
class StandardTransformer(nn.Module):
    config: dict
    tok_embed: Any
    pos_embed: Any
    xf_layers: Any
    final_ln: Any
    unembed: Any

    def __init__(self, config: dict): ...

    def forward(self, tokens: torch.Tensor, *unsupported, **by_name) -> torch.Tensor: ...

    def simplify(self): ...
def fold_norm(norm: nn.LayerNorm, *readers: nn.Linear): ...
