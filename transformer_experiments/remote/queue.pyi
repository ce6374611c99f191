# Made from queue.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import asyncio
import bisect
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from fastcore.basics import patch
from ..common.files import FULL
from .journal import Journal
from .limits import JobError, Limits
from .queued_jobs import SpooledBytes, QueuedJob
from .quotas import OverQuota, Quotas, TooMany
from .runners import OutOfTime, ReplicaLost, Runner

__all__ = ['SERVER_LOG', 'MAX_KEPT', 'MAX_REMEMBERED', 'MAX_SENT', 'REPLICA_GRACE', 'JOURNALED', 'JobTable', 'turn_of']
SERVER_LOG: Any
MAX_KEPT: Any
MAX_REMEMBERED: int
MAX_SENT: int
REPLICA_GRACE: int
class JobTable:
    runner: Runner
    limits: Any
    ended: Callable[[QueuedJob], None]
    max_kept: int
    quotas: Any
    journal: Journal | None
    jobs: dict[str, QueuedJob]
    waiting: dict[str, list[QueuedJob]]
    running: dict[str, set[QueuedJob]]
    round: Any
    last: Any
    by_request: dict[tuple[str, str], str]
    count: Any
    kept: int

    def __init__(self, runner: Runner, limits: Limits | None=None, ended: Callable[[QueuedJob], None]=..., max_kept: int=..., journal: Journal | None=None): ...

    def submit(self, key: str, place: str, models: tuple[str, ...], message: SpooledBytes, idempotency_key: str | None=None) -> QueuedJob: ...

    def _check_room(self, key: str, size: int): ...

    def keep(self, key: str, n: int): ...

    def position(self, job: QueuedJob) -> int: ...

    def _note(self, job: QueuedJob): ...

    def noter(self, job: QueuedJob) -> Callable: ...

    def _make_room(self, key: str, size: int): ...

    def _why_over(self, key: str, size: int) -> str: ...

    def start(self, place: str): ...

    async def _run(self, job: QueuedJob): ...

    def _free(self, job: QueuedJob): ...

    async def _attempt(self, job: QueuedJob): ...

    def _check_events(self, job: QueuedJob): ...

    def _complete(self, job: QueuedJob, result: SpooledBytes): ...

    def _end(self, job: QueuedJob, status: str, **more): ...

    def _drop_result(self, job: QueuedJob, why: str): ...

    def _lost(self, job: QueuedJob, error: Exception): ...

    def find(self, key: str, id: str) -> QueuedJob: ...

    def jobs_of(self, key: str) -> Iterator[QueuedJob]: ...

    def cancel(self, job: QueuedJob): ...

    def forget(self, job: QueuedJob): ...

    def tidy(self, now: float): ...

    def _forget(self, job: QueuedJob): ...

    async def tend(self, every: float=1.0): ...

    async def close(self): ...
def turn_of(job: QueuedJob) -> tuple: ...
JOURNALED: tuple
