"""Prove the project: what is generated is up to date, every notebook runs, the tests pass, the site has no broken link, and
the wheel works where nothing else is installed. The last line is `N passed, N failed`; an outcome is a notebook, a test or one
of the checks named below. Nothing run is a failure too."""
import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/'transformer_experiments'
THREADS = {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
outcomes: list[bool] = []


def record(name: str, fault: str, seconds: float):
    "Print and keep one outcome; `fault` is empty where all is well."
    outcomes.append(not fault)
    print(f"{'FAIL' if fault else 'ok  '} {name} ({seconds:.1f} s)", flush=True)
    if fault: print('     ' + fault.strip().replace('\n', '\n     '), flush=True)


def check(name: str, f: Callable[[], str | None]):
    "Run one check: it returns what is wrong, raises, or neither."
    start = time.time()
    try: fault = f() or ''
    except Exception as e: fault = f'{type(e).__name__}: {e}'
    record(name, fault, time.time() - start)


def run(*args, cwd: Path = ROOT, **env) -> str:
    "Run a command; its output, or an error that shows it."
    done = subprocess.run([str(a) for a in args], cwd=cwd, env={**os.environ, **env}, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        said = ' '.join('...' if '\n' in str(a) else str(a) for a in args)
        raise RuntimeError(f'{said} ended with {done.returncode}:\n{done.stdout[-6000:]}')
    return done.stdout


# Generated files: made again in a copy, and compared

def texts(root: Path, *patterns: str) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for pattern in patterns for p in sorted(root.glob(pattern))
            if not any(part.startswith(('.', '_proc')) for part in p.relative_to(root).parts[:-1])}


def difference(was: dict[str, bytes], now: dict[str, bytes], mend: str) -> str | None:
    changed = sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k))
    return f"not up to date, run `{mend}`: {', '.join(changed)}" if changed else None


def generated(copy: Path):
    "nbdev_export, nbdev_clean and the README, in a copy of the project, give what is in the project."
    ignore = shutil.ignore_patterns('.git', '.venv', '_docs', '_proc', 'artifacts', 'demo', 'build', 'dist', '*.egg-info', '__pycache__')
    shutil.copytree(ROOT, copy, ignore=ignore)
    for p in (copy/PACKAGE.name).rglob('*.py'): p.unlink()  # a module whose notebook is gone must not survive
    scripts = Path(sys.executable).parent

    def export():
        run(scripts/'nbdev_export', cwd=copy)
        return difference(texts(ROOT, 'transformer_experiments/**/*.py'), texts(copy, 'transformer_experiments/**/*.py'), 'nbdev_export')

    def clean():
        run(scripts/'nbdev_clean', cwd=copy)
        return difference(texts(ROOT, 'nbs/**/*.ipynb'), texts(copy, 'nbs/**/*.ipynb'), 'nbdev_clean')

    def readme():
        run(sys.executable, ROOT/'scripts/build_readme.py', copy/'README.md')
        return difference(texts(ROOT, 'README.md'), texts(copy, 'README.md'), 'python scripts/build_readme.py')

    for f in (export, clean, readme): check(f'generated: {f.__name__}', f)


# Notebooks

def run_notebook(path: Path, flags: str, said: Path):
    "In a process of its own, forked from one that has imported torch, which takes longer than most notebooks."
    with said.open('w') as out, open(os.devnull) as nothing:
        for to, fd in ((nothing, 0), (out, 1), (out, 2)): os.dup2(to.fileno(), fd)
    sys.argv, sys.path[0] = [''], ''
    os.chdir(ROOT)
    from nbdev.config import get_config
    from nbdev.test import test_nb
    passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split(), force_flags=flags.split())
    sys.exit(not passed)


def notebooks(flags: str, only: str, tmp: Path) -> list[Callable]:
    "Each notebook top to bottom in a process of its own; a failure shows its cell."
    fork = multiprocessing.get_context('forkserver')
    fork.set_forkserver_preload(['torch', 'matplotlib.pyplot', 'nbdev.test'])
    found = [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if not any(o.startswith(('.', '_')) for o in p.relative_to(ROOT).parts)]

    def one(path: Path) -> str | None:
        said = tmp/f'{"-".join(path.relative_to(ROOT).parts)}.txt'
        process = fork.Process(target=run_notebook, args=(path, flags, said))
        process.start()
        process.join()
        return f'{path} ended with {process.exitcode}:\n{said.read_text()[-6000:]}' if process.exitcode else None

    return [lambda p=p: check(f'notebook {p.relative_to(ROOT)}', lambda: one(p)) for p in found if only in str(p)]


# Tests

BROWSER = 'test_site_browser'
ALONE = 'test_remote_server', 'test_remote_parallel', 'test_remote_cluster' # they start Ray, which takes all cores for itself


def pytest(tmp: Path) -> tuple[list[Callable], list[Callable], list[Callable]]:
    "tests/: of the site, those that may run beside others, and those that may not; each file in a process of its own, each test an outcome. A skipped test is an outcome that is missing, so it is named."
    def one(path: Path):
        results, said = tmp/f'{path.stem}.xml', ''
        try: run(sys.executable, '-m', 'pytest', path, '--tb=short', f'--junitxml={results}')
        except RuntimeError as e: said = str(e)
        cases = list(ElementTree.parse(results).iter('testcase')) if results.exists() else []
        for case in cases:
            name = f"test {case.get('classname')}::{case.get('name')}"
            if case.find('skipped') is not None: print(f"skip {name}: {case.find('skipped').get('message')}")
            else: record(name, '\n'.join(o.text for kind in ('failure', 'error') for o in case.findall(kind)), float(case.get('time')))
        if not cases: record(str(path.relative_to(ROOT)), said or 'no test was found', 0)

    found = sorted((ROOT/'tests').glob('test_*.py'), key=lambda p: -p.stat().st_size) # the longest should not be the last
    if not found: record('tests/', 'no test was found', 0)
    kind = {p: 0 if p.stem == BROWSER else 2 if p.stem in ALONE else 1 for p in found}
    return tuple([lambda p=p: one(p) for p in found if kind[p] == k] for k in range(3))


