"""A sweep against the usual loop of hooks, at equal results.

The grid is layer by position of the stream behind each block of SmolLM2, for one pair of prompts of 12 tokens that
differ in their first token, so that no cell can be left out because nothing differs there. The loop runs the model once
for each cell with one plain hook, as most notebooks do. Both take turns; the ratio is of the medians. It also
prints how many blocks each ran, what the sweep's memory budget was, and by how much the process grew.

    python benchmarks/bench_patching.py                       # 30 x 12
    python benchmarks/bench_patching.py --layers 4 --rounds 1 # a few layers, spread over the model
    python benchmarks/bench_patching.py --estimates           # 270 heads: attribution and attribution* against exact
"""

import argparse
import os
import statistics
import threading
import time

import torch

from transformer_experiments.experiments import Contrast, sweep
from transformer_experiments.tracing import LanguageModel

TOKENS = 12
BUDGET = 1 << 29
TASKS = {
    'capitals': ('The capital of {} is the city of',
                 [('France', ' Paris'), ('Italy', ' Rome'), ('Germany', ' Berlin')]),
    'languages': ('People in {} speak', [('France', ' French'), ('Italy', ' Italian'), ('Germany', ' German')]),
}


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    "Two prompts that differ from the first token on."
    g = torch.Generator().manual_seed(0)
    clean = torch.randint(1000, 20000, (TOKENS,), generator=g)
    corrupt = clean.clone()
    corrupt[0] = int(torch.randint(1000, 20000, (1,), generator=g))
    return clean, corrupt


def logits_with(model, block, tokens: torch.Tensor, see) -> torch.Tensor:
    "One forward pass with one hook."
    handle = block.register_forward_hook(see)
    try:
        with torch.no_grad():
            return model(tokens[None]).logits[0, -1].double()
    finally:
        handle.remove()


def loop(model, task: Contrast, layers: list[int]) -> torch.Tensor:
    "The usual loop: (layers, positions), the metric as it is."
    found = torch.zeros(len(layers), TOKENS, dtype=torch.float64)
    right, wrong = task.answers[0].tolist()
    for i, layer in enumerate(layers):
        block, seen = model.model.layers[layer], []
        logits_with(model, block, task.clean[0], lambda m, args, out, seen=seen: seen.append(hidden(out).clone()))
        for p in range(TOKENS):

            def put(m, args, out, p=p, seen=seen):
                x = hidden(out).clone()
                x[:, p] = seen[0][:, p]
                return x if isinstance(out, torch.Tensor) else (x, *out[1:])

            logits = logits_with(model, block, task.corrupt[0], put)
            found[i, p] = logits[right] - logits[wrong]
    return found


def hidden(out): return out if isinstance(out, torch.Tensor) else out[0]


class Growth:
    "By how many MB the process grows while the block runs, looked at every few milliseconds."
    def __enter__(self):
        self.before, self.most, self.done = resident_mb(), 0., threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(.005):
            self.most = max(self.most, resident_mb() - self.before)

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()


def resident_mb() -> float:
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def grid(lm: LanguageModel, n_layers: int, rounds: int):
    "The layer x position sweep."
    clean, corrupt = pair()
    with torch.no_grad():
        best = [lm._module(t[None]).logits[0, -1].argmax().item() for t in (clean, corrupt)]
    if best[0] == best[1]:
        best[1] = (best[1] + 1) % lm._module.config.vocab_size
    task = Contrast(lm, [clean], [corrupt], [tuple(best)])
    L = lm._module.config.num_hidden_layers
    layers = sorted({round(i * (L - 1) / max(n_layers - 1, 1)) for i in range(n_layers)})
    times = {'loop': [], 'sweep': []}
    grown = 0.
    for _ in range(rounds):
        start = time.perf_counter()
        with Growth() as growth:
            found = sweep(task, 'resid.post_mlp', ('layer', 'position'), layers=layers, memory=BUDGET)
        times['sweep'].append(time.perf_counter() - start)
        grown = max(grown, growth.most)
        start = time.perf_counter()
        expected = loop(lm._module, task, layers)
        times['loop'].append(time.perf_counter() - start)
    error = (found.scores[0] - expected).abs().max().item()
    seconds = {k: statistics.median(v) for k, v in times.items()}
    needed = sum(L - 1 - layer for layer in layers) * TOKENS
    print(f'{len(layers)} layers x {TOKENS} positions; largest difference of scores {error:.1e} (float32, metric up to '
          f'{expected.abs().max():.1f})')
    ratio = seconds['loop'] / seconds['sweep']
    print(f"loop {seconds['loop']:.2f} s, sweep {seconds['sweep']:.2f} s: {ratio:.2f} times as fast")
    print(f'blocks run: loop {len(layers) * TOKENS * L:,}, needed {needed:,}; memory grew by {grown:,.0f} MB at '
          f'most in the sweep (budget {BUDGET / 2**20:,.0f} MB beside the model)')


def estimates(lm: LanguageModel):
    "270 heads of two tasks: how good are the estimates?"
    for name, (template, words) in TASKS.items():
        texts = [template.format(country) for country, _ in words]
        answers = [(a, b) for (_, a), (_, b) in zip(words, words[1:] + words[:1], strict=True)]
        task = Contrast(lm, texts, texts[1:] + texts[:1], answers, unsolved='drop')
        start = time.perf_counter()
        exact = sweep(task, 'attn.v_out', ('layer', 'head'), memory=BUDGET)
        took = time.perf_counter() - start
        print(f'{name}: {len(task)} pairs, exact {took:.1f} s')
        for method in ('attribution', 'attribution*'):
            start = time.perf_counter()
            estimate = sweep(task, 'attn.v_out', ('layer', 'head'), method=method)
            ratio = took / (time.perf_counter() - start)
            print(f'  {method}, {ratio:.1f} times as fast, {estimate.compare(exact)}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--layers', type=int, default=30, help='of the grid, spread over the model')
    parser.add_argument('--rounds', type=int, default=1)
    parser.add_argument('--estimates', action='store_true', help='also hold estimates against exact sweeps')
    args = parser.parse_args()
    lm = LanguageModel('smollm2', dispatch=True)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
    grid(lm, args.layers, args.rounds)
    if args.estimates:
        estimates(lm)


if __name__ == '__main__':
    main()
