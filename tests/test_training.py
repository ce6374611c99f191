"""What a notebook can't hold well of training: processes that are killed, and several that train together."""
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transformer_experiments.models.checkpoint import load_model

BIN = Path(sys.executable).parent
COMMAND = [
    str(BIN/'transformer-experiments'), 'train', '--preset', 'quick', '--device', 'cpu',
    '--batch-size', '4', '--micro-batch-size', '2', '--eval-every', '10', '--checkpoint-every', '3',
]
ENV = dict(os.environ, OMP_NUM_THREADS='1')
CAPTURED = dict(env=ENV, capture_output=True, text=True, timeout=300)


def torchrun(n_processes: int) -> list[str]:
    return [str(BIN/'torchrun'), '--standalone', '--nproc-per-node', str(n_processes), '--no-python', *COMMAND]


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
    "Killed five times at random moments, resumed each time: the same bytes as a run that nobody killed."
    def command(out, *more): return [*COMMAND, '--text', str(text), '--steps', '60', '--out', str(out), *more]
    subprocess.run(command(tmp_path/'whole'), env=ENV, check=True, capture_output=True)
    rng, kills, deadline = random.Random(1), 0, time.time() + 300
    while kills < 5:
        assert time.time() < deadline, f'{kills} kills in 300 s'
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        p = subprocess.Popen(command(tmp_path/'cut', '--resume'), env=ENV, **silent)
        state = tmp_path/'cut'/'state.safetensors'
        began = state.stat().st_mtime_ns if state.exists() else None
        while p.poll() is None and (not state.exists() or state.stat().st_mtime_ns == began):
            time.sleep(0.005) # it trains
        time.sleep(rng.uniform(0, 0.15))
        if p.poll() is not None:
            assert p.returncode == 0
            break # it was done before the kill: too quick a machine for more
        p.kill()
        p.wait()
        kills += 1
    done = subprocess.run(command(tmp_path/'cut', '--resume'), **CAPTURED)
    assert done.returncode == 0, done.stderr
    assert kills == 5, f'only {kills} kills hit a running process'
    assert files(tmp_path/'cut') == files(tmp_path/'whole')


def test_two_processes_give_the_losses_of_one(text, tmp_path):
    """The same global batch on one process and on two, dropout included.

    Losses are equal to 1e-5, which allows for float32 sums in another order."""
    settings = ['--text', str(text), '--steps', '12', '--dropout', '0.1']
    subprocess.run([*COMMAND, *settings, '--out', str(tmp_path/'one')], env=ENV, check=True, capture_output=True)
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
