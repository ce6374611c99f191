"""Every activation of every architecture, read and edited by its name, beside plain hooks and attention written out."""

import ast
import copy
from pathlib import Path

import pytest
import torch
import transformers as T
from torch.nn import functional as F

import transformer_experiments
from transformer_experiments.accessors import ActivationLocationType as A
from transformer_experiments.accessors import HFModelContext, TinyShakespeareModelContext
from transformer_experiments.models.moe_transformer import MoETransformerConfig
from transformer_experiments.models.transformer import TransformerConfig
from transformer_experiments.moe import MoEConfig
from transformer_experiments.tracing import Graph, LanguageModel, Session, TracedModel

SIZES = dict(vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)
CONFIGS = {
    'gpt2': T.GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    'llama': T.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    'qwen2': T.Qwen2Config(**SIZES),
    'qwen3': T.Qwen3Config(**SIZES, head_dim=6),
    'mistral': T.MistralConfig(**SIZES, sliding_window=4, head_dim=6),
    'gemma2': T.Gemma2Config(**SIZES, head_dim=6, sliding_window=4, query_pre_attn_scalar=9,
                             attn_logit_softcapping=.3, final_logit_softcapping=.5),
    'gemma3': T.Gemma3TextConfig(**SIZES, head_dim=6, sliding_window=4, query_pre_attn_scalar=9),
    'mixtral': T.MixtralConfig(**SIZES, num_local_experts=4),
    'qwen3 moe': T.Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=5, num_experts_per_tok=2,
                                  mlp_only_layers=[0], head_dim=6, norm_topk_prob=True),
    'olmoe': T.OlmoeConfig(**SIZES | dict(num_key_value_heads=4), num_experts=5, num_experts_per_tok=2),
}
TOKENS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(3))
LAYER = 1


def made(name: str, kernel: str = 'sdpa'):
    "A random model in float64; the same whatever the kernel."
    torch.manual_seed(0)
    if name == 'ours':
        model = TransformerConfig(16, 24, 3, 3, 0.1).build(60)
    elif name == 'ours moe':
        moe = MoEConfig(24, 20, 4, bias=True, n_shared_experts=1)
        model = MoETransformerConfig(16, 24, 3, 3, 0.1, moe=moe, moe_layers=(0, 1)).build(60)
    else:
        config = copy.deepcopy(CONFIGS[name])
        config._experts_implementation = 'eager' # the grouped kernel has no float64
        if name == 'gemma2' and kernel == 'sdpa':
            kernel = 'eager' # its caps have no fused kernel
        model = T.AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * .2
    return model.double().eval()


def context_of(model):
    return HFModelContext(model) if hasattr(model.config, 'model_type') else TinyShakespeareModelContext(model)


NAMES = (*CONFIGS, 'ours', 'ours moe')


def logits_of(model, tokens=TOKENS):
    with torch.no_grad():
        out = model(tokens)
    return out.logits if hasattr(out, 'logits') else out[0]


def traced(model, location, edit, layer=LAYER):
    "The logits with an edit by name, and the value before it."
    lm = TracedModel(model)
    with torch.no_grad(), lm.trace(TOKENS):
        site = lm.at(location, None if location.has_no_layers else layer)
        before = site.output.clone().save()
        site.output = edit(site.output)
        logits = lm.at('logits').output.save()
    return logits.value, before.value


# Outside of attention: a plain hook on a module that this table names


HF = dict(block='model.layers.1', attn_norm='model.layers.1.input_layernorm', attn='model.layers.1.self_attn',
          out='model.layers.1.self_attn.o_proj', mlp_norm='model.layers.1.post_attention_layernorm',
          mlp='model.layers.1.mlp', gate='model.layers.1.mlp.gate_proj', down='model.layers.1.mlp.down_proj',
          final='model.norm', first='model.layers.0', router='model.layers.1.mlp.gate')
GEMMA = HF | dict(attn='model.layers.1.post_attention_layernorm', mlp_norm='model.layers.1.pre_feedforward_layernorm',
                  mlp='model.layers.1.post_feedforward_layernorm')
