"""Block internals of all blocks and all sites over the validation text, on disk (fsynced).

They are compared with a bare forward over the same batches, and with copying: for each block by itself the prefix is
run again, the block copied for each batch, four tensors saved a batch by `torch.save`, nothing fsynced. The candidates
take turns in each round, so that a machine that slows down slows all of them."""
import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from transformer_experiments.common.databatcher import DataBatcher
from transformer_experiments.dataset_split import split_text_dataset
from transformer_experiments.datasets.tinyshakespeare import TinyShakespeareDataSet
from transformer_experiments.experiments.block_internals import BlockInternalsExperiment
from transformer_experiments.models.transformer import TransformerLanguageModel, eval_mode
from transformer_experiments.models.transformer_helpers import EncodingHelpers, TransformerAccessors
from transformer_experiments.tokenizers.char_tokenizer import CharacterTokenizer

SETTINGS = {  # name: (sample_len, max_batch_size, stride), and the rounds that are timed
    'short': ((3, 64, 96), 9),     # what the command does by itself: every 96th character
    'dense': ((3, 64, 3), 1),      # the whole text in samples of three
    'long': ((256, 64, 256), 3),   # the whole text in samples of 256
}
PARTS = 'input', 'heads', 'proj', 'ffwd'

text = TinyShakespeareDataSet().text
tokenizer = CharacterTokenizer(text)
_, val_data = split_text_dataset(text, tokenizer, 0.9)
torch.manual_seed(0)
m = TransformerLanguageModel(tokenizer.vocab_size).eval()  # the shipped model's sizes; weights don't matter here
eh, accessors = EncodingHelpers(m, tokenizer), TransformerAccessors(m)


def forward(batches: DataBatcher, folder: Path):
    with eval_mode(m):
        for batch in batches:
            m(batch)


def internals(batches: DataBatcher, folder: Path):
    BlockInternalsExperiment(eh, accessors, 'all', folder).run(batches, progress=False)


def by_copying(batches: DataBatcher, folder: Path):
    for block_idx in range(len(m.blocks)):
        for n, batch in enumerate(batches):
            x = accessors.embed_tokens(batch)
            for block in m.blocks[:block_idx]:
                x = block(x)
            block, io = accessors.copy_block_from_model(block_idx)
            block(x)
            values = batch.clone(), io.input('sa.proj'), io.output('sa.proj'), io.output('ffwd')
            for name, value in zip(PARTS, values, strict=True):
                torch.save(value, folder/f'{block_idx}_{name}_{n:03d}.pt')


def same_results(sample_len: int):
    "Both ways give the same bits, in each block."
    batches = DataBatcher(val_data[:40 * sample_len], sample_len, 16, sample_len)
    with TemporaryDirectory() as folder:
        internals(batches, Path(folder))
        by_copying(batches, Path(folder))
        for block_idx in range(len(m.blocks)):
            for n, stored in enumerate(BlockInternalsExperiment(eh, accessors, block_idx, folder).load()):
                files = [Path(folder)/f'{block_idx}_{name}_{n:03d}.pt' for name in PARTS]
                copied = [torch.load(file, weights_only=True) for file in files]
                if not all(map(torch.equal, stored, copied)):
                    raise SystemExit(f'block {block_idx}, batch {n}: stored and copied values differ')


def one_round(batches: DataBatcher, clock: Callable[[], float]) -> tuple[dict, int]:
    "The seconds of each candidate, and the bytes of tensors that `internals` stored."
    seconds, stored_bytes = {}, 0
    for f in (forward, internals, by_copying):
        with TemporaryDirectory() as folder:
            start = clock()
            f(batches, Path(folder))
            seconds[f.__name__] = clock() - start
            stored_bytes += sum(p.stat().st_size for p in Path(folder).rglob('*.safetensors'))
    return seconds, stored_bytes


def ratios(a: list, b: list, form: str) -> str:
    "The median, smallest and largest ratio."
    found = [x / y for x, y in zip(a, b, strict=True)]
    return f'{statistics.median(found):{form}}x ({min(found):{form}} to {max(found):{form}})'


def measure(settings: tuple, rounds: int, clock: Callable[[], float]):
    batches = DataBatcher(val_data, *settings)
    same_results(settings[0])
    times, sizes = zip(*[one_round(batches, clock) for _ in range(rounds)], strict=True)
    bare, stored, copied = ([t[name] for t in times] for name in ('forward', 'internals', 'by_copying'))
    print(f'{batches}\n  {sizes[-1] / 1e6:,.0f} MB; medians of {rounds} rounds: '
          f'bare forward {statistics.median(bare):.2f} s, internals {statistics.median(stored):.2f} s, '
          f'by copying {statistics.median(copied):.2f} s')
    print(f'  internals against a bare forward: {ratios(stored, bare, ".2f")}, at most 1.5x is wanted')
    print(f'  faster than by copying: {ratios(copied, stored, ".1f")}, at least 4x is wanted', flush=True)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('settings', nargs='*', default=[], help=f"some of {', '.join(SETTINGS)}; all by default")
parser.add_argument('--rounds', type=int, help='rounds to time')
parser.add_argument('--clock', choices=['wall', 'cpu'], default='wall',
                    help="'cpu' counts processor time: a rough guide on a busy machine")
args = parser.parse_args()
print(f'{torch.get_num_threads()} threads, {len(m.blocks)} blocks x {m.config.n_embed}, {args.clock} time')
for name in args.settings or SETTINGS:
    settings, rounds = SETTINGS[name]
    measure(settings, args.rounds or rounds, time.perf_counter if args.clock == 'wall' else time.process_time)
