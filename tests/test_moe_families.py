"""Blocks of transformers, each class that can be taken over: other sizes, types and masks; and rules 1% off.

`nbs/moe/family_table.ipynb` has the same classes in one size, and both settings of those that have two."""
import importlib
import itertools
import json
from dataclasses import asdict, fields, replace

import pytest
import torch
from torch import nn

from transformer_experiments.moe import MoEConfig, SparseMoE
from transformer_experiments.moe.families import FAMILIES, UNSUPPORTED
from transformer_experiments.moe.family_table import parity, sparse_classes, tiny_block
from transformer_experiments.moe.from_hf import copy_weights, hf_config, prove

FLOAT32 = {'BeamMoE', 'HYV3MoE', 'NemotronHMoE', 'OpenAIPrivacyFilterMLP'} # compute in it where all else is float64
assert FLOAT32 == {name for name, r in FAMILIES.items() if getattr(r, 'in_float32', False)}
DEFAULTS = {'LongcatFlashMoE': {'zero_expert_num': 0}} # by default of another kind
# One class of each rule; the rest share their reading with one of these
KINDS = [next(name for name in FAMILIES if FAMILIES[name] is r) for r in {id(r): r for r in FAMILIES.values()}.values()]
WHERE = {name: module for module, name in sparse_classes()}


def block_of(name: str, seed: int = 0, **changes) -> nn.Module:
    cls = getattr(importlib.import_module(WHERE[name]), name)
    return tiny_block(cls, seed, **DEFAULTS.get(name, {}), **changes)


def first(y): return y[0] if isinstance(y, tuple) else y


def test_every_class_is_in_a_table():
    assert not WHERE.keys() - FAMILIES.keys() - UNSUPPORTED.keys()


