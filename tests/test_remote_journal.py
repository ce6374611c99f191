"""Jobs survive the server's process: fifty SIGKILLs lose none that was acknowledged, and end none twice."""
import asyncio
import os
import random
import signal
import time

import pytest

from transformer_experiments.remote.jobs import Limits
from transformer_experiments.remote.journal import LARGE, Journal
from transformer_experiments.remote.queue import OVER, JobTable, kept_of

KILLS = int(os.environ.get('KILLS', 50))
LIMITS = Limits(queued_jobs=10_000)


class Runner:
    "Gives back what it was sent; some results are large, some jobs log."
    places = {'here': 2}

    async def run(self, place, message, owner=None):
        yield 'RUNNING', None
        await asyncio.sleep(0.003)
        if message.endswith(b'7'):
            yield 'LOG', 'seven'
            await asyncio.sleep(0.003)
        yield 'RESULT', answer(message)


def answer(message: bytes) -> bytes: return message * (LARGE if message.endswith(b'3') else 2)


def life(folder, numbers, told: int):
    "A server: takes up what is there, takes new jobs, tells which it has, and ends when all are over."
    async def serve():
        table = JobTable(Runner(), LIMITS, journal=Journal(folder))
        table.restore()
        for i in numbers:
            table.submit('ada', 'here', ('m',), kept_of(b'%d' % i), again=str(i))
            os.write(told, b'%d\n' % i)
            await asyncio.sleep(0.002)
        while any(not job.over for job in table.jobs.values()):
            await asyncio.sleep(0.005)
    asyncio.run(serve())


def start(folder, numbers, told: int) -> int: # Its process
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        life(folder, numbers, told)
        code = 0
    finally:
        os._exit(code)


def test_kills_lose_nothing_and_end_nothing_twice(tmp_path):
    rng, (heard, told) = random.Random(0), os.pipe()
    for k in range(KILLS):
        pid = start(tmp_path, range(10 * k, 10 * k + 10), told)
        time.sleep(rng.uniform(0, 0.08))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert os.waitpid(start(tmp_path, [], told), 0)[1] == 0
    os.close(told)
    with open(heard) as f:
        acknowledged = set(f.read().split())
    entries = {e.facts['again']: e for e in Journal(tmp_path).entries()}
    assert len(acknowledged) > KILLS and acknowledged <= set(entries)
    ends = [[e['status'] for e in entry.events if e['status'] in OVER] for entry in entries.values()]
    assert all(len(end) == 1 for end in ends)
    for again, entry in entries.items():
        last = entry.events[-1]
        assert [e['n'] for e in entry.events] == list(range(1, len(entry.events) + 1))
        if last['status'] == 'COMPLETED':
            assert entry.result == answer(again.encode())
        else:
            assert 'it had logged something' in last['text'] and again.endswith('7')
    assert sum(end == ['COMPLETED'] for end in ends) > 0.8 * len(ends)


def test_a_forgotten_job_leaves_no_file(tmp_path):
    async def serve():
        table = JobTable(Runner(), LIMITS, journal=Journal(tmp_path))
        job = table.submit('ada', 'here', ('m',), kept_of(b'8' * (LARGE + 1)))
        while not job.over:
            await asyncio.sleep(0.005)
        assert [p.suffix for p in tmp_path.glob(f'{job.id}*')] == ['.result']
        table.forget(job)
        return job.id
    id = asyncio.run(serve())
    assert not list(tmp_path.glob(f'{id}*')) and not list(Journal(tmp_path).entries())


def test_the_folder_is_its_owners_alone(tmp_path):
    Journal(tmp_path / 'jobs')
    assert (tmp_path / 'jobs').stat().st_mode & 0o077 == 0


@pytest.mark.parametrize('size', [0, 1, 4095])
def test_a_cut_database_is_named_or_empty(tmp_path, size):
    journal = Journal(tmp_path)
    journal.add('a', dict(key='ada'), b'x')
    journal.db.close()
    for name in ('jobs.sqlite-wal', 'jobs.sqlite-shm'):
        (tmp_path / name).unlink(missing_ok=True)
    file = tmp_path / 'jobs.sqlite'
    file.write_bytes(file.read_bytes()[:size])
    try:
        assert list(Journal(tmp_path).entries()) == []
    except ValueError as e:
        assert 'is damaged' in str(e)
