# Made from remote_jobs.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import base64
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4
import httpx
import torch
from fastcore.basics import patch
from tqdm.auto import tqdm
from .client_errors import RemoteError, graph_error, no_server, not_a_server, reason_of, with_line
from .client_log import CLIENT_LOG, status_line
from .endpoints import LOST, Endpoint, Reconnect
from .limits import FINAL_STATUSES
from .message_format import Result, unpack

__all__ = ['UPLOAD_CHUNK', 'POLL_PAUSES', 'events_in', 'RemoteJob', 'in_chunks', 'bar']
def events_in(lines: Iterator[str]) -> Iterator[dict]: ...
class RemoteJob:
    server: Endpoint
    fill: Callable
    wheres: Set[tuple]
    fail: Callable
    id: str | None
    events: list[dict]
    polls: bool
    values: Any

    def __init__(self, server: Endpoint, fill: Callable=..., wheres: Set[tuple]=..., fail: Callable=...): ...

    @property
    def seen(self) -> int: ...

    @property
    def over(self) -> bool: ...

    def __repr__(self): ...

    def take(self, event: dict): ...

    def _lost_connection(self, error: Exception) -> Exception: ...

    def submit(self, data: bytes, wait: bool=True): ...

    def _read_events(self, response: httpx.Response): ...

    def follow(self, timeout: float | None=None): ...

    def _request_events(self, left: float): ...

    def _fetch_result(self) -> tuple[Result, dict[str, torch.Tensor]]: ...

    def _read(self, data: bytes | Path) -> tuple[Result, dict[str, torch.Tensor]]: ...

    def download(self, path: Path, size: int): ...

    def wait(self): ...

    def result(self, timeout: float | None=None) -> dict: ...

    def status(self) -> str: ...

    def cancel(self): ...

    def _cancel_interrupted(self): ...
UPLOAD_CHUNK: Any
def in_chunks(data: bytes, what: str) -> Iterator[memoryview]: ...
def bar(total: int, what: str) -> tqdm: ...
POLL_PAUSES: tuple
