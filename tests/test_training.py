"""What a notebook can't hold well of training: processes that are killed, and several that train together."""
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kills import FILE_MOMENTS, preload, start

from transformer_experiments.cli import main
from transformer_experiments.models.checkpoint import load_model

preload('transformer_experiments.cli.training', 'transformer_experiments.training.trainer', 'matplotlib.pyplot')
BIN = Path(sys.executable).parent
TRAIN = [
    'train', '--preset', 'quick', '--device', 'cpu',
    '--batch-size', '4', '--micro-batch-size', '2', '--eval-every', '10', '--checkpoint-every', '3',
]
ENV = dict(os.environ, OMP_NUM_THREADS='1')
CAPTURED = dict(env=ENV, capture_output=True, text=True, timeout=300)


def torchrun(n_processes: int) -> list[str]:
    command = [str(BIN/'transformer-experiments'), *TRAIN]
    return [str(BIN/'torchrun'), '--standalone', '--nproc-per-node', str(n_processes), '--no-python', *command]


def train(options: list[str]): main([*TRAIN, *options])


def trained(out: Path, options: list[str], kill: tuple | None = None):
    "Train in a process of its own, which may be killed on the way: see `kills.die_at`."
    log = out.with_suffix('.log')
    process = start(train, [*options, '--out', str(out)], log=log, kill=kill)
    process.join(300)
    assert process.exitcode == (0 if kill is None else -signal.SIGKILL), log.read_text()


@pytest.fixture(scope='module')
def text(tmp_path_factory) -> Path:
    "A small text with some order in it."
    words = 'thou art more lovely and temperate rough winds do shake the darling buds of may'.split()
    path = tmp_path_factory.mktemp('text')/'text.txt'
    path.write_text(' '.join(random.Random(0).choices(words, k=1500)))
    return path


def files(run: Path) -> dict:
    return {name: (run/name).read_bytes() for name in ('model.safetensors', 'state.safetensors', 'losses.png')}


def test_five_kills_leave_no_trace(text, tmp_path):
    "Killed five times while one of the next checkpoints is written, and resumed: the bytes of a run nobody killed."
    options = ['--text', str(text), '--steps', '60']
    trained(tmp_path/'whole', options)
    rng = random.Random(1)
    for _ in range(5): # of 20 checkpoints each run writes 3 at most
        kill = 'state.safetensors', rng.choice(FILE_MOMENTS), rng.randint(1, 3)
        trained(tmp_path/'cut', [*options, '--resume'], kill)
    trained(tmp_path/'cut', [*options, '--resume'])
    assert files(tmp_path/'cut') == files(tmp_path/'whole')


def test_two_processes_give_the_losses_of_one(text, tmp_path):
    """The same global batch on one process and on two, dropout included.

    Losses are equal to 1e-5, which allows for float32 sums in another order."""
    settings = ['--text', str(text), '--steps', '12', '--dropout', '0.1']
    trained(tmp_path/'one', settings)
    done = subprocess.run([*torchrun(2), *settings, '--out', str(tmp_path/'two')], **CAPTURED)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_model(tmp_path/n/'model.safetensors').facts for n in ('one', 'two'))
    assert len(one['losses']) == 12
    assert max(abs(a - b) for a, b in zip(one['losses'], two['losses'], strict=True)) < 1e-5
    assert abs(one['evals']['12'] - two['evals']['12']) < 1e-5


def test_batches_that_processes_cannot_share(text, tmp_path):
    "Three processes can't share two micro-batches: said before anything is written."
    done = subprocess.run([*torchrun(3), '--text', str(text), '--out', str(tmp_path/'run')], **CAPTURED)
    assert done.returncode != 0 and "can't be shared equally by 3 processes" in done.stderr
    assert not (tmp_path/'run'/'state.safetensors').exists()
