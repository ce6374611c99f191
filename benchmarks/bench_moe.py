"""Mixture-of-experts blocks against a lower bound and `transformers`; expert choice against one-hot products.

The lower bound ("floor") is the same work in perfect balance, without routing. Candidates take turns; a ratio is the
median over the rounds. A step is measured in four ways: with and without a gradient of the input, with experts that
are frozen, and adding to gradients that are there.

    python benchmarks/bench_moe.py            # all rows
    python benchmarks/bench_moe.py 0 4 choice backends # some of them
"""
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

from transformer_experiments.moe import MoEConfig, SparseMoE


@dataclass(frozen=True)
class Row:
    "The sizes of a block and how many tokens it reads."
    width: int
    inner: int
    n_experts: int
    top_k: int
    n_tokens: int


ROWS = [Row(384, 1536, 8, 2, 512), Row(384, 1536, 8, 2, 4096), Row(1024, 3584, 8, 2, 2048),
        Row(512, 256, 32, 4, 1024), Row(512, 256, 64, 8, 1024), Row(1024, 3584, 8, 2, 1),
        Row(320, 1280, 8, 2, 640), Row(384, 1536, 8, 2, 2048), Row(768, 2048, 8, 2, 1024), Row(768, 2048, 8, 2, 1),
        Row(512, 512, 64, 8, 4096), Row(256, 1024, 16, 1, 4096)]
SECONDS = 10 # for a row and way to run it


class Floor(nn.Module):
    """Each expert's two products on an equal slice of the rows.

    Each expert's weights are parameters of their own, so that a gradient is written once."""
    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor):
        super().__init__()
        self.gate_up, self.down = (nn.ParameterList([w.clone() for w in ws]) for ws in (gate_up, down))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = []
        for rows, gate_up, down in zip(x.chunk(len(self.down)), self.gate_up, self.down, strict=True):
            gate, up = F.linear(rows, gate_up).chunk(2, -1)
            y.append(F.linear(F.silu(gate) * up, down))
        return y


def theirs(row: Row, way: str) -> nn.Module:
    config = Qwen3MoeConfig(hidden_size=row.width, moe_intermediate_size=row.inner, num_experts=row.n_experts,
                            num_experts_per_tok=row.top_k, norm_topk_prob=row.top_k > 1)
    config._experts_implementation = way
    return Qwen3MoeSparseMoeBlock(config)


def forward(block, x):
    with torch.no_grad():
        block(x)


def step(block, x, input_gradient=True, accumulate=False):
    "Forward and backward."
    x = x.detach().requires_grad_(input_gradient)
    y = block(x)
    y = y[0] if isinstance(y, tuple) else y
    torch.autograd.backward(y, [torch.ones_like(v) for v in y] if isinstance(y, list) else torch.ones_like(y))
    if accumulate: return
    for p in block.parameters():
        p.grad = None


def frozen_step(block, x):
    "Forward and backward to the input alone."
    parameters = list(block.parameters())
    for p in parameters:
        p.requires_grad_(False)
    step(block, x)
    for p in parameters:
        p.requires_grad_(True)


WAYS = {'forward': forward, 'step': step, 'step, no gradient of the input': partial(step, input_gradient=False),
        'step, all weights frozen': frozen_step, 'step, adding to gradients': partial(step, accumulate=True)}


def rounds(candidates: dict, seconds: float = SECONDS) -> dict:
    "Seconds of each candidate in each round, in turns."
    for f in candidates.values():
        f()
    times, start, n = {name: [] for name in candidates}, time.perf_counter(), 0
    while n < 5 or time.perf_counter() - start < seconds and n < 41:
        n += 1
        for name, f in candidates.items():
            before = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - before)
    return times


def ratio(a: list, b: list) -> float: return statistics.median(x / y for x, y in zip(a, b, strict=True))


def milliseconds(seconds: list) -> float: return statistics.median(seconds) * 1e3


def blocks_of(row: Row, x: torch.Tensor) -> dict:
    "The candidates by name, on the same weights. Stops if ours gives another result."
    blocks = {way: theirs(row, way) for way in ('eager', 'grouped_mm')}
    for p in blocks['eager'].parameters():
        nn.init.normal_(p, std=p.shape[-1]**-0.5)
    blocks['grouped_mm'].load_state_dict(blocks['eager'].state_dict())
    blocks['ours'] = SparseMoE.from_hf(blocks['eager'])
    y, want = blocks['ours'](x)[0], blocks['eager'](x)
    if (y - want).abs().max() > 1e-5 * want.abs().max(): raise SystemExit(f'{row}: not the same result')
    if row.top_k * row.n_tokens >= row.n_experts:
        experts = blocks['ours'].experts
        blocks['floor'] = Floor(experts.gate_up.detach(), experts.down.detach())
    return blocks


