# Made from activations.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from collections.abc import Iterable
import torch
from fastcore.basics import patch
from transformer_experiments.accessors.attention_check import ATTENTION_INPUT, CHECK_INPUTS, attention_parts as attention_parts, check_attention, check_site
from transformer_experiments.accessors.available_activations import check_location as check_location, known_location as known_location, resolve_locations
from .diagnosis import refuse_autocast
from .forward_pass import Reference
from .layout_context import LayoutModelContext
from .model_context import ModelContext
from transformer_experiments.accessors.ragged_texts import beginning_of_text as beginning_of_text, scattered, separate, text_rows, token_tensor
from .registry import ActivationLocationType, WeightLocationType
from .sites import COMPUTED, EXPERTS, PART_OF, SiteListener, site_of
from ..models.transformer import eval_mode

__all__ = ['A', 'W', 'Activations', 'activation_shape', 'live_context', 'run_batch']
A: Any
W: Any
class Activations(dict):
    ctx: ModelContext
    tokens: torch.Tensor
    mask: torch.Tensor | None

    def __init__(self, ctx: ModelContext, tokens: torch.Tensor, tensors: dict, mask: torch.Tensor | None=None): ...

    def __missing__(self, key): ...

    def stacked(self, location: ActivationLocationType) -> torch.Tensor: ...

    def __repr__(self): ...
def activation_shape(ctx: ModelContext, location: ActivationLocationType, n_tokens: int) -> tuple[int, ...]: ...
def _layer_ranges(layers: list[int]) -> str: ...
def live_context(ctx: ModelContext) -> LayoutModelContext: ...
def run_batch(self: ModelContext, given: torch.Tensor, locations: Iterable | None) -> dict: ...
