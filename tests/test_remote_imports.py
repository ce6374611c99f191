"Who imports whom: tracing knows of no server, and a client needs nothing of what a server is made of."
import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent/'transformer_experiments'
OF_A_SERVER = {'server', 'serving', 'queue', 'hosts', 'workers', 'running', 'checks', 'guard', 'isolation', 'cost',
               'journal', 'keys', 'door', 'parallel', 'sizing', 'placements',
               'gathering', 'ranks', 'rank_processes', 'answers', 'clusters', 'queued_jobs', 'quotas',
               'recovery', 'replicas', 'runners', 'serve_config'}


def modules_after(code: str) -> set[str]:
    "What a fresh interpreter has imported."
    code = f'{code}\nimport sys\nprint(*sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def imported_by(path: Path) -> set[str]:
    "The absolute names of all modules that a file imports, wherever in it."
    package = path.relative_to(PACKAGE.parent).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            module = '.'.join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f'{module}.{a.name}' for a in node.names}
    return found


def below(names: set[str], package: str) -> set[str]:
    return {n for n in names if n == package or n.startswith(package + '.')}


def test_the_client_imports_nothing_of_a_server():
    loaded = modules_after('import transformer_experiments.remote.client')
    mine = {n.rpartition('.')[2] for n in below(loaded, 'transformer_experiments.remote')}
    assert not mine & OF_A_SERVER, mine
    assert not loaded & {'fastapi', 'uvicorn', 'ray', 'sqlite3', 'h11'}
    assert {'client', 'messages', 'limits', 'registered', 'sending'} <= mine


def test_the_names_of_a_servers_modules_are_current():
    assert OF_A_SERVER <= {p.stem for p in (PACKAGE/'remote').glob('*.py')}


@pytest.mark.parametrize('path', sorted((PACKAGE/'tracing').glob('*.py')), ids=lambda p: p.stem)
def test_tracing_imports_nothing_of_remote(path):
    assert not below(imported_by(path), 'transformer_experiments.remote')


def test_relative_and_hidden_imports_are_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), 'PACKAGE', tmp_path/'transformer_experiments')
    folder = tmp_path/'transformer_experiments'/'tracing'
    folder.mkdir(parents=True)
    lines = ('from ..remote import client', 'from ..remote.client import send', 'from .. import remote',
             'import transformer_experiments.remote.client')
    for i, line in enumerate(lines):
        (folder/f'm{i}.py').write_text(f'def f():\n    {line}\n')
        assert below(imported_by(folder/f'm{i}.py'), 'transformer_experiments.remote'), line


def test_tracing_alone_imports_nothing_of_remote_and_a_remote_trace_does():
    code = ('import transformer_experiments.tracing as t\n'
            'from transformer_experiments.tracing.backends import BACKENDS\n')
    assert not below(modules_after(code + 'assert not BACKENDS'), 'transformer_experiments.remote')
    remote = 't.LanguageModel("tinyshakespeare").session(remote=True)\nassert list(BACKENDS) == ["remote"]'
    assert 'transformer_experiments.remote.sending' in modules_after(code + remote)


def test_a_missing_package_is_named():
    code = '''
import sys
sys.modules['httpx'] = None
import transformer_experiments.tracing as t
try:
    t.LanguageModel('tinyshakespeare').trace('A', remote=True)
except ImportError as e:
    assert 'httpx' in str(e) and "pip install 'transformer-experiments[remote]'" in str(e), e
else:
    raise SystemExit('no error')
'''
    modules_after(code)
