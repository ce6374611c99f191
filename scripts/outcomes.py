"Outcomes of checks: each is printed when it is there, and counted."
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/'transformer_experiments'


@dataclass(frozen=True)
class Outcome:
    name: str
    verdict: str    # 'ok', 'FAIL' or 'skip'
    seconds: float


outcomes: list[Outcome] = []


def record(name: str, fault: str, seconds: float):
    "Print and keep one outcome; `fault` is empty where all is well."
    outcomes.append(Outcome(name, 'FAIL' if fault else 'ok', seconds))
    print(f"{outcomes[-1].verdict:4} {name} ({seconds:.1f} s)", flush=True)
    if fault:
        print('     ' + fault.strip().replace('\n', '\n     '), flush=True)


def skip(name: str, why: str):
    "Something that could not be tested here: it is named, and counted as neither passed nor failed."
    outcomes.append(Outcome(name, 'skip', 0))
    print(f'skip {name}: {why}', flush=True)


def check(name: str, f: Callable[[], str | None]):
    "Run one check: it returns what is wrong, raises, or neither."
    start = time.time()
    try:
        fault = f() or ''
    except Exception as e:
        fault = f'{type(e).__name__}: {e}'
    record(name, fault, time.time() - start)


def run(*args, cwd: Path = ROOT, env: dict[str, str] | None = None, **more: str) -> str:
    "Run a command, in this environment with `more` or in `env` alone; its output, or an error that shows it."
    done = subprocess.run([str(a) for a in args], cwd=cwd, env=env or os.environ | more, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        said = ' '.join('...' if '\n' in str(a) else str(a) for a in args)
        raise RuntimeError(f'{said} ended with {done.returncode}:\n{done.stdout[-6000:]}')
    return done.stdout


def summarize(start: float, slowest: int = 20) -> bool:
    "Print what took longest, the time, and the closing line; whether all is well. Nothing run is not well."
    for o in sorted(outcomes, key=lambda o: -o.seconds)[:slowest]:
        print(f'{o.seconds:6.1f} s  {o.name}')
    n = {verdict: sum(o.verdict == verdict for o in outcomes) for verdict in ('ok', 'FAIL', 'skip')}
    print(f'{time.time() - start:.0f} s')
    print(f"{n['ok']} passed, {n['FAIL']} failed, {n['skip']} skipped")
    return n['ok'] > 0 and not n['FAIL']
