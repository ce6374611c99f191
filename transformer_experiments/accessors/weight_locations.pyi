# Made from weight_locations.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from enum import StrEnum
from fastcore.basics import patch
from .dimensions import Dimension

__all__ = ['weight_shape_by_location_type', 'WeightLocationType', 'get_dimension_index_of_weight_location_type']
class WeightLocationType(StrEnum):
    EMBEDDING = 'embedding'
    POSITION_EMBEDDING = 'position_embedding'
    LAYER_NORM_GAIN_PRE_ATTN = 'layer_norm_gain.pre_attn'
    LAYER_NORM_BIAS_PRE_ATTN = 'layer_norm_bias.pre_attn'
    ATTN_TO_QUERY = 'attn.to_query'
    ATTN_TO_QUERY_BIAS = 'attn.to_query_bias'
    ATTN_TO_KEY = 'attn.to_key'
    ATTN_TO_KEY_BIAS = 'attn.to_key_bias'
    ATTN_TO_VALUE = 'attn.to_value'
    ATTN_TO_VALUE_BIAS = 'attn.to_value_bias'
    ATTN_TO_KV_KEY = 'attn.to_kv_key'
    ATTN_TO_KV_KEY_BIAS = 'attn.to_kv_key_bias'
    ATTN_TO_KV_VALUE = 'attn.to_kv_value'
    ATTN_TO_KV_VALUE_BIAS = 'attn.to_kv_value_bias'
    ATTN_TO_RESIDUAL = 'attn.to_residual'
    ATTN_TO_RESIDUAL_BIAS = 'attn.to_residual_bias'
    LAYER_NORM_GAIN_QUERY = 'layer_norm_gain.query'
    LAYER_NORM_BIAS_QUERY = 'layer_norm_bias.query'
    LAYER_NORM_GAIN_KEY = 'layer_norm_gain.key'
    LAYER_NORM_BIAS_KEY = 'layer_norm_bias.key'
    LAYER_NORM_GAIN_KV_KEY = 'layer_norm_gain.kv_key'
    LAYER_NORM_BIAS_KV_KEY = 'layer_norm_bias.kv_key'
    ATTN_TO_QUERY_LATENT = 'attn.to_query_latent'
    ATTN_TO_QUERY_LATENT_BIAS = 'attn.to_query_latent_bias'
    LAYER_NORM_GAIN_QUERY_LATENT = 'layer_norm_gain.query_latent'
    QUERY_LATENT_TO_QUERY = 'query_latent.to_query'
    ATTN_TO_KV_LATENT = 'attn.to_kv_latent'
    ATTN_TO_KV_LATENT_BIAS = 'attn.to_kv_latent_bias'
    LAYER_NORM_GAIN_KV_LATENT = 'layer_norm_gain.kv_latent'
    KV_LATENT_TO_KEY = 'kv_latent.to_key'
    KV_LATENT_TO_VALUE = 'kv_latent.to_value'
    ATTN_TO_SHARED_KEY = 'attn.to_shared_key'
    ATTN_TO_SHARED_KEY_BIAS = 'attn.to_shared_key_bias'
    ATTN_SINKS = 'attn.sinks'
    LAYER_NORM_GAIN_POST_ATTN = 'layer_norm_gain.post_attn'
    LAYER_NORM_GAIN_PRE_MLP = 'layer_norm_gain.pre_mlp'
    LAYER_NORM_BIAS_PRE_MLP = 'layer_norm_bias.pre_mlp'
    MLP_TO_HIDDEN = 'mlp.to_hidden'
    MLP_TO_HIDDEN_BIAS = 'mlp.to_hidden_bias'
    MLP_TO_GATE = 'mlp.to_gate'
    MLP_TO_GATE_BIAS = 'mlp.to_gate_bias'
    MLP_TO_UP = 'mlp.to_up'
    MLP_TO_UP_BIAS = 'mlp.to_up_bias'
    MLP_TO_RESIDUAL = 'mlp.to_residual'
    MLP_TO_RESIDUAL_BIAS = 'mlp.to_residual_bias'
    ROUTER = 'router.to_experts'
    ROUTER_BIAS = 'router.to_experts_bias'
    ROUTER_CHOICE_BIAS = 'router.choice_bias'
    ROUTER_NOISE = 'router.to_noise'
    ROUTER_TO_SHARED_EXPERT = 'router.to_shared_expert'
    EXPERT_TO_HIDDEN = 'expert.to_hidden'
    EXPERT_TO_HIDDEN_BIAS = 'expert.to_hidden_bias'
    EXPERT_TO_GATE = 'expert.to_gate'
    EXPERT_TO_GATE_BIAS = 'expert.to_gate_bias'
    EXPERT_TO_UP = 'expert.to_up'
    EXPERT_TO_UP_BIAS = 'expert.to_up_bias'
    EXPERT_TO_RESIDUAL = 'expert.to_residual'
    EXPERT_TO_RESIDUAL_BIAS = 'expert.to_residual_bias'
    SHARED_EXPERT_TO_HIDDEN = 'shared_expert.to_hidden'
    SHARED_EXPERT_TO_HIDDEN_BIAS = 'shared_expert.to_hidden_bias'
    SHARED_EXPERT_TO_GATE = 'shared_expert.to_gate'
    SHARED_EXPERT_TO_GATE_BIAS = 'shared_expert.to_gate_bias'
    SHARED_EXPERT_TO_UP = 'shared_expert.to_up'
    SHARED_EXPERT_TO_UP_BIAS = 'shared_expert.to_up_bias'
    SHARED_EXPERT_TO_RESIDUAL = 'shared_expert.to_residual'
    SHARED_EXPERT_TO_RESIDUAL_BIAS = 'shared_expert.to_residual_bias'
    LAYER_NORM_GAIN_POST_MLP = 'layer_norm_gain.post_mlp'
    LAYER_NORM_GAIN_FINAL = 'layer_norm_gain.final'
    LAYER_NORM_BIAS_FINAL = 'layer_norm_bias.final'
    UNEMBEDDING = 'unembedding'
    UNEMBEDDING_BIAS = 'unembedding_bias'
    RMS_NORM_GAIN_PRE_ATTN = LAYER_NORM_GAIN_PRE_ATTN
    RMS_NORM_GAIN_PRE_MLP = LAYER_NORM_GAIN_PRE_MLP
    RMS_NORM_GAIN_POST_ATTN = LAYER_NORM_GAIN_POST_ATTN
    RMS_NORM_GAIN_POST_MLP = LAYER_NORM_GAIN_POST_MLP
    RMS_NORM_GAIN_QUERY = LAYER_NORM_GAIN_QUERY
    RMS_NORM_GAIN_KEY = LAYER_NORM_GAIN_KEY
    RMS_NORM_GAIN_FINAL = LAYER_NORM_GAIN_FINAL

    @property
    def is_mlp_specific(self) -> bool: ...

    @property
    def has_no_layers(self) -> bool: ...

    @property
    def is_absolute_position_embedding_specific(self) -> bool: ...

    @property
    def shape_spec(self) -> tuple[Dimension, ...]: ...
def _attention_shapes() -> dict[WeightLocationType, tuple[Dimension, ...]]: ...
def _mlp_shapes() -> dict[WeightLocationType, tuple[Dimension, ...]]: ...
def _weight_shapes() -> dict[WeightLocationType, tuple[Dimension, ...]]: ...
weight_shape_by_location_type: Any
def get_dimension_index_of_weight_location_type(weight_location_type: WeightLocationType, dimension: Dimension) -> int: ...