# The site

def listed_pages() -> str | None:
    "A page that the sidebar does not name is a page that nobody finds."
    listed = (ROOT/'nbs/sidebar.yml').read_text()
    pages = [str(p.relative_to(ROOT/'nbs')) for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    missing = [p for p in pages if p not in listed]
    return f"not in nbs/sidebar.yml: {', '.join(missing)}" if missing else None


def site():
    check('site: builds', lambda: run(sys.executable, 'scripts/build_docs.py') and None)
    check('site: every notebook is in the sidebar', listed_pages)
    check('site: no broken link', lambda: print('    ', run(sys.executable, 'scripts/check_links.py').strip().splitlines()[-1]))


# The wheel

def build_distributions(dist: Path):
    "An sdist, and a wheel made from it, so that the sdist is complete."
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', dist, ROOT)
    [sdist], [wheel] = dist.glob('*.tar.gz'), dist.glob('*.whl')
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(p.relative_to(ROOT)) for pattern in ('**/*.py', 'py.typed', 'artifacts/*') for p in PACKAGE.glob(pattern)}
    with tarfile.open(sdist) as f: in_sdist = {n.partition('/')[2] for n in f.getnames()}
    wrong = [f'{n} is not in the wheel' for n in sorted(expected - inside)] + [f'{n} is not in the sdist' for n in sorted(expected - in_sdist)]
    wrong += [f'{n} should not be in the wheel' for n in sorted(inside - expected) if '.dist-info/' not in n]
    return '\n'.join(wrong)


HELP_WITHOUT_TORCH = '''
import sys
from transformer_experiments.cli import main
try: main(['--help'])
except SystemExit as e: assert not e.code, e.code
heavy = {'torch', 'numpy', 'matplotlib', 'transformers'} & sys.modules.keys()
assert not heavy, f'transformer-experiments --help imports {sorted(heavy)}'
'''


def wheel(tmp: Path):
    "The wheel in an environment that holds nothing else, away from the checkout, without a corpus."
    dist, env, away = tmp/'dist', tmp/'env', tmp/'away'
    python, command = env/'bin/python', env/'bin/transformer-experiments'
    clean = {'PYTHONPATH': '', 'TRANSFORMER_EXPERIMENTS_DATA': '', 'TRANSFORMER_EXPERIMENTS_HOME': str(tmp/'home')}
    away.mkdir()

    def install():
        run(sys.executable, '-m', 'venv', env)
        run(python, '-m', 'pip', 'install', '-q', *os.environ.get('PIP_ARGS', '').split(), '-c', ROOT/'constraints.txt', *dist.glob('*.whl'))

    def package_is_light():
        run(python, '-c', "import sys, transformer_experiments; assert 'torch' not in sys.modules, 'imports torch'", cwd=away, **clean)

    def help_is_light(): run(python, '-c', HELP_WITHOUT_TORCH, cwd=away, **clean)

    def generates():
        shown = run(command, 'generate', '--prompt', 'ROMEO:', cwd=away, **clean)
        return None if 'ROMEO:' in shown and len(shown) > 50 else f'generate gave {shown!r}'

    check('wheel: builds, and what belongs in it is in it', lambda: build_distributions(dist))
    check('wheel: installs into a bare environment', install)
    check('wheel: import transformer_experiments imports no torch', package_is_light)
    check('wheel: --help answers and imports no torch', help_is_light)
    check('wheel: generate --prompt ROMEO:', generates)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--flags', default='', help="cells to run that are otherwise left out, e.g. 'slow'")
    parser.add_argument('--only', default='generated notebooks site tests wheel', help='the parts to run')
    parser.add_argument('--notebook', default='', help='only notebooks whose path holds this')
    args = parser.parse_args()
    start = time.time()
    os.environ.update(THREADS)
    with TemporaryDirectory() as d:
        tmp = Path(d)
        checks = {'generated': lambda: generated(tmp/'copy'), 'site': site, 'wheel': lambda: wheel(tmp)}
        wanted = args.only.split()
        if unknown := set(wanted) - {*checks, 'notebooks', 'tests'}: parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(checks)}, notebooks and tests")
        of_site, beside, alone = pytest(tmp) if 'tests' in wanted else ([], [], [])
        in_turn = [*(f for part, f in checks.items() if part in wanted), *of_site] # they write in the checkout, or look at what was written
        jobs = [lambda: [f() for f in in_turn], *(notebooks(args.flags, args.notebook, tmp) if 'notebooks' in wanted else ()), *beside]
        with ThreadPoolExecutor(2) as pool: list(pool.map(lambda job: job(), jobs))
        for job in alone: job()
    print(f'{time.time() - start:.0f} s')
    print(f'{sum(outcomes)} passed, {len(outcomes) - sum(outcomes)} failed')
    sys.exit(not outcomes or not all(outcomes))


if __name__ == '__main__': main()
