"""The microscope for experts, on every kind of model that has routers.

Counts are made again by NumPy from what is stored, with the routers' rules written down here again; effects of edits
are held against changes of the model's own modules. A recording that is interrupted goes on to the same bytes."""
import math
from dataclasses import replace
from functools import wraps
from importlib import import_module
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from transformer_experiments.accessors.examples import EXAMPLES
from transformer_experiments.experiments.recording import Recording
from transformer_experiments.experiments.routing import (
    ablate_expert,
    attribute_experts,
    choices_of,
    choices_of_routings,
    co_activation,
    domain_labels,
    edit_effect,
    expert_load,
    expert_neurons,
    function_similarity,
    pruning_curve,
    record_routing,
    saturation,
    silence_expert,
    specialisation,
    succession,
    token_information,
    top_tokens,
    weight_similarity,
)
from transformer_experiments.models import MoETransformerConfig
from transformer_experiments.moe import MoEConfig, Routing, ScoreRule, SparseMoE
from transformer_experiments.moe.routing import ROUTERS

FAMILIES = ('Mixtral', 'Qwen3-MoE', 'OLMoE', 'DeepSeek-V3', 'DeepSeek-V3, all else', 'DeepSeek-V2', 'gpt-oss',
            'GraniteMoE', 'Qwen2-MoE')


def drawn(module: nn.Module, std: float = .3) -> nn.Module:
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module.eval()


def family(name: str, dtype=torch.float32) -> nn.Module:
    transformers = import_module('transformers')
    kind, config, values = EXAMPLES[name]
    sizes = getattr(transformers, config)(**values)
    sizes._experts_implementation = 'eager'
    return drawn(getattr(transformers, kind)(sizes), .2).to(dtype)


def ours(router: str = 'top_k', **more) -> nn.Module:
    moe = MoEConfig(24, 20, 6, router=router, **({'top_k': 1} if router in ('switch', 'hash') else {}) | more)
    return drawn(MoETransformerConfig(64, 24, 3, 3, 0., moe=moe, moe_layers=(0, 2)).build(61))


def corpus(seed: int, n: int = 12, most: int = 30) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (int(k),), generator=g) for k in torch.randint(1, most, (n,), generator=g)]


def table(choices, name: str) -> np.ndarray: return choices.sites[name][:].double().numpy()


@pytest.mark.parametrize('name', FAMILIES)
def test_families_recount(name, tmp_path):
    model, texts = family(name), corpus(1)
    choices = record_routing(model, texts, tmp_path, batch_tokens=64, progress=False)
    assert len(choices) == sum(map(len, texts))
    for load in expert_load(choices):
        weights = table(choices, f'router.weights.{load.layer}')
        met = weights != 0
        assert load.n.tolist() == met.sum(0).tolist()
        k = model.config.num_experts_per_tok
        assert (met.sum(1) == k).all()
        if not name.startswith('DeepSeek'): # groups and biases come between logits and choice there
            best = np.argsort(-table(choices, f'router.logits.{load.layer}'), 1)[:, :k]
            assert np.bincount(best.flatten(), minlength=met.shape[1]).tolist() == load.n.tolist()
        pairs = met.T.astype(int) @ met.astype(int)
        assert co_activation(choices, load.layer).counts.tolist() == pairs.tolist()
    first, last = choices.layers[0], choices.layers[-1]
    a, b = (table(choices, f'router.weights.{i}') != 0 for i in (first, last))
    assert succession(choices, first, last).counts.tolist() == (a.T.astype(int) @ b.astype(int)).tolist()


@pytest.mark.parametrize('name', FAMILIES)
def test_families_opened(name):
    model, texts = family(name, torch.float64), corpus(2, 6)
    owed = attribute_experts(model, texts[0], token=5)
    with torch.no_grad():
        logit = model(texts[0][None]).logits[0, -1, 5].item()
    assert abs(owed.terms.sum().item() + owed.others - logit) < 1e-5 * max(abs(logit), 1)
    layer = owed.layers[0]
    for similar in (weight_similarity(model, layer), function_similarity(model, texts, layer)):
        assert similar.shape == (owed.terms.shape[1],) * 2
        assert (similar.diagonal() - 1).abs().max() < 1e-9 and similar.abs().max() < 1 + 1e-9
    met = max(range(len(similar)), key=lambda e: owed.terms[0].abs()[e])
    assert abs(sum(n.share for n in expert_neurons(model, texts, layer, met, n=100)) - 1) < 1e-9


