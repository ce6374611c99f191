"""Padding is nobody: for every router, limit of room, way to compute the experts, loss and side of the padding.

A masked batch is held against its texts, each alone and without padding. In float32 products of other sizes round
differently (1e-6 of the largest value); in float64 the same holds to 1e-12, but for the sigmoid router and for rules
whose scores are float32 whatever the model is."""
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from transformer_experiments.models.moe_transformer import MoETransformer, MoETransformerConfig
from transformer_experiments.moe import (
    MoEConfig,
    ScoreRule,
    SparseMoE,
    load_balancing_loss,
    router_z_loss,
    routing_stats,
)
from transformer_experiments.moe.expert_choice import CLASSES

CAPACITIES = None, 'switch', 'lucidrains', 'megatron'
BACKENDS = 'loop', 'grouped', 'einsum', 'auto'
SIDES = 'left', 'right', 'anywhere'


def drawn(module: nn.Module, std: float = .5) -> nn.Module:
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module


def random_mask(g: torch.Generator, B: int, T: int, side: str) -> torch.Tensor:
    "At least one sequence has a token."
    lengths = torch.randint(0, T + 1, (B, 1), generator=g)
    lengths[torch.randint(B, (1,), generator=g)] = T - T // 3
    if side == 'anywhere': return torch.rand(B, T, generator=g).argsort(1) < lengths
    return torch.arange(T) < lengths if side == 'right' else torch.arange(T) >= T - lengths


