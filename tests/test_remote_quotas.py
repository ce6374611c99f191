"What a key may have on a server: bytes, events and texts, counted in whole messages; and long texts are cut."
import asyncio
import base64
import json
import random

import pytest
from test_remote_app import MESSAGE, Place, events_of, run

from transformer_experiments.remote.guard import GuardCounts
from transformer_experiments.remote.journal import Journal
from transformer_experiments.remote.limits import MAX_TEXT, JobError, Limits, cut_text, describe_error
from transformer_experiments.remote.queue import JobTable
from transformer_experiments.remote.queued_jobs import spooled
from transformer_experiments.remote.quotas import OverQuota, TooMany, Usage
from transformer_experiments.remote.recovery import restore
from transformer_experiments.remote.runners import ReplicaLost


def recounted(table: JobTable, key: str) -> Usage:
    "What a key has, counted anew."
    mine = [j for j in table.jobs.values() if j.key == key]
    kept = [k.size for j in mine for k in (j.message, j.result) if k is not None]
    events = [json.dumps(e) for j in mine for e in j.events]
    return Usage(sum(kept), len(events), sum(map(len, events)))


class Any:
    "A runner: the message says how large the result is, how many lines are logged, and whether the replica dies."
    places = {'tiny': 2}

    async def run(self, place, message, owner=None):
        size, lines, dies = json.loads(message.rstrip(b' '))
        yield 'RUNNING', None
        for _ in range(lines):
            yield 'LOG', 'x' * 50
            await asyncio.sleep(0)
        if dies: raise ReplicaLost('exit code 1')
        yield 'RESULT', bytes(size)


@pytest.mark.parametrize('seed', range(8))
def test_counts_are_true_and_quotas_hold(tmp_path, seed):
    "After each step of a random life, also one that is taken up by another table."
    rng, limits = random.Random(seed), Limits(kept_bytes=600, kept_events=60, kept_texts=6000, queued_jobs=5)
    seen = {'refused': 0, 'failed': 0, 'done': 0}

    def check(table):
        for key in ('ada', 'grace'):
            assert table.quotas.of(key) == recounted(table, key)
            assert table.quotas.of(key).bytes <= limits.kept_bytes
            # what is told of jobs that had been taken isn't refused: at most 8 events of each that waits or runs
            assert table.quotas.of(key).events <= limits.kept_events + 8 * (limits.queued_jobs + 2)
        assert table.kept == sum(table.quotas.of(k).bytes for k in ('ada', 'grace'))

    def ended(job):
        seen['done'] += job.status == 'COMPLETED'
        seen['failed'] += job.status == 'ERROR' and 'a key may' in job.events[-1]['text']

    async def live():
        table = JobTable(Any(), limits, ended, journal=Journal(tmp_path))
        for _ in range(200):
            key, what = rng.choice(('ada', 'grace')), rng.random()
            jobs = [j for j in table.jobs.values() if j.key == key]
            if what < 0.7:
                job = rng.choice((0, 50, 200, 700)), rng.choice((0, 0, 5, 30)), rng.random() < 0.1
                message = spooled(json.dumps(job).encode().ljust(rng.choice((10, 10, 100, 100, 700))))
                try:
                    table.submit(key, 'tiny', ('tiny',), message)
                except OverQuota as e:
                    seen['refused'] += 1
                    assert any(f'{q}=' in str(e) for q in ('kept_bytes', 'kept_events', 'kept_texts'))
                except TooMany:
                    pass
            elif jobs and what < 0.85:
                table.cancel(rng.choice(jobs))
            elif jobs and what < 0.9:
                table.forget(rng.choice(jobs))
            await asyncio.sleep(rng.choice((0, 0.001)))
            check(table)
        while any(not j.over for j in table.jobs.values()):
            await asyncio.sleep(0.01)
        check(table)
        again = JobTable(Any(), limits, journal=Journal(tmp_path))
        restore(again)
        check(again)
        assert again.quotas.used == table.quotas.used
        for job in list(again.jobs.values()):
            again.forget(job)
        assert not again.quotas.used and again.kept == 0
    asyncio.run(asyncio.wait_for(live(), 60))
    assert all(seen.values()), seen # the random life is one in which quotas matter