@pytest.mark.parametrize('name', ('Mixtral', 'gpt-oss', 'Qwen2-MoE', 'DeepSeek-V3'))
def test_families_silenced(name):
    "One expert's answer zero, by a trace and by a change of its weights: its output matrix (and bias) are zero."
    model, texts = family(name, torch.float64), corpus(3, 8)
    layer, expert = model.config.num_hidden_layers - 1, 2
    effect = edit_effect(model, texts, lambda m: silence_expert(m, layer, expert), batch_tokens=100)
    with torch.no_grad():
        before = [model(t[None]).logits[0].log_softmax(-1) for t in texts]
        for key, p in model.get_submodule(f'model.layers.{layer}.mlp.experts').named_parameters():
            if key.startswith('down_proj'):
                p[expert] = 0
        after = [model(t[None]).logits[0].log_softmax(-1) for t in texts]
    for i, (p, q, t) in enumerate(zip(before, after, texts, strict=True)):
        lost = (p - q)[:-1].gather(1, t[1:, None]).sum().item()
        assert abs(effect.loss[i].item() - lost) < 1e-7 # float32 inside of some routers
        assert abs(effect.kl[i].item() - (p.exp() * (p - q)).sum().item()) < 1e-7
    assert effect.kl.sum() > 1e-6


@pytest.mark.parametrize('router', [r for r in ROUTERS if r != 'soft'])
def test_our_routers(router, tmp_path):
    model, texts = ours(router), corpus(4)
    choices = record_routing(model, texts, tmp_path, batch_tokens=100, progress=False)
    routings = [model.route(t[None]) for t in texts]
    for i, layer in enumerate(choices.layers):
        load = expert_load(choices)[i]
        alone = sum(expert_load_of(r[i]) for r in routings)
        assert load.n.tolist() == alone.tolist()
        best = top_tokens(choices, layer, int(load.n.argmax()), n=3)
        assert [t.score for t in best] == sorted((t.score for t in best), reverse=True)


def expert_load_of(routing) -> torch.Tensor:
    if routing.kind == 'token choice': return routing.experts[~routing.dropped].bincount(minlength=6)
    met = torch.zeros(routing.probs.shape[:2].numel(), 6, dtype=torch.int64)
    for e, tokens in enumerate(routing.tokens[0]):
        met[tokens[~routing.dropped[0, e]], e] = 1
    return met.sum(0)


@pytest.mark.parametrize('capacity', ('switch', 'megatron', 'lucidrains'))
def test_dropped_are_no_meetings_and_padding_is_nobody(capacity):
    config = MoEConfig(16, 20, 4, capacity=capacity, capacity_factor=.5)
    block = drawn(SparseMoE(config), .5)
    g = torch.Generator().manual_seed(0)
    x, ids = torch.randn(8, 30, 16, generator=g), torch.randint(9, (8, 30), generator=g)
    mask = torch.arange(30) < torch.tensor([[30], [1], [7], [20], [29], [3], [11], [12]])
    noise = x.masked_fill(~mask[..., None], float('nan'))
    found = expert_load(choices_of_routings(ids, [block(noise, mask=mask)[1]]))[0]
    alone = [block(x[i:i + 1, :int(m.sum())])[1] for i, m in enumerate(mask)]
    want = sum((~r.dropped).flatten().long().new_zeros(4).index_add(
        0, r.experts.flatten(), (~r.dropped).flatten().long()) for r in alone)
    assert found.n.tolist() == want.tolist() and int(found.tokens.sum()) == int(mask.sum())
    with pytest.raises(ValueError, match='padding alone'):
        choices_of_routings(ids, [block(x, mask=mask & False)[1]])