@pytest.mark.parametrize('name', FAMILIES)
def test_values_and_gradients_at_other_sizes(name):
    sizes = dict(hidden_size=11, intermediate_size=7, moe_intermediate_size=7, ffn_hidden_size=7,
                 expert_ffn_hidden_size=7, shared_intermediate_size=5, shared_expert_intermediate_size=5)
    known = block_of(name)
    config = getattr(getattr(known, 'experts', known), 'config', known)
    sizes = {n: v for n, v in sizes.items() if n in str(vars(config))}
    if name == 'Ernie4_5_VLMoeSparseMoeBlock':
        sizes = {'hidden_size': 11}
    g = torch.Generator().manual_seed(0)
    for seed, (B, T) in enumerate(((1, 1), (3, 13))):
        block = block_of(name, seed, **sizes).double()
        x = 3 * torch.randn(B, T, hf_config(block).hidden_size, generator=g, dtype=torch.float64)
        assert parity(block, x) < (2e-6 if name in FLOAT32 else 1e-10)


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
@pytest.mark.parametrize('name', KINDS)
def test_lower_precision(name, dtype):
    "Proven in float64, the copy computes alike in the block's own type: to the rounding of a few products."
    block = block_of(name).to(dtype)
    moe = SparseMoE.from_hf(block)
    assert {p.dtype for p in moe.parameters()} == {dtype}
    x = torch.randn(2, 30, moe.config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        y, want = moe(x)[0].float(), first(block(x)).view_as(x).float()
    apart = (y - want).norm(dim=-1) / want.norm(dim=-1)
    bound = 1e-4 if dtype == torch.float32 else .05
    assert apart.median() < bound and (apart < bound).float().mean() > .8 # a close choice may fall otherwise


def test_a_router_in_float32_stays_so():
    block = block_of('HunYuanMoEV1Moe').bfloat16()
    block.gate.wg.float()
    moe, x = SparseMoE.from_hf(block), torch.randn(2, 30, 16).bfloat16()
    assert moe.router.weight.dtype == torch.float32 and moe.experts.down.dtype == torch.bfloat16
    assert torch.allclose(moe(x)[0].float(), block(x).float(), atol=.05, rtol=.05)


@pytest.mark.parametrize('name', KINDS)
def test_padding_is_nobody_in_them(name):
    "A block of transformers knows no mask: its texts go one by one."
    block = block_of(name).double()
    moe, g = SparseMoE.from_hf(block), torch.Generator().manual_seed(2)
    x = torch.randn(3, 12, moe.config.hidden_size, generator=g, dtype=torch.float64)
    for mask in (torch.arange(12) < torch.tensor([[5], [12], [9]]), torch.arange(12) >= torch.tensor([[5], [0], [11]])):
        y = moe(x.masked_fill(~mask[..., None], float('nan')), mask=mask)[0]
        assert not y[~mask].any()
        for row, answer, real in zip(x, y, mask, strict=True):
            want = first(block(row[real][None])).view(int(real.sum()), -1)
            assert (answer[real] - want).abs().max() < 1e-6 * want.abs().max() # some scores are float32
            for moe.backend in ('loop', 'grouped', 'einsum'):
                z = moe(row[None], mask=real[None])[0][0, real]
                assert (z - answer[real]).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize('name', FAMILIES)
def test_a_factor_of_one_per_cent_is_refused(name):
    block = block_of(name)
    cls = type(block)
    class Times(cls):
        def forward(self, x):
            y = cls.forward(self, x)
            return (1.01 * y[0], *y[1:]) if isinstance(y, tuple) else 1.01 * y
    block.__class__ = Times
    with pytest.raises(ValueError, match='computes something else'):
        SparseMoE.from_hf(block)


def other_rules(config: MoEConfig):
    "The same configuration with one number 1% off, or one detail another."
    for name in ('scale', 'limit', 'alpha', 'offset', *(['shared_scale'] if config.n_shared_experts else [])):
        idle = name == 'alpha' and config.expert == 'mlp' or name == 'scale' and config.router == 'top_k'
        if (value := getattr(config, name)) and not idle:
            yield name, replace(config, **{name: 1.01 * value})
    if config.rule is None and config.router == 'top_k':
        yield 'normalize', replace(config, normalize=not config.normalize)
    if config.limit is not None and config.n_shared_experts:
        yield 'shared_limit', replace(config, shared_limit=not config.shared_limit)
    if (rule := config.rule) is None: return
    if rule.score != 'softmax_of_chosen' and config.top_k > 1:
        yield 'normalize', replace(config, normalize=not config.normalize)
    if rule.softcap:
        yield 'softcap', replace(config, rule=replace(rule, softcap=1.01 * rule.softcap))
    if rule.score == 'sigmoid' or rule.score == 'sqrtsoftplus':
        yield 'score', replace(config, rule=replace(rule, score='softmax'))
    if rule.choice_bias:
        yield 'choose', replace(config, rule=replace(rule, choose='scores' if rule.choose == 'logits' else 'logits'))
    if config.n_groups > 1:
        best = 'max' if rule.best_of_group == 'top2' else 'top2'
        yield 'best_of_group', replace(config, rule=replace(rule, best_of_group=best))
        yield 'top_groups', replace(config, top_groups=config.top_groups + 1)
    yield 'weigh', replace(config, rule=replace(rule, weigh='input' if rule.weigh == 'output' else 'output'))


@pytest.mark.parametrize('name', KINDS)
def test_a_configuration_that_is_off_is_refused(name):
    block = block_of(name)
    config, seen = hf_config(block), []
    for what, other in itertools.chain([('', config)], other_rules(config)):
        moe = SparseMoE(other)
        copy_weights(moe, block)
        if not what:
            prove(moe, block)
            continue
        seen.append(what)
        with pytest.raises(ValueError, match='computes something else'):
            prove(moe, block)
    assert seen


@pytest.mark.parametrize('part', ('experts', 'shared_experts'))
@pytest.mark.parametrize('name', ('HYV3MoE', 'NemotronHMoE', 'DeepseekV3MoE', 'Qwen2MoeSparseMoeBlock'))
def test_parts_of_zero_hide_nothing_and_refuse_nothing(name, part):
    "As they are before training."
    block = block_of(name)
    if part == 'experts':
        nn.init.zeros_(block.experts.down_proj)
    else:
        shared = getattr(block, part, getattr(block, 'shared_expert', None))
        nn.init.zeros_(shared.down_proj.weight)
    SparseMoE.from_hf(block)
    class Times(type(block)):
        def forward(self, x): return 1.01 * super().forward(x)
    block.__class__ = Times
    with pytest.raises(ValueError, match='computes something else'):
        SparseMoE.from_hf(block)


@pytest.mark.parametrize('name', KINDS)
def test_a_proof_leaves_everything_as_it_was(name):
    block = block_of(name).train()
    was, state = {n: t.clone() for n, t in block.state_dict().items()}, torch.get_rng_state()
    made = [SparseMoE.from_hf(block).state_dict() for _ in range(2)]
    assert state.equal(torch.get_rng_state()) and block.training
    assert all(t.equal(block.state_dict()[n]) for n, t in was.items())
    assert all(made[0][n].equal(made[1][n]) for n in made[0])


def test_what_is_stored_is_read_again():
    for name in KINDS:
        config = hf_config(block_of(name))
        again = {f.name: getattr(config, f.name) for f in fields(config)}
        assert MoEConfig(**again) == MoEConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize('name', UNSUPPORTED)
def test_what_is_unsupported_says_why(name):
    block = nn.Module()
    block.__class__ = type(name, (nn.Module,), {})
    with pytest.raises(ValueError, match=f'{name} has no counterpart here: '):
        SparseMoE.from_hf(block)
