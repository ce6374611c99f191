"""Walks with stub weights of two models that don't fit, each in a process of its own.

Peak memory and seconds are printed beside their limits."""
import resource
import subprocess
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

from transformer_experiments.shapes import parameters_on_meta, walk_shapes

LIMITS = {'block': (1.0, 20), 'mixtral': (1.5, 60)} # GB, seconds
UNIT = 1 if sys.platform == 'darwin' else 1024 # of ru_maxrss, in bytes


class Expert(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x): return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SparseBlock(nn.Module):
    "Mixtral's block in its textbook form: a loop over experts."
    def __init__(self, width: int, inner: int, n_experts: int, top_k: int):
        super().__init__()
        self.top_k, self.gate = top_k, nn.Linear(width, n_experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(n_experts))

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = F.softmax(self.gate(tokens), -1).topk(self.top_k)
        weights, y = weights / weights.sum(-1, keepdim=True), torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            rows, rank = torch.where(chosen == e)
            out = expert(tokens[rows]) * weights[rows, rank, None]
            y.index_add_(0, rows, out)
        return y.reshape(x.shape)


def block() -> tuple:
    with parameters_on_meta():
        m = SparseBlock(4096, 14336, 8, 2)
    return m, torch.randn(2, 512, 4096), 'a block 4096 wide, 14336 inside, with 8 experts, on 2 x 512 tokens'


def mixtral() -> tuple:
    from transformers import MixtralConfig, MixtralForCausalLM
    with parameters_on_meta():
        m = MixtralForCausalLM(MixtralConfig()).eval()
    return m, torch.randint(32000, (1, 16)), f'Mixtral-8x7B, {m.config.num_hidden_layers} layers, on 16 tokens'


def measure(name: str):
    "Walk, and print what it was and what it took."
    start = time.perf_counter()
    m, x, title = {'block': block, 'mixtral': mixtral}[name]()
    began = time.perf_counter()
    walk = walk_shapes(m, x, weights='stub')
    walked = time.perf_counter() - began
    n, peak = sum(p.numel() for p in m.parameters()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT / 1e9
    of_walk = f'{n / 1e9:.1f} billion parameters, {len(walk.lines)} lines, {walked:.1f} s in the walk'
    print(f'{peak} {time.perf_counter() - start} {title}: {of_walk}', flush=True)


def compare(name: str) -> bool: # Whether the memory is within its limit
    "One walk in a fresh process."
    said = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True).stdout
    peak, seconds, title = said.strip().splitlines()[-1].split(' ', 2)
    gigabytes, limit = LIMITS[name]
    print(f'  {title}\n    peak memory {float(peak):.2f} GB (at most {gigabytes} GB), '
          f'{float(seconds):.1f} s with building (at most {limit} s)')
    return float(peak) <= gigabytes


if len(sys.argv) > 1:
    measure(sys.argv[1])
else:
    print(f'{torch.get_num_threads()} threads')
    sys.exit(not all([compare(name) for name in LIMITS]))
