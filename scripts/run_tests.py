"""Prove the project, in parts: lint and types; generated files are up to date; notebooks run and show what is stored;
tests pass; the site has no broken link; the wheel works where nothing else is installed; the project works where
nothing lies beside it. The last lines are the slowest outcomes and `N passed, N failed, N skipped`; an outcome is a
notebook, a test or one of the checks named below."""
import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from changes import changed_files, touched
from forked import run_forked
from notebooks import find_notebooks, notebook_job
from outcomes import PACKAGE, ROOT, check, record, run, skip, summarize
from wheel import wheel

PARTS = 'lint', 'generated', 'notebooks', 'tests', 'site', 'ray', 'wheel', 'alone'
THREADS = {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
WITH_RAY = ('tour/remote.ipynb', 'test_remote_server.py', 'test_remote_parallel.py', 'test_remote_cluster.py',
            'test_recording_ray.py')
QUICK = '--notebook tokenizers dataset_split datasets/ moe/routing --test datasets original lint'.split()


def part_of(path: Path) -> str:
    "What starts Ray is a part of its own, and so is what needs a browser."
    if str(path).endswith(WITH_RAY): return 'ray'
    if path.stem == 'test_site_browser': return 'site'
    return 'notebooks' if path.suffix == '.ipynb' else 'tests'


def lint() -> str | None:
    done = subprocess.run([sys.executable, 'scripts/lint.py'], cwd=ROOT, text=True, capture_output=True)
    return (done.stdout + done.stderr)[-6000:] if done.returncode else None


# Generated files: made again in a copy, and compared

def texts(root: Path, *patterns: str) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for pattern in patterns for p in sorted(root.glob(pattern))
            if not any(part.startswith(('.', '_proc')) for part in p.relative_to(root).parts[:-1])}


def difference(was: dict[str, bytes], now: dict[str, bytes], mend: str) -> str | None:
    changed = sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k))
    return f"not up to date, run `{mend}`: {', '.join(changed)}" if changed else None


def generated(copy: Path):
    "nbdev_export, the stubs, nbdev_clean and the README, in a copy of the project, give what is in the project."
    made = 'artifacts', 'demo', 'build', 'dist', '*.egg-info', '__pycache__', '_docs', '_proc'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', '.venv', *made))
    for kind in ('*.py', '*.pyi'):
        for p in (copy/PACKAGE.name).rglob(kind):
            p.unlink()  # a module whose notebook is gone must not survive
    bin, modules = Path(sys.executable).parent, 'transformer_experiments/**/*.py'
    steps = [('export', bin/'nbdev_export', modules, 'nbdev_export'),
             ('stubs', copy/'scripts/patched.py', modules + 'i', 'python scripts/patched.py'),
             ('clean', bin/'nbdev_clean', 'nbs/**/*.ipynb', 'nbdev_clean'),
             ('documents', copy/'scripts/build_readme.py', '*.md', 'python scripts/build_readme.py'),
             ('pictures', copy/'scripts/build_readme.py', 'nbs/*.png', 'python scripts/build_readme.py')]

    def again(command: Path, pattern: str, mend: str) -> str | None:
        run(*([sys.executable] if command.suffix == '.py' else []), command, cwd=copy, PYTHONPATH=str(copy))
        return difference(texts(ROOT, pattern), texts(copy, pattern), mend)

    for name, *step in steps:
        check(f'generated: {name}', lambda step=step: again(*step))


# Tests

def run_pytest(*args: str) -> int:
    import pytest
    os.chdir(ROOT)
    return pytest.main(list(args))


def run_file(path: Path, tmp: Path):
    "One file of tests, in a process of its own; each test is an outcome."
    results = tmp/f'{path.stem}.xml'
    said = run_forked(tmp/f'{path.stem}.txt', run_pytest, str(path), '--tb=short', f'--junitxml={results}')
    cases = list(ElementTree.parse(results).iter('testcase')) if results.exists() else []
    for case in cases:
        name = f"test {case.get('classname')}::{case.get('name')}"
        skipped = case.find('skipped')
        faults = [o.text or o.get('message') or 'failed' for kind in ('failure', 'error') for o in case.findall(kind)]
        if skipped is not None:
            skip(name, skipped.get('message', ''))
        else:
            record(name, '\n'.join(faults), float(case.get('time', 0)))
    if not cases:
        record(str(path.relative_to(ROOT)), said or 'no test was found', 0)


def find_tests(only: list[str]) -> list[Path]:
    "The longest first: it should not be the last to end."
    found = sorted((ROOT/'tests').glob('test_*.py'), key=lambda p: -p.stat().st_size)
    return [p for p in found if not only or any(o in str(p.relative_to(ROOT)) for o in only)]


