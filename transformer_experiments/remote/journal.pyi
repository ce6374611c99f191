# Made from journal.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import errno
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from fastcore.basics import patch

__all__ = ['LARGE', 'TABLES', 'Entry', 'Journal']
LARGE: Any
TABLES: str
@dataclass
class Entry:
    id: str
    facts: dict
    message: bytes | None = None
    result: bytes | None = None
    events: list[dict] = ...
class Journal:
    folder: Any
    db: Any

    def __init__(self, folder: str | os.PathLike): ...

    def _run(self, *statement): ...

    def _put(self, id: str, kind: str, data: bytes) -> bytes: ...

    def _get(self, id: str, kind: str, data: bytes | None) -> bytes | None: ...

    def _remove(self, id: str, kind: str): ...

    def add(self, id: str, facts: dict, message: bytes): ...

    def note(self, id: str, event: dict, over: bool): ...

    def keep(self, id: str, result: bytes | None): ...

    def forget(self, id: str): ...

    def entries(self) -> Iterator[Entry]: ...

    def key_of(self, name: str, sha256: str) -> str: ...

    def new_key(self, name: str, sha256: str): ...