@pytest.mark.parametrize('capacity', (None, 'switch', 'megatron'))
def test_effects_know_no_padding(capacity):
    "Texts of unlike lengths, run together: the effect on each is that on the text alone."
    model, texts = ours(capacity=capacity, capacity_factor=.9), corpus(8, 9)
    def edit(m): ablate_expert(m, 0, 3)
    together = edit_effect(model, texts, edit, batch_tokens=1000)
    alone = [edit_effect(model, [t], edit) for t in texts]
    assert torch.allclose(together.kl, torch.cat([e.kl for e in alone]), atol=1e-4)
    assert torch.allclose(together.loss, torch.cat([e.loss for e in alone]), atol=1e-4)
    assert together.tokens.tolist() == [len(t) for t in texts]
    assert together.predicted.tolist() == [len(t) - 1 for t in texts]


def test_rules_of_scored_routers(tmp_path):
    "A bias of the choice alone, and one of the logits: who met whom, by NumPy from the stored logits and the bias."
    rule = ScoreRule('sigmoid', choice_bias=True, logit_bias=True, full='nothing')
    model, texts = ours('scored', rule=rule), corpus(9)
    for layer in (0, 2):
        nn.init.normal_(model.blocks[layer].ffwd.moe.router.bias, std=.5)
    choices = record_routing(model, texts, tmp_path, progress=False)
    for layer in choices.layers:
        router = model.blocks[layer].ffwd.moe.router
        scores = 1 / (1 + np.exp(-table(choices, f'router.logits.{layer}')))
        best = np.argsort(-(scores + router.bias.double().numpy()), 1)[:, :2]
        met = table(choices, f'router.weights.{layer}') != 0
        assert (np.sort(best, 1) == np.stack([np.flatnonzero(row) for row in met])).all()
    with pytest.raises(ValueError, match="weigh='input' of the experts' configuration has no place"):
        record_routing(ours('scored', rule=ScoreRule(weigh='input')), texts, tmp_path/'x')


def test_capacity_below_one_token():
    "Room is never less than one token for an expert; a capacity of nothing is refused where it is asked for."
    block = drawn(SparseMoE(MoEConfig(16, 20, 4, capacity='switch', capacity_factor=1e-6)))
    found = block(torch.randn(1, 9, 16))[1]
    assert (~found.dropped).sum() <= 4 and (~found.dropped).any()
    with pytest.raises(ValueError, match='with a capacity of 0 no expert takes a token'):
        MoEConfig(16, 20, 4, capacity='switch', capacity_factor=0)


def test_a_recording_goes_on_after_a_kill(tmp_path, monkeypatch):
    model, texts = ours(), corpus(5, 40)
    record_routing(model, texts, tmp_path/'whole', batch_tokens=40, shard_bytes=4096, progress=False)
    calls, plain = [0], type(model).forward

    @wraps(plain) # what it takes is looked at
    def dies(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 9: raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(model), 'forward', dies)
    with pytest.raises(KeyboardInterrupt):
        record_routing(model, texts, tmp_path/'cut', batch_tokens=40, shard_bytes=4096, progress=False)
    choices = record_routing(model, texts, tmp_path/'cut', batch_tokens=40, shard_bytes=4096, progress=False)
    shards = sorted(p.name for p in (tmp_path/'whole').glob('shard*'))
    assert len(shards) > 3
    for name in shards:
        assert (tmp_path/'cut'/name).read_bytes() == (tmp_path/'whole'/name).read_bytes()
    again = choices_of(Recording.open(tmp_path/'whole'))
    assert [s.share for s in saturation(choices, again)] == [1., 1.]


