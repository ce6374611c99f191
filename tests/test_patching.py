"""Sweeps beside loops of plain hooks, estimates beside their formulas, edges beside brute force; kills; bad inputs."""

import json
import multiprocessing
import os
import random
import signal

import pytest
import torch
from click.testing import CliRunner
from kills import contents, die_at, random_kill
from transformers import GPT2Config, GPT2LMHeadModel

from transformer_experiments.accessors.contexts import HFModelContext
from transformer_experiments.accessors.tiny_models import tiny_context
from transformer_experiments.cli import main
from transformer_experiments.common.activation_store import MANIFEST
from transformer_experiments.experiments import (
    Change,
    Circuit,
    Contrast,
    contrast_from_template,
    edge_effects,
    find_circuit,
    path_patch,
    sweep,
)
from transformer_experiments.experiments.edge_scores import edge_scores
from transformer_experiments.experiments.paths import ComponentGraph, Wiring, edge_runs, run_graph
from transformer_experiments.experiments.sweep_results import SweepResult
from transformer_experiments.models.moe_transformer import MoETransformerConfig
from transformer_experiments.moe import MoEConfig
from transformer_experiments.tracing import LanguageModel

KILLS = int(os.environ.get('KILLS', 3))
ONE_ROW = 1 << 16  # bytes: every variant alone in its batch
context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(
    ['transformer_experiments.experiments.patching', 'transformers.models.llama.modeling_llama']
)
BLOCKS = {
    'GPT-2': 'transformer.h',
    'Llama': 'model.layers',
    'GPT-NeoX': 'gpt_neox.layers',
    'Mixtral': 'model.layers',
    'ours': 'blocks',
}
HEADS = {
    'GPT-2': 'attn.c_proj',
    'Llama': 'self_attn.o_proj',
    'GPT-NeoX': 'attention.dense',
    'Mixtral': 'self_attn.o_proj',
    'ours': 'sa.proj',
}
NEURONS = {'GPT-2': 'mlp.c_proj', 'Llama': 'mlp.down_proj', 'GPT-NeoX': 'mlp.dense_4h_to_h'}


def prompts(n=3, length=6, seed=0, vocab=60):
    "Pairs of prompts that differ in one token."
    g = torch.Generator().manual_seed(seed)
    clean = list(torch.randint(vocab, (n, length), generator=g))
    corrupt = [t.clone() for t in clean]
    for t in corrupt:
        t[2] = (t[2] + 1 + torch.randint(vocab - 2, (1,), generator=g)) % vocab
    return clean, corrupt


def task_for(ctx, n=3, length=6, seed=0, **more):
    return Contrast(ctx, *prompts(n, length, seed), [(5, 9)] * n, **dict(threshold=None) | more)


def logits_of(model, tokens):
    with torch.no_grad():
        out = model(tokens[None])
    return (out.logits if hasattr(out, 'logits') else out[0])[0, -1]


def hidden(out):
    return out[0] if isinstance(out, tuple) else out


def block_output(model, name, layer):
    return model.get_submodule(f'{BLOCKS[name]}.{layer}')


def seen_in(model, module, tokens, inputs=False):
    "What a plain hook sees."
    seen = []
    handle = (
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
        if inputs
        else module.register_forward_hook(lambda m, args, out: seen.append(hidden(out).clone()))
    )
    logits_of(model, tokens)
    handle.remove()
    return seen[0]


def run_with(model, module, tokens, edit, inputs=False):
    "The usual loop's body: one forward pass with one hook."

    def after(m, args, out):
        x = edit(hidden(out).clone())
        return (x, *out[1:]) if isinstance(out, tuple) else x

    handle = (
        module.register_forward_pre_hook(lambda m, args: (edit(args[0].clone()), *args[1:]))
        if inputs
        else module.register_forward_hook(after)
    )
    try:
        return logits_of(model, tokens)
    finally:
        handle.remove()


