# Made from store_writer.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import errno
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
import torch
from fastcore.basics import patch
from filelock import FileLock, Timeout
from .files import remove_leftovers
from .shard_files import ShardImage
from .store_folders import StoreFolder

__all__ = ['ShardQueue', 'StoreWriter']
def check_rows(rows: range, n: int): ...
def check_room(store: StoreFolder): ...
class ShardQueue:
    waiting_bytes: Any
    store: StoreFolder
    _free: list[torch.Tensor]
    _thread: Any
    _pending: Any
    _failed: bool

    def __init__(self, store: StoreFolder): ...

    def hand_over(self, image: ShardImage): ...

    def wait(self): ...

    def _memory(self) -> torch.Tensor: ...

    def _store(self, image: ShardImage): ...
class StoreWriter(ShardQueue):
    _lock: Any
    _images: dict[int, ShardImage]
    _rows: range
    _places: list[tuple[ShardImage, range]]
    _missing: set[str]

    def __init__(self, store: StoreFolder): ...

    def needs(self, rows: range) -> bool: ...

    def __enter__(self) -> 'StoreWriter': ...

    def __exit__(self, kind, error, traceback): ...

    @contextmanager
    def rows(self, rows: range) -> Iterator[StoreWriter]: ...

    def put(self, site: str, x: torch.Tensor) -> None: ...

    def _open(self, rows: range) -> list[tuple[ShardImage, range]]: ...
