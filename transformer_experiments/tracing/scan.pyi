# Made from scan.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
import torch
from fastcore.basics import patch
from torch import nn
from ..common.hooks import listening_everywhere
from .nodes import Node, node_refs
from .errors import node_error
from .recorder import TorchReplacements
from .restoring import unchanged
from .state import without_hooks
from .steps import compile_step
from .values import map_tensors

__all__ = ['MAX_CACHED', 'NEEDS_NUMBERS', 'UNKNOWN', 'NOT_TRIED', 'MAX_SCANS', 'fake_mode', 'quietly', 'scan_model', 'Scans', 'Scan']
MAX_CACHED: int
def fake_mode() -> Any: ...
def _fake(mode, t: torch.Tensor) -> torch.Tensor: ...
@contextmanager
def quietly(): ...
def scan_model(module: nn.Module, call: Callable, args: tuple, kwargs: dict) -> tuple[Any, dict]: ...
NEEDS_NUMBERS: tuple
def _run_fakes(mode, module: nn.Module, call: Callable, args: tuple, kwargs: dict, found: dict): ...
@contextmanager
def _recorded(module: nn.Module, found: dict): ...
UNKNOWN: Any
NOT_TRIED: tuple
MAX_SCANS: int
class Scans(OrderedDict):

    def __setitem__(self, key, value): ...
class Scan:
    schedule: Any
    model: Any
    mode: AbstractContextManager
    found: dict
    validate: bool
    nodes: dict[int, Node]
    values: dict[int, object]
    looked: set[int | None]

    def __init__(self, model, mode: AbstractContextManager, found: dict, validate: bool): ...

    def module(self, path: str) -> nn.Module: ...

    def parameter(self, path: str) -> torch.Tensor: ...

    def added(self, rec, node: Node): ...

    def replace(self, id: int, new: object) -> object: ...

    def require_grad(self, id: int, values: dict, call: Callable): ...

    def fake(self, node: Node) -> Any: ...

    def _find(self, node: Node) -> object: ...

    def _at_site(self, node: Node) -> object: ...