@pytest.mark.parametrize('name', BLOCKS)
@pytest.mark.parametrize('mode', ['denoising', 'noising'])
def test_a_grid_of_layers_and_positions_is_the_loop_bit_for_bit(name, mode):
    ctx = tiny_context(name)
    task, model = task_for(ctx), ctx.get_or_create_model()
    found = sweep(task, 'resid.post_mlp', mode=mode, memory=ONE_ROW)
    loop = torch.zeros(3, 3, 6, dtype=torch.float64)
    for i, pair in enumerate(zip(task.clean, task.corrupt, strict=True)):
        source, base = pair if mode == 'denoising' else pair[::-1]
        for layer in range(3):
            block = block_output(model, name, layer)
            x = seen_in(model, block, source)
            for p in range(6):

                def put(y, x=x, p=p):
                    y[:, p] = x[:, p]
                    return y

                logits = run_with(model, block, base, put)
                loop[i, layer, p] = logits[5] - logits[9]
    assert torch.equal(found.scores, loop)
    assert found.facts['control'] == {'itself': 0, 'after the answer': 0}  # nothing at all
    batched = sweep(task, 'resid.post_mlp', mode=mode)
    assert (batched.scores - loop).abs().max() < 1e-12  # a product of more rows may add in another order
    gap = task.clean_scores.mean() - task.corrupt_scores.mean()
    assert torch.allclose(found.values, (loop.mean(0) - task.corrupt_scores.mean()) / gap, 0, 1e-12)


@pytest.mark.parametrize('name', HEADS)
def test_heads_and_neurons_are_the_loop_bit_for_bit(name):
    ctx = tiny_context(name)
    task, model = task_for(ctx, 2), ctx.get_or_create_model()
    cases = [('attn.v_out', HEADS[name], 'head', range(4), 8)]
    if name in NEURONS:
        cases.append(('mlp.post_act', NEURONS[name], 'neuron', (0, 7, 30), 1))
    for location, path, unit, units, width in cases:
        found = sweep(task, location, ('layer', unit), units=list(units), memory=ONE_ROW)
        for i, (clean, corrupt) in enumerate(zip(task.clean, task.corrupt, strict=True)):
            for layer in range(3):
                module = block_output(model, name, layer).get_submodule(path)
                x = seen_in(model, module, clean, inputs=True)
                for j, u in enumerate(units):
                    at = slice(u * width, (u + 1) * width)

                    def put(y, x=x, at=at):
                        y[..., at] = x[..., at]
                        return y

                    logits = run_with(model, module, corrupt, put, inputs=True)
                    assert found.scores[i, layer, j] == logits[5] - logits[9], (location, layer, u)


@pytest.mark.parametrize(
    'location, unit',
    [
        ('attn.q', 'head'),
        ('attn.kv_v', 'head'),
        ('attn.qk_probs', 'head'),
        ('expert.outputs', 'expert'),
        ('router.weights', 'expert'),
        ('resid.delta_attn', 'channel'),
        ('resid.post_attn', None),
    ],
)
def test_other_locations_are_a_trace_by_name(location, unit):
    "The tracing engine sets the same activations, one trace for each component."
    ctx = tiny_context('Qwen3-MoE')
    task = task_for(ctx, 1)
    lm = LanguageModel(ctx.get_or_create_model(), tokenizer=object())
    layer, axis = 0, {'attn.qk_probs': 3}.get(location, 2)
    units = [0, 1]
    if location == 'router.weights':
        with pytest.raises(ValueError, match='edit router.logits'):  # another expert would count than was chosen
            sweep(task, location, ('layer', unit), layers=[layer], units=units)
        return
    by = ('layer', 'position', unit) if unit else ('layer', 'position')
    found = sweep(task, location, by, layers=[layer], positions=[2, 5], units=units if unit else None)
    with torch.no_grad(), lm.trace(task.clean[0]):
        clean = lm.at(location, layer).output.save()
    for i, p in enumerate((2, 5)):
        for j, u in enumerate(units if unit else (slice(None),)):
            with torch.no_grad(), lm.trace(task.corrupt[0]):
                x = lm.at(location, layer).output.clone()
                if axis == 3:
                    x[:, p, :, u] = clean[:, p, :, u]
                else:
                    x[:, p, u] = clean[:, p, u]
                lm.at(location, layer).output = x
                logits = lm.at('logits').output.save()
            score = found.scores[0, 0, i, j] if unit else found.scores[0, 0, i]
            assert abs(score - (logits[0, -1, 5] - logits[0, -1, 9])) < 1e-9


