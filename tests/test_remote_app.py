"""The server's app without a network and without Ray: rights of keys, hostile requests, interrupted streams, resumed
downloads, and turns between keys.

Jobs are run by a stand-in, unless a test says otherwise: test_remote_jobs tests what a job may do."""
import asyncio
import base64
import errno
import json
import os
import struct
from types import SimpleNamespace
from unittest import mock

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_experiments.remote.door import ConnectionLimits
from transformer_experiments.remote.limits import JobError, Limits
from transformer_experiments.remote.journal import Journal
from transformer_experiments.remote.keys import Keys
from transformer_experiments.remote.messages import job_message, tree_hash
from transformer_experiments.remote.queue import JobTable
from transformer_experiments.remote.recovery import restore
from transformer_experiments.remote.queued_jobs import SpooledBytes
from transformer_experiments.remote.runners import OutOfTime, ReplicaLost
from transformer_experiments.remote.answers import HEARTBEAT, event_stream
from transformer_experiments.remote.server import ServedModel, make_app
from transformer_experiments.tracing import TracedModel

FUZZ = int(os.environ.get('FUZZ', 1500)) # hostile messages
QUIET = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def message_of(size: int = 1, model_name: str = 'tiny') -> bytes:
    model = TracedModel(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    x = torch.ones(size, 4)
    with model.trace(x) as tracer:
        for i in range(3):
            (model[0].output[:, 0] * i).sum().save()
    written = SimpleNamespace(
        method='forward', model=model, graph=tracer.graph, invokers=[], args=(x,), kwargs={}, invoker_args={}
    )
    return job_message(written, {id(model._root): model_name})


TREE = tree_hash(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
MESSAGE = message_of()


class Stand:
    "A runner that does as it is told: a function of the number of the run, which gives or raises."
    def __init__(self, does=None, replicas: int = 1):
        self.does, self.places = does, {'tiny': replicas, 'elsewhere': 1}
        self.runs = self.stopped = self.at_once = self.most = 0

    async def run(self, place, message, owner=None):
        self.runs, self.at_once = self.runs + 1, self.at_once + 1
        n, self.most = self.runs, max(self.most, self.at_once)
        try:
            yield 'RUNNING', None
            if self.does is None:
                yield 'RESULT', b'done'
            else:
                async for step in self.does(n):
                    yield step
        except (asyncio.CancelledError, GeneratorExit):
            self.stopped += 1
            raise
        finally:
            self.at_once -= 1


class Place:
    "A server with two keys."
    def __init__(self, tmp_path, does=None, replicas: int = 1, limits=None, **table):
        limits = limits or Limits()
        self.keys = Keys(tmp_path/'keys.json')
        self.key = {name: self.keys.add(name) for name in ('ada', 'grace')}
        self.runner, self.limits = Stand(does, replicas), limits
        self.table = JobTable(self.runner, limits, **table)
        models = {'tiny': ServedModel('tiny', 'tiny', TREE), 'apart': ServedModel('apart', 'elsewhere', TREE)}
        self.app = make_app(self.table, self.keys, models, limits)

    def client(self, name: str | None = 'ada', **headers):
        if name is not None:
            headers['Authorization'] = f'Bearer {self.key.get(name, name)}'
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url='http://server', headers=headers)


def events_of(response) -> list[dict]:
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith('data: ')]


def run(test):
    "An async test, in a loop of its own."
    def wrapped(tmp_path): asyncio.run(asyncio.wait_for(test(tmp_path), 60))
    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


# Who may do what

ROUTES = [
    ('POST', '/jobs'),
    ('GET', '/jobs'),
    ('GET', '/models'),
    ('GET', '/jobs/{id}'),
    ('GET', '/jobs/{id}/events'),
    ('GET', '/jobs/{id}/result'),
    ('DELETE', '/jobs/{id}'),
]