MODULES = {
    'gpt2': dict(block='transformer.h.1', attn_norm='transformer.h.1.ln_1', attn='transformer.h.1.attn',
                 out='transformer.h.1.attn.c_proj', mlp_norm='transformer.h.1.ln_2', mlp='transformer.h.1.mlp',
                 gate='transformer.h.1.mlp.c_fc', down='transformer.h.1.mlp.c_proj', final='transformer.ln_f',
                 first='transformer.h.0'),
    'gemma2': GEMMA, 'gemma3': GEMMA,
    'ours': dict(block='blocks.1', attn_norm='blocks.1.ln1', attn='blocks.1.sa', out='blocks.1.sa.proj',
                 mlp_norm='blocks.1.ln2', mlp='blocks.1.ffwd', gate='blocks.1.ffwd.net.0', down='blocks.1.ffwd.net.2',
                 final='ln_f', first='blocks.0'),
}
MODULES['ours moe'] = MODULES['ours'] | dict(router='blocks.1.ffwd.moe.router')
PLAIN = {
    A.RESID_POST_EMBEDDING: ('first', 'input'), A.RESID_POST_ATTN_LAYER_NORM: ('attn_norm', 'output'),
    A.ATTN_WEIGHTED_SUM_OF_VALUES: ('out', 'input'), A.RESID_DELTA_ATTN: ('attn', 'output'),
    A.RESID_POST_ATTN: ('mlp_norm', 'in place'), A.RESID_POST_MLP_LAYER_NORM: ('mlp_norm', 'output'),
    A.MLP_PRE_ACT: ('gate', 'output'), A.MLP_POST_ACT: ('down', 'input'), A.RESID_DELTA_MLP: ('mlp', 'output'),
    A.RESID_POST_MLP: ('block', 'output'), A.RESID_POST_FINAL_LAYER_NORM: ('final', 'output'),
}
SPARSE = ('mixtral', 'qwen3 moe', 'olmoe', 'ours moe')


def first_of(value):
    return value if isinstance(value, torch.Tensor) else value[0]


def hooked(model, name, where, end, change):
    "The logits with a plain hook, and what it saw."
    module, seen = model.get_submodule(MODULES.get(name, HF)[where]), []

    def after(module, args, out):
        seen.append(first_of(out).clone())
        new = change(first_of(out))
        return new if isinstance(out, torch.Tensor) else (new, *out[1:])

    def before(module, args, kwargs):
        (key, x), *_ = kwargs.items() if not args else [(None, args[0])]
        seen.append(x.clone())
        if end == 'in place': # the residual connection around the norm has the same tensor
            x.copy_(change(x))
            return None
        return ((change(x), *args[1:]), kwargs) if args else (args, kwargs | {key: change(x)})

    handle = module.register_forward_hook(after) if end == 'output' \
        else module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        return logits_of(model), seen[0]
    finally:
        handle.remove()


def half(x):
    "Another value in every place, without randomness."
    return x * .5 + .1


@pytest.mark.parametrize('location', PLAIN)
@pytest.mark.parametrize('name', NAMES)
def test_an_edit_by_name_is_that_of_a_plain_hook(name, location):
    model = made(name)
    if not context_of(model).has_activation(location, None if location.has_no_layers else LAYER):
        assert name in SPARSE and location in (A.MLP_PRE_ACT, A.MLP_POST_ACT)
        return
    got, before = traced(model, location, half)
    want, seen = hooked(made(name), name, *PLAIN[location], half)
    assert torch.equal(before.reshape(seen.shape), seen)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12) # the same operations in float64
    assert (got - logits_of(model)).abs().max() > 1e-4


# Attention: the same model with attention written out, edits included


EDIT: dict = {} # part -> a change of it; what the reference does in layer 1