@pytest.mark.parametrize('change', ['zero', 'mean', 'resample', 'noise', 'direction'])
def test_ablations_are_hooks_in_the_clean_run(change):
    ctx = tiny_context('Llama')
    task, model = task_for(ctx, 3), ctx.get_or_create_model()
    direction = torch.randn(32, generator=torch.Generator().manual_seed(4)).double()
    more = dict(direction=direction) if change == 'direction' else {}
    found = sweep(task, 'resid.post_mlp', ('layer', 'position'), change=change, memory=ONE_ROW, seed=3, **more)
    assert torch.equal(
        found.scores,
        sweep(task, 'resid.post_mlp', ('layer', 'position'), change=change, memory=ONE_ROW, seed=3, **more).scores,
    )
    block = block_output(model, 'Llama', 1)
    clean = [seen_in(model, block, t) for t in task.clean]
    everyone = torch.cat([*clean, *(seen_in(model, block, t) for t in task.corrupt)])
    unit = direction / direction.norm()
    for i, tokens in enumerate(task.clean):
        options = {
            'zero': [torch.zeros_like(clean[i])],
            'mean': [everyone.mean(0, keepdim=True)],
            'resample': [c for j, c in enumerate(clean) if j != i],
            'direction': [clean[i] - (clean[i] @ unit)[..., None] * unit],
        }.get(change)
        if options is None:  # noise: of the right size, and it matters
            assert (found.scores[i, 1] - task.clean_scores[i]).abs().max() > 0
            continue
        scores = []
        for new in options:

            def put(y, new=new):
                y[:, 4] = new[:, 4]
                return y

            logits = run_with(model, block, tokens, put)
            scores.append((logits[5] - logits[9]).item())
        assert min(abs(found.scores[i, 1, 4].item() - s) for s in scores) < 1e-10
    assert found.neutral == 1


def test_prompts_of_unlike_length_and_groups():
    ctx = tiny_context('GPT-2')
    (a, b), (c, d) = prompts(2, 6), prompts(2, 8, seed=1)
    both = Contrast(ctx, a + c, b + d, [(5, 9)] * 4, positions=dict(changed=2), threshold=None)
    found = sweep(both, 'resid.post_mlp', ('layer', 'position'), positions=['changed', 'last', -2])
    for part, rows in (
        (Contrast(ctx, a, b, [(5, 9)] * 2, threshold=None), slice(0, 2)),
        (Contrast(ctx, c, d, [(5, 9)] * 2, threshold=None), slice(2, 4)),
    ):
        alone = sweep(part, 'resid.post_mlp', ('layer', 'position'))
        assert (alone.scores[..., [2, -1, -2]] - found.scores[rows]).abs().max() < 1e-12
    groups = {
        'one': [dict(layer=1, head=2)],
        'two': [dict(layer=1, head=2), dict(layer=1, head=3)],
        'layers': [dict(layer=0), dict(layer=2, head=1)],
    }
    grouped, heads = sweep(both, 'attn.v_out', 'group', groups=groups), sweep(both, 'attn.v_out', ('layer', 'head'))
    assert torch.equal(grouped.scores[:, 0], heads.scores[:, 1, 2])
    assert not torch.equal(grouped.scores[:, 1], grouped.scores[:, 0])


def test_a_mixture_whose_rows_meet_is_run_row_by_row():
    "Experts with room for few tokens of the batch: a variant in a batch would be another one alone."
    torch.manual_seed(0)
    moe = MoEConfig(
        24,
        20,
        4,
        capacity='switch',
        capacity_factor=0.6,
        eval_capacity_factor=0.6,
        normalize=False,
        top_k=1,
        router='switch',
    )
    model = MoETransformerConfig(64, 24, 3, 3, 0.0, moe=moe, moe_layers=(0, 2)).build(60).double().eval()
    task = task_for(model, 2, 9)
    found = sweep(task, 'resid.post_mlp', ('layer', 'position'))
    for layer in range(3):
        block = model.blocks[layer]
        x = seen_in(model, block, task.clean[0])
        for p in range(9):

            def put(y, x=x, p=p):
                y[:, p] = x[:, p]
                return y

            logits = run_with(model, block, task.corrupt[0], put)
            assert abs(found.scores[0, layer, p] - (logits[5] - logits[9])) < 1e-12