@pytest.mark.parametrize('seed', range(3))
def test_an_ablation_is_a_plain_hook(seed):
    g = torch.Generator().manual_seed(seed)
    model, texts = ours(['top_k', 'sigmoid_bias', 'noisy_top_k'][seed]), corpus(seed, 9)
    layer, expert = 2, int(torch.randint(6, (1,), generator=g))
    effect = edit_effect(model, texts, lambda m: ablate_expert(m, layer, expert), batch_tokens=64)
    router = model.blocks[layer].ffwd.moe.router
    whole, bias = router.weight.data.clone(), getattr(router, 'bias', None)
    with torch.no_grad():
        before = [model(t[None])[0][0].log_softmax(-1) for t in texts]
        decide = type(router).forward

        def without(self, x, *args, **kwargs):
            if self is not router: return decide(self, x, *args, **kwargs)
            one = torch.cat([x, torch.ones_like(x[..., :1])], -1) # a constant channel carries -inf to one logit
            self.weight.data = torch.cat([whole, torch.zeros(6, 1)], 1)
            self.weight.data[expert, -1] = -1e30
            if hasattr(self, 'noise'):
                self.noise.data = torch.cat([noise, torch.zeros(6, 1)], 1)
            return decide(self, one, *args, **kwargs)

        noise = router.noise.data.clone() if hasattr(router, 'noise') else None
        type(router).forward = without
        try:
            after = [model(t[None])[0][0].log_softmax(-1) for t in texts]
        finally:
            type(router).forward, router.weight.data = decide, whole
            if noise is not None:
                router.noise.data = noise
    assert bias is None or bias.isfinite().all()
    for i, (p, q) in enumerate(zip(before, after, strict=True)):
        assert abs(effect.kl[i].item() - (p.exp() * (p - q)).sum().item()) < 1e-4
    assert effect.kl.sum() > 1e-3 or not bool((model.route(texts[0][None])[1].experts == expert).any())


def test_shuffled_labels_are_uniform(tmp_path):
    "Over random labels of texts, p-values below a level come about as often as the level says."
    choices = record_routing(ours(), corpus(6, 40), tmp_path, progress=False)
    rng = np.random.default_rng(0)
    p = [specialisation(choices, 0, domain_labels(list(rng.permutation(['a', 'b'] * 20))), 39, seed=s).p
         for s in range(40)]
    assert 0 <= np.mean(np.array(p) <= .1) <= .25 and .35 < np.mean(p) < .65


def test_information_of_a_known_mixture():
    "A share q of the tokens is routed by token, the rest at random: I(E; T) has a closed form, for k = 1."
    g, E, V, N = torch.Generator().manual_seed(0), 4, 12, 30000
    tokens = torch.randint(V, (50, N // 50), generator=g)
    for q in (0., .3, 1.):
        mine = torch.rand(tokens.shape, generator=g) < q
        experts = torch.where(mine, tokens % E, torch.randint(E, tokens.shape, generator=g))
        probs = nn.functional.one_hot(experts, E).float()
        routing = Routing(probs, probs, torch.ones(*experts.shape, 1), experts=experts[..., None])
        found = token_information(choices_of_routings(tokens, [routing]), 0)
        p = q + (1 - q) / E
        rest = (1 - q) / E
        h = -p * math.log(p) - (E - 1) * (rest * math.log(rest) if rest else 0)
        assert abs(found.token - (math.log(E) - h)) < .01
        assert abs(found.shuffled) < 2e-3


def test_what_is_refused(tmp_path):
    texts = corpus(7)
    dense = drawn(MoETransformerConfig(64, 24, 3, 2, 0., moe=MoEConfig(24, 20, 4), moe_layers=()).build(61))
    for call in (lambda m: record_routing(m, texts, tmp_path/'x'), lambda m: edit_effect(m, texts, lambda t: None),
                 lambda m: attribute_experts(m, texts[0]), lambda m: weight_similarity(m, 0)):
        with pytest.raises(ValueError, match='has no experts'):
            call(dense)
    assert not (tmp_path/'x').exists()
    model = ours()
    with pytest.raises(ValueError, match='layer 1 of .* has no experts; .* 0, 2'):
        expert_neurons(model, texts, 1, 0)
    with pytest.raises(ValueError, match="the corpus has 1, 'prose'"):
        domain_labels(['prose'] * 12)
    for bad, said in (({0: list(range(6)), 1: list(range(6))}, 'layer 1'), ({0: [0, 1, 2]}, 'each of its experts')):
        with pytest.raises(ValueError, match=said):
            pruning_curve(model, texts, bad)
    with pytest.raises(ValueError, match='at least 5'):
        expert_load(record_routing(model, texts[:3], tmp_path/'few', progress=False))
    for router, call in product(('soft',), (lambda m: record_routing(m, texts, tmp_path/'y'),)):
        with pytest.raises(ValueError, match='routes softly'):
            call(replace(model.config, moe=replace(model.config.moe, router=router)).build(61))
