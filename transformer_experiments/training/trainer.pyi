# Made from trainer.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import json
import os
import time
import warnings
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
import torch
import torch.distributed as dist
from fastcore.basics import patch
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from ..common.files import atomic_write, remove_leftovers
from ..common.plots import Picture
from ..models.checkpoint import own_state, read_tensors, save_model, write_tensors
from ..models.transformer import TransformerLanguageModel, eval_mode
from ..tokenizers.char_tokenizer import CharacterTokenizer
from .optimisers import load_optimizer_tensors, optimizer_tensors
from .optimisers import make_optimizers, set_lr
from .recipe import Recipe, batch_at, recipe_from_dict, seed_for

__all__ = ['Processes', 'evaluate', 'join_processes', 'Trainer', 'plot_losses']
def evaluate(m: TransformerLanguageModel, data: torch.Tensor, batch_size: int=16, window: int | None=None) -> float: ...
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
    net: Any
    m: Any

    def __init__(self, recipe: Recipe, text: str, tokenizer: CharacterTokenizer, folder: str | os.PathLike, data_sha256: str, device: str | torch.device='cpu', resume: bool=False): ...

    @property
    def is_main(self) -> bool: ...

    def _open_folder(self, resume: bool): ...

    def _load_state(self, path: Path): ...

    def _facts(self) -> dict: ...

    def _save_state(self): ...

    def _check_data(self): ...

    def _extend(self, step: int, planned: int): ...

    def _load_timing(self): ...

    def _micro_batch(self, i: int, rows: torch.Tensor) -> torch.Tensor: ...

    def _train_step(self) -> float: ...

    def train(self, progress: bool=True) -> TransformerLanguageModel: ...

    def _loop(self, bar): ...
STATE: str
def plot_losses(losses: list[float], evals: dict, title: str='') -> Picture: ...