def test_metrics_are_normalised():
    ctx = tiny_context('Llama')
    clean, corrupt = prompts(2)
    for metric in ('logit difference', 'probability', 'kl', 'loss', lambda logits: logits[:, 3]):
        task = Contrast(ctx, clean, corrupt, [(5, 9)] * 2, metric=metric, threshold=None)
        assert abs(task.normalise(task.clean_scores) - 1) < 1e-12 and abs(task.normalise(task.corrupt_scores)) < 1e-12
        values = sweep(task, 'resid.post_mlp', 'layer').values
        assert (values - 1).abs().max() < 1e-6
    assert Contrast(ctx, clean, corrupt, [(5, 9)] * 2, metric='kl', threshold=None).clean_scores.abs().max() < 1e-12


def test_attribution_is_the_gradient_by_a_trace_and_exact_where_the_metric_is_linear():
    ctx = tiny_context('Llama')
    task = task_for(ctx, 2)
    last = sweep(task, 'resid.post_ln_f', 'position', method='attribution')
    assert (last.values - sweep(task, 'resid.post_ln_f', 'position').values).abs().max() < 1e-9
    lm, found = (
        LanguageModel(ctx.get_or_create_model(), tokenizer=object()),
        sweep(task, 'mlp.post_act', ('layer', 'position'), method='attribution'),
    )
    for i in range(2):
        with torch.no_grad(), lm.trace(task.clean[i]):
            clean = lm.at('mlp.post_act', 1).output.save()
        with lm.trace(task.corrupt[i]):
            site = lm.at('mlp.post_act', 1)
            value, grad = site.output.save(), site.output.grad.save()
            logits = lm.at('logits').output
            (logits[0, -1, 5] - logits[0, -1, 9]).backward()
        by_hand = task.corrupt_scores[i] + (grad * (clean - value)).sum(-1)[0]
        assert (found.scores[i, 1] - by_hand.detach()).abs().max() < 1e-9


def test_star_sees_what_saturated_attention_hides():
    ctx = tiny_context('GPT-2')
    with torch.no_grad():
        for block in ctx.get_or_create_model().transformer.h:
            block.attn.c_attn.weight[:, :32] *= 30
    task = task_for(ctx, 2)
    exact, plain, star = (
        sweep(task, 'attn.q', ('head', 'position'), layers=[2], method=m)
        for m in ('exact', 'attribution', 'attribution*')
    )
    assert (star.values - exact.values).abs().sum() < 0.5 * (plain.values - exact.values).abs().sum()
    assert star.compare(exact).cells == 24 and 'rank correlation' in star.picture().alt


def gpt2_by_hand(model, tokens, dropped=None):
    "Logits at the end and what each layer computes, in plain torch. `dropped`: a layer that passes no gradient."
    t, T = model.transformer, len(tokens)
    x, kept = t.wte.weight[tokens] + t.wpe.weight[:T], []
    for i, block in enumerate(t.h):
        a = block.ln_1(x) @ block.attn.c_attn.weight + block.attn.c_attn.bias
        q, k, v = (y.view(T, 4, 8).transpose(0, 1) for y in a.split(32, -1))
        p = probabilities(q, k, i).requires_grad_()
        v_out = (p @ v).transpose(0, 1)
        add = v_out.reshape(T, 32) @ block.attn.c_proj.weight + block.attn.c_proj.bias
        x = x + (add.detach() if i == dropped else add)
        h = torch.nn.functional.gelu(block.ln_2(x) @ block.mlp.c_fc.weight + block.mlp.c_fc.bias, approximate='tanh')
        add = h @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
        x = x + (add.detach() if i == dropped else add)
        kept.append({'q': q, 'k': k, 'p': p, 'attn.v_out': v_out, 'mlp.post_act': h, 'resid.post_mlp': x})
    return (t.ln_f(x) @ model.lm_head.weight.T)[-1], kept


def probabilities(q, k, layer):
    logits = q @ k.transpose(1, 2) / 8**0.5 / (layer + 1)  # (H, T, S); the tiny model scales by layer
    return logits.masked_fill(~torch.ones(logits.shape[1:]).tril().bool(), -torch.inf).softmax(-1)