@run
async def test_a_message_over_the_quota_is_a_507_that_names_it(tmp_path):
    place = Place(tmp_path, limits=Limits(kept_bytes=len(MESSAGE) - 1))
    answer = await place.client().post('/jobs', content=MESSAGE)
    assert answer.status_code == 507 and f'kept_bytes={len(MESSAGE) - 1:,}' in answer.json()['error']
    assert not place.table.jobs and not place.table.quotas.used


@run
async def test_a_result_over_the_quota_is_a_failed_job_that_names_it(tmp_path):
    async def large(n): yield 'RESULT', bytes(5000 + len(MESSAGE))
    place = Place(tmp_path, large, limits=Limits(kept_bytes=4000 + len(MESSAGE)))
    end = events_of(await place.client().post('/jobs', content=MESSAGE))[-1]
    assert (end['status'], end['type']) == ('ERROR', 'MemoryError') and 'kept_bytes=' in end['text']
    assert place.table.quotas.of('ada').bytes == place.table.kept == 0


@run
async def test_the_oldest_results_of_a_key_make_room_and_nobody_elses(tmp_path):
    async def some(n): yield 'RESULT', bytes(100_000)
    place = Place(tmp_path, some, limits=Limits(kept_bytes=250_000))
    theirs = (await place.client('grace').post('/jobs', content=MESSAGE)).headers['x-job-id']
    ids = [(await place.client().post('/jobs', content=MESSAGE)).headers['x-job-id'] for _ in range(4)]
    answers = [await place.client().get(f'/jobs/{id}/result') for id in ids]
    assert [a.status_code for a in answers] == [410, 410, 200, 200]
    assert 'kept_bytes=250,000' in answers[0].json()['error']
    assert (await place.client('grace').get(f'/jobs/{theirs}/result')).status_code == 200


@pytest.mark.parametrize('limits', [Limits(kept_events=50), Limits(kept_texts=5000)])
def test_a_job_that_logs_without_end_fails_and_others_go_on(tmp_path, limits):
    async def ask():
        async def talk(n):
            for _ in range(1000 if n == 1 else 2):
                yield 'LOG', 'again'
            yield 'RESULT', b'done'
        place = Place(tmp_path, talk, limits=limits)
        end = events_of(await place.client().post('/jobs', content=MESSAGE))[-1]
        assert end['status'] == 'ERROR' and ('kept_events=50' in end['text'] or 'kept_texts=5,000' in end['text'])
        other = events_of(await place.client('grace').post('/jobs', content=MESSAGE))[-1]
        assert other['status'] == 'COMPLETED' and base64.b64decode(other['data']) == b'done'
        mine = events_of(await place.client().post('/jobs', content=MESSAGE))[-1] # the first is forgotten
        assert mine['status'] == 'COMPLETED' and len(place.table.jobs) == 2
    asyncio.run(asyncio.wait_for(ask(), 60))


@run
async def test_texts_are_cut_wherever_they_come_from(tmp_path):
    async def talk(n):
        yield 'LOG', 'é' * 50_000
        raise JobError('e' * 50_000)
    log, end = events_of(await Place(tmp_path, talk).client().post('/jobs', content=MESSAGE))[-2:]
    assert len(log['text']) == len(end['text']) == MAX_TEXT == 10_000
    assert log['text'].startswith('ééé') and log['text'].endswith('(cut: it has 50,000 characters)')


def test_what_a_job_logs_is_cut_where_it_runs_and_counted_whole():
    said = []
    counts = GuardCounts(Limits(log_bytes=50_000), lambda kind, text: said.append(text))
    counts.log('a' * 30_000)
    assert said == [cut_text('a' * 30_000)] and len(said[0]) == MAX_TEXT
    with pytest.raises(JobError, match='logs more than'):
        counts.log('a' * 30_000)
    assert len(str(describe_error(ValueError('b' * 10**6), Limits()))) == MAX_TEXT