# The site

def listed_pages() -> str | None:
    "A page that the sidebar does not name is a page that nobody finds."
    listed = (ROOT/'nbs/sidebar.yml').read_text()
    missing = [p for p in (str(p.relative_to(ROOT/'nbs')) for p in find_notebooks([])) if p not in listed]
    return f"not in nbs/sidebar.yml: {', '.join(missing)}" if missing else None


def links() -> None:
    print('    ', run(sys.executable, 'scripts/check_links.py').strip().splitlines()[-1])


def site():
    check('site: builds', lambda: run(sys.executable, 'scripts/build_docs.py') and None)
    check('site: every notebook is in the sidebar', listed_pages)
    check('site: no broken link', links)


# The project by itself

def clone(folder: Path):
    "Copy what git would clone, changes that aren't committed included."
    for name in run('git', 'ls-files', '--cached', '--others', '--exclude-standard').splitlines():
        if not (ROOT/name).is_file(): continue
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/name, folder/name)


def alone(folder: Path):
    "With nothing beside it, no corpus and an empty home, the tests are found and a quick part of them passes."
    copy, home = folder/'project', folder/'home'
    home.mkdir(parents=True)
    clone(copy)
    env = {'PATH': os.environ['PATH'], 'HOME': str(home), 'PYTHONPATH': str(copy), **THREADS}

    def python(*args: str):
        run(sys.executable, *args, cwd=copy, env=env)

    check('alone: every test can be collected', lambda: python('-m', 'pytest', '--collect-only', 'tests'))
    only = '--only', 'generated', 'notebooks', 'tests'
    check('alone: a quick part passes', lambda: python('scripts/run_tests.py', *only, *QUICK))


# All of it

def work(parts: list[str], pages: list[Path], files: list[Path], args: argparse.Namespace, tmp: Path):
    "Two jobs at a time. What looks at the whole checkout is in one; what starts Ray, which takes all cores, is last."
    jobs = {part: [] for part in PARTS}
    for path in files:
        jobs[part_of(path)].append(lambda p=path: run_file(p, tmp))
    for path in pages:
        jobs[part_of(path)].append(notebook_job(path, args.flags.split(), args.update, tmp))
    jobs['lint'] = [lambda: check('lint', lint)]
    jobs['generated'] = [lambda: generated(tmp/'copy')]
    jobs['site'] = [site, *jobs['site']]
    jobs['wheel'] = [lambda: wheel(tmp)]
    jobs['alone'] = [lambda: alone(tmp/'alone')]
    chosen = {part: jobs[part] if part in parts else [] for part in PARTS}
    in_turn = [job for part in ('lint', 'generated', 'site', 'wheel', 'alone') for job in chosen[part]]
    beside = [lambda: [job() for job in in_turn], *chosen['tests'], *chosen['notebooks']]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: job(), beside))
    for job in chosen['ray']:
        job()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--flags', default='', help="cells to run that are otherwise left out, e.g. 'slow'")
    parser.add_argument('--only', nargs='+', choices=PARTS, default=PARTS, help='the parts to run')
    parser.add_argument('--notebook', nargs='+', default=[], help='only notebooks whose path holds one of these')
    parser.add_argument('--test', nargs='+', default=[], help='only files of tests whose path holds one of these')
    parser.add_argument('--update', action='store_true', help='store the outputs of notebooks that have changed')
    parser.add_argument('--list', action='store_true', help='only name the notebooks and files of tests')
    parser.add_argument('--since', metavar='COMMIT', help='only what differs from this commit, and what imports it')
    args = parser.parse_args()
    start, parts = time.time(), list(args.only)
    os.environ.update(THREADS)
    pages, files = find_notebooks(args.notebook), find_tests(args.test)
    if not pages:
        parser.error(f"no notebook's path holds {' or '.join(args.notebook)}")
    if not files:
        parser.error(f"no test's path holds {' or '.join(args.test)}")
    if args.since:
        parts = ['lint', 'generated', 'notebooks', 'tests']
        pages, files = touched(changed_files(args.since))
        print(f'{len(pages)} notebooks and {len(files)} files of tests are touched')
    if args.list:
        print(*(p.relative_to(ROOT) for p in [*pages, *files] if part_of(p) in parts), sep='\n')
        return
    with TemporaryDirectory() as d:
        work(parts, pages, files, args, Path(d))
    sys.exit(not summarize(start))


if __name__ == '__main__':
    main()
