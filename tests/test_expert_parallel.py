"""Expert parallelism compared with one process.

2 and 4 real processes (gloo over the loopback interface), each with its own tokens, give the result and every gradient
of a `SparseMoE` on the whole batch. The processes of one size are started once and go through all cases; each test
reads their measurements."""
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from transformer_experiments.models.moe_transformer import MoETransformerConfig
from transformer_experiments.moe import (
    ExpertParallel,
    MoEConfig,
    Routing,
    ScoreRule,
    SparseMoE,
    expert_parallel,
    expert_parameters,
    full_state_dict,
    gradient_norm,
    sum_gradients,
)

BASE = MoEConfig(hidden_size=8, intermediate_size=12, n_experts=8)
ROUTED = {
    'top_k': BASE,
    'top_k, normalize=False': replace(BASE, top_k=3, normalize=False),
    'switch with capacity': replace(BASE, router='switch', capacity='switch', capacity_factor=0.7),
    'megatron capacity': replace(BASE, capacity='megatron', capacity_factor=0.6),
    'sigmoid_bias': replace(BASE, router='sigmoid_bias', n_groups=4, top_groups=2, scale=2.5),
    'hash': replace(BASE, router='hash'),
    'expert_choice': replace(BASE, router='expert_choice', capacity_factor=2.),
    'shared experts': replace(BASE, n_shared_experts=2),
    'gated shared experts, a bias of the sum': replace(
        BASE, n_shared_experts=1, shared_size=9, shared_gate=True, sum_bias=True),
    'a rule, clamped': replace(BASE, router='scored', rule=ScoreRule('softmax_of_chosen', full='nothing'), limit=.5),
    'biases': replace(BASE, bias=True, n_shared_experts=1),
    'mlp, biases, gelu': replace(BASE, expert='mlp', activation='gelu', bias=True),
    'odd widths': replace(BASE, hidden_size=7, intermediate_size=5, n_experts=12, top_k=4),
}
# name: sequences of each process. With 2 processes, the first two; on 4, all.
SIZES = {
    'even': (2, 2, 2, 2),
    'uneven': (3, 1, 2, 4),
    'an empty process': (2, 0, 3, 0),
    'no tokens at all': (0, 0, 0, 0),
}
DTYPES = {'float32': 1e-5, 'float64': 1e-10}
CASES = (
    [(c, 'uneven', d) for c in ROUTED for d in DTYPES]
    + [('top_k', s, d) for s in SIZES if s != 'uneven' for d in DTYPES]
    + [
        (c, s, 'float64')
        for c in ('shared experts', 'expert_choice', 'hash')
        for s in ('an empty process', 'no tokens at all')
    ]
)
OTHERS = [
    'idle experts',
    'idle process',
    'loop',
    'einsum',
    'bmm',
    'gather',
    'step',
    'mean',
    'lengths',
    'mesh of two dimensions',
    'ddp',
    'update_bias',
    'model',
    'autocast',
    'frozen',
    'unused',
]
DEADLINE = 100 # seconds, for all cases of one number of processes


# What every process does

def block(config: MoEConfig, dtype=torch.float64, **more) -> SparseMoE:
    "The same on all processes, with weights large enough to matter."
    torch.manual_seed(0)
    moe = SparseMoE(config, **more).to(dtype)
    for p in moe.parameters():
        nn.init.normal_(p, std=0.3)
    if config.router == 'sigmoid_bias':
        nn.init.normal_(moe.router.bias, std=0.3)
    return moe


def batches(sizes, C: int, dtype, T: int = 9) -> tuple[list, list]:
    "Tokens of each process, and their ids."
    g = torch.Generator().manual_seed(1)
    return [torch.randn(b, T, C, generator=g, dtype=torch.float64).to(dtype) for b in sizes], [
        torch.randint(65, (b, T), generator=g) for b in sizes
    ]


def loss(y: torch.Tensor, first: int, dtype) -> torch.Tensor: # A sum over tokens with another weight for each number
    out = torch.randn(64, *y.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)[
        first : first + len(y)
    ]
    return (y * out.to(dtype)).sum()


def off(a: torch.Tensor, b: torch.Tensor) -> float: # Largest difference, as a share of the largest value
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item() if b.numel() else 0.


def part(p: torch.Tensor, mesh) -> torch.Tensor: # Of all experts, those of this process
    return p.unflatten(0, (mesh.size(), -1))[mesh.get_local_rank()]


