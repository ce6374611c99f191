"""The list of exceptions only shrinks; stubs, stale outputs, and what a change touches; CONTRIBUTING's commands."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'scripts'))
import changes
import lint
import notebooks
import patched

LISTED = 'scripts/allowed_faults.json'


def git(*args: str) -> str:
    return subprocess.run(['git', *args], cwd=ROOT, text=True, capture_output=True).stdout


def test_no_commit_raises_a_count():
    "As far as the history of this checkout goes."
    commits = git('log', '--first-parent', '--format=%H', '--', LISTED).split()
    versions = [(ROOT/LISTED).read_text(), *(git('show', f'{commit}:{LISTED}') for commit in commits)]
    versions = list(map(json.loads, versions))
    for now, before in zip(versions, versions[1:], strict=False):
        was = lint.entries(before)
        assert {k: n for k, n in lint.entries(now).items() if n > was.get(k, 0)} == {}


def test_the_list_only_shrinks():
    listed = {'a.py': {'E501': 3, 'F401': 1}, 'b.py': {'E701': 2}}
    now = {'a.py': {'E501': 2, 'B006': 4}, 'b.py': {'E701': 5}, 'c.py': {'E501': 1}}
    assert lint.shrunk(listed, now) == {'a.py': {'E501': 2}, 'b.py': {'E701': 2}}
    assert lint.shrunk(listed, now, ('a',)) == {"a.py": {"E501": 2}, "b.py": {"E701": 2}}
    assert lint.shrunk(listed, {}, ('a',)) == {"b.py": {"E701": 2}}


@pytest.mark.parametrize('line, rules', [
    ('if x is None: return 1', []), ('    if x: raise ValueError(x)', []), ('if x: y = 1', ['E701']),
    ('for x in y: print(x)', ['E701']), ('x = 1; y = 2', ['E702']), (f'x = {"1" * 120}', ['E501'])])
def test_one_statement_a_line_but_for_guards(tmp_path, monkeypatch, line, rules):
    "Outside of the project's folder, which other tests check and copy at the same time."
    shutil.copy(ROOT/'pyproject.toml', tmp_path) # the settings of ruff
    (tmp_path/'page.py').write_text(f'def f(x, y):\n    {line}\n')
    monkeypatch.setattr(lint, 'ROOT', tmp_path)
    assert [f.rule for f in lint.ruff_faults([str(tmp_path/'page.py')]) if f.rule.startswith('E')] == rules


def test_a_function_has_forty_lines_at_most():
    def of(n): return 'class C:\n    def f(self):\n' + '        pass\n' * (n - 1)
    assert lint.long_functions(of(40)) == []
    assert lint.long_functions(of(41)) == [(2, 'f', 41)]


# A package of two modules: the second patches a class of the first.

FIRST = '''"A page"
class Box:
    "Holds a number."
    def __init__(self, n: int): self.n = n
'''
SECOND = '''from fastcore.basics import patch
from pathlib import Path
from .first import Box

@patch
def grow(self: Box, by: int = 1) -> 'Box': return Box(self.n + by)

@patch(as_prop=True)
def where(self: Box) -> Path: return Path(str(self.n))

@patch(cls_method=True)
def of(cls: Box,
    n: int, # What it holds
) -> 'Box': return cls(n)
'''


@pytest.fixture
def two_modules(tmp_path, monkeypatch):
    package = tmp_path/'box'
    package.mkdir()
    (package/'__init__.py').touch()
    (package/'first.py').write_text(FIRST)
    (package/'second.py').write_text(SECOND)
    monkeypatch.setattr(patched, 'PACKAGE', package)
    return package


def test_stubs_have_methods_from_other_modules(two_modules):
    [(path, text)] = patched.stubs().items()
    assert path == two_modules/'first.pyi'
    grow = "def grow(self, by: int=1) -> 'Box': ..."
    for line in ('from pathlib import Path', 'n: int', grow, '@property', '@classmethod'):
        assert line in text


def test_merged_methods_keep_their_lines(two_modules, tmp_path):
    both = FIRST.replace('class Box', 'class Other') + '\n' + FIRST + SECOND.replace('from .first import Box\n', '')
    (two_modules/'first.py').write_text(both)
    (two_modules/'second.py').unlink()
    [numbers] = [n for p, n in patched.merge(tmp_path/'merged').items() if p.name == 'first.py']
    merged = (tmp_path/'merged'/'box'/'first.py').read_text().splitlines()
    assert len(merged) == len(numbers)
    at = next(i for i, line in enumerate(merged) if 'def grow' in line)
    assert merged[at] == "    def grow(self, by: int = 1) -> 'Box': return Box(self.n + by)"
    assert both.splitlines()[numbers[at] - 1] == "def grow(self: Box, by: int = 1) -> 'Box': return Box(self.n + by)"


# Outputs

@pytest.mark.parametrize('was, now, equal', [
    ('loss 2.4231 after 3.2 s', 'loss 2.4231 after 11 s', True), ('loss 2.4231', 'loss 2.43', False),
    ('loss 2.4231', 'loss 2.4232', True), ('(1, 7, 192)', '(1, 8, 192)', False), ('<A at 0x7f01>', '<A>', True),
    ('error 3.1e-08', 'error 4.0e-09', True), ('0.31', '0.33', False), ('[1., 2.]', '[1., 2., 3.]', False),
    ('in /tmp/abc/x', 'in /tmp/de/x', True), ('12 heads', '13 heads', False)])
def test_what_counts_as_stale(was, now, equal):
    fault = notebooks.stale([notebooks.masked(was)], [notebooks.masked(now)])
    assert (fault is None) == equal


# What a change touches

def test_importers_are_found_through_front_pages():
    pages, tests = changes.touched(['nbs/tracing/graph.ipynb'])
    names = {str(p.relative_to(ROOT)) for p in [*pages, *tests]}
    assert {'nbs/tracing/graph.ipynb', 'nbs/tracing/proxy.ipynb', 'nbs/remote/messages.ipynb'} <= names
    assert {'tests/test_tracing_json.py', 'tests/test_walkthrough_graphs.py'} <= names
    assert not any('moe/' in n or 'datasets' in n for n in names)


def test_a_page_that_nothing_imports_touches_itself():
    assert changes.touched(['nbs/tour/shapes.ipynb']) == ([ROOT/'nbs/tour/shapes.ipynb'], [])


# CONTRIBUTING

def commands() -> list[str]:
    text = (ROOT/'CONTRIBUTING.md').read_text()
    blocks = re.findall(r'```bash\n(.*?)```', text, re.S)
    return [line.partition('  #')[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize('command', commands())
def test_commands_of_contributing_work(command):
    "Scripts are run. What `make` would do is only asked: it would run this test. The site is built by its own part."
    for part in command.split('&&'):
        words = [w for w in shlex.split(part) if w != '--update']  # a test writes nothing
        if words[0] == 'make':
            words[1:1] = ['-n']
        elif words[0] == '.venv/bin/python' and 'build_docs' not in part:
            words[0] = sys.executable
        else:
            assert all((ROOT/w).exists() for w in words if w.startswith('scripts/')), part
            continue
        done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_tests_that_contributing_and_architecture_name_are_there():
    text = ''.join((ROOT/f).read_text() for f in ('CONTRIBUTING.md', 'ARCHITECTURE.md'))
    named = re.findall(r'`((?:tests|nbs)/[\w/]+\.(?:py|ipynb))`', text)
    assert len(named) > 15
    assert not [n for n in named if not (ROOT/n).exists()]
