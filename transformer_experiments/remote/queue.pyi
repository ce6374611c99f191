# Made from queue.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import asyncio
import bisect
import itertools
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from tempfile import SpooledTemporaryFile
from typing import Any, Protocol
from fastcore.basics import patch
from ..common.files import FULL
from .jobs import JobError, Limits, run_job
from .journal import Entry, Journal

__all__ = ['INLINE', 'OVER', 'LOG', 'MAX_KEPT', 'MAX_JOBS', 'MAX_SENT', 'GRACE', 'FACTS', 'Kept', 'QueuedJob', 'ReplicaLost', 'OutOfTime', 'Runner', 'run_in_thread', 'ThreadRunner', 'TooMany', 'JobTable', 'kept_of']
INLINE: Any
class Kept:
    file: Any
    size: int

    def __init__(self, in_memory: int=...): ...

    def add(self, data: bytes | memoryview): ...

    def read(self, start: int=0, end: int | None=None) -> bytes: ...

    def close(self): ...
OVER: tuple
@dataclass(eq=False)
class QueuedJob:
    key: str
    place: str
    models: tuple[str, ...]
    message: Kept | None
    round: int = 0
    arrival: int = 0
    again: str | None = None
    id: str = ...
    created: float = ...
    started: float | None = None
    finished: float | None = None
    events: list[dict] = ...
    result: Kept | None = None
    sent: int = 0
    runs: int = 0
    news: asyncio.Event = ...
    task: asyncio.Task | None = None
    noted: Callable = ...

    @property
    def status(self) -> str: ...

    @property
    def over(self) -> bool: ...

    def tell(self, status: str, **more): ...

    async def follow(self, after: int=0) -> AsyncIterator[list[dict]]: ...
class ReplicaLost(RuntimeError): ...
class OutOfTime(RuntimeError): ...
class Runner(Protocol):
    places: Mapping[str, int]

    def run(self, place: str, message: bytes, owner: str | None=None) -> AsyncIterator[tuple[str, Any]]: ...
async def run_in_thread(models: Mapping, message: bytes, limits: Limits, pool: Executor | None=None, run: Callable=...) -> AsyncIterator[tuple[str, Any]]: ...
class ThreadRunner:
    models: Mapping[str, Mapping]
    limits: Limits
    job: Callable
    places: Any

    def __init__(self, places: Mapping[str, Mapping], limits: Limits=..., run: Callable=...): ...

    def run(self, place: str, message: bytes, owner: str | None=None): ...
LOG: Any
MAX_KEPT: Any
MAX_JOBS: int
MAX_SENT: int
GRACE: int
class TooMany(RuntimeError): ...
class JobTable:
    runner: Runner
    limits: Limits
    ended: Callable[[QueuedJob], None]
    max_kept: int
    journal: Journal | None
    jobs: dict[str, QueuedJob]
    waiting: dict[str, list[QueuedJob]]
    running: dict[str, set[QueuedJob]]
    round: Any
    last: Any
    again: Any
    count: Any
    kept: int

    def __init__(self, runner: Runner, limits: Limits=..., ended: Callable[[QueuedJob], None]=..., max_kept: int=..., journal: Journal | None=None): ...

    def submit(self, key: str, place: str, models: tuple[str, ...], message: Kept, again: str | None=None) -> QueuedJob: ...

    def _note(self, job: QueuedJob): ...

    def position(self, job: QueuedJob) -> int: ...

    def _start(self, place: str): ...

    async def _run(self, job: QueuedJob): ...

    def _free(self, job: QueuedJob): ...

    async def _attempt(self, job: QueuedJob): ...

    def _complete(self, job: QueuedJob, result: Kept): ...

    def _end(self, job: QueuedJob, status: str, **more): ...

    def _drop_result(self, job: QueuedJob): ...

    def _lost(self, job: QueuedJob, error: Exception): ...

    def restore(self): ...

    def _take_up(self, job: QueuedJob, entry: Entry): ...

    def find(self, key: str, id: str) -> QueuedJob: ...

    def jobs_of(self, key: str) -> Iterator[QueuedJob]: ...

    def cancel(self, job: QueuedJob): ...

    def forget(self, job: QueuedJob): ...

    def tidy(self, now: float): ...

    def _forget(self, job: QueuedJob): ...

    async def tend(self, every: float=1.0): ...

    async def close(self): ...
def _turn(job: QueuedJob) -> tuple: ...
FACTS: tuple
def kept_of(data: bytes) -> Kept: ...
