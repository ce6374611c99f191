"""Jobs survive the server's process: fifty SIGKILLs lose none that was acknowledged, and end none twice."""
import asyncio
import os
import random
import signal

import pytest
from kills import die

from transformer_experiments.remote.limits import FINAL_STATUSES, Limits
from transformer_experiments.remote.journal import LARGE, Journal
from transformer_experiments.remote.queue import JobTable
from transformer_experiments.remote.recovery import restore
from transformer_experiments.remote.queued_jobs import spooled

LIVES = 50 # Of one server, each of which ends with a SIGKILL
KILLS = int(os.environ.get('KILLS', LIVES))
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


class DyingJournal(Journal):
    "Its process ends with SIGKILL before it writes for the n-th time, or after it has."
    def __init__(self, folder, n: int, after: bool):
        super().__init__(folder)
        self.left, self.after = n, after

    def _run(self, *statement):
        self.left -= statement[0].startswith(('insert', 'update'))
        if not (self.left or self.after):
            die()
        done = super()._run(*statement)
        if not self.left:
            die()
        return done


WRITES = 70 # Of ten jobs, at least: each is written when it comes, at each of four events, and twice at its end


def life(folder, numbers, told: int, kill: tuple | None):
    "A server: takes up what is there, takes new jobs, tells which it has, and ends when all are over."
    async def serve():
        table = JobTable(Runner(), LIMITS, journal=DyingJournal(folder, *kill) if kill else Journal(folder))
        restore(table)
        for i in numbers:
            table.submit('ada', 'here', ('m',), spooled(b'%d' % i), idempotency_key=str(i))
            os.write(told, b'%d\n' % i)
            await asyncio.sleep(0.002)
        while any(not job.over for job in table.jobs.values()):
            await asyncio.sleep(0.005)
    asyncio.run(serve())


def start(folder, numbers, told: int, kill: tuple | None) -> int: # Its process
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        life(folder, numbers, told, kill)
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize('seed', range(KILLS // LIVES))
def test_kills_lose_nothing_and_end_nothing_twice(tmp_path, seed):
    rng, (heard, told) = random.Random(seed), os.pipe()
    for k in range(LIVES + 1):
        kill = (rng.randint(1, WRITES), rng.random() < .5) if k < LIVES else None # the last one ends by itself
        pid = start(tmp_path, range(10 * k, 10 * k + 10), told, kill)
        assert os.waitpid(pid, 0)[1] == (signal.SIGKILL if kill else 0)
    os.close(told)
    with open(heard) as f:
        acknowledged = set(f.read().split())
    entries = {e.facts['idempotency_key']: e for e in Journal(tmp_path).entries()}
    assert len(acknowledged) > LIVES and acknowledged <= set(entries)
    ends = [[e['status'] for e in entry.events if e['status'] in FINAL_STATUSES] for entry in entries.values()]
    assert all(len(end) == 1 for end in ends)
    for number, entry in entries.items():
        last = entry.events[-1]
        assert [e['n'] for e in entry.events] == list(range(1, len(entry.events) + 1))
        if last['status'] == 'COMPLETED':
            assert entry.result == answer(number.encode())
        else:
            assert 'it had logged something' in last['text'] and number.endswith('7')
    assert sum(end == ['COMPLETED'] for end in ends) > 0.8 * len(ends)


def test_a_forgotten_job_leaves_no_file(tmp_path):
    async def serve():
        table = JobTable(Runner(), LIMITS, journal=Journal(tmp_path))
        job = table.submit('ada', 'here', ('m',), spooled(b'8' * (LARGE + 1)))
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
