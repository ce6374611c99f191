"""Hostile jobs in processes of their own: none runs over its time, none reaches another's result, none grows the host.

Each attack was tried against a server that ran jobs in its replica, and stopped it for minutes or changed an answer."""
import os
import signal
import threading
import time

import psutil
import pytest
import torch

from transformer_experiments.remote.hosts import Host, host_environment, run_in_child
from transformer_experiments.remote.limits import Cancelled, JobError, Limits
from transformer_experiments.remote.message_format import Job, ModelRef, Table, pack
from transformer_experiments.remote.message_values import encode_graph, encode_value
from transformer_experiments.remote.messages import tree_hash
from transformer_experiments.remote.workers import read_frame, send_frame
from transformer_experiments.tracing import LanguageModel
from transformer_experiments.tracing.graph import Graph
from transformer_experiments.tracing.nodes import Node, Ref

NAME, SECONDS = 'tinyshakespeare', 2
SOON = 30  # seconds, for a machine that is busy with other jobs: what isn't ended takes minutes
R = [Ref(i) for i in range(64)]


def then(id, op, *args, **kwargs): return Node(id, op, args, kwargs)
def site(id, path='blocks.0'): return Node(id, 'site', (path, 'output', 0, None))
def saved(node, name='x'):
    node.save = name
    return node


@pytest.fixture(scope='module')
def lm(): return LanguageModel(NAME)


@pytest.fixture(scope='module')
def host():
    host = Host({NAME: NAME}, Limits(seconds=SECONDS, memory=1 << 30, log_bytes=100_000, bytes_out=8 << 20), 1)
    yield host
    host.close()


@pytest.fixture(scope='module')
def message(lm):
    ref = ModelRef(name=NAME, tree=tree_hash(lm._root))
    def make(nodes: list, **changes) -> bytes:
        table = Table()
        ids = torch.tensor([[1, 2, 3, 4]])
        job = dict(kind='trace', models=[ref], graph=encode_graph(Graph(nodes), table),
                   inputs=[encode_value(((ids,), {}, {}), table)])
        return pack(Job(**job | changes), table)
    return make


@pytest.fixture(scope='module')
def probe(message): return message([site(0, 'blocks.3'), saved(then(1, 'torch.Tensor.sum', R[0]))])


@pytest.fixture(scope='module')
def fresh(host, probe): return bytes(run_in_child(host, probe, host.limits, owner='somebody'))


def doubled(n: int) -> list: # A tuple of itself twice, and so on
    return [then(0, 'builtins.tuple', [1, 1])] + [then(i + 1, 'builtins.tuple', [R[i], R[i]]) for i in range(n)]


