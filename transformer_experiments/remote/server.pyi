# Made from server.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import islice
from typing import Annotated, Any
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastcore.basics import patch
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from .. import __version__
from ..common.files import FULL
from .answers import Answer, describe_job, download_response, stream_of, summarize_job
from .checks import read_job
from .door import ConnectionLimits
from .keys import Keys, hash_of
from .limits import Limits
from .message_format import PROTOCOL_VERSION
from .queue import JobTable
from .queued_jobs import SpooledBytes, QueuedJob
from .quotas import TooMany

__all__ = ['CONNECTION_LIMITS', 'SERVER_LOG', 'MAX_UPLOADS', 'SHORT_WAIT', 'After', 'POLICY', 'ServedModel', 'check_models', 'admit', 'in_process_reader', 'read_body', 'Routes', 'make_app']
@dataclass(frozen=True)
class ServedModel:
    name: str
    place: str
    tree: str
    kind: str = ''
    parameters: int = 0
    threads: int = 0
def check_models(wanted: list, models: Mapping[str, ServedModel]) -> str: ...
def admit(found: dict, models: Mapping[str, ServedModel]) -> tuple[str, tuple[str, ...]]: ...
def in_process_reader(limits: Limits) -> Callable: ...
CONNECTION_LIMITS: Any
async def read_body(request: Request, most: int, connection_limits: ConnectionLimits=...) -> SpooledBytes: ...
def _body_error(e: Exception) -> Exception: ...
SERVER_LOG: Any
class Routes:
    table: JobTable
    keys: Keys
    models: Mapping[str, ServedModel]
    limits: Any
    replicas: Callable[[], Mapping[str, int]]
    reader: Any
    uploading: Counter[str]
    read_locks: dict[str, asyncio.Lock]
    key_hashes: dict[str, str]

    def __init__(self, table: JobTable, keys: Keys, models: Mapping[str, ServedModel], limits: Limits | None=None, replicas: Callable[[], Mapping[str, int]]=..., reader: Callable | None=None): ...

    def owner(self, request: Request) -> str: ...

    def _forget_old_jobs(self, name: str, sha256: str): ...

    def find(self, request: Request, id: str) -> QueuedJob: ...

    def describe(self, job: QueuedJob, after: int=0) -> dict: ...

    @contextmanager
    def count_upload(self, owner: str, size: int): ...

    async def submit(self, request: Request) -> Response: ...

    async def events(self, request: Request, id: str, after: After=0) -> Response: ...

    async def job(self, request: Request, id: str, after: After=0) -> Response: ...

    async def jobs(self, request: Request, last: Annotated[int, Query(ge=1, le=1000)]=100) -> Response: ...

    async def result(self, request: Request, id: str) -> Response: ...

    async def cancel(self, request: Request, id: str) -> Response: ...

    async def list_models(self, request: Request) -> Response: ...

    async def health(self) -> Response: ...

    async def page(self) -> Response: ...
MAX_UPLOADS: int
SHORT_WAIT: float
After: Any
POLICY: str
async def _http_error(request: Request, e: StarletteHTTPException) -> Response: ...
async def _validation_error(request: Request, e: RequestValidationError) -> Response: ...
async def _internal_error(request: Request, e: Exception) -> Response: ...
def make_app(table: JobTable, keys: Keys, models: Mapping[str, ServedModel], limits: Limits | None=None, replicas: Callable[[], Mapping[str, int]]=..., reader: Callable | None=None) -> FastAPI: ...
