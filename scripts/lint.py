"""Lint and types: `make lint`.

ruff looks at the notebooks, tests, scripts and benchmarks; pyrefly at the package, with each patched
method in its class; `rooms.py` at the direction of imports. A function has 40 lines
at most. What was there before these checks is counted in `allowed_faults.json`, by file and rule. A fault beyond that
count fails, and so does a count that is too high: `lint.py --shrink` lowers it, and nothing raises it."""
import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import starmap
from pathlib import Path
from tempfile import TemporaryDirectory

from patched import PACKAGE, ROOT, merge
from rooms import import_faults

LISTED = ROOT/'scripts'/'allowed_faults.json'
BIN = Path(sys.executable).parent
GUARD = re.compile(r'\s*if .*:\s*(return|raise|continue|break)\b')  # the one statement that may stand behind a colon
CELL = re.compile(r'# %% (?:\.\./)*(nbs/\S+\.ipynb) #(\w+)')        # what nbdev writes above each exported cell


@dataclass(frozen=True)
class Fault:
    "One thing that a checker found."
    file: str   # A notebook or a Python file, from the top of the project
    place: str  # Where in it
    rule: str
    message: str

    def __str__(self) -> str: return f'{self.file}{self.place}: {self.rule} {self.message}'


def run_json(checker: str, *args: object, cwd: Path = ROOT):
    "What a checker prints; it ends with 1 where it has found something."
    done = subprocess.run([BIN/checker, *map(str, args)], cwd=cwd, text=True, capture_output=True)
    if done.returncode not in (0, 1): raise RuntimeError(f'{checker} ended with {done.returncode}:\n{done.stderr}')
    return json.loads(done.stdout)


# ruff

@cache
def read_cells(path: Path) -> list[dict]: return json.loads(path.read_text(encoding='utf-8'))['cells']


def source_line(path: Path, cell: int | None, row: int) -> str:
    "A line of a Python file, or of a notebook's cell; cells are counted from 1."
    text = path.read_text(encoding='utf-8') if cell is None else ''.join(read_cells(path)[cell - 1]['source'])
    return text.splitlines()[row - 1]


def ruff_faults(paths: list[str]) -> list[Fault]:
    "What ruff finds, but for guard clauses, which may have their one statement behind the colon."
    found = []
    for x in run_json('ruff', 'check', '--no-cache', '--output-format=json', *paths):
        path, cell, row = Path(x['filename']), x['cell'], x['location']['row']
        if x['code'] == 'E701' and GUARD.match(source_line(path, cell, row)): continue
        place = f':{row}' if cell is None else f' cell {cell}, line {row}'
        found.append(Fault(str(path.relative_to(ROOT)), place, x['code'] or 'syntax', x['message']))
    return found


# pyrefly

def page_of(lines: list[str], row: int) -> tuple[str, str] | None:
    "The notebook and the cell that a line of a module was exported from."
    return next((m.groups() for text in reversed(lines[:row]) if (m := CELL.match(text))), None)


def type_faults() -> list[Fault]:
    "What pyrefly finds in the package, told by notebook and by line of the module."
    with TemporaryDirectory() as d:
        folder = Path(d).resolve()
        numbers = merge(folder)
        shutil.copy2(ROOT/'pyproject.toml', folder)  # with the settings in ROOT, pyrefly would read the stubs there
        options = ['--python-interpreter-path', sys.executable, '--output-format=json']
        found = run_json('pyrefly', 'check', '--config', folder/'pyproject.toml', *options, *numbers, cwd=folder)
        return [type_fault(folder, numbers, x) for x in found['errors']]


def type_fault(folder: Path, numbers: dict[Path, list[int]], error: dict) -> Fault:
    path = folder/error['path']
    row = numbers[path][error['line'] - 1]
    module = PACKAGE.parent/path.relative_to(folder)
    page = page_of(module.read_text(encoding='utf-8').splitlines(), row)
    here, message = str(module.relative_to(ROOT)), error['description'].replace('\n', ' ')
    if page is None: return Fault(here, f':{row}', error['name'], message)
    return Fault(page[0], f' cell {page[1]} ({here}:{row})', error['name'], message)


# Sizes

LONGEST = 40 # Lines of a function


def long_functions(source: str) -> list[tuple[int, str, int]]:
    "Row, name and lines of each function that is longer than a page can show at once."
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [(n.lineno, n.name, (n.end_lineno or n.lineno) - n.lineno + 1) for n in found]
    return [entry for entry in lengths if entry[2] > LONGEST]


def size_faults() -> list[Fault]:
    "Functions of the package that are too long."
    found = []
    for path in sorted(PACKAGE.rglob('*.py')):
        source = path.read_text(encoding='utf-8')
        for row, name, n in long_functions(source):
            page, cell = page_of(source.splitlines(), row) or (str(path.relative_to(ROOT)), '')
            message = f'{name} has {n} lines, and a function has {LONGEST} at most: make two of it'
            found.append(Fault(page, f' cell {cell} ({path.relative_to(ROOT)}:{row})', 'long-function', message))
    return found


# The list of exceptions

Counts = dict[str, dict[str, int]]  # File: rule: number


def count(faults: list[Fault]) -> Counts:
    "By file and rule."
    counts: Counts = {}
    for (file, rule), n in sorted(Counter((f.file, f.rule) for f in faults).items()):
        counts.setdefault(file, {})[rule] = n
    return counts


def entries(listed: Counts) -> dict[tuple[str, str], int]:
    return {(file, rule): n for file, rules in listed.items() for rule, n in rules.items()}


def shrunk(listed: Counts, counts: Counts, files: tuple[str, ...] = ('',)) -> Counts:
    "The list with the numbers of these files lowered to what is there now; no number grows and no entry is added."
    now, lowered = entries(counts), Counts()
    for (file, rule), n in entries(listed).items():
        kept = min(n, now.get((file, rule), 0)) if file.startswith(files) else n
        if kept:
            lowered.setdefault(file, {})[rule] = kept
    return lowered


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('paths', nargs='*', default=['.'], help='files and folders to look at; by default all')
    parser.add_argument('--shrink', action='store_true', help='lower the list of exceptions to what is there')
    parser.add_argument('--all', action='store_true', help='show every fault in these paths, also those in the list')
    args = parser.parse_args()
    wanted = tuple(str(Path(p).resolve().relative_to(ROOT)).removeprefix('.') for p in args.paths)
    found = [*ruff_faults(args.paths), *type_faults(), *starmap(Fault, import_faults()), *size_faults()]
    faults = [f for f in found if f.file.startswith(wanted)]
    listed, counts = json.loads(LISTED.read_text()), count(faults)
    if args.shrink:
        LISTED.write_text(json.dumps(shrunk(listed, counts, wanted), indent=1) + '\n')
        return
    was, now = {k: n for k, n in entries(listed).items() if k[0].startswith(wanted)}, entries(counts)
    new, slack = ({k for k in was | now if sign*(now.get(k, 0) - was.get(k, 0)) > 0} for sign in (1, -1))
    for f in faults:
        if args.all or (f.file, f.rule) in new:
            print(f)
    for file, rule in sorted(new | slack):
        mend = ': run python scripts/lint.py --shrink' if (file, rule) in slack else ''
        print(f'{file}: {now.get((file, rule), 0)} of {rule}, and the list has {was.get((file, rule), 0)}{mend}')
    print(f'{len(faults)} faults, {sum(was.values())} in the list of exceptions, {len(new)} files and rules above it')
    sys.exit(bool(new or slack))


if __name__ == '__main__':
    main()