ONES = 'torch.ones'
ATTACKS = {
    'contains in a long range': [then(0, 'operator.contains', range(10**18), 1.5)],
    'enumerate of a range by keyword': [then(0, 'builtins.enumerate', iterable=range(10**18))],
    'a list of a range': [then(0, 'builtins.list', range(10**10))],
    'set.update with a range': [then(0, 'builtins.set', [1]), then(1, 'builtins.set.update', R[0], range(10**10))],
    'dict.update with a range': [then(0, 'builtins.dict'), then(1, 'builtins.dict.update', R[0], range(10**10))],
    'shift and division': [then(0, 'operator.lshift', True, 10**8), then(1, 'operator.floordiv', R[0], 7)],
    'power of an integer': [then(0, 'operator.pow', 7, 10**9)],
    'squares of squares': [
        then(0, 'operator.mul', 3, 3),
        *(then(i, 'operator.mul', R[i-1], R[i-1]) for i in range(1, 60)),
    ],
    'a format': [then(0, 'operator.mod', '%.2000000000f', 1.5)],
    'nested tuples hashed': [*doubled(50), then(51, 'builtins.set', [R[50]])],
    'nested tuples compared': [*doubled(50), then(51, 'operator.eq', R[50], R[50])],
    'nested tuples logged': [*doubled(50), then(51, 'log', R[50])],
    'nested tuples as text': [*doubled(50), then(51, 'builtins.str', R[50])],
    'a sum of lists': [then(0, 'operator.mul', [[1]], 10**5), then(1, 'builtins.sum', R[0], [])],
    'a large product': [then(0, ONES, 20_000, 1), then(1, 'torch.Tensor.expand', R[0], 20_000, 20_000),
                        then(2, 'torch.matmul', R[1], R[1])],
    'a large svd': [then(0, ONES, 1, 1), then(1, 'torch.Tensor.expand', R[0], 30_000, 30_000),
                    then(2, 'torch.linalg.svdvals', R[1])],
    'an svd that fits the bound': [then(0, ONES, 6000, 6000), then(1, 'torch.linalg.svdvals', R[0])],
    'two large tensors': [then(0, 'torch.zeros', 400_000_000), then(1, 'torch.zeros', 400_000_000)],
    'a polynomial of huge degree': [then(0, 'torch.special.laguerre_polynomial_l', torch.ones(4), 2 * 10**11)],
    'a split into single ones': [
        then(0, ONES, 1),
        then(1, 'torch.Tensor.expand', R[0], 10**9),
        then(2, 'torch.split', R[1], 1),
    ],
    'a sum of an expanded tensor': [
        then(0, ONES, 1),
        then(1, 'torch.Tensor.expand', R[0], 10**13),
        then(2, 'torch.sum', R[1]),
    ],
    'a loop of heavy steps': [
        then(0, ONES, 3000, 3000),
        *(then(i, 'torch.matmul', R[i-1], R[0]) for i in range(1, 60)),
    ],
    'a deep backward': [
        then(0, 'torch.zeros', 4, requires_grad=True),
        *(then(i, 'torch.Tensor.exp', R[i-1]) for i in range(1, 60)),
        then(60, 'torch.Tensor.sum', R[59]),
        then(61, 'torch.Tensor.backward', R[60]),
    ],
    'logs without text': [then(i, 'log') for i in range(2000)],
    'a function as text': [then(0, 'builtins.str', torch.add)],
    'a function logged': [then(0, 'log', torch.add)],
    'a function in a list logged': [then(0, 'builtins.list', [torch.add]), then(1, 'log', R[0])],
}
HARMLESS = {'a deep backward'}  # of a size that fits


@pytest.mark.parametrize('name', ATTACKS)
def test_an_attack_ends_in_time_and_leaves_nothing(host, message, probe, fresh, name):
    begin, logs = time.monotonic(), []
    try:
        run_in_child(host, message(ATTACKS[name]), host.limits, lambda kind, text: logs.append(text), owner='eve')
        assert name in HARMLESS
    except JobError as e:
        assert len(str(e)) <= 10_000 and ' at 0x' not in str(e)
    assert time.monotonic() - begin < SOON
    assert sum(len(text) + 64 for text in logs) < 200_000
    assert bytes(run_in_child(host, probe, host.limits, owner='somebody')) == fresh


def test_the_message_is_of_a_known_name_or_refused(host, message, probe, fresh):
    "What the wire says is looked up in tables, and is never an attribute."
    graphs = (
        dict(nodes=[dict(id=0, op='torch.zeros', args=[1], kwargs={'dtype': {'dtype': '_dynamo'}})]),
        dict(nodes=[dict(id=0, op='torch.as_tensor', args=[{'named': ['X', ['__cuda_array_interface__'], [1]]}])]),
        dict(nodes=[dict(id=0, op='torch.as_tensor', args=[{'output': ['X', [['__dlpack__', 1]]]}])]),
        dict(nodes=[dict(id=0, op='torch.zeros', args=[1], kwargs={'device': {'device': 'privateuseone'}})]),
        dict(nodes=[dict(id=0, op='builtins.set', args=[[k * (2**61 - 1) for k in range(3)]])]),
        dict(nodes=[dict(id=0, op='builtins.list', args=[{'set': list(range(2000))}])]),
        dict(nodes=[dict(id=0, op='builtins.list', args=[1 << 100])]),
    )
    for part in graphs:
        graph = Graph([Node(0, 'torch.zeros', (1,))]).to_data() | part
        try:
            run_in_child(host, message([then(0, 'torch.zeros', 1)], graph=graph), host.limits, owner='eve')
        except JobError as e:
            assert 'died' not in str(e) and e.kind != 'TimeoutError', str(e)
    assert bytes(run_in_child(host, probe, host.limits, owner='somebody')) == fresh


def test_a_cancelled_job_is_ended_at_once(host, message, probe, fresh):
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(Cancelled): # its time would end it, too, and as a TimeoutError
        run_in_child(host, message(ATTACKS['an svd that fits the bound']), host.limits, stop=stop, owner='eve')
    assert bytes(run_in_child(host, probe, host.limits, owner='somebody')) == fresh


