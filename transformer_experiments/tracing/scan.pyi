# Made from scan.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import logging
from collections.abc import Callable
from contextlib import contextmanager
import torch
from fastcore.basics import patch
from torch import nn
from .graph import Node, node_refs, show_where
from .interleave import Batch, _fitted, _first, aside, compile_step, map_tensors, node_error

__all__ = ['UNKNOWN', 'NOT_TRIED', 'fake_mode', 'quietly', 'scan_model', 'Scan']
def fake_mode(): ...
def _fake(mode, t: torch.Tensor) -> torch.Tensor: ...
@contextmanager
def quietly(): ...
def scan_model(module: nn.Module, call: Callable, args: tuple, kwargs: dict) -> tuple[object, dict]: ...
UNKNOWN: Any
NOT_TRIED: tuple
class Scan:
    model: Any
    mode: object
    found: dict
    validate: bool
    nodes: Any
    values: Any
    looked: Any

    def __init__(self, model, mode: object, found: dict, validate: bool): ...

    def module(self, path: str) -> nn.Module: ...

    def parameter(self, path: str) -> torch.Tensor: ...

    def added(self, rec, node: Node): ...

    def fake(self, node: Node): ...

    def _find(self, node: Node): ...

    def _at_site(self, node: Node): ...
