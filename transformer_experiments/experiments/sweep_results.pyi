# Made from sweep_results.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
import numpy as np
import torch
from fastcore.basics import patch
from matplotlib.colors import Normalize
from ..common.plots import Picture
from .intervals import Interval, middle_of, resampled_times
from .metrics import normalised
import os

__all__ = ['ranks', 'correlation', 'SweepResult', 'caption', 'Comparison', 'marks_in_words']
def ranks(x: torch.Tensor) -> torch.Tensor: ...
def correlation(x: torch.Tensor, y: torch.Tensor) -> float: ...
class SweepResult:
    facts: dict
    axes: dict[str, list]
    scores: torch.Tensor
    comparison: Comparison | None
    clean: Any
    corrupt: Any

    def __init__(self, facts: dict, axes: dict[str, list], scores: torch.Tensor): ...

    @property
    def by(self) -> tuple[str, ...]: ...

    @property
    def values(self) -> torch.Tensor: ...

    @property
    def neutral(self) -> float: ...

    def cells(self) -> Iterator[tuple[tuple, tuple[int, ...]]]: ...

    def __repr__(self): ...

    def interval(self, level: float=0.95, draws: int=1000, seed: int=0) -> Interval[torch.Tensor]: ...

    def p_values(self, draws: int=4000, seed: int=0) -> torch.Tensor: ...

    def marked(self, level: float=0.05) -> torch.Tensor: ...

    def table(self, n: int | None=10, level: float=0.95) -> list[dict]: ...

    def compare(self, other: SweepResult, n_misses: int=5) -> Comparison: ...

    def picture(self, level: float=0.05, title: str='') -> Picture: ...

    @classmethod
    def open(cls, folder: str | os.PathLike) -> SweepResult: ...
def caption(result: SweepResult) -> str: ...
@dataclass(frozen=True)
class Comparison:
    cells: int
    rank_correlation: float
    correlation: float
    misses: tuple
    of: str
    __repr__ = __str__

    def __str__(self): ...
def marks_in_words(result: SweepResult, level: float) -> str: ...
def _draw_bars(fig, ax, result: SweepResult, dots: np.ndarray): ...
def _draw_grid(fig, ax, result: SweepResult, dots: np.ndarray): ...
