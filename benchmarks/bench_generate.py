"""`generate` of 256 characters by the shipped model: with its cache, and reading everything anew for each character."""
import statistics
import time

import torch

from transformer_experiments.models.sampling import sample_token
from transformer_experiments.models.transformer import eval_mode
from transformer_experiments.trained_models.tinyshakespeare_transformer import create_model_and_tokenizer

N, ROUNDS = 256, 11
m, tokenizer = create_model_and_tokenizer()
prompt = torch.tensor([tokenizer.encode('ROMEO:\n')])


def recompute(seed: int) -> torch.Tensor:
    "The same draws without a cache."
    idx, generator = prompt, torch.Generator().manual_seed(seed)
    with eval_mode(m):
        for _ in range(N):
            logits, _ = m(idx[:, -m.config.block_size:])
            idx = torch.cat([idx, sample_token(logits[:, -1], generator=generator)], 1)
    return idx


def cached(seed: int) -> torch.Tensor:
    return m.generate(prompt, N, generator=torch.Generator().manual_seed(seed))


def seconds(f, seed: int) -> tuple:
    start = time.perf_counter()
    result = f(seed)
    return time.perf_counter() - start, result


ratios, times = [], []
for seed in range(-1, ROUNDS): # the first round warms up
    slow, a = seconds(recompute, seed + 1)
    fast, b = seconds(cached, seed + 1)
    if not torch.equal(a, b): raise SystemExit('the cache changed the text')
    if seed >= 0:
        ratios.append(slow / fast)
        times.append(fast)
print(f'{torch.get_num_threads()} threads; {N} characters after a prompt of {prompt.shape[1]}, the same text both ways')
print(f'  with the cache {statistics.median(times):.2f} s; {statistics.median(ratios):.1f}x faster than without '
      f'({min(ratios):.1f} to {max(ratios):.1f} in {ROUNDS} rounds; at least 4x is wanted)')
