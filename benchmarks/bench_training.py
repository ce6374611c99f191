"""Wall time to a validation loss of 1.88: the default recipe against nanoGPT's recipe for CPUs (AdamW).

The trainer is the same. The two are trained in turn, a few steps each, so that a machine that slows down slows both.
Evaluations are not counted. A CPU without units for bfloat16 can be had on one that has them:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/bench_training.py"""
import statistics
import tempfile
import time

import torch

from transformer_experiments.datasets.tinyshakespeare import SHA256, TinyShakespeareDataSet
from transformer_experiments.tokenizers.char_tokenizer import CharacterTokenizer
from transformer_experiments.training.recipe import PRESETS, batch_at
from transformer_experiments.training.evaluation import evaluate
from transformer_experiments.training.trainer import Trainer

GOAL, EVERY = 1.88, {'nanogpt-cpu': 50, 'quick': 25}

text = TinyShakespeareDataSet().text
tokenizer = CharacterTokenizer(text)


class Runner:
    "One recipe on its way to the goal."
    def __init__(self, preset: str):
        self.preset, self.recipe, self.every = preset, PRESETS[preset], EVERY[preset]
        self.trainer = Trainer(self.recipe, text, tokenizer, tempfile.mkdtemp(), SHA256)
        self.seconds, self.loss = 0., float('inf')

    @property
    def done(self) -> bool: return self.loss <= GOAL or self.trainer.step >= self.recipe.max_steps

    def go_on(self):
        t, start = self.trainer, time.perf_counter()
        t.m.train()
        for _ in range(self.every):
            t._train_step()
        self.seconds += time.perf_counter() - start
        self.loss = evaluate(t.m, t.val_data, 64)


def parts_of_a_step(t: Trainer, times: int = 30) -> str:
    "Milliseconds of the forward and backward of a step, and of each optimiser's part of it: medians."
    spent = {'forward and backward': []} | {type(o).__name__: [] for o in t.optimizers}
    for _ in range(times):
        clock = [time.perf_counter()]
        for micro in batch_at(t.recipe, t.train_data, t.step).split(t.recipe.micro_batch_size):
            t._micro_batch(0, micro).backward()
        clock.append(time.perf_counter())
        for o in t.optimizers:
            o.step()
            o.zero_grad()
            clock.append(time.perf_counter())
        for name, start, end in zip(spent, clock, clock[1:], strict=False):
            spent[name].append(1e3 * (end - start))
    return ', '.join(f'{name} {statistics.median(ms):.1f} ms' for name, ms in spent.items())


features = [name for name in ('avx512_bf16', 'amx_tile') if getattr(torch.cpu, f'_is_{name}_supported')()]
print(f"{torch.get_num_threads()} threads; torch runs the CPU as {torch.backends.cpu.get_cpu_capability()}; "
      f"the processor has {', '.join(features) or 'no units for bfloat16'}")
runners = [Runner(p) for p in EVERY]
for r in runners: # the first steps of a process are slow, and belong to nobody
    warm = Trainer(r.recipe, text, tokenizer, tempfile.mkdtemp(), SHA256)
    for _ in range(3):
        warm._train_step()
    groups = [g for o in warm.optimizers for g in o.param_groups if 'products' in g]
    for products in sorted(('bfloat16', 'float32'), key=lambda p: p != groups[0]['products']) if groups else [None]:
        for g in groups:
            g['products'] = products
        said = f'; products in {products}' if products else ''
        print(f'  {r.preset:12} a step: {parts_of_a_step(warm)}{said}', flush=True) # the first is what is chosen here
while not all(r.done for r in runners):
    for r in runners:
        if not r.done:
            r.go_on()
base, ours = runners
print(f'validation loss {GOAL}')
for r in runners:
    missed = '' if r.loss <= GOAL else '  (the goal was not reached)'
    print(f'  {r.preset:12} {r.trainer.step:5} steps {r.seconds:7.1f} s   loss {r.loss:.3f}{missed}')
print(f'  {ours.preset} is {base.seconds / ours.seconds:.1f}x faster than {base.preset} (at least 4x is wanted)')