@run
async def test_every_route_wants_a_key(tmp_path):
    place = Place(tmp_path)
    id = (await place.client().post('/jobs', content=MESSAGE)).headers['x-job-id']
    gone = place.keys.add('gone')
    place.keys.revoke('gone')
    wrong = [
        None,
        '',
        'Bearer',
        'Bearer ',
        'Bearer te_' + 'a' * 43,
        f'Basic {place.key["ada"]}',
        place.key['ada'],
        f'Bearer {place.key["ada"]}x',
        f'Bearer {gone}',
        'Bearer \xe9\xff',
    ]
    for method, route in ROUTES:
        for value in wrong:
            headers = {} if value is None else {'Authorization': value.encode('latin-1')}
            answer = await place.client(None).request(
                method, route.format(id=id), headers=headers, content=MESSAGE if method == 'POST' else None
            )
            assert (
                answer.status_code == 401 and 'key' in answer.json()['error'] and place.key['ada'] not in answer.text
            ), (method, route, value, answer.text)
    for path in ('/health', '/'):
        assert (await place.client(None).get(path)).status_code == 200
    assert place.runner.runs == 1


@run
async def test_a_revoked_key_is_refused_at_once(tmp_path):
    place = Place(tmp_path)
    assert (await place.client().get('/models')).status_code == 200
    Keys(place.keys.path).revoke('ada') # as another process does it
    assert (await place.client().get('/models')).status_code == 401
    assert (await place.client('grace').get('/models')).status_code == 200


@run
async def test_somebody_elses_job_is_not_there(tmp_path):
    place = Place(tmp_path)
    answer = await place.client().post('/jobs', content=MESSAGE)
    id = answer.headers['x-job-id']
    for method, route in ROUTES[3:]:
        told = await place.client('grace').request(method, route.format(id=id))
        never = await place.client('grace').request(method, route.format(id='0' * 24))
        assert (told.status_code, told.text.replace(id, '')) == (404, never.text.replace('0' * 24, '')), (
            'tells that it exists'
        )
    assert (await place.client('grace').get('/jobs')).json() == {'jobs': []}
    assert (await place.client().get(f'/jobs/{id}/result')).content == b'done'


@run
async def test_damaged_keys_open_nothing(tmp_path):
    place = Place(tmp_path)
    place.keys.path.write_text('{')
    answer = await place.client().get('/models')
    assert answer.status_code == 503 and str(tmp_path) not in answer.text


# What is refused

@run
async def test_a_job_that_is_too_large(tmp_path):
    place = Place(tmp_path, limits=Limits(bytes_in=len(MESSAGE)))
    client = place.client()
    assert (await client.post('/jobs', content=MESSAGE)).status_code == 200
    async def pieces():
        for _ in range(100):
            yield MESSAGE
    async def never():
        raise AssertionError("the body was read")
        yield b''
    lengths = [{'Content-Length': str(n)} for n in (10**9, 10**30)]
    for answer in [await client.post('/jobs', content=MESSAGE + b' '), await client.post('/jobs', content=pieces()),
                   *[await client.post('/jobs', content=never(), headers=length) for length in lengths]]:
        assert answer.status_code == 413 and f'{len(MESSAGE):,} bytes' in answer.json()['error']


def with_header(change) -> bytes: # MESSAGE with another JSON in it
    size = struct.unpack('<Q', MESSAGE[:8])[0]
    entries = json.loads(MESSAGE[8:8 + size])
    job = json.loads(entries['__metadata__']['message'])
    entries['__metadata__']['message'] = json.dumps(change(job))
    text = json.dumps(entries).encode()
    return struct.pack('<Q', len(text)) + text + MESSAGE[8 + size:]


@run
async def test_refusals_say_why(tmp_path):
    client = Place(tmp_path).client()
    model = lambda name, tree=TREE: {'name': name, 'tree': tree}
    for change, status, said in [
            (lambda j: j | {'version': 2}, 400, 'version 2, and this is version 1'),
            (lambda j: j | {'version': '1'}, 400, 'version'),
            (lambda j: j | {'code': 'import os'}, 400, 'code'),
            (lambda j: j | {'models': [model('gpt-5')]}, 404, 'it has tiny, apart'),
            (lambda j: j | {'models': [model('tiny', 'f' * 64)]}, 409, 'built differently'),
            (lambda j: j | {'models': [model('tiny'), model('apart')]}, 422, 'serve them together, --model tiny+apart'),
            (lambda j: j | {'models': []}, 400, 'models'),
            (lambda j: j | {'kind': 'session'}, 422, 'session'),
            (lambda j: [], 400, '')]:
        answer = await client.post('/jobs', content=with_header(change))
        assert answer.status_code == status and said in answer.json()['error'], (
            status,
            answer.status_code,
            answer.text,
        )


