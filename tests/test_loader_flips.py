"""A file with one flipped bit, cut short, or written to do harm: every loader names it in an error of a few kinds,
within seconds and without taking memory, or reads the very same values. `FLIPS=1000 pytest tests/test_loader_flips.py`
gives each loader a thousand damaged files, and all hostile headers; without it a few of each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loader_flips import CASES, HOSTILE

FLIPS, SEED = int(os.environ.get('FLIPS', 12)), int(os.environ.get('SEED', 0))
PROGRAM = Path(__file__).with_name('loader_flips.py')


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('flips')
    command = [sys.executable, PROGRAM, folder, str(FLIPS), str(SEED)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith('now')]
    assert done.returncode == 0, f'the loader died or took too long: {said[-1:]}\n{done.stderr[-3000:]}'
    return {found['case']: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_a_damaged_file_is_named_or_harmless(case, results):
    found = results[case.name]
    print(found['counts'], found['seconds'], 's')
    assert not found['wrong'], '\n'.join(found['wrong'][:20])
    assert sum(found['counts'].values()) == FLIPS
    assert 'foreign' not in found['counts'] or case.header_only  # of files whose hash nobody knows
    assert found['counts'].get('named', 0) >= (1 if case.header_only else FLIPS // 2)


def test_a_hostile_header_is_named(results):
    found = results[HOSTILE]
    print(found['counts'], found['seconds'], 's')
    assert not found['wrong'], '\n'.join(found['wrong'][:20])
    assert found['counts'].get('harmless', 0) <= 4 < found['counts']['named']