def whole_grads(moe: SparseMoE, x: torch.Tensor, ids: torch.Tensor) -> tuple:
    "One process on the whole batch: result, gradient of x, gradients of parameters."
    x = x.clone().requires_grad_()
    y, routing = moe(x, token_ids=ids)
    names, params = zip(*moe.named_parameters(), strict=True)
    dx, *grads = torch.autograd.grad(loss(y, 0, x.dtype), [x, *params])
    return y.detach(), dx, dict(zip(names, grads, strict=True)), routing


def compare(mesh, config: MoEConfig, sizes, dtype=torch.float64, moe: SparseMoE | None = None) -> dict:
    "How far result and gradients are from those of one process."
    sizes, rank = sizes[:mesh.size()], mesh.get_local_rank()
    moe = moe or block(config, dtype)
    (xs, ids), first = batches(sizes, config.hidden_size, dtype), sum(sizes[:rank])
    y, dx, grads, whole_routing = whole_grads(moe, torch.cat(xs), torch.cat(ids))
    ep, x, mine = ExpertParallel(moe, mesh), xs[rank].clone().requires_grad_(), slice(first, first + sizes[rank])
    ep.zero_grad()
    out, routing = ep(x, token_ids=ids[rank])
    loss(out, first, dtype).backward()
    experts = {n: p.grad.clone() for n, p in ep.experts.named_parameters()} # complete before anything is added up
    sum_gradients(ep, mesh)
    assert routing.weights.shape[0] == sizes[rank] and torch.equal(routing.weights, whole_routing.weights[mine])
    errors = {'y': off(out, y[mine]), 'x': off(x.grad, dx[mine])}
    if config.router == 'sigmoid_bias': # its gradient is always added up in float32: exact only in the same order
        assert off(ep.router.weight.grad, grads['router.weight']) < 1e-5
        grads['router.weight'] = router_grad_by_process(moe, xs)
    for n, p in ep.named_parameters():
        errors[n] = off(p.grad, part(grads[n], mesh) if n.startswith('experts.') else grads[n])
    for n, g in experts.items():
        assert torch.equal(g, ep.experts.get_parameter(n).grad)
    return errors


def router_grad_by_process(moe: SparseMoE, xs: list[torch.Tensor]) -> torch.Tensor:
    firsts = [sum(len(v) for v in xs[:i]) for i in range(len(xs))]
    pairs = zip(xs, firsts, strict=True)
    return sum(torch.autograd.grad(loss(moe(v)[0], first, v.dtype), moe.router.weight)[0] for v, first in pairs)


class Only(nn.Module):
    "Sends all tokens to the same experts."
    def __init__(self, *experts: int, E: int = 8):
        super().__init__()
        self.experts, self.E, self.weight = experts, E, nn.Parameter(torch.ones(len(experts)))
    def forward(self, x):
        chosen = torch.tensor(self.experts).expand(*x.shape[:2], -1)
        probs = torch.zeros(*x.shape[:2], self.E).scatter(-1, chosen, 1 / len(self.experts))
        return Routing(probs.log(), probs, self.weight * x.mean(-1, keepdim=True), experts=chosen)