def star_by_hand(model, clean, corrupt, location):
    "AtP* of each layer, position and, for heads, head: a backward pass for each dropped layer."
    with torch.no_grad():
        _, new = gpt2_by_hand(model, clean)
    effects = []
    for dropped in (None, 0, 1, 2):
        logits, old = gpt2_by_hand(model, corrupt, dropped)
        which = 'p' if location in ('attn.q', 'attn.k') else location
        grads = torch.autograd.grad(logits[5] - logits[9], [o[which] for o in old], allow_unused=True)
        rows = []
        for i, (o, n, g) in enumerate(zip(old, new, grads, strict=True)):
            g = torch.zeros_like(o[which]) if g is None else g
            if location == 'attn.q':
                rows.append((g * (probabilities(n['q'], o['k'], i) - o['p'])).sum(-1).T)
            elif location == 'attn.k':
                each = []
                for s in range(len(clean)):
                    k = o['k'].clone()
                    k[:, s] = n['k'][:, s]
                    each.append((g * (probabilities(o['q'], k, i) - o['p'])).sum((1, 2)))
                rows.append(torch.stack(each))
            else:
                rows.append((g * (n[location] - o[location])).sum(-1))
        effects.append(torch.stack(rows).detach())
    terms = 3 if location == 'resid.post_mlp' else 2
    return torch.where(effects[0] < 0, -1, 1) * torch.stack(effects[1:]).abs().sum(0) / terms


@pytest.mark.parametrize('location', ['attn.q', 'attn.k', 'attn.v_out', 'mlp.post_act', 'resid.post_mlp'])
def test_star_is_the_papers_formula_in_plain_torch(location):
    ctx = tiny_context('GPT-2')
    task, model = task_for(ctx, 2), ctx.get_or_create_model().eval()
    by = ('layer', 'position', 'head') if location.startswith('attn') else ('layer', 'position')
    found = sweep(task, location, by, method='attribution*')
    for i in range(2):
        by_hand = star_by_hand(model, task.clean[i], task.corrupt[i], location)
        assert by_hand.abs().max() > 1e-6
        assert torch.allclose(found.scores[i] - task.corrupt_scores[i], by_hand, rtol=1e-9, atol=1e-12)


def test_star_of_one_layer_is_the_plain_estimate():
    ctx = HFModelContext(GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=1, n_head=2)).eval().double())
    task = task_for(ctx, 2)
    plain, star = (sweep(task, 'attn.v_out', 'head', method=m) for m in ('attribution', 'attribution*'))
    assert plain.values.abs().max() > 0 and torch.allclose(plain.scores, star.scores, rtol=1e-12)


def test_marks_hold_their_level_and_intervals_cover():
    facts = dict(
        model='none',
        pairs=8,
        dropped=0,
        metric='m',
        location='x',
        change='patch',
        method='exact',
        neutral=0.0,
        clean_scores=[1.0] * 8,
        corrupt_scores=[0.0] * 8,
    )
    g, alarms, covered = torch.Generator().manual_seed(0), 0, 0
    for _ in range(60):
        result = SweepResult(
            facts, dict(layer=list(range(30))), torch.randn(8, 30, generator=g, dtype=torch.float64) + 0
        )
        alarms += bool(result.marked().any())
        low, high = result.interval(draws=200)
        covered += ((low <= 0) & (high >= 0)).double().mean().item()
    assert alarms <= 9 and 0.8 < covered / 60 < 0.97  # 3 and .95 are meant; the bootstrap of 8 pairs is a little narrow


def sweep_in(folder: str, kill: tuple | None = None):
    if kill:
        die_at(*kill)
    torch.set_num_threads(1)
    ctx = tiny_context('Llama')
    sweep(
        task_for(ctx, 4),
        'mlp.post_act',
        ('layer', 'position', 'neuron'),
        units=list(range(30)),
        folder=folder,
        memory=1 << 20,
    )


