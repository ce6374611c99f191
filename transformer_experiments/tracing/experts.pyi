# Made from experts.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from typing import Any
import torch
import torch.nn.functional as F
from ..moe import SparseMoE
from ..moe.gates import Gate
from .envoy import Envoy
from .proxy import Proxy

__all__ = ['Expert', 'expert']
class Expert:
    block: Envoy
    experts: Any
    e: int
    ours: Any

    def __init__(self, block: Envoy, e: int): ...

    @property
    def _choice(self) -> Proxy: ...

    @property
    def tokens(self) -> Proxy: ...

    @property
    def _by_expert(self) -> bool: ...

    @property
    def input(self) -> Proxy: ...

    @property
    def weights(self) -> Proxy: ...

    @property
    def output(self) -> Proxy: ...
def _expert_input(self) -> Proxy: ...
def _expert_weights(self) -> Proxy: ...
def _expert_output(self) -> Proxy: ...
def _set_output(self, value): ...
def expert(block: Envoy, e: int) -> Expert: ...
