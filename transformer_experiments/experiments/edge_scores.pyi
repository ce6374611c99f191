# Made from edge_scores.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from collections.abc import Callable
from dataclasses import dataclass
import torch
from fastcore.basics import patch
from .contrast import Contrast
from .estimates import metric_of
from .paths import ComponentGraph, Wiring, check_graph, edge_effects
from .paths import edge_runs, run_graph
from .sweep_results import Comparison, correlation, ranks

__all__ = ['reader_gradients', 'scores_of_pair', 'EdgeScores', 'edge_scores', 'exact_scores', 'computed_from', 'connected', 'strongest']
def reader_gradients(graph: ComponentGraph, embeddings: torch.Tensor, measure: Callable) -> dict: ...
def scores_of_pair(graph: ComponentGraph, task: Contrast, pair: int, steps: int | None) -> torch.Tensor: ...
@dataclass(frozen=True)
class EdgeScores:
    task: Contrast
    graph: ComponentGraph
    method: str
    each: torch.Tensor

    @property
    def values(self) -> torch.Tensor: ...

    def compare(self, exact: EdgeScores | None=None, sample: int=100, seed: int=0, n_misses: int=5) -> Comparison: ...
def edge_scores(task: Contrast, method: str='eap-ig', steps: int=5, graph: ComponentGraph | None=None) -> EdgeScores: ...
def exact_scores(task: Contrast, graph: ComponentGraph) -> EdgeScores: ...
def computed_from(graph: ComponentGraph) -> torch.Tensor: ...
def connected(graph: ComponentGraph, edges: torch.Tensor, owners: torch.Tensor) -> torch.Tensor: ...
def strongest(graph: ComponentGraph, scores: torch.Tensor, n: int, owners: torch.Tensor | None=None) -> torch.Tensor: ...
