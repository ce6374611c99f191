"""Wall time to a validation loss of 1.88: the default recipe against nanoGPT's recipe for CPUs (AdamW).

The trainer is the same. The two are trained in turn, a few steps each, so that a machine that slows down slows both.
Evaluations are not counted."""
import tempfile
import time

import torch

from transformer_experiments.datasets.tinyshakespeare import SHA256, TinyShakespeareDataSet
from transformer_experiments.tokenizers.char_tokenizer import CharacterTokenizer
from transformer_experiments.training.recipe import PRESETS
from transformer_experiments.training.trainer import Trainer, evaluate

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


runners = [Runner(p) for p in EVERY]
for r in runners: # the first steps of a process are slow, and belong to nobody
    warm = Trainer(r.recipe, text, tokenizer, tempfile.mkdtemp(), SHA256)
    for _ in range(3):
        warm._train_step()
while not all(r.done for r in runners):
    for r in runners:
        if not r.done:
            r.go_on()
base, ours = runners
print(f'{torch.get_num_threads()} threads; validation loss {GOAL}')
for r in runners:
    missed = '' if r.loss <= GOAL else '  (the goal was not reached)'
    print(f'  {r.preset:12} {r.trainer.step:5} steps {r.seconds:7.1f} s   loss {r.loss:.3f}{missed}')
print(f'  {ours.preset} is {base.seconds / ours.seconds:.1f}x faster than {base.preset} (at least 3x is wanted)')