def token_choice(row: Row) -> dict:
    "Print a row; how many times faster than the better one of `transformers`, by way to run it."
    torch.manual_seed(0)
    x = torch.randn(1, row.n_tokens, row.width)
    choices = row.top_k * row.n_tokens
    in_balance = torch.randn(max(row.n_experts, choices), row.width)
    inputs = {name: (b, in_balance if name == 'floor' else x) for name, b in blocks_of(row, x).items()}
    print(f'width {row.width}, inner {row.inner}, {row.n_experts} experts, {row.top_k} a token, {row.n_tokens} tokens')
    faster = {}
    for way, run in WAYS.items():
        t = rounds({name: partial(run, *given) for name, given in inputs.items()})
        for block, _ in inputs.values():
            block.zero_grad()
        medians = {name: statistics.median(t[name]) for name in ('eager', 'grouped_mm')}
        best = min(medians, key=medians.get)
        faster[way] = ratio(t[best], t['ours'])
        over = ''
        if 'floor' in t and choices / row.n_experts >= 64:
            over = f'{ratio(t["ours"], t["floor"]):.2f}x the floor; '
        print(f'  {way:<31} {milliseconds(t["ours"]):7.1f} ms; {over}{faster[way]:.2f}x as fast as {best}', flush=True)
    return faster


class OneHotChain(nn.Module):
    "Expert choice step by step: products with a one-hot tensor (B, E, l, T), weights (E, C, F) and (E, F, C)."
    def __init__(self, block: SparseMoE):
        super().__init__()
        self.config, self.gate = block.config, nn.Parameter(block.router.weight.detach().clone())
        self.up, self.down = (nn.Parameter(w.detach().mT.contiguous()) for w in (block.experts.up, block.experts.down))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        probs = F.linear(x, self.gate).softmax(-1)
        capacity = int(T / self.config.n_experts * self.config.capacity_factor)
        weights, tokens = probs.permute(0, 2, 1).topk(capacity, dim=-1)
        one_hot = F.one_hot(tokens, T).float()                       # (B, E, l, T)
        h = F.gelu(torch.einsum('BElC,ECH->BElH', torch.einsum('BElT,BTC->BElC', one_hot, x), self.up))
        answers = torch.einsum('BElH,EHC->BElC', h, self.down) * weights[..., None]
        return one_hot.view(B, -1, T).permute(0, 2, 1) @ answers.contiguous().view(B, -1, C)


def expert_choice(T: int, goal: float):
    torch.manual_seed(0)
    block = SparseMoE(MoEConfig(512, 1024, 8, router='expert_choice', expert='mlp', activation='gelu'))
    chain, grouped, x = OneHotChain(block), SparseMoE(block.config, backend='grouped'), torch.randn(1, T, 512)
    grouped.load_state_dict(block.state_dict())
    y, want = block(x)[0], chain(x)
    if (y - want).abs().max() > 1e-5 * want.abs().max(): raise SystemExit('expert choice: not the same result')
    candidates = dict(ours=block, grouped=grouped, chain=chain)
    t = rounds({name: partial(step, b, x) for name, b in candidates.items()})
    print(f'expert choice, width 512, inner 1024, 8 experts, {T} tokens: '
          f'forward + backward {milliseconds(t["ours"]):.1f} ms, '
          f'{ratio(t["chain"], t["ours"]):.1f}x as fast as the one-hot chain (at least {goal} wanted); '
          f'grouped {ratio(t["chain"], t["grouped"]):.1f}x', flush=True)


def backends(router: str, C: int, Fi: int, E: int, T: int):
    "Print what each way to compute the experts takes, against what `auto` chose."
    torch.manual_seed(0)
    config, x = MoEConfig(C, Fi, E, router=router), torch.randn(1, T, C)
    ways = ['auto', 'loop', 'einsum', 'grouped', *(['bmm'] if router == 'expert_choice' else [])]
    blocks = {way: SparseMoE(config, backend=way) for way in ways}
    for b in blocks.values():
        b.load_state_dict(blocks['auto'].state_dict())
    for name, run in (('forward', forward), ('forward + backward', step)):
        t = rounds({way: partial(run, b, x) for way, b in blocks.items()}, seconds=4)
        each = ', '.join(f'{way} {ratio(t[way], t["auto"]):.2f}' for way in blocks if way != 'auto')
        print(f'{router}, width {C}, inner {Fi}, {E} experts, {T} tokens, {name}: '
              f'auto {milliseconds(t["auto"]):.2f} ms; times auto: {each}', flush=True)


if __name__ == '__main__':
    warnings.filterwarnings('ignore')
    wanted = sys.argv[1:] or [*map(str, range(len(ROWS))), 'choice', 'backends']
    print(f'{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}')
    faster = [token_choice(ROWS[int(i)]) for i in wanted if i.isdigit()]
    for way in WAYS if faster else ():
        ratios = [f[way] for f in faster]
        print(f'{way}: {min(ratios):.2f} to {max(ratios):.2f} times as fast as the better one of transformers, '
              f'geometric mean {statistics.geometric_mean(ratios):.2f}')
    print('wanted: a step at most 1.15x the floor and at least 1.1 times as fast; forward at most 1.1x; never behind')
    if 'choice' in wanted:
        for T, goal in ((2048, 2.4), (4096, 4.)):
            expert_choice(T, goal)
    if 'backends' in wanted:
        for router in ('top_k', 'expert_choice'):
            for sizes in ((32, 64, 4, 16), (128, 256, 8, 256), (384, 1536, 8, 1024)):
                backends(router, *sizes)
