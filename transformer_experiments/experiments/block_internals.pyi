# Made from block_internals.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
import click
import torch
from fastcore.basics import patch
from tqdm.auto import tqdm
from .. import __version__
from ..common.activation_store import MANIFEST, ActivationStore, StoreSpec, StoreWriter
from ..common.databatcher import DataBatcher
from ..common.store_folders import StoreFolder
from ..dataset_split import split_text_dataset
from ..datasets.tinyshakespeare import TinyShakespeareDataSet
from ..models.transformer import eval_mode
from ..models.transformer_helpers import EncodingHelpers, TransformerAccessors, capture, weights_sha256
from ..trained_models.tinyshakespeare_transformer import create_model_and_tokenizer

__all__ = ['SITES', 'CPU_TOKENS', 'block_sites', 'BlockInternalsResult', 'BlockInternalsExperiment', 'pieces', 'put_into', 'run_experiment', 'resumable', 'open_stores', 'SiteSummary', 'named_sites', 'summarize', 'summary_table', 'Blocks', 'record_validation_split', 'run']
SITES: dict
def block_sites(block_idx: int) -> list[str]: ...
@dataclass
class BlockInternalsResult:
    substring: str
    heads_output: torch.Tensor
    proj_output: torch.Tensor
    ffwd_output: torch.Tensor
class BlockInternalsExperiment:
    blocks: Any
    eh: EncodingHelpers
    accessors: TransformerAccessors
    block_idx: int | Sequence[int] | str
    results_folder: Any

    def __init__(self, eh: EncodingHelpers, accessors: TransformerAccessors, block_idx: int | Sequence[int] | str, results_folder: str | Path): ...

    @property
    def sites(self) -> list[str]: ...

    @property
    def folder(self) -> Path: ...

    def run(self, data_batcher: DataBatcher, progress: bool=True, shard_bytes: int | None=None): ...

    def __repr__(self): ...

    def _spec(self, batcher: DataBatcher, shard_bytes: int | None) -> StoreSpec: ...

    def open_store(self) -> ActivationStore: ...

    def load(self, block_idx: int | None=None) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]: ...

    def raw_results(self, block_idx: int | None=None) -> Iterator[BlockInternalsResult]: ...

    def summary(self) -> list[SiteSummary]: ...
def check_tokens(data: torch.Tensor, sample_len: int, m): ...
CPU_TOKENS: int
def pieces(batch: torch.Tensor, device: str | torch.device) -> tuple[torch.Tensor, ...]: ...
def put_into(writer: StoreWriter) -> Callable[[str, object], None]: ...
def run_experiment(exp: BlockInternalsExperiment, data_batcher: DataBatcher, progress: bool, shard_bytes: int | None): ...
@contextmanager
def resumable(store: StoreFolder): ...
def open_stores(folder: str | Path, kinds: Sequence[str]=...) -> list[ActivationStore]: ...
@dataclass(frozen=True)
class SiteSummary:
    block: int | None
    site: str
    shape: tuple
    mean_norm: float
    std_norm: float
    largest: float
def named_sites(store: ActivationStore) -> list[tuple[int | None, str, str]]: ...
def _vectors(store: ActivationStore, site: str) -> Iterator[torch.Tensor]: ...
def summarize(store: ActivationStore) -> list[SiteSummary]: ...
def summary_table(rows: list[SiteSummary]) -> str: ...
class Blocks(click.ParamType):
    name: str

    def convert(self, value, param, ctx): ...
def record_validation_split(output_folder: str | Path, block_idx: int | Sequence[int] | str='all', model_weights_filename: str | None=None, dataset_cache_filename: str | None=None, sample_len: int=3, max_batch_size: int=64, stride: int=96, shard_mb: float | None=None, device: str='cpu', progress: bool=True) -> BlockInternalsExperiment: ...
def run(model_weights_filename, dataset_cache_filename, output_folder, block_idx, sample_len, max_batch_size, stride, shard_mb, device, quiet): ...