def one(mesh, case: str) -> dict:
    "The errors of a case that is not a plain comparison."
    n, rank, uneven = mesh.size(), mesh.get_local_rank(), SIZES['uneven'][:mesh.size()]
    if case == 'idle experts': return compare(mesh, replace(BASE, router=Only(0, 3, 7)), uneven)
    if case == 'idle process': return compare(mesh, replace(BASE, router=Only(0, 1)), uneven)
    if case in ('loop', 'einsum'): return compare(mesh, BASE, SIZES['an empty process'], moe=block(BASE, backend=case))
    if case == 'bmm': return compare(mesh, c := ROUTED['expert_choice'], uneven, moe=block(c, backend=case))
    moe = block(c := replace(BASE, n_shared_experts=1, bias=True))
    ep = ExpertParallel(block(c), mesh)
    xs, ids = batches(uneven, 8, torch.float64)
    first, x = sum(uneven[:rank]), xs[rank]
    if case == 'gather': # and the other way round: spread again
        back, other = ep.gather(), moe.state_dict()
        assert {k: v.shape for k, v in back.state_dict().items()} == {k: v.shape for k, v in other.items()} and type(
            back
        ) is SparseMoE
        again = ExpertParallel(back, mesh).experts.state_dict()
        return {
            **{k: off(v, other[k]) for k, v in back.state_dict().items()},
            **{'again ' + k: off(v, part(other['experts.' + k], mesh)) for k, v in again.items()},
            'y': off(back(x)[0], moe(x)[0]),
        }
    if case == 'step': # clipped by the norm of all, two steps of AdamW
        optims = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (moe, ep)]
        for _ in range(2):
            for optim in optims:
                optim.zero_grad()
            loss(moe(torch.cat(xs))[0], 0, x.dtype).backward()
            loss(ep(x)[0], first, x.dtype).backward()
            sum_gradients(ep, mesh)
            norms = nn.utils.clip_grad_norm_(moe.parameters(), 1.), gradient_norm(ep)
            nn.utils.clip_grads_with_norm_(ep.parameters(), 1., norms[1])
            for optim in optims:
                optim.step()
        back = ep.gather().state_dict()
        return {
            'norm': off(norms[1], norms[0].float()) / 1e5,
            **{k: off(v, back[k]) / 1e5 for k, v in moe.state_dict().items()},
        }  # the norm is float32
    if case == 'mean': # each process's sum divided by the tokens of all
        (moe(torch.cat(xs))[0].square().sum(-1)).mean().backward()
        (ep(x)[0].square().sum(-1).sum() / (sum(uneven) * 9)).backward()
        sum_gradients(ep, mesh)
        return grads_off(ep, moe, mesh)
    if case == 'lengths': # other lengths on other processes, and a time of 0
        x = x[:, :(9, 4, 0, 1)[rank]]
        return {'y': off(ep(x)[0], moe(x)[0])}
    if case == 'mesh of two dimensions':
        square = init_device_mesh('cpu', (n // 2, 2), mesh_dim_names=('data', 'expert'))
        ep = ExpertParallel(block(c), square['expert'])
        loss(moe(torch.cat(xs))[0], 0, x.dtype).backward()
        loss(y := ep(x)[0], first, x.dtype).backward()
        sum_gradients(ep, square)
        return {'y': off(y, moe(torch.cat(xs))[0][first:first + len(x)]), **grads_off(ep, moe, square['expert'])}
    if case == 'ddp': # as the notebook says: the mean of all processes' losses
        if rank:
            nn.init.normal_(ep.router.weight) # DDP starts from the first process's router
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ep, list(expert_parameters(ep)))
        ddp = nn.parallel.DistributedDataParallel(ep)
        (sum(loss(moe(v)[0], sum(uneven[:i]), v.dtype) for i, v in enumerate(xs)) / n).backward()
        loss(ddp(x)[0], first, x.dtype).backward()
        for p in expert_parameters(ep).values():
            p.grad /= n
        return grads_off(ep, moe, mesh)
    if case == 'update_bias':
        moe, ep = block(c := ROUTED['sigmoid_bias']), ExpertParallel(block(c), mesh)
        ep(x), ep.router.update_bias()
        moe(torch.cat(xs))
        moe.router.bias += 1e-3 * torch.sign(moe.router.counts.float().mean() - moe.router.counts)
        return {'bias': off(ep.router.bias, moe.router.bias)}
    if case == 'model': # a transformer, both of its layers
        config = MoETransformerConfig(
            n_embed=8,
            n_head=2,
            n_layer=2,
            block_size=9,
            dropout=0.0,
            moe=replace(BASE, expert='mlp', activation='relu', bias=True),
            balance_loss=0.0,
        )
        models = []
        for _ in range(2):
            torch.manual_seed(3)
            models.append(config.build(65).double())
            for p in models[-1].parameters():
                nn.init.normal_(p, std=0.2)
        (logits, total), parallel = models[0](torch.cat(ids), torch.cat(ids)), expert_parallel(models[1], mesh)
        assert len(expert_parameters(parallel)) == 8 and {type(l.moe) for l in parallel.sparse_layers} == {
            ExpertParallel
        }
        state, was = full_state_dict(parallel), models[0].state_dict()
        assert state.keys() == was.keys() and all(torch.equal(v, was[k]) for k, v in state.items())
        out, own = parallel(ids[rank], ids[rank])
        total.backward(), (own * len(x) / sum(uneven)).backward()
        sum_gradients(parallel, mesh)
        return {'logits': off(out, logits[first:first + len(x)]), **grads_off(parallel, models[0], mesh)}
    if case == 'autocast': # the same rows in the same precision: to the rounding of bfloat16
        moe, ep, x = block(c, torch.float32), ExpertParallel(block(c, torch.float32), mesh), x.float()
        with torch.autocast('cpu', torch.bfloat16):
            (y, _), (z, _) = ep(x), moe(x)
        assert y.dtype == z.dtype == torch.bfloat16
        loss(y, first, x.dtype).backward()
        return {'y': off(y, z) * 1e-8}
    if case == 'frozen': # experts that don't train send no gradient of theirs; tokens and router get theirs
        ep = ExpertParallel(block(c).requires_grad_(False), mesh)
        ep.router.requires_grad_(True)
        loss(ep(x)[0], first, x.dtype).backward()
        sum_gradients(ep, mesh)
        assert all(p.grad is None for p in ep.experts.parameters())
        loss(moe(torch.cat(xs))[0], 0, x.dtype).backward()
        return {'router': off(ep.router.weight.grad, moe.router.weight.grad)}
    if case == 'unused': # a dense layer that only the last process's tokens meet
        torch.manual_seed(4)
        model = nn.ModuleDict(dict(moe=ep, extra=nn.Linear(8, 8).double()))
        y = model.moe(x)[0]
        loss(model.extra(y) if rank == n - 1 else y, first, x.dtype).backward()
        sum_gradients(model, mesh)
        alone = torch.autograd.grad(
            loss(model.extra(moe(xs[n - 1])[0]), sum(uneven[: n - 1]), x.dtype), model.extra.weight
        )[0]
        return {'extra': off(model.extra.weight.grad, alone)}
    raise KeyError(case)


def grads_off(ep: nn.Module, moe: nn.Module, mesh) -> dict:
    own = expert_parameters(ep)
    return {
        n: off(p.grad, part(moe.get_parameter(n).grad, mesh) if n in own else moe.get_parameter(n).grad)
        for n, p in ep.named_parameters()
    }


def work(rank: int, n: int, folder: Path):
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=n, timeout=timedelta(seconds=30)
    )
    mesh, found = init_device_mesh('cpu', (n,)), {}
    for case in [*CASES, *OTHERS]:
        name = case if isinstance(case, str) else ' | '.join(case)
        try:
            if isinstance(case, str):
                found[name] = one(mesh, case)
            else:
                found[name] = compare(mesh, ROUTED[case[0]], SIZES[case[1]], getattr(torch, case[2]))
        except AssertionError as e:
            found[name] = f'{type(e).__name__}: {e}' # found by one process after all exchanges: the others go on
        (folder/f'{rank}.json').write_text(json.dumps(found))
    dist.destroy_process_group()