@run
async def test_a_key_has_its_limits(tmp_path):
    async def long(n):
        await asyncio.sleep(0.05)
        yield 'RESULT', b''
    place = Place(tmp_path, long, replicas=8, limits=Limits(concurrent_jobs=2, queued_jobs=3))
    client = place.client(Prefer='respond-async')
    answers = [await client.post('/jobs', content=MESSAGE) for _ in range(6)]
    assert [a.status_code for a in answers] == [202] * 5 + [429]
    assert answers[-1].headers['retry-after'] and 'ada has 3 jobs waiting' in answers[-1].json()['error']
    assert (await place.client('grace').post('/jobs', content=MESSAGE)).status_code == 200
    for a in answers[:5]:
        await place.client().get(f"/jobs/{a.json()['id']}/events")
    assert place.runner.most == 3 # two of ada's and grace's


PATHS = st.sampled_from(
    [
        '/',
        '/jobs',
        '/jobs/{id}',
        '/jobs/{id}/events',
        '/jobs/{id}/result',
        '/models',
        '/health',
        '/../etc/passwd',
        '/jobs/%00',
        '/jobs//',
        '/docs',
        '/openapi.json',
        '/jobs/{id}/result/x',
    ]
)
TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=40)


METHODS = 'GET', 'POST', 'DELETE', 'PUT', 'PATCH', 'HEAD', 'OPTIONS'
HEADERS = ('Range', 'If-Range', 'Last-Event-ID', 'Prefer', 'Idempotency-Key', 'Content-Type', 'X-Forwarded-For')


@settings(max_examples=400, **QUIET)
@given(method=st.sampled_from(METHODS), path=PATHS, after=TEXT, body=st.binary(max_size=100),
       headers=st.dictionaries(st.sampled_from(HEADERS), TEXT, max_size=4))
def test_any_request_gets_an_answer(tmp_path_factory, method, path, after, body, headers):
    async def ask():
        place = Place(tmp_path_factory.mktemp('keys'))
        id = (await place.client().post('/jobs', content=MESSAGE)).headers['x-job-id']
        answer = await place.client(**{k: v.encode('latin-1') for k, v in headers.items()}).request(
            method, path.format(id=id), params={'after': after}, content=body
        )
        assert answer.status_code < 500
        if answer.status_code >= 400 and method != 'HEAD':
            assert answer.json()['error']
    asyncio.run(ask())


@st.composite
def damaged(draw) -> bytes:
    "A message that isn't what it was: its bytes, its lengths or its JSON."
    kind = draw(st.integers(0, 4))
    if kind == 0: # bytes
        data = bytearray(MESSAGE)
        for _ in range(draw(st.integers(1, 8))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data[:draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)
    if kind == 1: return struct.pack('<Q', draw(st.integers(0, 2**64 - 1) | st.integers(0, len(MESSAGE)))) + MESSAGE[8:]
    if kind == 2: # deep nesting, where a value may be
        depth, field = (
            draw(st.integers(1, 900)),
            draw(st.sampled_from(['common', 'inputs', 'graph', 'edits', 'models'])),
        )
        return with_header(lambda job: job | {field: json.loads('[' * depth + ']' * depth)})

    def change(value, left):
        if isinstance(value, (dict, list)) and value and left and draw(st.integers(0, 5)):
            k = draw(st.sampled_from(sorted(value)) if isinstance(value, dict) else st.integers(0, len(value) - 1))
            return (
                value | {k: change(value[k], left - 1)}
                if isinstance(value, dict)
                else [*value[:k], change(value[k], left - 1), *value[k + 1 :]]
            )
        return draw(JUNK)
    return with_header(lambda job: change(job, 9))


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.text(max_size=5)
    | st.sampled_from(
        ['os.system', 'builtins.eval', 'tensor', '__class__', 't0', 'torch.load', 'torch.Tensor.exp', 'apply']
    ),
    lambda v: (
        st.lists(v, max_size=3)
        | st.dictionaries(
            st.sampled_from(['tensor', 'node', 'tuple', 'dict', 'slice', 'dtype', 'function', 'x']), v, max_size=2
        )
    ),
    max_leaves=6,
)


@pytest.fixture(scope='module')
def one_place(tmp_path_factory): return Place(tmp_path_factory.mktemp('server'))


