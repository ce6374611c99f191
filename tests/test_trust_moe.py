"""Blocks that are taken over prove what they compute; limits of room, masks and precision mean the same everywhere.

Each test holds the right value of a fault that was reported for this kind of library, or of its kind."""
import copy

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, JambaConfig, Llama4TextConfig, MixtralConfig, Qwen2MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP, DeepseekV3MoE
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from transformer_experiments.moe import MoEConfig, SparseMoE, families, load_balancing_loss, make_router

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def drawn(block: nn.Module, std: float = .3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    for t in [*block.parameters(), *block.buffers()]:
        if t.is_floating_point():
            nn.init.normal_(t, std=std)
    return block


def mixtral(cls: type = MixtralSparseMoeBlock, **more) -> nn.Module:
    return drawn(
        cls(MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)), **more
    )


def deepseek() -> nn.Module:
    config = DeepseekV3Config(
        hidden_size=16,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_local_experts=8,
        n_group=2,
        num_experts_per_tok=2,
        n_shared_experts=1,
        topk_group=1,
    )
    return drawn(DeepseekV3MoE(config))


# Other rules

class Times(MixtralSparseMoeBlock):
    factor = 1.01

    def forward(self, x): return super().forward(x) * self.factor


class OnlyWhenLarge(MixtralSparseMoeBlock):
    "Another rule for tokens of size 50 and more."

    def forward(self, x): return super().forward(x).where(x.abs().amax(-1, keepdim=True) < 50, 0)


class OnlyWhenSmall(MixtralSparseMoeBlock):
    "Another rule for tokens below 0.05."

    def forward(self, x): return super().forward(x).where(x.abs().amax(-1, keepdim=True) > .05, 0)


class Unnormalised(MixtralSparseMoeBlock):
    "Weights that don't add up to one: seen only where the router is undecided."

    def forward(self, x):
        weights = (x @ self.gate.weight.T).float().softmax(-1).topk(self.top_k).values.sum(-1, keepdim=True)
        return super().forward(x) * weights.to(x.dtype)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('rule', (Times, OnlyWhenLarge, OnlyWhenSmall, Unnormalised))
def test_another_rule_is_refused_in_every_dtype(rule, dtype):
    with pytest.raises(ValueError, match='computes something else'):
        SparseMoE.from_hf(mixtral(rule).to(dtype))


@pytest.mark.parametrize('part', ('all', 'dropout'))
def test_another_rule_in_training_is_refused(part):
    class Drops(MixtralSparseMoeBlock):
        def forward(self, x):
            y = super().forward(x)
            if not self.training: return y
            return nn.functional.dropout(y, .1) if part == 'dropout' else 1.01 * y

    with pytest.raises(ValueError, match='something else in training'):
        SparseMoE.from_hf(mixtral(Drops).eval())


def test_a_rule_that_looks_at_other_sequences_is_refused():
    class Neighbour(MixtralSparseMoeBlock):
        def forward(self, x): return super().forward(x).flip(0)

    with pytest.raises(ValueError, match='computes something else'):
        SparseMoE.from_hf(mixtral(Neighbour))


@pytest.mark.parametrize('seed', range(4))
def test_what_was_drawn_before_does_not_hide_a_rule(seed):
    class Renamed(JambaSparseMoeBlock):
        "Not in the table under this name, so it's read as Mixtral's."

    config = JambaConfig(hidden_size=64, intermediate_size=96, num_experts=16, num_experts_per_tok=2)
    block, own = drawn(Renamed(config), seed=seed), families.FAMILIES
    try:
        families.FAMILIES = {name: r for name, r in own.items() if name != 'JambaSparseMoeBlock'}
        with pytest.raises(ValueError, match='computes something else'):
            SparseMoE.from_hf(block)
    finally:
        families.FAMILIES = own
    assert not SparseMoE.from_hf(block).config.normalize


@pytest.mark.parametrize('zero', ('gate.weight', 'experts.down_proj'))
def test_weights_of_zero_prove_nothing_by_themselves(zero):
    block, right = mixtral(Unnormalised), mixtral()
    for b in (block, right):
        nn.init.zeros_(b.get_parameter(zero))
    with pytest.raises(ValueError, match='computes something else'):
        SparseMoE.from_hf(block)
    SparseMoE.from_hf(right)


def test_a_rule_behind_large_shared_experts_is_seen():
    class Halved(DeepseekV3MoE):
        def forward(self, x): return (super().forward(x) + self.shared_experts(x)) / 2

    block = deepseek()
    block.__class__ = Halved
    nn.init.normal_(block.shared_experts.down_proj.weight, std=1e6)
    with pytest.raises(ValueError, match='computes something else'):
        SparseMoE.from_hf(block)


# What a proof leaves alone

def test_the_global_generator_is_neither_read_nor_moved():
    class Draws(MixtralSparseMoeBlock):
        def forward(self, x):
            torch.rand(3)
            return super().forward(x)

    block, states = mixtral(Draws), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        states.append(SparseMoE.from_hf(block).state_dict())
        assert before.equal(torch.get_rng_state())
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


@pytest.mark.parametrize('dtype', DTYPES)
def test_the_block_is_what_it_was(dtype):
    block = deepseek().to(dtype).train()
    was, modes = copy.deepcopy(block.state_dict()), [m.training for m in block.modules()]
    moe = SparseMoE.from_hf(block)
    assert moe.training and modes == [m.training for m in block.modules()]
    assert all(was[name].equal(t) and was[name].dtype == t.dtype for name, t in block.state_dict().items())
    assert {p.dtype for p in moe.parameters()} == {dtype}