# The tests

@pytest.fixture(scope='module', params=[2, 4])
def measured(request, tmp_path_factory) -> list[dict]:
    "What each process found; all are killed after `DEADLINE`."
    n, folder = request.param, tmp_path_factory.mktemp('processes')
    env = dict(os.environ, OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo')
    logs = [open(folder/f'{r}.log', 'w+') for r in range(n)]
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(r), str(n), str(folder)], env=env, stdout=logs[r], stderr=subprocess.STDOUT
        )
        for r in range(n)
    ]
    deadline = time.time() + DEADLINE
    try:
        codes = [p.wait(max(0.1, deadline - time.time())) for p in running]
    except subprocess.TimeoutExpired:
        codes = None
    finally:
        for p in running:
            p.kill()
            p.wait()
    said = '\n'.join((f.seek(0), f.read())[1][-2000:] for f in logs)
    assert codes == [0] * n, f'processes ended with {codes} (None: not within {DEADLINE} s):\n{said}'
    return [json.loads((folder/f'{r}.json').read_text()) for r in range(n)]


def errors(measured: list[dict], name: str) -> float:
    for rank, found in enumerate(measured):
        assert isinstance(found[name], dict), f'process {rank}: {found[name]}'
        assert found[name]
    return max(
        (e, f'{what} on process {rank}') for rank, found in enumerate(measured) for what, e in found[name].items()
    )


@pytest.mark.parametrize('case', [pytest.param(c, id=' | '.join(c)) for c in CASES])
def test_processes_equal_one(measured, case):
    "Result, and gradients of x, router, experts and shared experts, relative to the largest value."
    worst = errors(measured, ' | '.join(case))
    assert worst[0] < DTYPES[case[2]], worst


@pytest.mark.parametrize('case', OTHERS)
def test_other_ways(measured, case):
    "In float64, except for what is scaled to that bound in `one`."
    worst = errors(measured, case)
    assert worst[0] < DTYPES['float64'], worst


if __name__ == '__main__':
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