@settings(max_examples=FUZZ, **QUIET)
@given(message=damaged(), key=st.sampled_from(['ada'] * 9 + ['te_nobody']))
def test_hostile_jobs_are_refused(one_place, message, key):
    "With a reason, or they are jobs after all; the runner hears of no other."
    async def ask():
        runs = one_place.runner.runs
        answer = await one_place.client(key).post('/jobs', content=message)
        assert answer.status_code in ((200, 400, 404, 409, 422) if key == 'ada' else (401,)), (
            answer.status_code,
            answer.text,
        )
        assert (answer.status_code == 200) == (one_place.runner.runs == runs + 1)
        if answer.status_code != 200:
            assert 3 < len(answer.json()['error']) < 2000, answer.text
        one_place.table.jobs.clear()
    asyncio.run(ask())


# Streams and downloads

@run
async def test_events_are_numbered_and_replayed(tmp_path):
    async def talks(n):
        for i in range(40):
            yield 'LOG', f'line {i} \ud800 \n\ndata: not an event'
            if i % 7 == 0:
                await asyncio.sleep(0)
        yield 'RESULT', b'done'
    client = Place(tmp_path, talks).client()
    answer = await client.post('/jobs', content=MESSAGE)
    id, events = answer.headers['x-job-id'], events_of(answer)
    assert [e['n'] for e in events] == list(range(1, 45)) and [e['status'] for e in events] == [
        'RECEIVED',
        'QUEUED',
        'RUNNING',
    ] + ['LOG'] * 40 + ['COMPLETED']
    assert (
        base64.b64decode(events[-1]['data']) == b'done' and events[3]['text'] == 'line 0 \ud800 \n\ndata: not an event'
    )
    for after in (0, 3, 43, 44, 99):
        assert events_of(await client.get(f'/jobs/{id}/events', params={'after': after})) == events[after:]
        assert (
            events_of(await client.get(f'/jobs/{id}/events', headers={'Last-Event-ID': str(after)})) == events[after:]
        )
        assert (await client.get(f'/jobs/{id}', params={'after': after})).json()['events'] == events[after:]


@run
async def test_whoever_goes_away_and_comes_back_misses_nothing(tmp_path):
    go = asyncio.Event()
    async def waits(n):
        for i in range(20):
            yield 'LOG', str(i)
            await asyncio.sleep(0.001)
        await go.wait()
        yield 'RESULT', b'done'
    place = Place(tmp_path, waits)
    id = (await place.client(Prefer='respond-async').post('/jobs', content=MESSAGE)).json()['id']
    job, seen = place.table.jobs[id], []
    while len(seen) < 23: # streams that are left in the middle, again and again
        stream = event_stream(job, after=len(seen))
        seen += [json.loads(e.split('data: ')[1]) for e in (await anext(stream)).decode().split('\n\n') if e]
        await stream.aclose()
    go.set()
    stream = event_stream(job, len(seen), heartbeat=0.01)
    seen += [
        json.loads(e.split('data: ')[1]) async for part in stream for e in part.decode().split('\n\n') if 'data: ' in e
    ]
    assert [e['n'] for e in seen] == list(range(1, 25)) and seen[-1]['status'] == 'COMPLETED'


@run
async def test_a_silent_job_has_a_heartbeat(tmp_path):
    place = Place(tmp_path, lambda n: never())
    id = (await place.client(Prefer='respond-async').post('/jobs', content=MESSAGE)).json()['id']
    stream = event_stream(place.table.jobs[id], after=3, heartbeat=0.01)
    await asyncio.sleep(0.05)
    assert [await anext(stream) for _ in range(3)] == [b': waiting\n\n'] * 3 and HEARTBEAT < 30
    await stream.aclose()
    await place.table.close()


async def never():
    await asyncio.sleep(1000)
    yield 'RESULT', b''


