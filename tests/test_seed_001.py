"""The notebook that block internals were first described by runs unchanged against this package: its cells, its paths, its two files.

The document is not part of the project; where it isn't at hand there is nothing to test here, and `block_internals.ipynb`
covers the same in its own words."""
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from transformer_experiments.datasets.tinyshakespeare import TinyShakespeareDataSet
from transformer_experiments.models.transformer import TransformerLanguageModel

ROOT = Path(__file__).resolve().parent.parent
SEEDS = sorted((ROOT.parent/'shared'/'seeds').glob('001_*.txt'))
RUN = '''
import json, sys
from execnb.nbio import mk_cell, new_nb
from execnb.shell import CaptureShell
shell = CaptureShell()
shell.run_all(new_nb([mk_cell(source) for source in json.load(sys.stdin)]), exc_stop=True)
'''


def cells(document: str) -> list[str]:
    "The code cells of a notebook that was printed as text: what stands behind each `In [..]:`, without the outputs behind it."
    found = [c.strip() for c in document.split('\nIn [None]:\n')[1:]]
    return [c.removesuffix('0it [00:00, ?it/s]').removesuffix('device is cpu').strip() for c in found]


def run_cells(sources: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', RUN], input=json.dumps(sources), cwd=folder, text=True, capture_output=True,
                          env={**os.environ, 'IN_TEST': '1', 'OMP_NUM_THREADS': '1'})


if SEEDS:
    def test_the_seed_runs_unchanged(tmp_path):
        here, artifacts = tmp_path/'nbs'/'experiments', tmp_path/'nbs'/'artifacts'
        here.mkdir(parents=True), artifacts.mkdir()
        text = TinyShakespeareDataSet().text
        (artifacts/'input.txt').write_text(text)
        torch.save(TransformerLanguageModel(len(set(text))).state_dict(), artifacts/'shakespeare.pt')
        sources = cells(SEEDS[0].read_text())
        assert len(sources) == 14 and 'test_exp.load()' in ''.join(sources)
        # its classes are defined by its own cells; the package's must pass the same check, so its check runs a second time with them
        check = next(s for s in sources if 'test_exp.run(' in s)
        ours = 'from transformer_experiments.experiments.block_internals import BlockInternalsExperiment, BlockInternalsResult, run'
        count = 'with tempfile.TemporaryDirectory() as d:\n' \
                '    e = BlockInternalsExperiment(encoding_helpers, accessors, 0, Path(d)); e.run(data_batcher)\n' \
                '    test_eq((len(list(e.load())), len(list(e.raw_results()))), (3, 140 * 3))'
        done = run_cells([*sources[:-1], count, ours, check, count, sources[-1]], here)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        broken = run_cells([*sources[:-1], ours, check.replace('last_batch_size, s_len, n_embed', 'last_batch_size, s_len, 7')], here)
        assert broken.returncode != 0  # the check can fail
