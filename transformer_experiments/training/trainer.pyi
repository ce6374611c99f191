# Made from trainer.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import os
import time
import warnings
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
import torch
import torch.distributed as dist
from fastcore.basics import patch
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from ..common.files import remove_leftovers
from ..models.checkpoint import check_sizes, own_state, save_model, shapes_of, write_tensors
from ..models.moe_transformer import MoETransformer
from ..models.transformer import TransformerLanguageModel
from ..models.transformer_helpers import weights_sha256
from ..tokenizers.char_tokenizer import CharacterTokenizer
from .evaluation import evaluate
from .optimisers import load_optimizer_tensors, optimizer_tensors
from .optimisers import make_optimizers, set_lr
from .recipe import Recipe, batch_at, seed_for
from .routing_health import health_of_step
from .run_state import STATE, check_splits, read_state, read_timing, write_timing

__all__ = ['Processes', 'join_processes', 'Trainer']
Processes: Any
def join_processes(device: torch.device) -> Processes: ...
class Trainer:
    recipe: Recipe
    tokenizer: CharacterTokenizer
    data_sha256: str
    folder: Any
    device: Any
    processes: Any
    train_data: Any
    val_data: Any
    optimizers: Any
    step: int
    seconds: float
    extended: list
    losses: list[float]
    evals: dict[int, float]
    routed: list
    health: dict[int, list]
    net: Any
    m: Any

    def __init__(self, recipe: Recipe, text: str, tokenizer: CharacterTokenizer, folder: str | os.PathLike, data_sha256: str, device: str | torch.device='cpu', resume: bool=False, start: TransformerLanguageModel | None=None): ...

    @property
    def is_main(self) -> bool: ...

    def _load_start(self, start: TransformerLanguageModel | None, resume: bool): ...

    def _open_folder(self, resume: bool): ...

    def _load_state(self, path: Path): ...

    def _extend(self, step: int, planned: int): ...

    def _facts(self) -> dict: ...

    def _save_state(self): ...

    def _micro_batch(self, i: int, rows: torch.Tensor) -> torch.Tensor: ...

    @contextmanager
    def _watched(self): ...

    def _backward(self, mine: list) -> torch.Tensor: ...

    def _backward_at_once(self, parts: list) -> torch.Tensor: ...

    def _train_step(self) -> float: ...

    def train(self, progress: bool=True) -> TransformerLanguageModel: ...

    def _loop(self, bar): ...
