"""A process that ends with SIGKILL at a moment of its own progress: no test depends on the speed of the machine.

A file is written beside its place, forced to the disk and renamed, so on disk a kill can differ only by the call of
`os` that it hits: between two of them it leaves what the first has left.

Processes are forked from a server that has imported what they need, so a start costs only the work itself."""
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

SHARD_MOMENTS = 'open', 'write', 'truncate', 'fsync', 'replace', 'replaced'
FILE_MOMENTS = 'open', 'fsync', 'replace', 'replaced'  # Of a file that is written by other means than `os.write`


FORKS = multiprocessing.get_context('forkserver')
PRELOADED = ['pytest']


def preload(*modules: str):
    "Import these once, in the server, rather than in each process that it forks."
    PRELOADED.extend(modules)
    FORKS.set_forkserver_preload(PRELOADED)


def start(
    f: Callable, # A function of a module
    *args: object,
    log: Path | None = None, # For the output; `None`: it goes where ours goes
    largest_file: int | None = None, # Bytes: no file may become larger
    kill: tuple | None = None, # Arguments of `die_at`
) -> BaseProcess:
    "Call a function in a process of its own, with one thread. See `preload`."
    process = FORKS.Process(target=_call, args=(f, args, log, largest_file, kill))
    process.start()
    return process


def _call(f: Callable, args: tuple, log: Path | None, largest_file: int | None, kill: tuple | None):
    if log is not None:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if kill:
        die_at(*kill)
    torch.set_num_threads(1)
    f(*args)


def die(): os.kill(os.getpid(), signal.SIGKILL)


def die_at(file: str, moment: str, times: int = 1):
    """This process dies when it makes a call of `os` for a file, for example at the third `fsync` of it.

    `moment` is a function of `os`: the process dies before the call, but in the middle of a `write`. 'replaced' is
    after the file has its name."""
    calls = {name: getattr(os, name) for name in SHARD_MOMENTS[:-1]}
    descriptors, left = set(), [times]

    def reach(name: str, concerned: bool):
        if concerned and name == moment:
            left[0] -= 1
            if left[0] == 0:
                die()

    def is_ours(path) -> bool: return isinstance(path, str | os.PathLike) and file in Path(path).name

    def open_file(path, *args, **kwargs):
        reach('open', is_ours(path))
        fd = calls['open'](path, *args, **kwargs)
        (descriptors.add if is_ours(path) else descriptors.discard)(fd)
        return fd

    def write(fd, data):
        if moment == 'write' and left[0] == 1 and fd in descriptors:
            calls['write'](fd, data[:len(data) // 2 // 4096 * 4096])  # direct writes take whole pages
        reach('write', fd in descriptors)
        return calls['write'](fd, data)

    def truncate(fd, size):
        reach('truncate', fd in descriptors)
        calls['truncate'](fd, size)

    def fsync(fd):
        reach('fsync', fd in descriptors)
        calls['fsync'](fd)

    def replace(old, new, **kwargs):
        reach('replace', is_ours(new))
        calls['replace'](old, new, **kwargs)
        reach('replaced', is_ours(new))

    for name, f in dict(open=open_file, write=write, truncate=truncate, fsync=fsync, replace=replace).items():
        setattr(os, name, f)


def random_kill(rng, folder: Path, n_shards: int, manifest: str) -> tuple[str, str]:
    "Arguments of `die_at` for a run that resumes in a folder: a shard that is missing there, or the manifest."
    there = {p.name for p in folder.glob('shard-*')}
    missing = [name for i in range(n_shards) if (name := f'shard-{i:05d}.safetensors') not in there]
    file = rng.choice([*missing, manifest])
    return file, rng.choice(FILE_MOMENTS if file == manifest else SHARD_MOMENTS)


def contents(folder: Path) -> dict[str, bytes]:
    "All files of a stored result but the lock, leftovers of a killed process too."
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != '.lock'}
