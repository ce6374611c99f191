"""Recording the stream behind every layer of SmolLM2 in bfloat16, beside a bare forward over the same batches.

The two take turns in each round, so that a machine that slows down slows both. A recording also writes to a disk: how
long its bytes take there by themselves, written and fsynced, is printed too. `--texts 16 --tokens 32` is a quick look;
so small a run is mostly what is there once, such as the hash of the weights."""
import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from transformer_experiments.datasets.tinyshakespeare import TinyShakespeareDataSet
from transformer_experiments.experiments.reading import context_for
from transformer_experiments.experiments.recording import arrange, padded, record
from transformer_experiments.experiments.text_runs import samples_of
from transformer_experiments.models.transformer import eval_mode
from transformer_experiments.tracing import LanguageModel

BATCH_TOKENS = 2048  # that run together, as `record` has it


def bare(lm: LanguageModel, texts: list[torch.Tensor], folder: Path):
    "The model over the same batches, without its head, which a recording of the stream doesn't run either."
    arranged, model = arrange(texts, BATCH_TOKENS), lm._module
    with eval_mode(model), torch.no_grad():
        for start, stop in arranged.batches:
            ids, _ = padded([arranged.tokens[i] for i in arranged.order[start:stop]])
            model.base_model(ids, use_cache=False)


def recorded(lm: LanguageModel, texts: list[torch.Tensor], folder: Path):
    record(lm, texts, folder/'recording', ['resid.post_mlp'], dtype=torch.bfloat16, batch_tokens=BATCH_TOKENS,
           progress=False)


def seconds(run: Callable, *args) -> float:
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def write_bytes(n: int, folder: Path):
    "As many bytes, in pieces of 16 MB, safe on the disk."
    piece = os.urandom(1 << 24)
    with open(folder/'bytes', 'wb') as f:
        for start in range(0, n, len(piece)):
            f.write(piece[:n - start])
        f.flush()
        os.fsync(f.fileno())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--texts', type=int, default=256)
    parser.add_argument('--tokens', type=int, default=128, help='of a text')
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    lm = LanguageModel('smollm2')
    ctx = context_for(lm)
    text = TinyShakespeareDataSet().text
    texts = [t for t in samples_of(lm, text, args.tokens) if len(t) == args.tokens][:args.texts]
    n_bytes = len(texts) * args.tokens * ctx.n_layers * ctx.n_residual_stream_channels * 2
    print(f'{len(texts)} texts of {args.tokens} tokens, {ctx.n_layers} layers, {n_bytes / 1e6:.1f} MB of bfloat16; '
          f'{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}')
    times = {bare: [], recorded: []}
    disk = []
    for _ in range(args.rounds):
        for run, found in times.items():
            with TemporaryDirectory() as folder:
                found.append(seconds(run, lm, texts, Path(folder)))
        with TemporaryDirectory() as folder:
            disk.append(seconds(write_bytes, n_bytes, Path(folder)))
    forward, whole, written = (statistics.median(x) for x in (*times.values(), disk))
    print(f'bare forward {forward:.2f} s; recording {whole:.2f} s, {whole / forward:.3f} times that')
    print(f'the disk alone {written:.2f} s, {n_bytes / written / 1e6:,.0f} MB/s: '
          f'{written / forward:.3f} of the bare forward')


if __name__ == '__main__':
    main()