def test_a_killed_sweep_ends_in_the_same_bytes(tmp_path):
    process = context.Process(target=sweep_in, args=(str(tmp_path / 'whole'),))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    whole, rng = contents(tmp_path / 'whole'), random.Random(0)
    n = len(whole) - 1
    assert n > 20
    for _ in range(KILLS):
        kill = random_kill(rng, tmp_path / 'a', n, MANIFEST)
        process = context.Process(target=sweep_in, args=(str(tmp_path / 'a'), kill))
        process.start()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
    process = context.Process(target=sweep_in, args=(str(tmp_path / 'a'),))
    process.start()
    process.join(300)
    assert process.exitcode == 0 and contents(tmp_path / 'a') == whole
    opened = SweepResult.open(tmp_path / 'a')
    assert (
        opened.values.shape == (3, 6, 30)
        and not opened.values.isnan().any()
        and opened.interval().low.shape == (3, 6, 30)
    )


@pytest.mark.parametrize('name', ['GPT-2', 'Llama', 'GPT-NeoX', 'Mixtral', 'ours, sparse'])
def test_all_edges_of_a_head_are_the_patched_head(name):
    "Swapping every edge out of a head is patching its output: a sweep by hooks, the graph from the weights."
    ctx = tiny_context(name)
    task = task_for(ctx, 2)
    graph = ComponentGraph(ctx)
    heads = sweep(task, 'attn.v_out', ('layer', 'head'))
    for layer, head in ((0, 1), (1, 3), (2, 0)):
        w = next(i for i, c in enumerate(graph.writers) if (c.role, c.layer, c.number) == ('head', layer, head))
        mask = graph.exists() & (torch.arange(len(graph.writers)) == w)
        for pair in range(2):
            runs = edge_runs(graph, task, pair, False)
            other = runs.base_written.clone()
            other[w] = runs.source_written[w]
            with torch.no_grad():
                outputs, _ = run_graph(graph, runs.base, Wiring(outputs={w: other[w]}))
                logits, _ = run_graph(graph, runs.base, Wiring(other, mask))
            for found in (outputs, logits):
                assert abs(found[0, 5] - found[0, 9] - heads.scores[pair, layer, head]) < 1e-6
    assert mask.any()


@pytest.mark.parametrize('name', ['Mixtral', 'Qwen3-MoE', 'DeepSeek-V3', 'ours, sparse, all else'])
def test_experts_and_routers_are_ends_of_edges(name):
    "All edges swapped is the other run; an expert that reads what it read anyway changes nothing."
    ctx = tiny_context(name)
    task, graph = task_for(ctx, 1), ComponentGraph(ctx)
    roles = {c.role for c in graph.readers}
    assert {'expert', 'router'} <= roles and {'expert', 'head', 'embedding'} <= {c.role for c in graph.writers}
    runs = edge_runs(graph, task, 0, False)
    with torch.no_grad():
        every, _ = run_graph(graph, runs.base, Wiring(runs.source_written, graph.exists()))
        none, _ = run_graph(graph, runs.base, Wiring(runs.base_written, graph.exists()))
    for logits, expected in ((every, task.clean_scores), (none, task.corrupt_scores)):
        assert abs(logits[0, 5] - logits[0, 9] - expected[0]) < 1e-5 # some models route in float32
    experts = [str(c) for c in graph.readers if c.role == 'expert'][:3]
    found = edge_effects(task, [('embedding', e) for e in experts])
    assert found.isfinite().all()


def test_path_patching_by_hand():
    "From a head of the first block to a head of the last one: freeze all others, take the receiver's input, put it in."
    ctx = tiny_context('Llama')
    task, model = task_for(ctx, 1), ctx.get_or_create_model()
    clean, corrupt = task.clean[0], task.corrupt[0]
    layers, at = model.model.layers, slice(8, 16)  # head 1
    projections = [layer.self_attn.o_proj for layer in layers]
    base = [seen_in(model, p, corrupt, inputs=True) for p in projections]
    source = seen_in(model, projections[0], clean, inputs=True)

    def freeze(layer):
        def pre(m, args):
            x = base[layer].clone()
            if layer == 0:
                x[..., at] = source[..., at]
            return (x,)

        return pre

    handles = [p.register_forward_pre_hook(freeze(i)) for i, p in enumerate(projections)]
    seen = []
    handles.append(layers[2].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone())))
    logits_of(model, corrupt)
    for h in handles:
        h.remove()

    def put(m, args, out):
        out = out.clone()
        out[..., 16:24] = torch.nn.functional.linear(seen[0], m.weight[16:24])  # queries of head 2
        return out

    handle = layers[2].self_attn.q_proj.register_forward_hook(put)
    logits = logits_of(model, corrupt)
    handle.remove()
    expected = task.normalise((logits[5] - logits[9])[None])
    assert abs(path_patch(task, ['head 0.1'], ['head 2.2 q']) - expected) < 1e-6
    assert abs(path_patch(task, ['head 0.1'], ['head 2.2 q'], through_mlps=False) - expected) > 1e-4


