# Made from activation_store.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import errno
import hashlib
import json
import math
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
import torch
from fastcore.basics import patch
from filelock import FileLock, Timeout
from safetensors import safe_open
from xxhash import xxh3_128_hexdigest
from .files import atomic_path, atomic_write, remove_leftovers

__all__ = ['DTYPES', 'MANIFEST', 'StoreSpec', 'ActivationStore', 'StoreWriter', 'SiteSlice']
DTYPES: dict
MANIFEST: str
@dataclass(frozen=True)
class StoreSpec:
    sites: dict[str, dict]
    n_rows: int
    batch_rows: int
    run: dict
    shard_bytes: int | None = None

    def __post_init__(self): ...

    @cached_property
    def row_bytes(self) -> int: ...

    @cached_property
    def shard_rows(self) -> int: ...

    @property
    def n_shards(self) -> int: ...

    @cached_property
    def sha256(self) -> str: ...

    def rows(self, shard: int) -> range: ...

    def shards(self, rows: range) -> range: ...
class ActivationStore:
    folder: Any
    spec: StoreSpec
    shards: dict[int, dict]
    _opened: Any
    _checked: Any

    def __init__(self, folder: str | os.PathLike, spec: StoreSpec, shards: dict[int, dict]): ...

    @classmethod
    def open(cls, folder: str | os.PathLike) -> 'ActivationStore': ...

    @classmethod
    def create(cls, folder: str | os.PathLike, spec: StoreSpec) -> 'ActivationStore': ...

    def _write_manifest(self): ...

    def path(self, shard: int) -> Path: ...

    @property
    def complete(self) -> bool: ...

    @property
    def n_safe_rows(self) -> int: ...

    def __repr__(self): ...

    def verify(self): ...

    def _write_shard(self, image: ShardImage): ...

    def _entry(self, image: ShardImage, header: bytes) -> dict: ...

    def _found(self) -> dict[int, dict]: ...

    def _damaged(self, shard: int, why: str): ...

    def get_slice(self, site: str) -> SiteSlice: ...

    def batches(self, sites: Iterable[str]) -> Iterator[tuple[torch.Tensor, ...]]: ...

    def _read(self, shard: int, site: str, start: int, stop: int) -> torch.Tensor: ...

    def _shard(self, shard: int): ...
def differences(there: dict, here: dict, path: str='') -> list[str]: ...
def raw_bytes(x: torch.Tensor): ...
def site_bytes(spec: StoreSpec, site: str) -> int: ...
def layout(spec: StoreSpec, shard: int) -> dict[str, tuple[int, int]]: ...
def shard_header(spec: StoreSpec, shard: int, hashes: dict[str, str]) -> bytes: ...
class ShardImage:
    spec: StoreSpec
    shard: int
    rows: Any
    memory: torch.Tensor
    n: int
    start: Any
    data: Any
    views: Any
    size: Any

    def __init__(self, spec: StoreSpec, shard: int, memory: torch.Tensor): ...

    @property
    def full(self) -> bool: ...

    @property
    def content(self) -> memoryview: ...

    def seal(self) -> bytes: ...

    @property
    def pages(self) -> memoryview: ...

    @staticmethod
    def memory_for(spec: StoreSpec) -> torch.Tensor: ...
PAGE: int
def write_pages(path: Path, memory: memoryview, size: int): ...
class StoreWriter:
    waiting_bytes: Any
    store: ActivationStore
    _lock: Any
    _images: Any
    _free: Any
    _places: Any
    _missing: Any
    _thread: Any
    _pending: Any
    _failed: bool
    _rows: range

    def __init__(self, store: ActivationStore): ...

    def needs(self, rows: range) -> bool: ...

    def __enter__(self): ...

    def __exit__(self, kind, error, traceback): ...

    @contextmanager
    def rows(self, rows: range): ...

    def put(self, site: str, x: torch.Tensor): ...

    def _open(self, rows: range) -> list[tuple[ShardImage, range]]: ...

    def _memory(self) -> torch.Tensor: ...

    def _store(self, image: ShardImage): ...
class SiteSlice:
    store: ActivationStore
    site: str
    dtype: Any
    shape: Any

    def __init__(self, store: ActivationStore, site: str): ...

    def __len__(self): ...

    def __repr__(self): ...

    def __getitem__(self, key: int | slice | list[int] | tuple) -> torch.Tensor: ...

    def _row(self, row: int): ...

    def _range(self, rows: range): ...
