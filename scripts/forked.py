"""Run a function in a process of its own, forked from one that has imported what takes longer than most pages and
tests: torch, transformers, pyplot and pytest."""
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

FORK = multiprocessing.get_context('forkserver')
FORK.set_forkserver_preload(['torch', 'transformers', 'matplotlib.pyplot', 'nbdev.test', 'pytest'])


def _speak_into(said: Path, f: Callable, args: tuple):
    with said.open('w') as out, open(os.devnull) as nothing:
        for to, fd in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(to.fileno(), fd)
    sys.argv = ['']
    sys.path.insert(0, '')  # behind it the folder of the main script, which processes started from here import again
    sys.exit(f(*args))


def run_forked(
    said: Path,  # Takes what the function prints
    f: Callable,  # Of a module; what it returns is the exit status, as for `sys.exit`
    *args: object,
) -> str:  # Empty, or the end of what it printed, if the status isn't 0
    "Call `f` in a process of its own, and wait for it."
    process = FORK.Process(target=_speak_into, args=(said, f, args))
    process.start()
    process.join()
    return f'ended with {process.exitcode}:\n{said.read_text()[-6000:]}' if process.exitcode else ''