def test_frozen_parameters_stay_frozen():
    block = deepseek()
    block.gate.weight.requires_grad_(False)
    block.shared_experts.requires_grad_(False)
    free = {name for name, p in SparseMoE.from_hf(block).named_parameters() if p.requires_grad}
    assert free == {'experts.gate_up', 'experts.down'}
    block.shared_experts.up_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match='shared.gate_up is frozen and some'):
        SparseMoE.from_hf(block)


# Blocks that can't be taken over, for the reason that is true

def test_shared_experts_of_another_width():
    block = deepseek()
    block.shared_experts = drawn(DeepseekV3MLP(block.config, intermediate_size=36))
    moe, x = SparseMoE.from_hf(block), torch.randn(2, 7, 16)
    assert moe.config.shared_size == 36 and torch.allclose(moe(x)[0], block(x), atol=1e-5)
    block.shared_experts = nn.Linear(16, 16)
    with pytest.raises(ValueError, match='none of the known layouts'):
        SparseMoE.from_hf(block)


def test_llama_4_has_weighed_inputs_and_turned_matrices():
    config = Llama4TextConfig(hidden_size=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=1)
    block = drawn(Llama4TextMoe(config)).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    assert torch.allclose(SparseMoE.from_hf(block)(x)[0].flatten(0, 1), block(x)[0], atol=1e-12)
    block.experts.down_proj = nn.Parameter(block.experts.down_proj.mT.contiguous())
    with pytest.raises(ValueError, match="don't fit together"):
        SparseMoE.from_hf(block)


def test_a_gate_of_the_shared_experts_is_taken_over():
    config = Qwen2MoeConfig(hidden_size=16, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
    block = drawn(Qwen2MoeSparseMoeBlock(config))
    assert SparseMoE.from_hf(block).config.shared_gate
    block.another_gate = nn.Linear(16, 1)
    with pytest.raises(ValueError, match='no counterpart here: another_gate'):
        SparseMoE.from_hf(block)


def test_what_has_no_data_is_unproven():
    with torch.device('meta'):
        empty = MixtralSparseMoeBlock(MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=8))
    with pytest.raises(ValueError, match='nothing is proven about it'):
        SparseMoE.from_hf(empty)
    half = mixtral()
    half.experts.down_proj = nn.Parameter(half.experts.down_proj.to('meta'))
    with pytest.raises(ValueError, match='experts.down_proj .* has no data'):
        SparseMoE.from_hf(half)
    unknown = mixtral()
    nn.init.constant_(unknown.experts.down_proj, float('nan'))
    with pytest.raises(ValueError):
        SparseMoE.from_hf(unknown)


def test_stored_numbers_are_no_weights():
    block = mixtral()
    block.experts.down_proj = nn.Parameter(block.experts.down_proj.detach().to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match='dequantise it first'):
        SparseMoE.from_hf(block)


# Masks and precision

@pytest.mark.parametrize('router', ('top_k', 'switch', 'noisy_top_k', 'expert_choice', 'soft', 'sigmoid_bias', 'hash'))
@pytest.mark.parametrize('group', ('sequence', 'batch'))
@pytest.mark.parametrize('capacity', (None, 'switch', 'lucidrains', 'megatron'))
def test_more_padding_changes_nothing(router, group, capacity):
    torch.manual_seed(0)
    config = MoEConfig(8, 12, 4, router=router, group=group, capacity=capacity, capacity_factor=.7)
    moe = drawn(SparseMoE(config).eval(), 1.)
    x, ids, mask = torch.randn(3, 20, 8), torch.randint(50, (3, 20)), torch.rand(3, 20) < .7
    y, r = moe(x, ids, mask)
    wide = [
        torch.cat([torch.full_like(v[:, :9], fill), v], 1) for v, fill in ((x, float('nan')), (ids, 7), (mask, False))
    ]
    z, s = moe(*wide)
    assert torch.allclose(y[mask], z[:, 9:][mask], atol=1e-5)
    assert int((r.dropped & r.offered).sum()) == int((s.dropped & s.offered).sum())
    if router in ('top_k', 'switch', 'noisy_top_k'):
        assert torch.allclose(load_balancing_loss(r), load_balancing_loss(s))


def test_sequences_that_are_all_padding():
    for router in ('top_k', 'switch', 'expert_choice', 'soft', 'sigmoid_bias'):
        moe = SparseMoE(MoEConfig(8, 12, 4, router=router)).eval()
        x, mask = torch.randn(2, 6, 8), torch.tensor([[False], [True]]).expand(2, 6)
        y = moe(x, mask=mask)[0]
        assert not y[0].any() and torch.allclose(y[1], moe(x[1:])[0][0], atol=1e-6)


@pytest.mark.parametrize('router', ('top_k', 'switch', 'noisy_top_k', 'expert_choice', 'soft', 'sigmoid_bias'))
def test_autocast_leaves_decisions_alone(router):
    torch.manual_seed(0)
    moe = SparseMoE(MoEConfig(64, 32, 32, top_k=4, router=router)).eval()
    nn.init.normal_(moe.router.weight, std=.1)
    x = torch.randn(4, 128, 64)
    want = moe.decide(x)
    with torch.autocast('cpu', torch.bfloat16):
        got = moe.decide(x)
        moe(x)[0].sum().backward()
    for name in ('logits', 'probs', 'experts', 'tokens', 'weights', 'dispatch'):
        a, b = getattr(want, name), getattr(got, name)
        assert a is b is None or a.equal(b), name


def test_a_router_without_a_mask_is_not_given_padding():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_router(MoEConfig(8, 12, 4))

        def forward(self, x): return self.inner(x)

    moe = SparseMoE(MoEConfig(8, 12, 4, router=Plain()))
    moe(torch.randn(2, 5, 8), mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match='Plain takes no mask'):
        moe(torch.randn(2, 5, 8), mask=torch.arange(5).expand(2, 5) > 0)