@run
async def test_a_brief_job_is_answered_whole_and_a_long_one_as_it_goes(tmp_path):
    go_on, heard = asyncio.Event(), asyncio.Queue()
    async def does(n):
        if n == 2:
            await go_on.wait()
        yield 'RESULT', b'done'
    place = Place(tmp_path, does)
    async def receive():
        return (
            {'type': 'http.request', 'body': MESSAGE, 'more_body': False}
            if not asked.pop()
            else await asyncio.Event().wait()
        )
    scope = dict(
        type='http',
        http_version='1.1',
        method='POST',
        scheme='http',
        path='/jobs',
        raw_path=b'/jobs',
        query_string=b'',
        root_path='',
        headers=[(b'authorization', f'Bearer {place.key["ada"]}'.encode())],
        client=('here', 1),
        server=('server', 80),
    )
    asked = [True, False]
    await place.app(scope, receive, heard.put)
    start, body = heard.get_nowait(), heard.get_nowait()
    assert (
        heard.empty()
        and dict(start['headers'])[b'content-length'] == str(len(body['body'])).encode()
        and not body.get('more_body')
    )
    assert [line for line in body['body'].splitlines() if line.startswith(b'id')] == [
        b'id: 1',
        b'id: 2',
        b'id: 3',
        b'id: 4',
    ]
    asked[:] = [True, False]
    answer = asyncio.ensure_future(place.app(scope, receive, heard.put))
    start, body = await heard.get(), await heard.get()
    assert (
        not answer.done()
        and dict(start['headers'])[b'content-type'].startswith(b'text/event-stream')
        and b'RUNNING' in body['body']
        and b'COMPLETED' not in body['body']
    )
    go_on.set()
    assert b'COMPLETED' in (await heard.get())['body']
    await answer


@run
async def test_one_number_is_one_job(tmp_path):
    place = Place(tmp_path)
    clients = [place.client(name, **{'Idempotency-Key': 'n1'}) for name in ('ada', 'ada', 'grace')]
    ids = [(await c.post('/jobs', content=MESSAGE)).headers['x-job-id'] for c in clients]
    assert ids[0] == ids[1] != ids[2] and place.runner.runs == 2 and place.table.kept == 2 * len(b'done')


LARGE = bytes(range(256)) * 40_000 # about 10 MB, over several pieces


@run
async def test_downloads_by_ranges(tmp_path):
    async def large(n):
        for i in range(0, len(LARGE), 3_000_000):
            yield 'PART' if i + 3_000_000 < len(LARGE) else 'RESULT', memoryview(LARGE)[i:i + 3_000_000]
    client = Place(tmp_path, large).client()
    answer = await client.post('/jobs', content=MESSAGE)
    path = f"/jobs/{answer.headers['x-job-id']}/result"
    assert 'data' not in events_of(answer)[-1] and events_of(answer)[-1]['size'] == len(LARGE)
    whole = await client.get(path)
    assert whole.content == LARGE and whole.headers['content-length'] == str(len(LARGE))
    tag = {'If-Range': whole.headers['etag']}
    parts = {'bytes=0-': slice(0, None), 'bytes=4194303-4194304': slice(4194303, 4194305),
             'bytes=-5': slice(-5, None), 'bytes=10239999-': slice(-1, None)}
    for text, part in parts.items():
        answer = await client.get(path, headers={'Range': text} | tag)
        assert answer.status_code == 206 and answer.content == LARGE[part], text
    assert (await client.get(path, headers={'Range': 'bytes=5-', 'If-Range': '"another"'})).status_code == 200
    assert (await client.get(path, headers={'Range': f'bytes={len(LARGE)}-'})).status_code == 416


# What becomes of jobs

@run
async def test_a_hundred_clients_with_twenty_jobs_each(tmp_path):
    "Each ends once, in its owner's hands, though every tenth process dies."
    async def dies(n):
        await asyncio.sleep(0)
        if n % 10 == 0: raise ReplicaLost('killed')
        yield 'RESULT', str(n).encode()
    place = Place(tmp_path, dies, replicas=3)
    for i in range(100):
        place.key[f'c{i}'] = place.keys.add(f'c{i}')
    async def one(name):
        return [
            events_of(await place.client(name).post('/jobs', content=MESSAGE, headers={'Idempotency-Key': str(k)}))
            for k in range(20)
        ]
    found = await asyncio.gather(*(one(f'c{i}') for i in range(100)))
    ends = [
        [e['status'] for e in events if e['status'] in ('COMPLETED', 'ERROR', 'CANCELLED')]
        for each in found
        for events in each
    ]
    failed = [events[-1] for each in found for events in each if events[-1]['status'] == 'ERROR']
    assert all(len(e) == 1 for e in ends) and len(ends) == 2000 and place.runner.most == 3
    assert all('it was tried twice' in e['text'] for e in failed) and len(failed) < 60
    given = [base64.b64decode(e[-1]['data']) for each in found for e in each if e[-1]['status'] == 'COMPLETED']
    assert len(set(given)) == len(given) and sum(len(j.events) > 4 for j in place.table.jobs.values()) > 100
    for name in ('c0', 'c99'):
        assert len((await place.client(name).get('/jobs')).json()['jobs']) == 20


