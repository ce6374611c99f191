# Made from standard.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import os
from pathlib import Path
import torch
from fastcore.basics import patch
from .config_files import read_config_file
from .contexts import FOLDER_KINDS, get_standard_model_spec
from .encodings import load_encoding
from .layout_context import LayoutModelContext
from .layouts_standard import STANDARD
from .model_context import get_default_device
from .piece_export import export_pieces as export_pieces
from .piece_files import PieceTensors, check_hash, read_manifest
from .standard_model import ACTIVATIONS, StandardTransformer
from ..common.headers import check_header, list_of, one_of, record, string, whole
from ..tokenizers.char_tokenizer import CharacterTokenizer

__all__ = ['StandardModelContext']
class StandardModelContext(LayoutModelContext):
    load_path: Any
    _models: Any
    _encoding: Any

    def __init__(self, model_name: str, device: torch.device | str | None=None, encoding=None): ...

    def get_encoding(self): ...

    def get_or_create_model(self, device: torch.device | str | None=None, simplify: bool=False) -> StandardTransformer: ...

    def _make_model(self, device, simplify) -> StandardTransformer: ...
_CONFIG: Any
def _read_config(folder: Path, hashes: dict | None) -> dict: ...
def _config_encoding(config: dict): ...