def test_a_result_that_is_too_large_is_refused_before_it_is_sent(host, message):
    text = [then(0, 'operator.mul', 'x' * 1000, 1000), saved(then(1, 'builtins.list', [R[0]] * 9))]
    with pytest.raises(JobError, match='most that this server gives'):
        run_in_child(host, message(text), host.limits, owner='eve')


def test_jobs_of_one_owner_share_a_process_and_no_two_owners_do(host, message):
    who = message([then(0, 'torch.Tensor.sum', torch.ones(1))])
    def child_of(owner):
        run_in_child(host, who, host.limits, owner=owner)
        return host.current
    a, b, c = child_of('ada'), child_of('ada'), child_of('bob')
    assert a is b and c is not a
    with pytest.raises(JobError):
        run_in_child(host, message([then(0, 'torch.add', 1, 'x')]), host.limits, owner='bob')
    assert host.current is None  # after an error the next job gets a new one


def pid_of(pidfd: int) -> int:
    lines = open(f'/proc/self/fdinfo/{pidfd}').read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('Pid:'))


def kill_at_work(pid: int):
    "As soon as the process has computed for a while."
    process = psutil.Process(pid)
    before = process.cpu_times().user
    while process.cpu_times().user < before + 0.1:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)


def test_a_killed_child_is_an_error_and_a_killed_host_is_started_again(host, message, probe, fresh, monkeypatch):
    long = message(ATTACKS['an svd that fits the bound'])
    children = set(psutil.Process(host.process.pid).children())
    assert children
    take = host.take
    def take_and_kill(owner):
        child = take(owner)
        threading.Thread(target=kill_at_work, args=[pid_of(child.pidfd)]).start()
        return child
    monkeypatch.setattr(host, 'take', take_and_kill)
    with pytest.raises(JobError, match='died'):
        run_in_child(host, long, host.limits, owner='eve')
    monkeypatch.undo()
    assert bytes(run_in_child(host, probe, host.limits, owner='somebody')) == fresh
    old = host.process.pid
    host.process.kill()
    host.process.wait()
    assert bytes(run_in_child(host, probe, host.limits, owner='somebody')) == fresh and host.process.pid != old
    assert not any(p.is_running() and p.status() != 'zombie' for p in children)


def test_fifty_kills_lose_no_answer(host, message, probe, fresh):
    "The child is killed at a random moment of fifty jobs: each gives its result, or an error."
    generator = torch.Generator().manual_seed(0)
    outcomes = set()
    for _ in range(50):
        moment = 0.03 * torch.rand(1, generator=generator).item()
        child = host.take('eve')
        timer = threading.Timer(moment, child.end)
        timer.start()
        try:
            send_frame(child.sock, 'JOB', probe)
            outcomes.add(read_frame(child.sock)[0])
        except (EOFError, OSError):
            outcomes.add('ended')
        timer.join()
        host.give_back(child, last=False)
        host.current = None
    assert outcomes <= {'RESULT', 'ended'}
    assert bytes(run_in_child(host, probe, host.limits, owner='somebody')) == fresh


def test_memory_of_the_host_is_flat(host, message, probe):
    def used(): return psutil.Process(host.process.pid).memory_info().rss
    for _ in range(20):
        run_in_child(host, probe, host.limits, owner='somebody')
    before = used()
    for i in range(300):
        run_in_child(host, probe, host.limits, owner=f'owner {i // 10}')
    assert used() - before < 20 << 20


def test_a_child_has_no_secrets_and_no_open_files(host):
    secrets = dict(HF_TOKEN='x', TRANSFORMER_EXPERIMENTS_API_KEY='y', RAY_AUTH_TOKEN='z')
    env = host_environment(dict(PATH='/bin', OMP_NUM_THREADS='8', **secrets))
    assert not {'x', 'y', 'z'} & set(env.values()) and env['OMP_NUM_THREADS'] == '1'
    [*children] = psutil.Process(host.process.pid).children()
    for p in children:
        links = [os.readlink(f'/proc/{p.pid}/fd/{fd}') for fd in os.listdir(f'/proc/{p.pid}/fd')]
        assert sum('socket:' in link for link in links) <= 1, links
