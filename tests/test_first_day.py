"""Ablation, top activations, steering and probes on many architectures, beside plain hooks and brute force."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from transformer_experiments.accessors import ActivationLocationType, WeightLocationType
from transformer_experiments.accessors.tiny_models import tiny_context
from transformer_experiments.experiments import ablate, difference_of_means, probe, record, steer, steering_effect
from transformer_experiments.experiments import top_activations
from transformer_experiments.experiments.ablation import replacement_for, target_of
from transformer_experiments.experiments.max_activating import Candidates, best_of
from transformer_experiments.experiments.probing import held_out_texts, labels_of
from transformer_experiments.tracing import LanguageModel, TracedModel

NAMES = ('ours', 'GPT-2', 'Llama, all else', 'Gemma 2', 'Mixtral', 'GPT-NeoX', 'OPT', 'Falcon', 'Qwen2-MoE', 'gpt-oss',
         'DeepSeek-V3')
DENSE = ('ours', 'GPT-2', 'Llama, all else', 'Gemma 2', 'GPT-NeoX', 'OPT', 'Phi-3')
LAYER, UNIT = 1, 2


def texts_of(lengths=(5, 9, 2, 12, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (n,), generator=generator) for n in lengths]


def logits_of(model, ids):
    with torch.no_grad():
        out = model(ids[None])
    return (out.logits if hasattr(out, 'logits') else out[0])[0]


@contextmanager
def instead(module, change):
    "A plain hook that changes what a module gets."
    handle = module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def module_of(ctx, role):
    return ctx.get_or_create_model().get_submodule(ctx.module_path(role, LAYER))


def check_ablation(found, ctx, module, change, texts):
    "Loss, divergence and logits of each text alone, by a plain hook."
    model = ctx.get_or_create_model()
    for i, text in enumerate(texts):
        clean = logits_of(model, text)
        with instead(module, change):
            other = logits_of(model, text)
        p, q = clean.double().log_softmax(-1), other.double().log_softmax(-1)
        wanted = dict(loss=F.cross_entropy(other[:-1].double(), text[1:]),
                      clean_loss=F.cross_entropy(clean[:-1].double(), text[1:]),
                      kl=F.kl_div(q, p, log_target=True, reduction='none').sum(-1).mean())
        for name, want in wanted.items():
            torch.testing.assert_close(getattr(found, name)[i], want, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(found.logits[i], other[-1], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.clean_logits[i], clean[-1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('name', NAMES)
def test_an_ablated_head_is_that_of_a_plain_hook(name):
    ctx, texts = tiny_context(name, torch.float64), texts_of()
    module, heads = module_of(ctx, 'attn_out'), ctx.n_attention_heads
    unit = UNIT % heads
    kept = []
    with instead(module, lambda x: kept.append(x[0].unflatten(-1, (heads, -1))[:, unit]) or x):
        for text in texts:
            logits_of(ctx.get_or_create_model(), text)
    mean = torch.cat(kept).mean(0)

    def put(value):
        def change(x):
            x = x.unflatten(-1, (heads, -1)).clone()
            x[..., unit, :] = value
            return x.flatten(-2)
        return change

    for how, value in (('zero', 0.), ('mean', mean)):
        found = ablate(ctx, texts, 'attn.v_out', LAYER, unit, how, controls=1, batch_tokens=20)
        check_ablation(found, ctx, module, put(value), texts)
        assert found.kl.max() > 1e-9 and len(found.controls) == min(1, heads - 1)


@pytest.mark.parametrize('name', DENSE)
def test_ablated_neurons_are_those_of_a_plain_hook(name):
    ctx, texts = tiny_context(name, torch.float64), texts_of((4, 7, 7))
    path = ctx.stored_at(WeightLocationType.MLP_TO_RESIDUAL, LAYER)[0][0].rpartition('.')[0]
    module = ctx.get_or_create_model().get_submodule(path)

    def change(x):
        x = x.clone()
        x[..., [1, 5]] = 0
        return x

    check_ablation(ablate(ctx, texts, 'mlp.post_act', LAYER, [1, 5], controls=0), ctx, module, change, texts)


def test_an_ablation_that_changes_nothing_and_one_of_all_layers():
    ctx, texts = tiny_context('Llama', torch.float32), texts_of()
    with torch.no_grad():
        module_of(ctx, 'attn_out').weight.zero_()
    found = ablate(ctx, texts, 'attn.v_out', LAYER, controls=2)
    assert torch.equal(found.loss, found.clean_loss) and not found.kl.any() and found.interval == (0., 0.)
    assert len(found.controls) == 2
    assert found.chance == pytest.approx((1 + sum(c >= 0 for c in found.control_increases)) / 3)
    every = ablate(ctx, texts, 'resid.delta_mlp', 'all')
    assert every.controls == [] and 'no other parts' in repr(every) and every.chance == 1
    alone = ablate(ctx, texts[:1], 'resid.delta_mlp', 0, controls=0)
    assert alone.interval == (-math.inf, math.inf)


def test_resampled_rows_are_those_of_other_texts():
    ctx, texts = tiny_context('Mixtral', torch.float32), texts_of((3, 4, 5, 4))
    target = target_of(ctx, 'resid.post_mlp', [0, 2], None)
    rows = [ctx.run(t, ['resid.post_mlp']) for t in texts]
    own = replacement_for(ctx, target, 'resample', texts, True, 5, 100)
    other = replacement_for(ctx, target, 'resample', texts, False, 5, 100)
    seen = set()
    for i in range(len(texts)):
        for site in target.sites:
            pool = {j: x[site] for j, x in enumerate(rows)}
            for row in own.at(site, [i], 50)[0]:
                owners = {j for j, x in pool.items() if (x - row).abs().amax(-1).min() < 1e-4}
                assert owners and i not in owners
            if site == target.sites[0]:
                seen |= {j for row in other.at(site, [i], 50)[0] for j, x in pool.items()
                         if (x - row).abs().amax(-1).min() < 1e-4}
    assert seen == {0, 1, 2, 3}
    together, alone = own.at(target.sites[0], [1, 3], 4), own.at(target.sites[0], [3], 4)
    assert torch.equal(together[1], alone[0]) # a text's rows don't depend on its batch


def test_values_from_reference_texts_and_from_edits(tmp_path):
    ctx, texts = tiny_context('Llama', torch.float32), texts_of()
    reference = texts_of((6, 6), seed=4)
    found = ablate(ctx, texts, 'resid.delta_attn', LAYER, how='mean', reference=reference, controls=0)
    mean = torch.cat([ctx.run(t, ['resid.delta_attn'])[found.target.sites[0]] for t in reference]).mean(0)
    torch.testing.assert_close(found.replacement.rows[found.target.sites[0]], mean, rtol=0, atol=1e-4)
    path = found.save(tmp_path/'mean.json')
    lm = LanguageModel(ctx.get_or_create_model())
    logits = lm.load_edits(path)(texts[1][None]).logits
    torch.testing.assert_close(logits[0, -1], found.logits[1], rtol=1e-4, atol=1e-3)
    half = LanguageModel(tiny_context('Llama', torch.bfloat16).get_or_create_model())
    assert half.load_edits(path, strict=False)(texts[1][None]).logits.dtype == torch.bfloat16
    with pytest.raises(ValueError, match='has lasting edits'):
        ablate(lm.load_edits(path), texts, 'attn.v_out', 0, 1)
    with pytest.raises(ValueError, match='has no layout'):
        ablate(TracedModel(nn.Linear(2, 2)), texts, 'attn.v_out', 0, 1)


# Top activations


def test_the_top_k_is_exact_with_ties():
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        n, k = (int(torch.randint(1, most, (1,), generator=generator)) for most in (40, 12))
        values = torch.randint(-2, 3, (n,), generator=generator).float() * (1 if trial % 2 else .1)
        texts = torch.randint(4, (n,), generator=generator)
        positions = torch.arange(n)[torch.randperm(n, generator=generator)]
        rows = list(zip(values.tolist(), texts.tolist(), positions.tolist(), strict=True))
        for sign in (1, -1):
            want = sorted(rows, key=lambda r: (-sign * r[0], r[1], r[2]))[:k]
            best = []
            for a in range(0, n, 7): # as a stream
                best = [best_of([*best, Candidates(*(x[a:a + 7] for x in (values, texts, positions)))], k, sign)]
            assert list(zip(*(x.tolist() for x in best[0]), strict=True)) == want


CASES = [('attn.v_out', dict(unit=1)), ('resid.post_attn_ln', 'direction'), ('mlp.post_act', dict(unit=3)),
         ('router.weights', dict(unit=2)), ('expert.outputs', dict(unit=2))]


@pytest.mark.parametrize('name', ['GPT-2', 'OPT', 'Mixtral', 'gpt-oss', 'ours, sparse'])
def test_top_activations_beside_brute_force(name, tmp_path):
    ctx, texts = tiny_context(name, torch.float64), texts_of((5, 1, 12, 3, 9, 9, 2))
    recorded = [a for a, _ in CASES if ctx.has_activation(ActivationLocationType(a), 2)]
    recording = record(ctx, texts, tmp_path, recorded, layers=[2], batch_tokens=15, progress=False)
    for location, what in CASES:
        if location not in recorded: continue
        if what == 'direction':
            what = dict(direction=torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        for largest in (True, False):
            got = top_activations(ctx, texts, location, 2, **what, k=9, largest=largest, batch_tokens=15)
            every = []
            for i, text in enumerate(texts):
                x = ctx.run(text, [(location, 2)])[got.measure.location, 2]
                if 'direction' in what:
                    numbers = x @ what['direction']
                else:
                    x = x[:, what['unit']]
                    numbers = x.norm(dim=-1) if x.ndim == 2 else x
                every += [(v, i, t) for t, v in enumerate(numbers.tolist())]
            want = sorted(every, key=lambda r: ((-1 if largest else 1) * round(r[0], 9), r[1], r[2]))[:9]
            np.testing.assert_allclose([r.value for r in got.rows], [v for v, _, _ in want], rtol=1e-6, atol=1e-9)
            assert got.n_tokens == len(every) == 41
            assert got.mean == pytest.approx(np.mean([v for v, _, _ in every]), abs=1e-6)
            by_recording = top_activations(ctx, recording, location, 2, **what, k=9, largest=largest)
            assert [r[1:3] for r in by_recording.rows] == [r[1:3] for r in got.rows]
            if location == 'mlp.post_act' and name == 'OPT' and not largest: # a relu's zeros, all alike
                assert [r[1:3] for r in got.rows] == [r[1:] for r in want]


def test_a_recording_of_some_positions(tmp_path):
    ctx, texts = tiny_context('Llama', torch.float32), texts_of()
    recording = record(ctx, texts, tmp_path, layers=[0], positions=[1, -1], progress=False)
    got = top_activations(ctx, recording, 'resid.post_mlp', 0, unit=3, k=20)
    assert {(r.text, r.position) for r in got.rows} == {(i, t) for i, x in enumerate(texts) for t in (1, len(x) - 1)}
    assert all(r.token == str(int(texts[r.text][r.position])) for r in got.rows)
    assert len(top_activations(ctx, texts, 'resid.post_mlp', 0, unit=3, k=1000).rows) == 37


# Steering


@pytest.mark.parametrize('name', NAMES)
def test_steering_is_a_plain_hook_at_every_step(name, tmp_path):
    ctx = tiny_context(name, torch.float32)
    model, ids = ctx.get_or_create_model(), torch.tensor([[3, 1, 4, 1, 5]])
    positive, negative = texts_of((3, 6, 3), seed=1), texts_of((4, 4, 5), seed=2)
    direction = difference_of_means(ctx, positive, negative, layer=LAYER, positions=None)
    means = []
    for prompts in (positive, negative):
        rows = [ctx.run(p, ['resid.post_mlp'])[direction.location, LAYER].mean(0) for p in prompts]
        means.append(torch.stack(rows).mean(0))
    scale = float(direction.vector.abs().max())
    torch.testing.assert_close(direction.vector, means[0] - means[1], rtol=1e-3, atol=1e-4 * scale)
    steered = steer(ctx, positive, negative, layer=LAYER, positions=None, scale=.7)

    def push(module, args, out):
        vector = direction.vector * .7
        return out + vector if isinstance(out, torch.Tensor) else (out[0] + vector, *out[1:])

    options = dict(max_new_tokens=5) if name == 'ours' else dict(max_new_tokens=5, do_sample=False)
    written = steered.generate(ids, **options, trace=False)
    lm, path = LanguageModel(model), steered.save_edits(tmp_path/'steer.json')
    handle = module_of(ctx, 'block').register_forward_hook(push)
    try:
        with torch.no_grad():
            logits, tokens = logits_of(model, ids[0]), lm.generate(ids, **options, trace=False)
    finally:
        handle.remove()
    with torch.no_grad():
        out = steered(ids)
    got = (out.logits if hasattr(out, 'logits') else out[0])[0]
    torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-3)
    assert torch.equal(written, tokens)
    assert torch.equal(lm.load_edits(path).generate(ids, **options, trace=False), written)
    with torch.no_grad():
        assert (logits_of(model, ids[0]) - logits).abs().max() > 1e-3 # the model itself is as it was


def test_a_direction_that_means_nothing_is_said_to():
    ctx = tiny_context('Llama', torch.float32)
    rights = [difference_of_means(ctx, texts_of((5,) * 10, seed=2 * s), texts_of((5,) * 10, seed=2 * s + 1), layer=2)
              for s in range(6)]
    assert .2 < sum(d.right for d in rights) / sum(d.n for d in rights) < .8
    marked = [[torch.cat([t, torch.tensor([last])]) for t in texts_of((5,) * 6, seed=last)] for last in (7, 40)]
    found = difference_of_means(ctx, *marked, location='resid.post_emb')
    assert found.right == found.n == 12
    lm = LanguageModel(ctx.get_or_create_model())
    effect = steering_effect(lm, found.vector, texts_of((4, 6)), [1], [2], layer=0, scale=0., controls=3)
    assert not effect.shift.any() and not effect.controls.any() and effect.chance == 1
    with pytest.raises(ValueError, match='there are no prompts'):
        steering_effect(lm, found.vector, [], [1], [2], layer=0)


# Probes


def test_a_probe_does_not_recognise_texts(tmp_path):
    "Random labels of texts whose tokens all carry a mark of the text: nothing can be read on others."
    ctx = tiny_context('Llama', torch.float32)
    texts = [torch.full((12,), i) for i in range(40)]
    recording = record(ctx, texts, tmp_path, layers=[0], progress=False)
    draw = np.random.default_rng(0)
    scores = [probe(recording, 'resid.post_mlp', 0, draw.permutation([0, 1] * 20).tolist(), controls=0, seed=s)
              for s in range(6)]
    assert .3 < np.mean([s.score for s in scores]) < .7
    labels = labels_of(recording, ['a', 'b'] * 20)
    for seed in range(5):
        held = held_out_texts(labels, .3, seed)
        assert not set(labels.texts[held]) & set(labels.texts[~held]) and len(set(labels.texts[held])) == 12
        assert np.bincount(labels.rows[held]).tolist() == [72, 72]
    low, high = scores[0].interval
    assert high - low > .4 # 12 texts, however many tokens


def test_a_probe_reads_what_is_there_in_its_own_units(tmp_path):
    ctx, texts = tiny_context('GPT-2', torch.float32), texts_of((20,) * 30)
    recording = record(ctx, texts, tmp_path, ['attn.v_out', 'resid.post_emb'], layers=[0], progress=False)
    for n in (2, 3):
        found = probe(recording, 'resid.post_emb', None, lambda tokens, n=n: tokens % n, controls=9)
        assert found.score > max(found.controls) + .1 and found.chance == .1
        assert found.weights.shape == (1 if n == 2 else n, 32)
        tokens = recording.store.get_slice('tokens')[:]
        held = held_out_texts(labels_of(recording, lambda t, n=n: t % n), .3, 0)
        guesses = np.array(found.predict(recording.site('resid.post_emb')[:]))
        assert np.mean(guesses[held] == (tokens % n).numpy()[held]) == pytest.approx(found.score)
    again = probe(recording, 'attn.v_out', 0, lambda tokens: tokens > 30, controls=1, seed=3)
    assert again.classes == [False, True] and again.weights.shape == (1, 4, 8)
    other = probe(recording, 'attn.v_out', 0, lambda tokens: tokens > 30, controls=1, seed=3)
    assert torch.equal(again.weights, other.weights) and again.controls == other.controls


def test_a_class_that_no_fitted_text_has(tmp_path):
    ctx, texts = tiny_context('GPT-2', torch.float32), texts_of((6,) * 12)
    recording = record(ctx, texts, tmp_path, ['resid.post_emb'], progress=False)
    held = np.unique(labels_of(recording, [[0, 1, 0, 1, 0, 1]] * 12).texts[
        held_out_texts(labels_of(recording, [[0, 1, 0, 1, 0, 1]] * 12), .3, 0)])
    labels = [[0, 1, 0, 1, 0, 2 if i == held[0] else 1] for i in range(12)]
    found = probe(recording, 'resid.post_emb', None, labels, controls=0)
    assert found.weights.shape == (3, 32) and 2 not in found.predict(recording.site('resid.post_emb')[:])
    assert set(found.predict(recording.site('resid.post_emb')[:])) == {0, 1}