def test_circuits_beside_random_ones(tmp_path):
    ctx = tiny_context('GPT-2')
    task = task_for(ctx, 4)
    scores, graph = edge_scores(task, 'eap-ig', steps=20), ComponentGraph(ctx)
    assert scores.values.shape == (len(graph.readers), len(graph.writers)) and not scores.values[~graph.exists()].any()
    names = [('head 1.2', 'mlp 2'), ('embedding', 'head 0.0 v'), ('mlp 1', 'logits')]
    assert scores.compare(sample=30).cells == 30
    exact = 1 - edge_effects(task, names, noising=True)
    alone = torch.stack([1 - edge_effects(task, [n], noising=True)[0] for n in names])
    assert (exact - alone).abs().max() < 1e-12
    circuit = find_circuit(task, edges=150)
    found, half = circuit.faithfulness(random=10), find_circuit(task, edges=60)
    assert 100 < len(circuit) <= 150 and len(half) <= 60 and len(found.random) == 10
    assert circuit.faithfulness(random=10).random == found.random  # seeded
    assert set(half.components) <= set(circuit.components) | set(half.components)
    assert abs(find_circuit(task, edges=graph.n_edges).faithfulness(random=0) - 1) < 1e-9
    circuit.save(tmp_path / 'circuit.json')
    again = Circuit.load(tmp_path / 'circuit.json', task)
    assert again.edges == circuit.edges and again.faithfulness(random=0) == circuit.faithfulness(random=0)
    assert 'transformer.h' not in (tmp_path / 'circuit.json').read_text()  # roles, no module paths
    assert all(r['difference'] >= 0 for r in circuit.completeness(3)) and circuit.minimality()
    assert '<svg' in circuit.picture()._repr_html_() and 'http' not in circuit.svg().replace(
        'http://www.w3.org/2000/svg', ''
    )


class Words:
    "A tokenizer of words: what isn't known is several tokens, one for each letter."

    words = [
        '<s>',
        'the',
        'capital',
        'of',
        'France',
        'Italy',
        'is',
        ' Paris',
        ' Rome',
        *'abcdefghijklmnopqrstuvwxyz',
        ' ',
    ]

    def encode(self, text):
        if text in self.words:
            return [self.words.index(text)]
        ids = []
        for i, word in enumerate(text.split(' ')):
            ids += [self.words.index(' ')] * (i > 0)
            ids += [self.words.index(word)] if word in self.words else [self.words.index(c) for c in word.lower()]
        return ids

    def decode(self, ids):
        return ''.join(self.words[i] for i in ids)


