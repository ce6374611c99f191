"""Each architecture beyond its one small model: seeds, sizes, kernels, ties; every declared fact and every declared
order matters; attribution and circuits hold for all; what isn't covered is refused by name."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

from transformer_experiments.accessors import (
    ActivationLocationType,
    HFModelContext,
    WeightLocationType,
    check_reassembly,
)
from transformer_experiments.accessors.architectures import architecture_row
from transformer_experiments.accessors.examples import EXAMPLES
from transformer_experiments.accessors.layouts import LAZY_MODULES, layout_for
from transformer_experiments.accessors.tiny_models import TINY_MODELS, fill_randomly, tiny_context
from transformer_experiments.accessors.registry import Dimension
from transformer_experiments.accessors.stored import Stored
from transformer_experiments.experiments.attribution import attribute_logit, head_sources
from transformer_experiments.experiments.circuits import (
    copying_scores,
    neuron_terms,
    ov_writes,
    qk_scores,
    read_out,
    token_streams,
)
from transformer_experiments.tracing import TracedModel

warnings.filterwarnings('ignore')
T.utils.logging.set_verbosity_error()
A, W = ActivationLocationType, WeightLocationType
OLD = ('GPT-2', 'Llama', 'Qwen2', 'Qwen3', 'Mistral', 'Gemma 2', 'Gemma 3', 'Mixtral', 'Qwen3-MoE', 'OLMoE')
NEW = [name for name in EXAMPLES if name.startswith('Llama, yarn') or name.split(', ')[0] not in OLD]
PLAIN_ONLY = ('GPT-J', 'gpt-oss')  # No fused kernel
NO_TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)


def ids(*shape: int, seed: int = 0, vocabulary: int = 61) -> torch.Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def made(model: str, config: str, seed: int = 0, dtype=torch.float64, **values) -> HFModelContext:
    "A context of a small random model."
    return HFModelContext(fill_randomly(getattr(T, model)(getattr(T, config)(**NO_TOKENS, **values)), dtype, seed))


# Seeds, kernels, lengths


@pytest.mark.parametrize('kernel', ['sdpa', 'eager'])
@pytest.mark.parametrize('name', NEW)
def test_all_that_is_read_is_what_the_model_computes(name, kernel):
    if kernel == 'sdpa' and name in PLAIN_ONLY:
        with pytest.raises((ValueError, KeyError)):
            tiny_context(name, kernel=kernel)
        return
    for seed, length in ((1, 12), (2, 7), (3, 1)):
        ctx = tiny_context(name, seed=seed, kernel=kernel)
        row = architecture_row(ctx, ids(2, min(length, ctx.n_context), seed=seed))
        assert row.rebuilt < 1e-9 and row.read < 1e-9 and row.grows < 1e-6, row
        router = row.own.pop(A.ROUTER_LOGITS, 0.0)  # read before the model's code rounds them to float32
        assert max(row.own.values()) < 1e-9 and router < 1e-6, row.own
        assert set(row.locations) | {A(m) for m in row.missing()} == set(A)
        assert (A.ATTN_QK_PROBS in row.own) == (kernel == 'eager')


@pytest.mark.parametrize('name', NEW)
def test_in_lower_precision(name):
    "float32 to 1e-4; in bfloat16 what is computed here agrees with what passed on, to the three digits there are."
    assert check_reassembly(tiny_context(name, torch.float32)).worst < 1e-4
    ctx = tiny_context(name, torch.bfloat16)
    acts = ctx.run(ids(8))
    assert {x.dtype for (a, _), x in acts.items() if a is not A.ROUTER_LOGITS} <= {torch.bfloat16, torch.float32}


def test_a_dynamic_rotation_of_long_texts():
    ctx = tiny_context('Llama, dynamic')  # was made for 8 tokens
    for length in (5, 8):
        assert check_reassembly(ctx, ids(1, length)).worst < 1e-9
    for length in (9, 14, 30):  # each longer than those before, since the model remembers the longest
        assert check_reassembly(ctx, ids(1, length)).worst < 1e-9
    with pytest.raises(ValueError, match='more than 1e-09'):  # it does: 12 tokens are turned as 30 were
        check_reassembly(ctx, ids(1, 12))
    assert check_reassembly(ctx, ids(1, 6)).worst < 1e-9  # a short one makes it forget


@pytest.mark.parametrize('name', ['Llama, longrope', 'Phi-3, longrope'])
def test_short_and_long_texts_have_factors_of_their_own(name):
    ctx = tiny_context(name)
    for length in (3, 8, 9, 20, 8):
        assert check_reassembly(ctx, ids(2, length)).worst < 1e-9
    same = dict(ctx.facts.rotary[0], long_factor=ctx.facts.rotary[0]['short_factor'])
    ctx.facts = replace(ctx.facts, rotary=(same,) * 3)
    assert check_reassembly(ctx, ids(2, 8)).worst < 1e-9
    with pytest.raises(ValueError, match='more than 1e-09'):
        check_reassembly(ctx, ids(2, 9))


def test_a_factor_that_is_left_out_is_a_ratio_of_lengths():
    factors = dict(short_factor=[1.0, 1.2, 1.5, 2.0], long_factor=[1.0, 2.0, 4.0, 4.5])
    sizes = NEOX | dict(hidden_size=24, num_attention_heads=3, original_max_position_embeddings=6)
    rotation = dict(rope_type='longrope', rope_theta=100.0, **factors)
    ctx = made('Phi3ForCausalLM', 'Phi3Config', rope_parameters=rotation, **sizes)
    assert ctx.facts.rotation(0)['factor'] == 24 / 6
    for length in (6, 7, 20):
        assert check_reassembly(ctx, ids(1, length, vocabulary=37)).worst < 1e-9


# Sizes: odd numbers of heads, head sizes, and ties

SIZES = dict(vocab_size=37, num_hidden_layers=2, max_position_embeddings=24)
NEOX = SIZES | dict(intermediate_size=20)
ODD = {
    'GPT-NeoX, 5 heads of 6': ('GPTNeoXForCausalLM', 'GPTNeoXConfig', NEOX | dict(
        hidden_size=30, num_attention_heads=5, rotary_pct=0.34)),  # 2 of 6 channels
    'GPT-NeoX, 1 head': ('GPTNeoXForCausalLM', 'GPTNeoXConfig', NEOX | dict(hidden_size=12, num_attention_heads=1)),
    'Phi, 6 heads share 3': ('PhiForCausalLM', 'PhiConfig', NEOX | dict(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=3, partial_rotary_factor=0.5, qk_layernorm=True)),
    'StableLM, 6 heads share 2': ('StableLmForCausalLM', 'StableLmConfig', NEOX | dict(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, qk_layernorm=True, use_qkv_bias=True)),
    'StableLM, parallel, heads share none': ('StableLmForCausalLM', 'StableLmConfig', NEOX | dict(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=3, use_parallel_residual=True)),
    'Falcon, 7 heads share one': ('FalconForCausalLM', 'FalconConfig', SIZES | dict(
        hidden_size=42, num_attention_heads=7, bias=True)),
    'Falcon, 6 heads share 3': ('FalconForCausalLM', 'FalconConfig', SIZES | dict(
        hidden_size=24, num_attention_heads=6, num_kv_heads=3, new_decoder_architecture=True)),
    'Falcon, grouped, one head each': ('FalconForCausalLM', 'FalconConfig', SIZES | dict(
        hidden_size=24, num_attention_heads=3, num_kv_heads=3, new_decoder_architecture=True, alibi=True)),
    'Falcon, slopes of 5 heads': ('FalconForCausalLM', 'FalconConfig', SIZES | dict(
        hidden_size=30, num_attention_heads=5, multi_query=False, alibi=True, parallel_attn=True)),
    'Falcon, by head, rotated': ('FalconForCausalLM', 'FalconConfig', SIZES | dict(
        hidden_size=30, num_attention_heads=5, multi_query=False, parallel_attn=False, bias=True)),
    'OPT, 3 heads': ('OPTForCausalLM', 'OPTConfig', SIZES | dict(
        hidden_size=18, num_attention_heads=3, ffn_dim=20, word_embed_proj_dim=18)),
    'Phi-3, 5 heads share one': ('Phi3ForCausalLM', 'Phi3Config', NEOX | dict(
        hidden_size=30, num_attention_heads=5, num_key_value_heads=1)),
    'Phi-3, heads share none': ('Phi3ForCausalLM', 'Phi3Config', NEOX | dict(hidden_size=24, num_attention_heads=3)),
    'OLMo-2, 6 heads share 2': ('Olmo2ForCausalLM', 'Olmo2Config', NEOX | dict(
        hidden_size=36, num_attention_heads=6, num_key_value_heads=2)),
    'SmolLM3, 5 layers': ('SmolLM3ForCausalLM', 'SmolLM3Config', NEOX | dict(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=5, mlp_bias=True)),
    'Granite, 3 heads share one': ('GraniteForCausalLM', 'GraniteConfig', NEOX | dict(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=1, logits_scaling=3.0, residual_multiplier=0.22)),
    'GraniteMoE, one expert a token': ('GraniteMoeForCausalLM', 'GraniteMoeConfig', NEOX | dict(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=3, num_local_experts=3, num_experts_per_tok=1)),
    'Qwen2-MoE, every other layer': ('Qwen2MoeForCausalLM', 'Qwen2MoeConfig', NEOX | dict(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=3, num_experts=3, num_experts_per_tok=3,
        moe_intermediate_size=7, shared_expert_intermediate_size=9, decoder_sparse_step=2, qkv_bias=False)),
    'Gemma, 3 heads share one': ('GemmaForCausalLM', 'GemmaConfig', NEOX | dict(
        hidden_size=20, num_attention_heads=3, num_key_value_heads=1, head_dim=8)),
    'gpt-oss, 4 heads': ('GptOssForCausalLM', 'GptOssConfig', NEOX | dict(
        hidden_size=20, num_attention_heads=4, num_key_value_heads=1, head_dim=10, num_local_experts=3,
        num_experts_per_tok=3, layer_types=['full_attention', 'sliding_attention'], sliding_window=3)),
    'DeepSeek-V3, 3 heads': ('DeepseekV3ForCausalLM', 'DeepseekV3Config', NEOX | dict(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=5, kv_lora_rank=7,
        qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=9, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=6, first_k_dense_replace=0, n_shared_experts=3)),
    'DeepSeek-V2, 3 heads': ('DeepseekV2ForCausalLM', 'DeepseekV2Config', NEOX | dict(
        hidden_size=24, num_attention_heads=3, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=3,
        qk_rope_head_dim=4, v_head_dim=9, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=6,
        first_k_dense_replace=1, routed_scaling_factor=0.7)),
}  # fmt: skip


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('name', ODD)
def test_other_sizes_tied_and_untied(name, tied):
    model, config, values = ODD[name]
    ctx = made(model, config, seed=5, tie_word_embeddings=tied, **values)
    row = architecture_row(ctx, ids(2, 11, vocabulary=37))
    assert row.rebuilt < 1e-9 and row.read < 1e-9 and row.grows < 1e-6, row
    same = ctx.get_weight(W.UNEMBEDDING).data_ptr() == ctx.get_weight(W.EMBEDDING).data_ptr()
    assert same == tied
    counted = sum(r.parameters for r in ctx.table(norms=False))
    skipped = 2 * ctx.n_residual_stream_channels if 'OPT' in name else 0  # rows that no position reads
    model = ctx.get_or_create_model()
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith('correction_bias'))  # buffers that learn
    assert counted + skipped == biases + sum(p.numel() for p in model.parameters())


def test_gpt_j_with_a_root_that_rounds():
    "Its product of queries and keys is in float32; two ways of dividing it by a root agree to that precision."
    sizes = dict(n_embd=30, n_layer=2, n_head=3, n_positions=24, vocab_size=37, rotary_dim=4)
    assert check_reassembly(made('GPTJForCausalLM', 'GPTJConfig', **sizes), tolerance=1e-6).worst < 1e-6


# Every declared fact matters, and so does every declared order


def changed_rotation(facts, **more):
    return replace(facts, rotary=tuple(r and dict(r, **more) for r in facts.rotary))


def every_layer_turns(facts):
    return replace(facts, rotary=tuple(r or facts.rotary[0] for r in facts.rotary))


FACTS = {
    'GPT-NeoX': [lambda f: replace(f, parallel=False), lambda f: changed_rotation(f, partial_rotary_factor=1.0)],
    'GPT-NeoX, sequential': [lambda f: replace(f, parallel=True)],
    'GPT-J': [lambda f: changed_rotation(f, pairs='halves'), lambda f: changed_rotation(f, channels=8)],
    'Falcon, sequential': [lambda f: replace(f, alibi=2.0), lambda f: replace(f, alibi=0.0)],
    'Llama, yarn': [lambda f: changed_rotation(f, rope_type='linear'), lambda f: changed_rotation(f, beta_fast=20.0)],
    'Llama, yarn, all else': [lambda f: changed_rotation(f, mscale=0.0), lambda f: changed_rotation(f, truncate=True)],
    'OLMo-2': [lambda f: replace(f, norm_grouping='head')],
    'SmolLM3': [every_layer_turns],
    'Granite': [
        lambda f: replace(f, residual_scale=1.0),
        lambda f: replace(f, logit_scale=1.0),
        lambda f: replace(f, embedding_scale=1.0),
        lambda f: replace(f, attention_scales=(0.5,) * 3),
    ],
    'GraniteMoE': [lambda f: replace(f, experts=replace(f.experts, top_k=1))],
    'gpt-oss': [
        lambda f: replace(f, experts=replace(f.experts, clamp=7.0)),
        lambda f: replace(f, experts=replace(f.experts, up_plus=0.0)),
        lambda f: replace(f, windows=()),
    ],
    'DeepSeek-V3': [
        lambda f: changed_rotation(f, last=False),
        lambda f: changed_rotation(f, pairs='halves'),
        lambda f: replace(f, latent_eps=0.1),
        lambda f: replace(f, experts=replace(f.experts, top_groups=3)),
        lambda f: replace(f, experts=replace(f.experts, group_best=1)),
        lambda f: replace(f, experts=replace(f.experts, scale=1.0)),
    ],
    'DeepSeek-V3, all else': [lambda f: replace(f, attention_scales=(14**-0.5,) * 3)],
    'DeepSeek-V2': [
        lambda f: replace(f, experts=replace(f.experts, normalize=True)),
        lambda f: replace(f, experts=replace(f.experts, group_best=2)),
    ],
    'ours, groups of experts': [lambda f: replace(f, experts=replace(f.experts, top_groups=1))],
}


@pytest.mark.parametrize('name, change', [(name, change) for name, changes in FACTS.items() for change in changes])
def test_a_wrong_fact_is_noticed(name, change):
    ctx = tiny_context(name)
    ctx.facts = change(ctx.facts)
    with pytest.raises(ValueError, match='more than 1e-09'):
        check_reassembly(ctx)


QKV_OF_FALCON = 'transformer.h.{layer}.self_attention.query_key_value.weight'
ORDERS = {  # All of the right shape
    ('GPT-NeoX', W.ATTN_TO_QUERY): Stored('@layers.{layer}.attention.query_key_value.weight', '(3 h q) r'),
    ('Falcon', W.ATTN_TO_KV_KEY): Stored(QKV_OF_FALCON, '(h q | g v | g q) r', 2),
    ('Falcon, by groups', W.ATTN_TO_QUERY): Stored(QKV_OF_FALCON, '(h q | g q | g v) r'),
    ('Falcon, sequential', W.ATTN_TO_QUERY): Stored(QKV_OF_FALCON, '(3 h q) r'),
    ('OPT', W.POSITION_EMBEDDING): Stored('@embed_positions.weight', '(p | 2) r'),
    ('Phi-3', W.ATTN_TO_QUERY): Stored('@layers.{layer}.self_attn.qkv_proj.weight', '(g (k q | q | v)) r'),
    ('Phi-3', W.MLP_TO_GATE): Stored('@layers.{layer}.mlp.gate_up_proj.weight', '(m 2) r'),
    ('gpt-oss', W.EXPERT_TO_UP): Stored('@layers.{layer}.mlp.experts.gate_up_proj', 'e r (2 f)', 1, when='sparse'),
    ('DeepSeek-V3', W.KV_LATENT_TO_VALUE): Stored('@layers.{layer}.self_attn.kv_b_proj.weight', '(h u | h v) c', 1),
    ('DeepSeek-V3', W.ATTN_TO_KV_LATENT): Stored('@layers.{layer}.self_attn.kv_a_proj_with_mqa.weight', '(t | c) r', 1),
    ('Phi, all else', W.LAYER_NORM_GAIN_QUERY): Stored('@layers.{layer}.self_attn.k_layernorm.weight', 'q'),
}


@pytest.mark.parametrize('name, location', ORDERS)
def test_another_order_of_the_same_shape_is_noticed(name, location):
    ctx = tiny_context(name)
    assert check_reassembly(ctx).worst < 1e-9
    other = HFModelContext(ctx.get_or_create_model(), model_name=name)
    other.layout = replace(other.layout, stored=other.layout.stored | {location: ORDERS[name, location]})
    shape = ctx.get_weight(location, None if location.has_no_layers else 0).shape
    assert other.get_weight(location, None if location.has_no_layers else 0).shape == shape
    with pytest.raises(ValueError, match='more than 1e-09'):
        check_reassembly(other)


def test_parts_in_turn_are_counted_once():
    for name in ('GPT-NeoX', 'Falcon, by groups', 'Phi-3'):
        ctx = tiny_context(name)
        rows = {r.location: r for r in ctx.table(norms=False)}
        owners = [r for w, r in rows.items() if w.name.startswith('ATTN_TO_') and r.same_as is None]
        stored = ctx.get_or_create_model().named_parameters()
        fused = sum(p.numel() for n, p in stored if 'query_key' in n or 'qkv' in n)
        out = sum(rows[w].parameters for w in (W.ATTN_TO_RESIDUAL, W.ATTN_TO_RESIDUAL_BIAS) if w in rows)
        assert sum(r.parameters for r in owners) == fused + out


# Files: older names and older configurations


def resaved(ctx, folder, rename, **config):
    "A checkpoint with other names of tensors, and other values in its configuration; None: left out."
    ctx.get_or_create_model().save_pretrained(folder)
    tensors = load_file(folder / 'model.safetensors')
    save_file({rename(name): x for name, x in tensors.items()}, folder / 'model.safetensors')
    path = folder / 'config.json'
    found = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    return HFModelContext(folder, device='cpu')


def same_weights(one, two) -> bool:
    at = [(w, None if w.has_no_layers else 1) for w in one.locations()]
    return one.locations() == two.locations() and all(torch.equal(one.get_weight(*a), two.get_weight(*a)) for a in at)


def test_pythia_as_it_was_published(tmp_path):
    live = tiny_context('GPT-NeoX')
    old = dict(rope_parameters=None, rotary_pct=0.5, rotary_emb_base=10000)
    stored = resaved(live, tmp_path, lambda name: name.replace('lm_head', 'embed_out'), **old)
    assert same_weights(live, stored) and stored.facts == live.facts


def test_granite_moe_as_it_was_published(tmp_path):
    names = {'experts.gate_up_proj': 'input_linear.weight', 'experts.down_proj': 'output_linear.weight'}
    names |= {'router.weight': 'router.layer.weight'}

    def rename(name):
        return next((name.replace(new, old) for new, old in names.items() if name.endswith(new)), name)

    live = tiny_context('GraniteMoE')
    assert same_weights(live, resaved(live, tmp_path, rename))


def test_an_older_configuration_of_a_partial_rotation(tmp_path):
    for name in ('Phi, all else', 'StableLM'):
        live = tiny_context(name)
        rotation = live.facts.rotation(0)
        old = dict(rope_theta=rotation['rope_theta'], partial_rotary_factor=rotation['partial_rotary_factor'])
        stored = resaved(live, tmp_path / name, lambda x: x, rope_parameters=None, **old)
        assert stored.facts == live.facts and same_weights(live, stored)


# Attribution and circuits


@pytest.mark.parametrize('name', TINY_MODELS)
def test_a_logit_is_the_sum_of_its_parts(name):
    ctx, tokens = tiny_context(name, seed=4), ids(7, seed=2)
    found = attribute_logit(ctx, tokens, 7, against=3)  # which checks the sum, to 1e-9
    with torch.no_grad():
        out = ctx.get_or_create_model()(tokens[None])
    logits = (out.logits if hasattr(out, 'logits') else out[0])[0, -1]
    if ctx.facts.logit_cap is None:
        assert abs(found.logit - (logits[7] - logits[3]).item()) < 1e-9 * logits.abs().max()
    by_source = head_sources(ctx, tokens, 1, 2 % ctx.n_attention_heads, 7, against=3)
    part = next(p for p in found.parts if p.kind == 'head' and p[1:] == (1, 2 % ctx.n_attention_heads))
    assert abs(by_source.sum().item() - found[part]) < 1e-5 * found.values.abs().max()  # norms may round to float32
    if 0 not in ctx.facts.sparse_layers:
        terms = neuron_terms(ctx, tokens, 0, 7, against=3)
        whole = next(found[p] for p in found.parts if p[:2] == ('mlp', 0))
        assert abs(terms.sum().item() - whole) < 1e-5 * found.values.abs().max()


@pytest.mark.parametrize('name', TINY_MODELS)
def test_circuits_compute_what_attention_computes(name):
    "Scores between the streams of two tokens are attention's logits at that distance; writes add up to its output."
    ctx, tokens, head = tiny_context(name, seed=4), ids(8, seed=2), 1
    acts = ctx.run(tokens)
    for layer in range(ctx.n_layers):
        before = acts[A.RESID_POST_MLP, layer - 1] if layer else acts[A.RESID_POST_EMBEDDING]
        logits = acts[A.ATTN_QK_LOGITS, layer][..., head]  # (query, key)
        scale = logits[logits.isfinite()].abs().max().clamp(min=1)
        for query, key in ((7, 6), (7, 7), (5, 3)):
            score = qk_scores(ctx, layer, head, before[query][None], before[key][None], query - key)[0, 0]
            if logits[query, key].isfinite():
                constant = qk_constant(ctx, query, layer, head)
                assert abs(score + constant - logits[query, key]) < 1e-5 * scale  # angles are float32
        added = sum(
            acts[A.ATTN_QK_PROBS, layer][7, :, h] @ ov_writes(ctx, layer, h, before)
            for h in range(ctx.n_attention_heads)
        )
        bias = ctx.get_weight(W.ATTN_TO_RESIDUAL_BIAS, layer) if ctx.has_weight(W.ATTN_TO_RESIDUAL_BIAS, layer) else 0
        if not ctx.has_weight(W.LAYER_NORM_GAIN_POST_ATTN, layer):
            delta = (added + bias) * ctx.facts.residual_scale
            assert (delta - acts[A.RESID_DELTA_ATTN, layer][7]).abs().max() < 1e-6 * delta.abs().max()
    assert copying_scores(ctx).abs().max() <= 1
    assert read_out(ctx, token_streams(ctx, [3, 5]), [1, 2, 4], 'MLP', 0).shape == (2, 3)


def qk_constant(ctx, query: int, layer: int, head: int) -> float:
    "What falls with the distance is counted from the first token in the model, and from the query in a circuit."
    if not ctx.facts.alibi: return 0.0
    slope = 2 ** (-8 * (head + 1) / ctx.n_attention_heads)
    return query * slope * ctx.facts.alibi * ctx.facts.attention_scales[layer]


# Edits by role


def edited(model, tokens, *edits) -> torch.Tensor:
    "The logits with edits by role: (location, layer, function of what passes)."
    lm = TracedModel(model)
    with torch.no_grad(), lm.trace(tokens):
        for location, layer, change in edits:
            site = lm.at(location, layer)
            site.output = change(site.output)
        logits = lm.at('logits').output.save()
    return logits.value


def hooked(model, tokens, path: str, change, inputs: bool = False) -> torch.Tensor:
    "The logits with a plain hook on what a module gives, or gets."

    def on_output(module, args, out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    module = model.get_submodule(path)
    if inputs:
        hook = module.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
    else:
        hook = module.register_forward_hook(on_output)
    try:
        with torch.no_grad():
            return model(tokens).logits
    finally:
        hook.remove()


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize('kernel', ['sdpa', 'eager'])
@pytest.mark.parametrize('name', NEW)
def test_what_is_written_back_unchanged_changes_nothing(name, kernel):
    if kernel == 'sdpa' and name in PLAIN_ONLY: return
    ctx, tokens = tiny_context(name, kernel=kernel), ids(2, 8)
    model = ctx.get_or_create_model()
    with torch.no_grad():
        plain = model(tokens).logits
    tried = 0
    for location in A:
        layer = None if location.has_no_layers else 1
        if not ctx.has_activation(location, layer): continue
        if location.value.endswith('.scale'):
            with pytest.raises(ValueError, match='can be read and not edited'):
                edited(model, tokens, (location, layer, lambda x: x * 1.0))
            continue
        assert off(edited(model, tokens, (location, layer, lambda x: x * 1.0)), plain) < 1e-6, location
        tried += 1
    assert tried > 12


@pytest.mark.parametrize('kernel', ['sdpa', 'eager'])
@pytest.mark.parametrize('name', NEW)
def test_edits_do_what_plain_hooks_do(name, kernel):
    if kernel == 'sdpa' and name in PLAIN_ONLY: return
    ctx, tokens, layer = tiny_context(name, kernel=kernel), ids(2, 8), 1
    model, size = ctx.get_or_create_model(), ctx.get_dim_size(Dimension.VALUE_CHANNELS)
    with torch.no_grad():
        plain = model(tokens).logits

    def without_head(x):  # The first head's pattern: what it adds is gone
        return torch.cat([torch.zeros_like(x[..., :1]), x[..., 1:]], -1)

    def without_channels(x):
        return torch.cat([torch.zeros_like(x[..., :size]), x[..., size:]], -1)

    head = hooked(model, tokens, ctx.module_path('attn_out', layer), without_channels, inputs=True)
    assert off(edited(model, tokens, (A.ATTN_QK_PROBS, layer, without_head)), head) < 1e-6
    assert off(head, plain) > 1e-4
    for location, roles in (
        (A.RESID_DELTA_ATTN, ('post_attn_norm', 'attn')),
        (A.RESID_DELTA_MLP, ('post_mlp_norm', 'mlp')),
        (A.RESID_POST_MLP, ('block',)),
    ):
        path = ctx.module_path(next(role for role in roles if ctx.has_module(role, layer)), layer)
        want = hooked(model, tokens, path, lambda x: x * 0.5)
        assert off(edited(model, tokens, (location, layer, lambda x: x * 0.5)), want) < 1e-9, location
        assert off(want, plain) > 1e-4
    if layer not in ctx.facts.sparse_layers:
        path = ctx.stored_at(W.MLP_TO_RESIDUAL, layer)[0][0].rpartition('.')[0]
        want = hooked(model, tokens, path, without_head, inputs=True)  # the first neuron
        assert off(edited(model, tokens, (A.MLP_POST_ACT, layer, without_head)), want) < 1e-9


@pytest.mark.parametrize('name', [name for name in NEW if tiny_context(name).facts.sparse_layers])
def test_edits_of_experts_agree_with_each_other(name):
    ctx, tokens = tiny_context(name), ids(2, 8)
    model, layer = ctx.get_or_create_model(), ctx.facts.sparse_layers[-1]

    def without_expert(x, axis):
        return x * (torch.arange(x.shape[axis]) != 2).view(-1, *[1] * (-1 - axis))

    outputs = edited(model, tokens, (A.EXPERT_OUTPUTS, layer, lambda x: without_expert(x, -2)))
    weights = edited(model, tokens, (A.ROUTER_WEIGHTS, layer, lambda x: without_expert(x, -1)))
    assert off(outputs, weights) < 1e-6  # weights may be in float32
    with torch.no_grad():
        assert off(outputs, model(tokens).logits) > 1e-4


# What isn't covered


@pytest.mark.parametrize('model_type, config, said', [
    ('opt', dict(do_layer_norm_before=False), 'do_layer_norm_before=False'),
    ('opt', dict(word_embed_proj_dim=512), 'word_embed_proj_dim=512'),
    ('gptj', dict(rotary_dim=None), 'rotary_dim is missing'),
    ('falcon', dict(new_decoder_architecture=True, parallel_attn=False), 'parallel_attn=False'),
    ('gpt_oss', dict(swiglu_alpha=2.0), 'swiglu_alpha=2.0'),
    ('deepseek_v3', dict(num_key_value_heads=8), 'num_key_value_heads=8'),
    ('deepseek_v2', dict(topk_method='noaux_tc'), "topk_method='noaux_tc'"),
    ('phi', dict(is_causal=False), 'is_causal=False'),
    ('granite', dict(num_attention_heads=5, hidden_act='xielu'), None),
])  # fmt: skip
def test_a_refusal_says_what_is_missing(model_type, config, said):
    if said is None:  # an activation that nobody knows is named when it is computed
        facts = layout_for(model_type).read_config(config)
        ctx = tiny_context('Granite')
        ctx.facts = replace(ctx.facts, activation=facts.activation)
        with pytest.raises(ValueError, match="the activation 'xielu' is not known here"):
            check_reassembly(ctx)
        return
    with pytest.raises(ValueError, match=said):
        layout_for(model_type).read_config(config)


def test_what_a_block_lacks_is_said():
    for name, location, said in (
        ('Phi', A.RESID_POST_ATTN, 'nothing passes between them'),
        ('OLMo-2', A.ATTN_INPUT_LAYER_NORM_SCALE, 'normalise what a sublayer adds'),
        ('OLMo-2', A.RESID_POST_MLP_LAYER_NORM, 'normalise what a sublayer adds'),
        ('GraniteMoE', A.MLP_PRE_ACT, 'the layers with experts are 0, 1, 2'),
    ):
        ctx = tiny_context(name)
        assert not ctx.has_activation(location, 1)
        with pytest.raises(ValueError, match=said):
            ctx.run([1, 2, 3], [(location, 1)])
    with pytest.raises(ValueError, match='no norm behind its last block'):
        tiny_context('OPT, without biases').run([1, 2], [A.RESID_POST_FINAL_LAYER_NORM])


def test_a_page_registers_itself_when_it_is_asked_for():
    code = """
from transformer_experiments.accessors.layouts import LAYOUTS, LAZY_MODULES, layout_for
assert 'gpt_neox' not in LAYOUTS and len(LAYOUTS) == 12, LAYOUTS.keys()
assert layout_for('phi').name == 'Phi' and 'gpt_neox' in LAYOUTS and 'granite' not in LAYOUTS
try:
    layout_for('rwkv')
except ValueError as e:
    assert all(name in str(e) for types in LAZY_MODULES.values() for name in types), e
"""
    subprocess.run([sys.executable, '-c', code], check=True)
    for page, types in LAZY_MODULES.items():
        for model_type in types:
            assert model_type in layout_for(model_type).model_types, page