def reference_attention(module, query, key, value, attention_mask, scaling, dropout=0., softcap=None, **more):
    edit = EDIT if getattr(module, 'layer_idx', 1) == LAYER else {}
    heads = query.shape[1]

    def changed(part, x, turn, back):
        return back(edit[part](turn(x))) if part in edit else x

    def later(x):
        return x.transpose(1, 2)

    def each(x):
        return x.repeat_interleave(heads // x.shape[1], 1)

    query = changed('q', query, later, later)
    key, value = (changed(f'kv_{n}', x, later, later) for n, x in (('k', key), ('v', value)))
    key, value = (changed(n, each(x), later, later) for n, x in (('k', key), ('v', value)))
    logits = query @ key.mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    t, s = logits.shape[-2:]
    hidden = torch.ones(t, s).triu(1) > 0 if attention_mask is None else attention_mask < -1
    logits = logits.masked_fill(hidden, -torch.inf)
    logits = changed('logits', logits, lambda x: x.movedim(1, -1), lambda x: x.movedim(-1, 1))
    probs = changed('probs', logits.softmax(-1), lambda x: x.movedim(1, -1), lambda x: x.movedim(-1, 1))
    return (probs @ value).transpose(1, 2).contiguous(), probs


T.AttentionInterface.register('written out', reference_attention)
T.AttentionMaskInterface.register('written out', T.masking_utils.eager_mask)


def changes(x):
    x = x.clone()
    x[..., 0] = x[..., 0] * .5 + .2
    x[:, 1:, 1] *= .7
    return x


PARTS = {A.ATTN_QUERY: 'q', A.ATTN_KV_KEY: 'kv_k', A.ATTN_KEY: 'k', A.ATTN_KV_VALUE: 'kv_v', A.ATTN_VALUE: 'v',
         A.ATTN_QK_LOGITS: 'logits', A.ATTN_QK_PROBS: 'probs'}


@pytest.mark.parametrize('kernel', ['sdpa', 'eager'])
@pytest.mark.parametrize('location', PARTS)
@pytest.mark.parametrize('name', CONFIGS)
def test_an_edit_inside_attention_is_that_of_attention_written_out(name, location, kernel):
    got, before = traced(made(name, kernel), location, changes)
    seen = []
    EDIT.update({PARTS[location]: lambda x: seen.append(x.clone()) or changes(x)})
    try:
        want = logits_of(made(name, 'written out'))
    finally:
        EDIT.clear()
    # transformers' own softmax goes through float32 in the eager kernel
    atol = 1e-5 if kernel == 'eager' or name == 'gemma2' else 1e-9
    torch.testing.assert_close(before, seen[0], rtol=0, atol=atol)
    torch.testing.assert_close(got, want, rtol=0, atol=atol)
    assert (got - logits_of(made(name, kernel))).abs().max() > 1e-5


@pytest.mark.parametrize('location', PARTS)
def test_an_edit_inside_our_attention(location):
    model = made('ours')
    got, _ = traced(model, location, changes)
    EDIT.update({PARTS[location]: changes})

    def written_out(self, x, cache=None, layer=0, mask=None):
        q, k, v = self.heads(x).unbind()
        self.layer_idx = layer
        out, _ = reference_attention(self, q, k, v, None, q.shape[-1] ** -.5)
        return self.proj(out.flatten(2))

    attention = type(model.blocks[0].sa)
    original = attention.forward
    attention.forward = written_out
    try:
        want = logits_of(model)
    finally:
        attention.forward = original
        EDIT.clear()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


# Experts


def other_choice(logits):
    logits = logits.clone()
    logits[..., 1] = 9.
    return logits


@pytest.mark.parametrize('name', SPARSE)
def test_router_logits_decide_who_is_chosen(name):
    model = made(name)
    lm = TracedModel(model)
    with torch.no_grad(), lm.trace(TOKENS):
        lm.at('router.logits', LAYER).output[..., 1] = 9.
        weights = lm.at('router.weights', LAYER).output.save()
        got = lm.at('logits').output.save()
    assert (weights.value[..., 1] > 0).all()
    router = model.get_submodule(MODULES.get(name, HF)['router'])
    original = F.linear
    # the router's only product, replaced for the reference
    def product(x, w, b=None):
        return other_choice(original(x, w, b)) if w is router.weight else original(x, w, b)
    F.linear = torch.nn.functional.linear = product
    try:
        want = logits_of(model)
    finally:
        F.linear = torch.nn.functional.linear = original
    torch.testing.assert_close(got.value, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize('name', SPARSE)
def test_an_expert_that_says_nothing(name):
    "One expert's outputs set to zero, beside the model whose expert has zeros for its last matrix."
    model = made(name)
    lm = TracedModel(model)
    load = context_of(model).run(TOKENS, [(A.ROUTER_WEIGHTS, LAYER)])[A.ROUTER_WEIGHTS, LAYER].sum((0, 1))
    busiest = int(load.argmax())
    with torch.no_grad(), lm.trace(TOKENS):
        lm.at('expert.outputs', LAYER).output[..., busiest, :] = 0
        got = lm.at('logits').output.save()
    with torch.no_grad(), lm.trace(TOKENS):
        lm.at('router.weights', LAYER).output[..., busiest] = 0
        by_weight = lm.at('logits').output.save()
    silent = made(name)
    experts = silent.get_submodule('blocks.1.ffwd.moe.experts' if name == 'ours moe' else 'model.layers.1.mlp.experts')
    with torch.no_grad():
        for n, p in experts.named_parameters():
            if 'down' in n:
                p[busiest] = 0
    want = logits_of(silent)
    torch.testing.assert_close(got.value, want, rtol=0, atol=1e-9) # the sum of experts, in another order
    torch.testing.assert_close(by_weight.value, want, rtol=0, atol=1e-12)
    assert (want - logits_of(model)).abs().max() > 1e-5


@pytest.mark.parametrize('name', SPARSE)
def test_gradients_through_edited_experts_reach_all_weights(name):
    "An expert at half its strength, by what it gives and by how much it counts: the same gradients of every parameter."
    grads = []
    for location, index in ((A.EXPERT_OUTPUTS, (..., 1, slice(None))), (A.ROUTER_WEIGHTS, (..., 1))):
        model = made(name)
        lm = TracedModel(model)
        with lm.trace(TOKENS):
            lm.at(location, LAYER).output[index] *= .5
            (lm.at('logits').output ** 2).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert all((g is None) == (grads[1][n] is None) for n, g in grads[0].items())
    for n, g in grads[0].items():
        if g is not None:
            torch.testing.assert_close(g, grads[1][n], rtol=0, atol=1e-7 * float(grads[1][n].abs().max() + 1e-3), msg=n)


def test_a_weight_for_an_expert_that_was_not_chosen():
    lm = TracedModel(made('mixtral'))
    with pytest.raises(ValueError, match='edit router.logits'), lm.trace(TOKENS):
        lm.at('router.weights', LAYER).output[:] = .25
        lm.at('logits').output.save()


# What a trace that changes nothing gives; gradients; other contexts


@pytest.mark.parametrize('name', NAMES)
def test_reading_everything_changes_nothing(name):
    model = made(name)
    ctx, lm = context_of(model), TracedModel(model)
    found = {}
    with torch.no_grad(), lm.trace(TOKENS):
        for location, layer in ctx.activation_locations():
            found[location, layer] = lm.at(location, layer).output.save()
        out = lm.output.save()
    logits = out.value.logits if hasattr(out.value, 'logits') else out.value[0]
    assert torch.equal(logits, logits_of(model))
    for key, x in ctx.run(TOKENS).items():
        assert torch.equal(found[key].value, x), key


@pytest.mark.parametrize('name', ['gpt2', 'qwen3', 'mistral', 'gemma2', 'mixtral'])
def test_gradients_of_what_a_kernel_hides(name):
    model, weights = made(name), torch.linspace(-1, 1, 60, dtype=torch.float64)
    lm, got = TracedModel(model), {}
    with lm.trace(TOKENS):
        for location in (A.RESID_POST_ATTN, A.ATTN_QUERY, A.ATTN_QK_PROBS, A.ATTN_WEIGHTED_SUM_OF_VALUES):
            got[location] = lm.at(location, LAYER).output.grad.save()
        (lm.at('logits').output[:, -1] @ weights).sum().backward()
    want, reference = {}, made(name, 'written out')
    EDIT.update({part: lambda x, key=key: want.setdefault(key, x) for key, part in PARTS.items() if key in got})
    paths = {A.RESID_POST_ATTN: 'mlp_norm', A.ATTN_WEIGHTED_SUM_OF_VALUES: 'out'}

    def keep(key):
        return lambda module, args: want.update({key: args[0]})

    hooks = [reference.get_submodule(MODULES.get(name, HF)[where]).register_forward_pre_hook(keep(key))
             for key, where in paths.items()]
    try:
        out = reference(TOKENS)
    finally:
        EDIT.clear()
        for hook in hooks:
            hook.remove()
    total = ((out.logits if hasattr(out, 'logits') else out[0])[:, -1] @ weights).sum()
    for key, gradient in got.items():
        (by_hand,) = torch.autograd.grad(total, want[key], retain_graph=True)
        # the models' norms go through float32
        torch.testing.assert_close(gradient.value, by_hand.reshape(gradient.value.shape), rtol=1e-4, atol=1e-5)


class Numbers:
    "A tokenizer of whole numbers."
    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return ' '.join(map(str, ids))


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'ours'])
def test_generation_sessions_conditions_and_prompts(name):
    model = made(name)
    lm = LanguageModel(model, Numbers())
    with lm.generate('3 1 4', max_new_tokens=4) as tracer:
        kept = [lm.at('attn.qk_probs', LAYER).next(min(i, 1)).output.save() for i in range(3)]
    assert [x.value.shape[1:3] for x in kept] == [(3, 3), (1, 4), (1, 5)]
    with lm.generate('3 1 4', max_new_tokens=3) as tracer:
        lm.at('logits').all().output[..., 7] = 1e3
        out = lm.generator.output.save()
    assert out.value[0, 3:].tolist() == [7, 7, 7]
    with torch.no_grad():
        with Session():
            with lm.trace('3 1 4 1'):
                stream = lm.at('resid.post_mlp', 0).output.save()
            with lm.trace('3 1 4 1'):
                lm.at('resid.post_mlp', 0).output = stream * 0
                silent = lm.at('resid.post_mlp', 0).output.abs().max().save()
        assert silent.value == 0
        with lm.trace() as tracer:
            with tracer.invoke('3 1 4 1 5 9'):
                with tracer.cond(lm.at('resid.post_mlp', 0).output.mean() < 1e9):
                    lm.at('attn.v_out', LAYER).output[..., 0, :] = 0
                a = lm.at('logits').output[0, -1].save()
            with tracer.invoke('3 1 4 1'):
                b = lm.at('logits').output[0, -1].save()
        with lm.trace('3 1 4 1') as tracer:
            alone = lm.at('logits').output[0, -1].save()
        with lm.trace('3 1 4 1 5 9') as tracer:
            lm.at('attn.v_out', LAYER).output[..., 0, :] = 0
            edited = lm.at('logits').output[0, -1].save()
    torch.testing.assert_close(b.value, alone.value, rtol=0, atol=1e-9)
    torch.testing.assert_close(a.value, edited.value, rtol=0, atol=1e-9)


