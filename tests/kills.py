"""A process that ends with SIGKILL at a moment of its own progress: no test depends on the speed of the machine.

A file is written beside its place, forced to the disk and renamed, so on disk a kill can differ only by the call of
`os` that it hits: between two of them it leaves what the first has left."""
import os
import signal
from pathlib import Path

SHARD_MOMENTS = 'open', 'write', 'truncate', 'fsync', 'replace', 'replaced'
FILE_MOMENTS = 'open', 'fsync', 'replace', 'replaced'  # Of a file that is written by other means than `os.write`


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
