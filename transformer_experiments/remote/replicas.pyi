# Made from replicas.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import asyncio
import math
import os
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any
from fastcore.basics import patch
from .limits import JobError, Limits
from .serve_config import PlaceConfig

__all__ = ['RESULT_PIECE', 'SWITCH_INTERVAL', 'together', 'start_ranks', 'listen_here', 'Replica', 'ServeRunner']
RESULT_PIECE: Any
SWITCH_INTERVAL: float
async def together(steps: AsyncIterator, pause: float=0.03) -> AsyncIterator[list]: ...
def start_ranks(place: PlaceConfig, limits: Limits, threads: int): ...
def _in_serve() -> bool: ...
def listen_here(address: str | None=None): ...
class Replica:
    limits: Any
    pool: Any
    turn: Any
    ranks: Any
    host: Any

    def __init__(self, place: dict, limits: dict, threads: int): ...

    def describe(self) -> dict[str, dict]: ...

    def __del__(self): ...

    async def run(self, message: bytes, owner: str | None=None) -> AsyncIterator[list[tuple[str, Any]]]: ...

    def _run(self, message: bytes, owner: str | None): ...

    async def _steps(self, message: bytes, owner: str | None) -> AsyncGenerator[tuple[str, Any]]: ...
class ServeRunner:
    handles: Any
    limits: Limits
    places: Any

    def __init__(self, handles: Mapping, places: list[PlaceConfig], limits: Limits): ...

    async def run(self, place: str, message: bytes, owner: str | None=None) -> AsyncGenerator[tuple[str, Any]]: ...