@run
async def test_keys_take_turns(tmp_path):
    all_posted = asyncio.Event() # however busy the machine is
    async def short(n):
        await all_posted.wait()
        yield 'RESULT', b''
    place = Place(tmp_path, short)
    many, few = place.client(Prefer='respond-async'), place.client('grace', Prefer='respond-async')
    for _ in range(30):
        await many.post('/jobs', content=MESSAGE)
    for _ in range(3):
        await few.post('/jobs', content=MESSAGE)
    jobs = list(place.table.jobs.values())
    all_posted.set()
    await asyncio.gather(*(anext(j.follow(10**6), None) for j in jobs))
    order = [j.key for j in sorted(jobs, key=lambda j: j.finished)]
    late = [i for i, key in enumerate(order) if key == 'grace']
    assert late[-1] - late[0] == 4 and late[0] < 30 - 5, order # every second one, from when it came


@run
async def test_ends_of_all_kinds(tmp_path):
    async def each(n):
        if n == 1: raise JobError("no site 'nowhere'", 'TraceError')
        if n == 2: raise OutOfTime
        if n == 3: raise RuntimeError('secret of the machine')
        yield 'LOG', 'a line'
        raise ReplicaLost('killed')
    client = Place(tmp_path, each).client()
    ends = [events_of(await client.post('/jobs', content=MESSAGE))[-1] for _ in range(4)]
    assert [e['type'] for e in ends] == ['TraceError', 'TimeoutError', 'RuntimeError', 'RuntimeError'] and {
        e['status'] for e in ends
    } == {'ERROR'}
    texts = ["no site 'nowhere'", 'more than 300 s', 'the server failed at this job (RuntimeError)',
             'logged something already']
    for e, said in zip(ends, texts, strict=True):
        assert said in e['text'] and 'secret' not in e['text']
    jobs = (await client.get('/jobs')).json()['jobs']
    assert (await client.get(f"/jobs/{jobs[0]['id']}/result")).status_code == 404


@run
async def test_cancelling(tmp_path):
    place = Place(tmp_path, lambda n: never())
    client = place.client(Prefer='respond-async')
    running, waiting, third = [(await client.post('/jobs', content=MESSAGE)).json()['id'] for _ in range(3)]
    assert (await client.get(f'/jobs/{running}/result')).status_code == 409
    await asyncio.sleep(0)
    assert (await client.delete(f'/jobs/{waiting}')).json()['status'] == 'CANCELLED' and place.runner.runs == 1
    assert (await client.delete(f'/jobs/{running}')).json()['status'] == 'CANCELLED'
    await asyncio.sleep(0.01)
    assert place.runner.stopped == 1 and place.runner.runs == 2 # and the next one runs
    await place.table.close()
    assert place.table.jobs[third].status == 'CANCELLED' and place.table.kept == 0 and place.runner.at_once == 0
    assert [e['status'] for e in events_of(await client.get(f'/jobs/{running}/events'))][-1] == 'CANCELLED'


@run
async def test_a_job_that_is_cancelled_before_its_first_step_frees_its_place(tmp_path):
    place = Place(tmp_path)
    message = SpooledBytes()
    message.add(MESSAGE)
    job = place.table.submit('ada', 'tiny', ('tiny',), message)
    place.table.cancel(job)
    await asyncio.sleep(0.01)
    assert not place.table.running['tiny'] and (await place.client().post('/jobs', content=MESSAGE)).status_code == 200


@run
async def test_results_are_kept_for_their_time(tmp_path):
    place = Place(tmp_path, limits=Limits(keep_seconds=10))
    client = place.client(**{'Idempotency-Key': 'once'})
    id = (await client.post('/jobs', content=MESSAGE)).headers['x-job-id']
    end = place.table.jobs[id].finished
    for later, status in ((9, 200), (10, 410), (20, 404)):
        place.table.tidy(end + later)
        answer = await client.get(f'/jobs/{id}/result')
        assert answer.status_code == status, (later, answer.text)
    assert place.table.kept == 0 and not place.table.by_request


