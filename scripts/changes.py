"""What a change touches: its notebooks, the notebooks that import them, and their tests. For `make check`.

Imports are read from the text, each name followed through the rooms' front pages to the module that defines it."""
import ast
import json
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from notebooks import find_notebooks
from outcomes import ROOT
from patched import Module, read_package

DEFAULT_EXP = re.compile(r'^#\|\s*default_exp\s+(\S+)', re.M)
IMPORT = re.compile(r'^[ \t]*(?:from[ \t]+[\w.]+[ \t]+import[ \t]*(?:\([^)]*\)|[^\n;]+)|import[ \t]+[^\n;]+)', re.M)


def changed_files(base: str) -> list[str]:
    "Files that differ from the commit `base`, and those that git doesn't know yet."
    def ask(*args: str) -> list[str]:
        return subprocess.run(['git', *args], cwd=ROOT, text=True, capture_output=True, check=True).stdout.splitlines()

    return sorted({*ask('diff', '--name-only', base), *ask('ls-files', '--others', '--exclude-standard')})


def module_of(source: str) -> str | None:
    "The module that a notebook is exported to."
    m = DEFAULT_EXP.search(source)
    return f'transformer_experiments.{m[1]}'.removesuffix('.__init__') if m else None


def imports(source: str, package: str) -> Iterable[tuple[str, str | None]]:
    "Each (module, name) that a text imports; name None: the module itself."
    for m in IMPORT.finditer(source):
        try:
            [node] = ast.parse(m[0].strip()).body
        except (SyntaxError, ValueError):
            continue
        if isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names)
            continue
        base = package.split('.')[:len(package.split('.')) - node.level + 1] if node.level else []
        yield from (('.'.join([*base, *([node.module] if node.module else [])]), a.name) for a in node.names)


def defining(modules: dict[str, Module], module: str, name: str | None) -> str:
    "The module that a name comes from, through those that hand it on."
    if name and f'{module}.{name}' in modules: return f'{module}.{name}'
    while module in modules and name in modules[module].imported:
        origin, name = modules[module].imported[name]
        if f'{origin}.{name}' in modules: return f'{origin}.{name}'
        module = origin
    return module


@dataclass(frozen=True)
class File:
    "A notebook or a test, and the modules of the package that it imports."
    path: Path
    module: str | None  # That it is exported to
    needs: frozenset[str]


def read_file(modules: dict[str, Module], path: Path) -> File:
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.ipynb':
        text = '\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'code')
    module = module_of(text)
    package = '' if module is None else module if modules[module].path.stem == '__init__' else module.rpartition('.')[0]
    needs = {defining(modules, *found) for found in imports(text, package)}
    return File(path, module, frozenset(needs & modules.keys()))


def touched(files: list[str]) -> tuple[list[Path], list[Path]]:
    "The notebooks and the tests that changed, or that import a module whose notebook changed."
    modules = read_package()
    tests = sorted((ROOT/'tests').glob('test_*.py'))
    found = [read_file(modules, p) for p in [*find_notebooks([]), *tests]]
    changed = {ROOT/f for f in files}
    new = {f.module for f in found if f.path in changed and f.module}
    hit = [f.path for f in found if f.path in changed or f.needs & new]
    return [p for p in hit if p.suffix == '.ipynb'], [p for p in hit if p.suffix == '.py']
