"""The notebook that first described block internals runs unchanged against this package: cells, paths and two files.

The document is not part of the project. Where it isn't at hand the test is skipped, by name; the notebook
`nbs/experiments/block_internals.ipynb` checks the same in its own words."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transformer_experiments.datasets.tinyshakespeare import TinyShakespeareDataSet
from transformer_experiments.models.transformer import TransformerLanguageModel

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = next(iter((ROOT.parent/'shared'/'seeds').glob('001_*.txt')), None)
RUN = '''
import json, sys
from execnb.nbio import mk_cell, new_nb
from execnb.shell import CaptureShell
shell = CaptureShell()
shell.run_all(new_nb([mk_cell(source) for source in json.load(sys.stdin)]), exc_stop=True)
'''


def cells(document: str) -> list[str]:
    "The code cells of a notebook that was printed as text: what follows each `In [..]:`, without the outputs."
    found = [c.strip() for c in document.split('\nIn [None]:\n')[1:]]
    return [c.removesuffix('0it [00:00, ?it/s]').removesuffix('device is cpu').strip() for c in found]


def run_cells(sources: list[str], folder: Path) -> subprocess.CompletedProcess:
    env = os.environ | {'IN_TEST': '1', 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-c', RUN]
    return subprocess.run(command, input=json.dumps(sources), cwd=folder, text=True, capture_output=True, env=env)


@pytest.mark.skipif(DOCUMENT is None, reason='the original document is not beside this checkout')
def test_the_original_runs_unchanged(tmp_path):
    here, artifacts = tmp_path/'nbs'/'experiments', tmp_path/'nbs'/'artifacts'
    here.mkdir(parents=True)
    artifacts.mkdir()
    text = TinyShakespeareDataSet().text
    (artifacts/'input.txt').write_text(text)
    torch.save(TransformerLanguageModel(len(set(text))).state_dict(), artifacts/'shakespeare.pt')
    sources = cells(DOCUMENT.read_text())
    assert len(sources) == 14 and 'test_exp.load()' in ''.join(sources)
    # Its cells define the classes themselves. The package's must pass the same check, so it runs again with them.
    check = next(s for s in sources if 'test_exp.run(' in s)
    ours = 'from transformer_experiments.experiments.block_internals import ' \
           'BlockInternalsExperiment, BlockInternalsResult, run'
    count = 'with tempfile.TemporaryDirectory() as d:\n' \
            '    e = BlockInternalsExperiment(encoding_helpers, accessors, 0, Path(d))\n' \
            '    e.run(data_batcher)\n' \
            '    test_eq((len(list(e.load())), len(list(e.raw_results()))), (3, 140 * 3))'
    done = run_cells([*sources[:-1], count, ours, check, count, sources[-1]], here)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    wrong = check.replace('last_batch_size, s_len, n_embed', 'last_batch_size, s_len, 7')
    broken = run_cells([*sources[:-1], ours, wrong], here)
    assert broken.returncode != 0  # the check can fail