def test_bad_inputs_say_what_to_do():
    ctx = tiny_context('GPT-2')
    lm = LanguageModel(ctx.get_or_create_model(), Words())
    sentence = 'the capital of {} is'
    good = dict(
        clean=[sentence.format('France')],
        corrupt=[sentence.format('Italy')],
        answers=[(' Paris', ' Rome')],
        threshold=None,
    )
    task = Contrast(lm, **good)
    assert task.alignment().count('|') == 2 * (len(task.clean[0]) - 1)
    cases = [
        (dict(corrupt=[sentence.format('Spain')]), r'part at token 6:\nclean.*France'),
        (dict(answers=[(' Madrid', ' Rome')]), r"answer is one token, and ' Madrid' is 7"),
        (dict(metric=lambda logits: logits[:, 0] * 0), 'the metric is constant'),
        (dict(corrupt=good['clean']), 'the metric is constant'),
        (dict(metric=lambda logits: logits.sum()), 'one number for each row'),
        (dict(threshold=1e9), "doesn't solve 1 of 1 pairs"),
        (dict(threshold=1e9, unsolved='drop'), "doesn't solve 1 of 1 pairs"),
        (dict(unsolved='ignore'), "unsolved is 'raise' or 'drop'"),
        (dict(answers=[' Paris']), 'a logit difference is of two answers'),
        (dict(answers=[(' Paris', ' Paris')]), 'are the same token'),
        (dict(positions=dict(subject=99)), "position 'subject' of pair 0 is 99"),
        (dict(clean=[]), 'at least one pair of prompts'),
        (dict(metric='accuracy'), 'a metric is one of'),
    ]
    for change, said in cases:
        with pytest.raises(ValueError, match=said):
            Contrast(lm, **good | change)
    slots = [(dict(country='France'), dict(country='Italy'), (' Paris', ' Rome'))]
    named = contrast_from_template(lm, 'the capital of {country} is', slots, threshold=None)
    assert named.positions['country'] == [[6]]
    with pytest.raises(ValueError, match="position 'city' isn't one of this task: it has last, country"):
        sweep(named, 'resid.post_mlp', positions=['city'])
    with pytest.raises(ValueError, match='the template has the slots country, and city came'):
        contrast_from_template(
            lm, 'the capital of {country} is', [(dict(city='France'), dict(city='Italy'), (' Paris', ' Rome'))]
        )
    with pytest.raises(ValueError, match='no gradient of the metric reaches attn_ln.scale'):
        sweep(task, 'attn_ln.scale', 'layer', method='attribution')
    with pytest.raises(ValueError, match='can be read and not changed'):
        sweep(task, 'attn_ln.scale', 'layer')
    with pytest.raises(ValueError, match='a norm behind a sublayer'):
        find_circuit(task_for(tiny_context('Gemma 2')))
    with pytest.raises(ValueError, match='there is no edge from mlp 2 to head 1.0 q'):
        edge_effects(task, [('mlp 2', 'head 1.0 q')])
    with pytest.raises(ValueError, match='a change is one of'):
        Change('erase')


def test_a_choice_has_no_gradient():
    "A model that detaches what it computes from."
    ctx = tiny_context('Llama')
    model = ctx.get_or_create_model()
    task = task_for(ctx, 1)
    handle = model.model.layers[1].register_forward_hook(
        lambda m, args, out: (out[0].detach(), *out[1:]) if isinstance(out, tuple) else out.detach()
    )
    try:
        with pytest.raises(ValueError, match='no gradient of the metric reaches attn.v_out'):
            sweep(task, 'attn.v_out', ('layer', 'head'), layers=[0], method='attribution')
        assert sweep(task, 'attn.v_out', ('layer', 'head'), layers=[0]).values.shape == (1, 4)
    finally:
        handle.remove()


def test_the_command_reads_yaml(tmp_path):
    (tmp_path / 'task.yaml').write_text("""
model: tinyshakespeare
template: '{start}{letter}'
pairs:
  - {clean: {start: 'My lord, the ', letter: q}, corrupt: {start: 'My lord, the ', letter: h}, answers: [u, e]}
  - {clean: {start: 'I pray you, ', letter: q}, corrupt: {start: 'I pray you, ', letter: h}, answers: [u, e]}
sweep: {location: resid.post_mlp, by: [layer, position], positions: [letter], method: attribution}
""")
    done = CliRunner().invoke(main, ['patch', str(tmp_path / 'task.yaml'), '--out', str(tmp_path / 'out'), '-q'])
    assert done.exit_code == 0 and 'position letter' in done.output, done.output
    stored = json.loads((tmp_path / 'out' / 'sweep.json').read_text())
    assert stored['facts']['method'] == 'attribution' and len(stored['values']) == 6
    (tmp_path / 'task.yaml').write_text(
        'model: tinyshakespeare\nclean: [a]\ncorrupt: [b]\nanswers: [[u, e]]\nsweep: {by: [layer]}\n'
    )
    done = CliRunner().invoke(main, ['patch', str(tmp_path / 'task.yaml')])
    assert done.exit_code == 1 and 'sweep.location should be there' in done.output
