"""A worker of Ray that dies in the middle of its range, for tests of stored results that Ray's workers fill."""
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from transformer_experiments.experiments.recording_on_ray import on_ray


@contextmanager
def local_ray() -> Iterator[None]:
    "One Ray of two cores, as `ray_address='local'` starts it; 'auto' finds it."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'cpu_count', lambda: 2)
        with on_ray('local'):
            yield


def fill_and_die(
    fill: Callable, # Fills a range of a store; its last argument is the `StoreWriter`
    mark: str, # A file
) -> Callable:
    "As `fill`; the first worker that has stored a shard of its range dies, and leaves its process id at `mark`."
    def dying(*given):
        store = given[-1].store
        missing, write = store.spec.n_shards - len(store.shards), store._write_shard

        def write_shard(image):
            write(image)
            if missing < 2: return # the middle of a range of several
            try:
                fd = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                return
            os.write(fd, str(os.getpid()).encode())
            os.kill(os.getpid(), signal.SIGKILL)

        store._write_shard = write_shard
        fill(*given)
    return dying
