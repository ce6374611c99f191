"""The accessors: how exactly every architecture is rebuilt from its weights, and what reading a checkpoint costs.

    python benchmarks/bench_accessors.py                 # all
    python benchmarks/bench_accessors.py reassembly      # or reading, smollm2
"""
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from transformer_experiments.accessors import HFModelContext, ModelContext, WeightLocationType, check_reassembly
from transformer_experiments.accessors.tiny_models import TINY_MODELS, tiny_context
from transformer_experiments.accessors.sources import resident_bytes

ROUNDS = 21
SMOL = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30) # SmolLM2-135M's sizes
SMOL |= dict(num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)

ONE = """
import sys, time, torch
from transformer_experiments.accessors import HFModelContext, WeightLocationType
start = time.perf_counter()
ctx = HFModelContext(sys.argv[1], device='cpu')
ctx.get_weight(WeightLocationType.ATTN_TO_QUERY, layer=15).sum()
print((time.perf_counter() - start) * 1e3, ctx.source.bytes_read, ctx.source.bytes_total)
"""


def reassembly():
    print("worst error, as a share of the largest value, and where the model's own code goes through float32")
    print(f"{'architecture':24}{'float64':>10}{'float32':>10}  through float32")
    for name in TINY_MODELS:
        f64, f32 = (check_reassembly(tiny_context(name, dtype)) for dtype in (torch.float64, torch.float32))
        print(f"{name:24}{f64.worst:10.0e}{f32.worst:10.0e}  {', '.join(f64.float32)}")


def stored_locations(folder: Path) -> list:
    return [row.location for row in HFModelContext(folder, device='cpu').table(norms=False) if row.same_as is None]


def every_weight(folder: Path, locations: list) -> list:
    "Each stored weight once, from a context that is opened for it."
    ctx = HFModelContext(folder, device='cpu')
    every_layer = range(ctx.n_layers)
    return [ctx.get_weight(w, layer) for w in locations for layer in ([None] if w.has_no_layers else every_layer)]


def milliseconds(f, *args) -> tuple:
    start = time.perf_counter()
    result = f(*args)
    return (time.perf_counter() - start) * 1e3, result


def sum_all(weights: list) -> float: return sum(w.sum().item() for w in weights)


def one_matrix(folder: Path):
    "What it costs to read one query matrix."
    command, n = [sys.executable, '-c', ONE, str(folder)], 5
    fresh = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(n)]
    ms, (read, total) = statistics.median(float(f[0]) for f in fresh), map(int, fresh[0][1:])
    print(f'one query matrix of {total / 1e6:.0f} MB, in a fresh process after import: '
          f'{ms:.1f} ms (median of {n}); {read:,} bytes asked for')
    file = folder / 'model.safetensors'
    ctx = HFModelContext(folder, device='cpu')
    before = resident_bytes(file)
    ctx.get_weight(WeightLocationType.ATTN_TO_QUERY, 15).sum()
    if before is not None:
        print(f'of the file, the process touched {resident_bytes(file):,} bytes')


def reading(folder: Path):
    one_matrix(folder)
    file, locations = folder / 'model.safetensors', stored_locations(folder)
    candidates = [('load_file', lambda: list(load_file(file).values())),
                  ('ours', lambda: every_weight(folder, locations))]
    handed, summed = {'ours': [], 'load_file': []}, {'ours': [], 'load_file': []}
    for i in range(ROUNDS + 1): # the first round warms up
        for name, f in candidates[::-1] if i % 2 else candidates:
            ms, weights = milliseconds(f)
            more, _ = milliseconds(sum_all, weights)
            if i:
                handed[name].append(ms)
                summed[name].append(ms + more)
    for what, times in (('handed out', handed), ('handed out and summed', summed)):
        ours, theirs = times['ours'], times['load_file']
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(f'every weight ({len(weights)}), {what}: {statistics.median(ours):.1f} ms, '
              f'safetensors.torch.load_file {statistics.median(theirs):.1f} ms; '
              f'ratio {ratio:.2f} (median of {ROUNDS} rounds)')


def smollm2():
    try:
        ctx = ModelContext.from_model_type('smollm2', device='cpu').live()
    except FileNotFoundError as e:
        return print('SmolLM2:', e)
    tokens = torch.tensor([ctx.encode('The Eiffel Tower is in the city of')])
    print(check_reassembly(ctx, tokens))
    ctx.get_or_create_model().double()
    print(check_reassembly(ctx, tokens))


if __name__ == '__main__':
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parts = sys.argv[1:] or ['reassembly', 'reading', 'smollm2']
    print(f'{torch.get_num_threads()} threads')
    if 'reassembly' in parts:
        reassembly()
    if 'reading' in parts:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**SMOL)).save_pretrained(folder, max_shard_size='2GB')
            reading(Path(folder))
    if 'smollm2' in parts:
        smollm2()