@run
async def test_room_is_bounded(tmp_path):
    async def some(n): yield 'RESULT', bytes(100_000)
    place = Place(tmp_path, some, max_kept=250_000)
    ids = [(await place.client().post('/jobs', content=MESSAGE)).headers['x-job-id'] for _ in range(4)]
    assert [(await place.client().get(f'/jobs/{id}/result')).status_code for id in ids] == [410, 410, 200, 200]
    place.table.max_kept = place.table.kept
    answer = await place.client().post('/jobs', content=MESSAGE)
    assert answer.status_code == 429 and 'has no room' in answer.json()['error']


# The front door's limits, and whose results are whose

@run
async def test_a_body_that_never_comes_is_given_up(tmp_path):
    async def slow():
        yield MESSAGE[:100]
        await asyncio.sleep(5)
        yield MESSAGE[100:]
    with mock.patch.object(ConnectionLimits, 'body_deadline', lambda self, size: 0.1):
        response = await Place(tmp_path).client().post('/jobs', content=slow())
    assert response.status_code == 408 and 'too long to arrive' in response.json()['error']


@run
async def test_bytes_on_their_way_are_counted_by_owner(tmp_path):
    place, gate = Place(tmp_path, limits=Limits(bytes_in=len(MESSAGE) + 100)), asyncio.Event()
    arrived = []
    async def held():
        yield MESSAGE[:100]
        arrived.append(1)
        await gate.wait()
        yield MESSAGE[100:]
    waiting = [asyncio.ensure_future(place.client().post('/jobs', content=held())) for _ in range(4)]
    while len(arrived) < 4:
        await asyncio.sleep(0.01)
    refused = await place.client().post('/jobs', content=MESSAGE)
    other = await place.client('grace').post('/jobs', content=MESSAGE)
    gate.set()
    assert refused.status_code == 429 and 'you are sending' in refused.json()['error'] and other.status_code == 200
    assert [r.status_code for r in await asyncio.gather(*waiting)] == [200] * 4
    assert (await place.client().post('/jobs', content=MESSAGE)).status_code == 200


@pytest.mark.parametrize('where', ['body', 'journal'])
def test_a_full_disk_is_a_507_and_takes_no_job(tmp_path, where):
    full = OSError(errno.ENOSPC, 'No space left on device')
    async def ask():
        place = Place(tmp_path, journal=Journal(tmp_path/'jobs'))
        target, name = (SpooledBytes, 'add') if where == 'body' else (Journal, '_put')
        with mock.patch.object(target, name, side_effect=full):
            response = await place.client().post('/jobs', content=MESSAGE)
        assert response.status_code == 507 and 'disk is full' in response.json()['error'] and not place.table.jobs
        assert (await place.client().post('/jobs', content=MESSAGE)).status_code == 200
    asyncio.run(ask())


@pytest.mark.parametrize('restart', [False, True])
def test_a_new_key_of_an_old_name_finds_nothing_of_the_old_one(tmp_path, restart):
    async def ask():
        place = Place(tmp_path, journal=Journal(tmp_path/'jobs'))
        id = (await place.client().post('/jobs', content=MESSAGE)).headers['x-job-id']
        assert (await place.client().get(f'/jobs/{id}')).status_code == 200
        place.keys.revoke('ada')
        new = place.keys.add('ada')
        if restart:
            again = JobTable(place.runner, place.limits, journal=Journal(tmp_path/'jobs'))
            restore(again)
            models = {'tiny': ServedModel('tiny', 'tiny', TREE)}
            place.table, place.app = again, make_app(again, place.keys, models, place.limits)
            assert id in again.jobs
        place.key['ada'] = new
        assert (await place.client().get(f'/jobs/{id}')).status_code == 404
        assert (await place.client().get('/jobs')).json() == {'jobs': []} and id not in place.table.jobs
    asyncio.run(ask())


@run
async def test_idempotency_keys_are_compared_whole(tmp_path):
    place = Place(tmp_path)
    long = await place.client(**{'Idempotency-Key': 'x' * 101}).post('/jobs', content=MESSAGE)
    assert long.status_code == 422 and 'at most 100' in long.json()['error']
    ids = [(await place.client(**{'Idempotency-Key': 'x' * 99 + c}).post('/jobs', content=MESSAGE)).headers['x-job-id']
           for c in 'aba']
    assert ids[0] == ids[2] != ids[1]