def random_case(seed: int, router: str, dtype: torch.dtype):
    g = torch.Generator().manual_seed(seed)
    def whole(low, high): return int(torch.randint(low, high, (1,), generator=g))
    E, torch_seed = whole(4, 9), whole(0, 1000)
    rule, groups = None, 1
    if router == 'scored':
        def pick(*values): return values[whole(0, len(values))]
        groups, E = pick(1, 2), 2 * ((E + 1) // 2)
        rule = ScoreRule(
            pick('softmax', 'sigmoid', 'sqrtsoftplus', 'softmax_of_chosen'), pick('scores', 'logits'),
            pick('scores', 'nothing'), pick(True, False), pick(True, False), pick(None, 2.), pick(0., 1e-6),
            pick(True, False), pick('top2', 'max'), pick(None, 0.), pick(True, False), pick('output', 'input'))
    config = MoEConfig(
        whole(3, 9), whole(2, 9), E, top_k=whole(2, max(3, E // groups + 1)), n_groups=groups, rule=rule,
        router=router, capacity=CAPACITIES[whole(0, 4)],
        n_slots=whole(1, 3), n_shared_experts=whole(0, 2), expert=('swiglu', 'mlp')[whole(0, 2)],
        bias=bool(whole(0, 2)),
        capacity_factor=.5 + whole(0, 4) / 2, eval_capacity_factor=(None, .7, 2.5)[whole(0, 3)])
    torch.manual_seed(torch_seed)
    moe = drawn(SparseMoE(config).to(dtype)).train(bool(whole(0, 2)))
    B, T = whole(1, 4), whole(3, 12)
    x = torch.randn(B, T, config.hidden_size, generator=g, dtype=dtype)
    ids, mask = torch.randint(50, (B, T), generator=g), random_mask(g, B, T, SIDES[whole(0, 3)])
    return moe, x, ids, mask


def close(a: torch.Tensor, b: torch.Tensor, share: float, what: object):
    size = max(b.detach().abs().max().item(), 1.) if b.numel() else 1.
    assert a.shape == b.shape and (not a.numel() or (a - b).abs().max() <= share * size), what


def results(moe, x, ids, mask, out):
    "Outputs, the gradients of the input and of the weights for gradients `out`, and the decision."
    x = x.detach().clone().requires_grad_()
    for p in moe.parameters():
        p.grad = None
    if hasattr(moe.router, 'counts'):
        moe.router.counts = 0
    torch.manual_seed(0)
    y, r = moe(x, ids, mask)
    (y * out).sum().backward()
    return y.detach(), x.grad, [p.grad for p in moe.parameters()], r


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
@pytest.mark.parametrize('router', CLASSES)
def test_a_masked_batch_is_its_texts_alone(router, dtype):
    for seed in range(25):
        moe, x, ids, mask = random_case(seed, router, dtype)
        in_float32 = router == 'sigmoid_bias' or moe.config.rule is not None and moe.config.rule.full != 'nothing'
        if moe.training and router == 'noisy_top_k':
            moe.eval() # the noise of several texts is drawn at once
        x = x.masked_fill(~mask[..., None], float('nan')) # whatever padding holds
        out = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        y, dx, grads, r = results(moe, x, ids, mask, out)
        counts = getattr(moe.router, 'counts', 0)
        assert not y[~mask].any() and not dx[~mask].any()
        total, choices = [torch.zeros_like(p) for p in moe.parameters()], 0
        bound = 1e-12 if dtype == torch.float64 and not in_float32 else 1e-6
        for b, real in enumerate(mask):
            if not real.any(): continue
            alone, rest = x[b:b + 1, real], torch.ones(1, int(real.sum()))
            y1, dx1, grads1, r1 = results(moe, alone, ids[b:b + 1, real], rest, out[b:b + 1, real])
            close(y[b, real], y1[0], bound, (seed, 'outputs'))
            close(dx[b, real], dx1[0], 10 * bound, (seed, 'gradients of the input'))
            choices = choices + getattr(moe.router, 'counts', 0)
            total = [t if g is None else t + g for t, g in zip(total, grads1, strict=True)]
        for g, t in zip(grads, total, strict=True):
            close(torch.zeros_like(t) if g is None else g, t, 10 * bound, (seed, 'gradients of the weights'))
        assert torch.equal(torch.as_tensor(counts), torch.as_tensor(choices)), seed


@pytest.mark.parametrize('router', CLASSES)
def test_backends_agree_under_masks(router):
    for seed in range(25, 45):
        moe, x, ids, mask = random_case(seed, router, torch.float64)
        out, want = torch.randn(x.shape, dtype=torch.float64), None
        for moe.backend in BACKENDS:
            y, dx, grads, _ = results(moe, x, ids, mask, out)
            want = want or (y, dx, grads)
            close(y, want[0], 1e-12, (seed, moe.backend))
            close(dx, want[1], 1e-11, (seed, moe.backend))
            for a, b in zip(grads, want[2], strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    close(a, b, 1e-11, (seed, moe.backend))


@pytest.mark.parametrize('group', ('sequence', 'batch'))
@pytest.mark.parametrize('router', CLASSES)
def test_left_and_right_padding_are_no_padding(router, group):
    "With the batch as the group, texts compete: all of them, padded on either side, and packed tightly."
    for seed in range(45, 60):
        moe, x, ids, _ = random_case(seed, router, torch.float32)
        moe = SparseMoE(replace(moe.config, group=group)).eval()
        drawn(moe)
        T = x.shape[1]
        want, r = moe(x, ids)
        for left, right in ((3, 0), (0, 4), (2, 5)):
            wide = nn.functional.pad(x, (0, 0, left, right), value=float('inf'))
            mask = nn.functional.pad(torch.ones(len(x), T), (left, right))
            y, s = moe(wide, nn.functional.pad(ids, (left, right)), mask)
            close(y[:, left:left + T], want, 1e-6, (seed, left, right))
            if r.kind == 'token choice':
                assert s.dropped[:, left:left + T].equal(r.dropped) and s.experts[:, left:left + T].equal(r.experts)
                if router != 'hash': # whose logits say never by -inf
                    close(router_z_loss(s), router_z_loss(r), 1e-6, seed)
                close(load_balancing_loss(s), load_balancing_loss(r), 1e-6, seed)
            if r.kind == 'soft': continue
            a, b = routing_stats(s), routing_stats(r)
            assert (a.load - b.load).abs().max() < 1e-9 and a.drop_rate == b.drop_rate and a.unrouted == b.unrouted


def test_losses_of_masked_texts_are_those_of_their_tokens():
    for seed in range(20):
        moe, x, ids, mask = random_case(seed, 'top_k', torch.float64)
        def losses(x, ids, mask, moe=moe):
            r = moe(x, ids, mask)[1]
            return load_balancing_loss(r) + router_z_loss(r)
        packed = x[mask][None], ids[mask][None], None
        grads = [torch.autograd.grad(losses(*given), moe.router.weight)[0] for given in ((x, ids, mask), packed)]
        close(losses(x, ids, mask), losses(*packed), 1e-6, seed) # z is float32
        close(grads[0], grads[1], 1e-6, seed)


@pytest.mark.parametrize('router', CLASSES)
def test_a_batch_of_padding_alone_is_zeros(router):
    moe = SparseMoE(MoEConfig(8, 12, 4, router=router, capacity='switch')).train()
    drawn(moe)
    x = torch.full((2, 6, 8), float('nan'), requires_grad=True)
    y, r = moe(x, torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6))
    y.sum().backward()
    assert not y.any() and not x.grad.any() and all(p.grad is None or not p.grad.any() for p in moe.parameters())
    if r.kind == 'token choice':
        with pytest.raises(ValueError, match='no token counts'):
            load_balancing_loss(r)
    if getattr(moe.router, 'bias', None) is not None:
        was = moe.router.bias.clone()
        moe.router.update_bias()
        assert was.equal(moe.router.bias)


def test_a_mask_of_another_shape_says_what_was_expected():
    moe = SparseMoE(MoEConfig(8, 12, 4))
    for wrong in ((6, 2), (2, 5), (2, 6, 1), (12,)):
        with pytest.raises(ValueError, match=r'\(2, 6\), got'):
            moe(torch.randn(2, 6, 8), mask=torch.ones(wrong))


def model(router: str, **more) -> MoETransformer:
    torch.manual_seed(0)
    moe = MoEConfig(12, 10, 4, router=router, capacity='switch', capacity_factor=.8)
    config = MoETransformerConfig(16, 12, 3, 2, 0., moe=moe, balance_loss=.5, z_loss=.1, **more)
    m = MoETransformer(31, config=config)
    for p in m.parameters():
        p.data *= 4
    return m


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
@pytest.mark.parametrize('router', CLASSES)
def test_a_model_gives_each_text_what_it_gets_alone(router, dtype):
    "Logits, with padding on either side; as close as products of other sizes are."
    m, g = model(router).to(dtype).eval(), torch.Generator().manual_seed(2)
    texts = [torch.randint(31, (1, n), generator=g) for n in (3, 11, 8)]
    exact = dtype == torch.float64 and router not in ('sigmoid_bias', 'scored')
    for pad in (lambda x, n: (n, 0), lambda x, n: (0, n), lambda x, n: (n // 2, n - n // 2)):
        pads = [pad(x, 12 - x.shape[1]) for x in texts]
        idx = torch.cat([nn.functional.pad(x, p, value=5) for x, p in zip(texts, pads, strict=True)])
        mask = torch.cat([nn.functional.pad(torch.ones(x.shape), p) for x, p in zip(texts, pads, strict=True)])
        for x, row, real in zip(texts, m(idx, mask=mask)[0], mask.bool(), strict=True):
            want = m(x)[0][0]
            close(row[real], want, 1e-12 if exact else 3e-6, router) # two layers of float32 sums


@pytest.mark.parametrize('router', CLASSES)
@pytest.mark.parametrize('side', ('left', 'right'))
def test_a_model_in_training_sees_no_padding(router, side):
    "One text with padding on a side: the same loss and gradients as without, and the same biases after the step."
    m, idx = model(router).double().train(), torch.randint(31, (1, 9), generator=torch.Generator().manual_seed(1))
    pads = (4, 0) if side == 'left' else (0, 4)
    mask = nn.functional.pad(torch.ones(1, 9), pads)
    found = []
    padded = [nn.functional.pad(v, pads, value=7) for v in (idx, idx.roll(-1))]
    for given in ((idx, idx.roll(-1)), (*padded, None, mask)):
        torch.manual_seed(0) # of the noise
        m.zero_grad()
        loss = m(*given)[1]
        loss.backward()
        grads = [p.grad for p in m.parameters() if p.grad is not None]
        counts = [torch.as_tensor(getattr(layer.moe.router, 'counts', 0)) for layer in m.sparse_layers]
        found.append((loss.detach(), grads, counts))
        m.after_step()
    (a, da, na), (b, db, nb) = found
    close(a, b, 1e-6, 'loss') # the loss is float32
    for p, q in zip(da, db, strict=True):
        close(p, q, 1e-6, 'gradients')
    assert all(torch.equal(i, j) for i, j in zip(na, nb, strict=True))


TWO_PROCESSES = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformer_experiments.models.moe_transformer import MoETransformer, MoETransformerConfig
from transformer_experiments.moe import MoEConfig

dist.init_process_group('gloo')
moe = MoEConfig(12, 10, 4)
torch.manual_seed(0)
config = MoETransformerConfig(16, 12, 3, 2, 0., moe=moe, balance_loss=.5, z_loss=.1, balance_over='processes')
m = MoETransformer(31, config=config).train()
for p in m.parameters(): p.data *= 4
alone = MoETransformer(31, config=MoETransformerConfig(16, 12, 3, 2, 0., moe=moe, balance_loss=.5, z_loss=.1)).train()
alone.load_state_dict(m.state_dict())
idx = torch.randint(31, (4, 9))
alone(idx, idx.roll(-1, 1))[1].backward()
mine = idx[2 * dist.get_rank():][:2]
ddp = DistributedDataParallel(m) # kept: it takes its hooks with it
ddp(mine, mine.roll(-1, 1))[1].backward()
for p, q in zip(m.parameters(), alone.parameters(), strict=True):
    assert (p.grad - q.grad).abs().max() < 1e-5 * q.grad.abs().max() + 1e-8
if dist.get_rank() == 0: print('as one process')
del ddp # before its group, whose threads it uses
dist.barrier()
dist.destroy_process_group()
"""


def test_data_parallel_trains_like_one_process(tmp_path):
    "With the balance counted over all processes; each call alone gives other gradients."
    def run(script):
        (path := tmp_path/'script.py').write_text(script)
        torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(path)]
        env = dict(os.environ, OMP_NUM_THREADS='1')
        return subprocess.run(torchrun, env=env, capture_output=True, text=True, timeout=120)

    done = run(TWO_PROCESSES)
    assert done.returncode == 0 and 'as one process' in done.stdout, done.stderr[-3000:]
    assert 'AssertionError' in run(TWO_PROCESSES.replace("'processes'", "'call'")).stderr
