"""What a notebook can't hold well of block internals: processes that are killed or interrupted, and full disks."""
import errno
import os
import random
import signal

import pytest
import torch
from kills import preload, random_kill, start

from transformer_experiments.common.activation_store import MANIFEST
from transformer_experiments.datasets.tinyshakespeare import SHA256, TinyShakespeareDataSet
from transformer_experiments.experiments.block_internals import run
from transformer_experiments.models.checkpoint import save_model
from transformer_experiments.models.transformer import TransformerConfig, TransformerLanguageModel
from transformer_experiments.tokenizers.char_tokenizer import CharacterTokenizer

preload('transformer_experiments.experiments.block_internals')
STORE, SHARDS = 'blocks0-1_internals', 20
def command(args: list, interrupt_at: int | None):
    "The click command, in a process of its own."
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupt_at:
        os.replace = interrupting(os.replace, interrupt_at)
    run.main(args)


def interrupting(replace, after: int):
    "`os.replace`, which sends Ctrl-C's signal when so many shards have their names, however busy the machine is."
    shards = []
    def call(old, new):
        replace(old, new)
        if str(new).endswith('.safetensors'):
            shards.append(new)
        if len(shards) == after:
            os.kill(os.getpid(), signal.SIGINT)
    return call


class Runs:
    "Runs of all blocks of a tiny model, in shards that end within batches."
    def __init__(self, folder):
        text = TinyShakespeareDataSet().text
        tokenizer = CharacterTokenizer(text)
        torch.manual_seed(0)
        config = TransformerConfig(block_size=8, n_embed=24, n_head=3, n_layer=2)
        m = TransformerLanguageModel(tokenizer.vocab_size, config=config)
        save_model(folder/'model.safetensors', m, tokenizer, SHA256)
        (folder/'input.txt').write_text(text)
        self.folder = folder
        self.finish('whole')
        self.whole = self.contents('whole')

    def start(self, name: str, interrupt_at: int | None = None, **how):
        (self.folder/name).mkdir(exist_ok=True)
        paths = [str(self.folder/n) for n in ('model.safetensors', 'input.txt', name)]
        args = [*paths, '-b', 'all', '-q', '--shard_mb', '0.1']
        return start(command, args, interrupt_at, log=self.folder/f'{name}.log', **how)

    def finish(self, name: str):
        p = self.start(name)
        p.join(60)
        assert p.exitcode == 0, self.log(name)

    def log(self, name: str) -> str: return (self.folder/f'{name}.log').read_text()
    def contents(self, name: str) -> dict: return {p.name: p.read_bytes() for p in (self.folder/name/STORE).iterdir()}

    def safe(self, name: str) -> dict:
        "The shards that are there, each of them whole, and when they were written."
        found = sorted((self.folder/name/STORE).glob('shard-*'))
        for p in found:
            assert p.read_bytes() == self.whole[p.name]
        return {p.name: p.stat().st_mtime_ns for p in found}

    def go_on(self, name: str):
        "Finish a run: what was safe is not computed again, and the end is that of the run that nobody stopped."
        was = self.safe(name)
        self.finish(name)
        assert self.contents(name) == self.whole
        assert was.items() <= self.safe(name).items()


@pytest.fixture(scope='module')
def runs(tmp_path_factory): return Runs(tmp_path_factory.mktemp('runs'))


def test_whole_run(runs):
    assert len(runs.whole) == SHARDS + 2 and {MANIFEST, '.lock'} < runs.whole.keys()


def test_twenty_kills_leave_no_trace(runs):
    """SIGKILL while a random shard or the manifest is written, twice in each of ten runs.

    Each run ends in the bytes of the one that nobody killed."""
    rng, safe = random.Random(0), []
    for name in map('cut{}'.format, range(10)):
        for _ in range(2):
            p = runs.start(name, kill=random_kill(rng, runs.folder/name/STORE, SHARDS, MANIFEST))
            p.join(60)
            assert p.exitcode == -signal.SIGKILL, runs.log(name)
            safe.append(len(runs.safe(name)))
        runs.go_on(name)
    assert sum(0 < n < SHARDS for n in safe) >= 8, safe  # most of them hit a run that had stored something


def test_ctrl_c_says_how_to_go_on(runs):
    p = runs.start('interrupted', interrupt_at=3)
    p.join(60)
    log = runs.log('interrupted')
    assert p.exitcode == 130, log
    assert 'samples are safe in' in log and 'run the same again to go on' in log
    assert 'Traceback' not in log
    assert len(runs.safe('interrupted')) >= 3 # what was computed when the signal came is still written
    runs.go_on('interrupted')


def test_a_disk_that_takes_no_more(runs):
    """A real failing write, from a limit on file sizes: a clear error, nothing half-written, and the run can go on."""
    p = runs.start('full', largest_file=100_000)
    p.join(60)
    log = runs.log('full')
    assert p.exitcode == 1 and os.strerror(errno.EFBIG) in log, log
    assert 'Run the same again to go on' in log and 'Traceback' not in log
    assert sorted(p.name for p in (runs.folder/'full'/STORE).iterdir()) == ['.lock', MANIFEST]
    runs.go_on('full')
