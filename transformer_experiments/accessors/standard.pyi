# Made from standard.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import json
import math
import os
import pickle
from pathlib import Path
import torch
import torch.nn.functional as F
from fastcore.basics import patch
from torch import nn
from transformer_experiments.accessors.contexts import FOLDER_KINDS, LayoutModelContext, ModelContext, get_default_device, get_standard_model_spec
from .encodings import CharacterEncoding, load_encoding
from .layouts import STANDARD, make_plan
from .registry import WeightLocationType
from ..common.files import atomic_path, atomic_write
from ..tokenizers.char_tokenizer import CharacterTokenizer

__all__ = ['ACTIVATIONS', 'ELSEWHERE', 'ALIASES', 'PieceTensors', 'StandardAttention', 'StandardMLP', 'StandardBlock', 'StandardTransformer', 'fold_norm', 'StandardModelContext', 'width_ratio', 'export_pieces']
class PieceTensors:
    keeps: bool
    folder: Any
    width: int | None
    label: Any
    bytes_read: int

    def __init__(self, folder: str | os.PathLike, width: int | None=None): ...

    def _path(self, name: str) -> Path: ...

    def __contains__(self, name: str) -> bool: ...

    def identity(self, name: str) -> str: ...

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple: ...

    def read(self, name: str, cut: tuple | None=None) -> torch.Tensor: ...

    def _load(self, name: str) -> torch.Tensor: ...
def _load_piece(path: Path): ...
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
ELSEWHERE: dict
def _refuse_elsewhere(given: tuple, by_name: dict): ...
class StandardTransformer(nn.Module):
    config: dict
    tok_embed: Any
    pos_embed: Any
    xf_layers: Any
    final_ln: Any
    unembed: Any

    def __init__(self, config: dict): ...

    def forward(self, tokens: torch.Tensor, *elsewhere, **by_name) -> torch.Tensor: ...

    def simplify(self): ...
def fold_norm(norm: nn.LayerNorm, *readers: nn.Linear): ...
class StandardModelContext(LayoutModelContext):
    load_path: Any
    _models: Any
    _encoding: Any

    def __init__(self, model_name: str, device: torch.device | str | None=None, encoding=None): ...

    def get_encoding(self): ...

    def get_or_create_model(self, device: torch.device | str | None=None, simplify: bool=False) -> StandardTransformer: ...

    def _make_model(self, device, simplify) -> StandardTransformer: ...
def _read_config(folder: Path) -> dict: ...
def _config_encoding(config: dict): ...
def _misfits(ctx: ModelContext) -> list[str]: ...
def _piece_config(ctx: ModelContext, enc: str | None) -> dict: ...
def width_ratio(n: int, width: int) -> int | float: ...
ALIASES: Any
def export_pieces(ctx: ModelContext, folder: str | os.PathLike, enc: str | None=None) -> Path: ...
