# Made from registry.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from difflib import get_close_matches
from enum import Enum, EnumMeta, StrEnum
from fastcore.basics import patch

__all__ = ['LayerIndex', 'weight_shape_by_location_type', 'NODE_TYPES', 'activation_shape_by_location_type', 'Dimension', 'WeightLocationType', 'get_dimension_index_of_weight_location_type', 'NodeType', 'ActivationLocationType', 'nearest_locations']
class Dimension(str, Enum):
    SEQUENCE_TOKENS = 'sequence_tokens'
    ATTENDED_TO_SEQUENCE_TOKENS = 'attended_to_sequence_tokens'
    MAX_CONTEXT_LENGTH = 'max_context_length'
    RESIDUAL_STREAM_CHANNELS = 'residual_stream_channels'
    VOCAB_SIZE = 'vocab_size'
    ATTN_HEADS = 'attn_heads'
    QUERY_AND_KEY_CHANNELS = 'query_and_key_channels'
    VALUE_CHANNELS = 'value_channels'
    MLP_ACTS = 'mlp_acts'
    LAYERS = 'layers'
    SINGLETON = 'singleton'
    AUTOENCODER_LATENTS = 'autoencoder_latents'
    AUTOENCODER_LATENTS_BY_TOKEN_PAIR = 'autoencoder_latents_by_token_pair'
    KV_HEADS = 'kv_heads'
    EXPERTS = 'experts'
    EXPERT_CHANNELS = 'expert_channels'
    SHARED_EXPERT_CHANNELS = 'shared_expert_channels'

    @property
    def is_sequence_token_dimension(self) -> bool: ...

    @property
    def is_parameterized_dimension(self) -> bool: ...

    @property
    def is_model_intrinsic(self) -> bool: ...
LayerIndex: Any
class WeightLocationType(str, Enum):
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
    LAYER_NORM_GAIN_KEY = 'layer_norm_gain.key'
    LAYER_NORM_GAIN_KV_KEY = 'layer_norm_gain.kv_key'
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
def _weight_shapes() -> dict[WeightLocationType, tuple[Dimension, ...]]: ...
weight_shape_by_location_type: Any
def get_dimension_index_of_weight_location_type(weight_location_type: WeightLocationType, dimension: Dimension) -> int: ...
class NodeType(StrEnum):
    ATTENTION_HEAD = 'attention_head'
    QK_CHANNEL = 'qk_channel'
    V_CHANNEL = 'v_channel'
    MLP_NEURON = 'mlp_neuron'
    LAYER = 'layer'
    RESIDUAL_STREAM_CHANNEL = 'residual_stream_channel'
    VOCAB_TOKEN = 'vocab_token'
class _Locations(EnumMeta):

    def __getattr__(cls, name: str): ...
def _no_online(name: str) -> str: ...
class ActivationLocationType(str, Enum, metaclass=_Locations):
    RESID_POST_EMBEDDING = 'resid.post_emb'
    ATTN_INPUT_LAYER_NORM_SCALE = 'attn_ln.scale'
    RESID_POST_ATTN_LAYER_NORM = 'resid.post_attn_ln'
    ATTN_QUERY = 'attn.q'
    ATTN_KEY = 'attn.k'
    ATTN_VALUE = 'attn.v'
    ATTN_KV_KEY = 'attn.kv_k'
    ATTN_KV_VALUE = 'attn.kv_v'
    ATTN_QK_LOGITS = 'attn.qk_logits'
    ATTN_QK_PROBS = 'attn.qk_probs'
    ATTN_WEIGHTED_SUM_OF_VALUES = 'attn.v_out'
    RESID_DELTA_ATTN = 'resid.delta_attn'
    RESID_POST_ATTN = 'resid.post_attn'
    MLP_INPUT_LAYER_NORM_SCALE = 'mlp_ln.scale'
    RESID_POST_MLP_LAYER_NORM = 'resid.post_mlp_ln'
    MLP_PRE_ACT = 'mlp.pre_act'
    MLP_POST_ACT = 'mlp.post_act'
    ROUTER_LOGITS = 'router.logits'
    ROUTER_WEIGHTS = 'router.weights'
    EXPERT_OUTPUTS = 'expert.outputs'
    RESID_DELTA_MLP = 'resid.delta_mlp'
    RESID_POST_MLP = 'resid.post_mlp'
    RESID_FINAL_LAYER_NORM_SCALE = 'resid.ln_f.scale'
    RESID_POST_FINAL_LAYER_NORM = 'resid.post_ln_f'
    LOGITS = 'logits'

    @property
    def has_no_layers(self) -> bool: ...

    @property
    def shape_spec_per_token_sequence(self) -> tuple[Dimension, ...]: ...

    @property
    def ndim_per_token_sequence(self) -> int: ...

    @property
    def exists_by_default(self) -> bool: ...

    @property
    def node_type(self) -> NodeType: ...

    @classmethod
    def _missing_(cls, value): ...
NODE_TYPES: dict
def _activation_shapes() -> dict[ActivationLocationType, tuple[Dimension, ...]]: ...
activation_shape_by_location_type: Any
def nearest_locations(location: Enum | str, among: list, n: int=3) -> list: ...
