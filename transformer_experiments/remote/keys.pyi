# Made from keys.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import hashlib
import json
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from fastcore.basics import patch
from filelock import FileLock
from ..common.files import atomic_path, user_config_dir

__all__ = ['PREFIX', 'new_key', 'hash_of', 'Holder', 'check_name', 'read_holders', 'Keys']
PREFIX: str
def new_key() -> str: ...
def hash_of(key: str) -> str: ...
@dataclass(frozen=True)
class Holder:
    name: str
    sha256: str
    created: str
def check_name(name: str) -> str: ...
def read_holders(path: Path) -> dict[str, Holder]: ...
class Keys:
    path: Any
    _stamp: tuple | None
    _holders: dict[str, Holder]

    def __init__(self, path: str | os.PathLike | None=None): ...

    def __repr__(self): ...

    def holders(self) -> dict[str, Holder]: ...

    def name_of(self, key: str) -> str | None: ...

    def _change(self, change): ...

    def add(self, name: str) -> str: ...

    def revoke(self, name: str): ...
