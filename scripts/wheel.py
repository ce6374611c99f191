"The distributions: what belongs in them is in them, and the wheel works in an environment that holds nothing else."
import os
import sys
import tarfile
import zipfile
from pathlib import Path

from outcomes import PACKAGE, ROOT, check, run

HELP_WITHOUT_TORCH = '''
import sys
from transformer_experiments.cli import main
try: main(['--help'])
except SystemExit as e: assert not e.code, e.code
heavy = {'torch', 'numpy', 'matplotlib', 'transformers'} & sys.modules.keys()
assert not heavy, f'transformer-experiments --help imports {sorted(heavy)}'
'''


def build_distributions(dist: Path) -> str:
    "An sdist, and a wheel made from it, so that the sdist is complete."
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', dist, ROOT)
    [sdist], [wheel] = dist.glob('*.tar.gz'), dist.glob('*.whl')
    inside = set(zipfile.ZipFile(wheel).namelist())
    patterns = '**/*.py', '**/*.pyi', 'py.typed', 'artifacts/*'
    expected = {str(p.relative_to(ROOT)) for pattern in patterns for p in PACKAGE.glob(pattern)}
    with tarfile.open(sdist) as f:
        in_sdist = {n.partition('/')[2] for n in f.getnames()}
    wrong = [f'{n} is not in the wheel' for n in sorted(expected - inside)]
    wrong += [f'{n} is not in the sdist' for n in sorted(expected - in_sdist)]
    wrong += [f'{n} should not be in the wheel' for n in sorted(inside - expected) if '.dist-info/' not in n]
    return '\n'.join(wrong)


def wheel(tmp: Path):
    "The wheel in an environment that holds nothing else, away from the checkout, without a corpus."
    dist, env, away = tmp/'dist', tmp/'env', tmp/'away'
    python, command = env/'bin/python', env/'bin/transformer-experiments'
    clean = {'PYTHONPATH': '', 'TRANSFORMER_EXPERIMENTS_DATA': '', 'TRANSFORMER_EXPERIMENTS_HOME': str(tmp/'home')}
    away.mkdir()

    def install():
        run(sys.executable, '-m', 'venv', env)
        options = ['-q', *os.environ.get('PIP_ARGS', '').split(), '-c', ROOT/'constraints.txt']
        run(python, '-m', 'pip', 'install', *options, *dist.glob('*.whl'))

    def package_is_light():
        test = "import sys, transformer_experiments; assert 'torch' not in sys.modules, 'imports torch'"
        run(python, '-c', test, cwd=away, **clean)

    def help_is_light():
        run(python, '-c', HELP_WITHOUT_TORCH, cwd=away, **clean)

    def generates() -> str | None:
        shown = run(command, 'generate', '--prompt', 'ROMEO:', cwd=away, **clean)
        return None if 'ROMEO:' in shown and len(shown) > 50 else f'generate gave {shown!r}'

    check('wheel: builds, and what belongs in it is in it', lambda: build_distributions(dist))
    check('wheel: installs into a bare environment', install)
    check('wheel: import transformer_experiments imports no torch', package_is_light)
    check('wheel: --help answers and imports no torch', help_is_light)
    check('wheel: generate --prompt ROMEO:', generates)