def test_a_lasting_edit_and_a_trace_of_the_same_pattern():
    lm = TracedModel(made('llama'))
    with lm.edit() as edited:
        lm.at('attn.qk_probs', LAYER).output[..., 0] = 0
    with torch.no_grad(), edited.trace(TOKENS):
        pattern = edited.at('attn.qk_probs', LAYER).output.save()
        edited.at('attn.qk_probs', LAYER).output[..., 1] = 0
        heads = edited.at('attn.v_out', LAYER).output.save()
    assert pattern.value[..., 0].abs().max() == 0 and pattern.value[..., 1].abs().max() > 0
    assert heads.value[..., :2, :].abs().max() == 0 and heads.value[..., 2, :].abs().max() > 0


def test_a_checkpointed_layer_is_recomputed_with_the_edit():
    model = made('llama').train()
    lm, grads = TracedModel(model), []
    for again in (False, True):
        model.zero_grad()
        if again:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        with lm.trace(TOKENS):
            lm.at('attn.qk_probs', LAYER).output[..., 3] = 0
            lm.at('resid.post_attn', LAYER).output[:] *= .5
            lm.at('logits').output.sum().backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_one_program_for_all():
    def write(lm):
        with torch.no_grad(), lm.trace(TOKENS) as tracer:
            lm.at('attn.qk_probs', LAYER).output[..., 1] = 0
            lm.at('resid.post_attn', LAYER).output[:, 0] *= 2
            lm.at('logits').output.save()
        return tracer.graph
    graphs = {name: write(TracedModel(made(name))) for name in NAMES}
    assert len({g.sha256 for g in graphs.values()}) == 1
    graph = Graph.from_json(graphs['gpt2'].to_json())
    for name in NAMES:
        with torch.no_grad():
            (a,), (b,) = (TracedModel(made(name)).run(g, TOKENS).values() for g in (graph, graphs[name]))
        assert torch.equal(a, b)


REGISTERS = ('register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook',
             'register_full_backward_pre_hook', 'register_module_forward_hook', 'register_module_forward_pre_hook')


def test_one_module_registers_hooks():
    package = Path(transformer_experiments.__file__).parent
    found = {}
    for path in package.rglob('*.py'):
        names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        if used := names & {*REGISTERS}:
            found[path.relative_to(package).as_posix()] = used
    assert not found # common.hooks itself writes into the modules' dictionaries


def test_hooks_and_modes_are_gone_after_an_error():
    model = made('llama')
    lm = TracedModel(model)
    with pytest.raises(IndexError, match=r"on at\('attn.qk_probs', 1\).output"), lm.trace(TOKENS):
        lm.at('attn.qk_probs', LAYER).output[..., 99] = 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.equal(logits_of(model), logits_of(made('llama')))
