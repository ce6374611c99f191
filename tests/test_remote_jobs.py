"""Jobs that `remote.running` runs, without any server.

Hostile and damaged messages get a reason, and nothing of them outlives the job. (`test_walkthrough_graphs.py` sends
what isn't hostile.)

`FUZZ=20000 pytest tests/test_remote_jobs.py` makes as many damaged messages; by default fewer."""
import copy
import json
import os
import random
import struct
import subprocess
import sys
import threading
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_walkthrough_graphs import answer, same
from torch import nn

import transformer_experiments.tracing as tracing
from transformer_experiments.remote.checks import REFUSED_OPERATIONS
from transformer_experiments.remote.isolation import ModelModified, PreparedModels
from transformer_experiments.remote.limits import Cancelled, JobError, Limits
from transformer_experiments.remote.running import run_job
from transformer_experiments.remote.message_format import Job, ModelRef, Table, pack
from transformer_experiments.remote.message_values import decode_value, encode_graph, encode_value
from transformer_experiments.remote.messages import job_message, tree_hash
from transformer_experiments.remote.registered import attached_modules
from transformer_experiments.tracing import Graph, LanguageModel, Session, TracedModel, Tracer
from transformer_experiments.tracing.nodes import Node, Ref
from transformer_experiments.tracing.operations import OPERATIONS

FUZZ = int(os.environ.get('FUZZ', 1500))
QUIET = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


# A model with everything that could be written to, and a way to tell that nothing was

class Odd(nn.Module):
    "Hands out its own memory: a view of its table, its buffer, a tensor that is no buffer, a list; and works in place."
    def __init__(self):
        super().__init__()
        self.table, self.first, self.act, self.last = (
            nn.Parameter(torch.randn(6, 4)),
            nn.Linear(4, 4),
            nn.ReLU(inplace=True),
            nn.Linear(4, 3),
        )
        self.norm, self.same, self.pair = nn.BatchNorm1d(4), nn.Identity(), Pair()
        self.register_buffer('scale', torch.ones(4))
        self.plain, self.names, self.kept = torch.full((4,), 2.), ['a', 'b'], [torch.ones(4)]

    def forward(self, x):
        position = self.same(self.table[:x.shape[1]])
        h = self.norm((self.first(x) + position).transpose(1, 2)).transpose(1, 2)
        h, extra = self.pair(h, self.scale, self.plain, self.names, self.kept)
        return self.last(self.act(h + extra))


class Pair(nn.Module):
    def forward(self, h, *held): return h * held[0] * held[1], held[3][0]


def build() -> nn.Module:
    torch.manual_seed(0)
    return Odd().eval()


X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
odd = TracedModel(build())
SERVED = {'odd': odd}
REF = ModelRef(name='odd', tree=tree_hash(odd._root))


def message(nodes: list, inputs: tuple = (X,), kind: str = 'trace', **changes) -> bytes:
    table = Table()
    job = dict(
        kind=kind,
        models=[REF],
        graph=encode_graph(Graph(nodes, kind), table),
        inputs=[encode_value((inputs, {}, {}), table)] if kind == 'trace' else [],
    )
    return pack(Job(**job | changes), table)


def every(root: nn.Module) -> dict: # Every tensor that the model holds
    return dict(root.named_parameters()) | dict(root.named_buffers()) | {'plain': root.plain, 'kept': root.kept[0]}


def state(root: nn.Module) -> list:
    "All that could be different, as comparable data."
    hooks = [name for name in dir(nn.Module()) if isinstance(getattr(nn.Module(), name), dict)]
    return [
        {
            n: (
                t.detach().clone().numpy().tobytes(),
                t.data_ptr(),
                t.requires_grad,
                t.is_leaf,
                t.grad is None,
                t.stride(),
                len(t._backward_hooks or ()),
            )
            for n, t in every(root).items()
        },
        [
            (path, m.training, sorted(m.__dict__), [len(getattr(m, h)) for h in hooks if hasattr(m, h)])
            for path, m in root.named_modules()
        ],
        list(root.names),
        len(root.kept),
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        np.random.get_state()[1].tobytes(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        odd._attached,
        odd._edits,
        [getattr(tracing.interleave.STATE, n) for n in ('context', 'running', 'log', 'guard')],
    ]


@pytest.fixture
def unchanged():
    before = state(odd._root)
    yield
    after = state(odd._root)
    for a, b in zip(before, after, strict=True):
        assert a == b


def site(path, kind='output', id=0): return Node(id, 'site', (path, kind, 0, None))
def weight(path='first.weight', id=0): return Node(id, 'parameter', (path,))
def then(op, *args, id=1, **kwargs): return Node(id, op, args, kwargs)
R = [Ref(i) for i in range(12)]
NEW = torch.full((4, 4), 9.)
LOOSE = dict(
    detached=('torch.Tensor.detach', (), {}),
    viewed=('torch.Tensor.view', (-1,), {}),
    transposed=('torch.Tensor.t', (), {}),
    row=('operator.getitem', (0,), {}),
    parameter=('torch.nn.Parameter', (), {}),
    as_tensor=('torch.as_tensor', (), {}),
    expanded=('torch.Tensor.expand_as', (R[0],), {}),
    same_type=('torch.Tensor.float', (), {}),
    contiguous=('torch.Tensor.contiguous', (), {}),
    chunk=('torch.chunk', (1,), {}),
    reversed=('builtins.tuple', (), {}),
    made=('apply', (), {}),
)

ATTACKS = {
    **{
        f'in place: {op}': [weight(), then(f'torch.Tensor.{op}', R[0], *args)]
        for op, args in dict(
            add_=(1.0,),
            copy_=(NEW,),
            zero_=(),
            fill_=(3.0,),
            normal_=(),
            t_=(),
            transpose_=(0, 1),
            unsqueeze_=(0,),
            squeeze_=(),
            clamp_=(0.0, 0.1),
            index_fill_=(0, torch.tensor([0]), 5.0),
            masked_fill_=(NEW > 0, 1.0),
            put_=(torch.tensor([0]), torch.ones(1)),
            exponential_=(),
            detach_=(),
            bernoulli_=(0.5,),
            tril_=(),
            requires_grad_=(False,),
            swapaxes_=(0, 1),
            scatter_=(0, torch.zeros(1, 1).long(), 1.0),
        ).items()
    },
    'setitem': [weight(), then('operator.setitem', R[0], 0, 9.0)],
    'setitem by mask': [weight(), then('operator.setitem', R[0], NEW > 0, 9.0)],
    **{
        f'operator {op}': [weight(), then(f'operator.{op}', R[0], 2.0)]
        for op in ('iadd', 'imul', 'isub', 'itruediv', 'ipow')
    },
    'out=': [weight(), then('torch.add', 1.0, 2.0, out=R[0])],
    'out= by apply': [weight(), then('apply', torch.add, 1.0, 2.0, out=R[0])],
    'out by position': [weight(), then('torch.norm', NEW, 2, 1, False, R[0])],
    'out of normalize': [weight(), then('torch.nn.functional.normalize', NEW, 2.0, 1, 1e-12, R[0])],
    'relu in place': [weight(), then('torch.nn.functional.relu', R[0], True)],
    'relu in place by keyword': [weight(), then('torch.nn.functional.relu', R[0], inplace=True)],
    'silu in place, true by value': [
        weight(),
        then('builtins.bool', 1),
        then('torch.nn.functional.silu', R[0], R[1], id=2),
    ],
    'dropout in place': [weight(), then('torch.nn.functional.dropout', R[0], 0.5, True, True)],
    'embedding renormalised': [
        weight('table'),
        then('torch.nn.functional.embedding', torch.tensor([1]), R[0], None, 0.01),
    ],
    'batch norm statistics': [
        weight('norm.running_mean'),
        weight('norm.running_var', 1),
        then('torch.nn.functional.batch_norm', torch.randn(3, 4), R[0], R[1], None, None, True, id=2),
    ],
    'instance norm statistics': [
        weight('norm.running_mean'),
        weight('norm.running_var', 1),
        then('torch.instance_norm', torch.randn(3, 4, 2), None, None, R[0], R[1], True, 0.1, 1e-5, False, id=2),
    ],
    'apply': [weight(), then('apply', torch.Tensor.zero_, R[0])],
    'a function as a key': [
        weight(),
        then('builtins.list', (R[0],)),
        then('builtins.sorted', R[1], key=torch.Tensor.zero_, id=2),
    ],
    'a function as a key, of max': [weight(), then('builtins.max', [R[0], R[0]], key=torch.Tensor.zero_)],
    'a function as a key, of sort': [
        weight(),
        then('builtins.list', (R[0], R[0])),
        then('builtins.list.sort', R[1], key=torch.Tensor.zero_, id=2),
    ],
    'a function in a list': [
        weight(),
        then('builtins.list', (torch.Tensor.zero_,)),
        then('operator.getitem', R[1], 0, id=2),
        then('builtins.sorted', [R[0]], key=R[2], id=3),
    ],
    'numpy': [weight(), then('torch.Tensor.numpy', R[0]), then('operator.setitem', R[1], 0, 1.0, id=2)],
    'numpy by apply': [
        weight(),
        then('torch.Tensor.detach', R[0]),
        then('apply', torch.Tensor.numpy, R[1], id=2),
        then('operator.iadd', R[2], 1.0, id=3),
    ],
    **{
        f'optimiser {name}': [
            weight(),
            then('torch.sum', R[0]),
            then('torch.Tensor.backward', R[1], id=2),
            then(f'torch.optim.{name}', [R[0]], lr=0.1, id=3),
            then('torch.optim.Optimizer.step', R[3], id=4),
        ]
        for name in ('SGD', 'Adam', 'AdamW')
    },
    'optimiser, fused': [
        weight(),
        then('torch.nn.Parameter', R[0]),
        then('torch.Tensor.detach', R[1], id=2),
        then('torch.nn.Parameter', R[2], id=3),
        then('torch.optim.AdamW', [R[3]], fused=True, id=4),
        then('torch.optim.Optimizer.step', R[4], id=5),
    ],
    'optimiser of groups': [
        weight(),
        then('builtins.dict', params=[R[0]]),
        then('torch.optim.SGD', [R[1]], lr=0.1, id=2),
        then('torch.optim.Optimizer.step', R[2], id=3),
    ],
    'optimiser by apply': [
        weight(),
        then('apply', torch.optim.SGD, [R[0]], lr=0.1),
        then('torch.optim.Optimizer.step', R[1], id=2),
    ],
    'optimiser through a list': [
        weight(),
        then('builtins.list'),
        then('builtins.list.append', R[1], R[0], id=2),
        then('torch.optim.SGD', R[1], lr=0.1, id=3),
    ],
    'update, then in place': [
        site('first'),
        weight(id=1),
        then('torch.sum', R[0], id=2),
        then('update', R[2], R[1], id=3),
        then('torch.Tensor.add_', R[2], 1.0, id=4),
    ],
    'module that works in place': [weight(), then('module', 'act', False, R[0])],
    'module that works in place, on a buffer': [
        weight('norm.running_mean'),
        then('torch.Tensor.view', R[0], 2, 2),
        then('module', 'act', True, R[1], id=2),
    ],
    'batch norm of the model on its own table': [weight('table'), then('module', 'norm', False, R[0])],
    'edit that the model goes on with in place': [
        site('act', 'input'),
        weight('table', 1),
        then('torch.Tensor.expand', R[1], 2, -1, -1, id=2),
        then('operator.getitem', R[2], (slice(None), slice(0, 5)), id=3),
        then('first_input', R[0], id=4),
        then('update', R[4], R[3], id=5),
    ],
    'output that is a view of the table': [site('same'), then('torch.nn.functional.relu', R[0], True)],
    'output that is a view, by max': [site('same'), then('builtins.max', [R[0], R[0]], key=torch.Tensor.zero_)],
    'output that is a view, out by position': [site('same'), then('torch.norm', torch.randn(5, 4), 2, 1, True, R[0])],
    'buffer among the inputs': [
        site('pair', 'input'),
        then('operator.getitem', R[0], (0)),
        then('operator.getitem', R[1], 1, id=2),
        then('torch.nn.functional.relu', R[2], True, id=3),
    ],
    'plain tensor among the inputs': [
        site('pair', 'input'),
        then('operator.getitem', R[0], 0),
        then('operator.getitem', R[1], 2, id=2),
        then('apply', torch.Tensor.zero_, R[2], id=3),
    ],
    'a tensor in a list of the model': [
        site('pair', 'input'),
        then('operator.getitem', R[0], 0),
        then('operator.getitem', R[1], 4, id=2),
        then('operator.getitem', R[2], 0, id=3),
        then('apply', torch.Tensor.zero_, R[3], id=4),
    ],
    'a list of the model': [
        site('pair', 'input'),
        then('operator.getitem', R[0], 0),
        then('operator.getitem', R[1], 3, id=2),
        then('builtins.list', R[2], id=3),
        then('builtins.list.append', R[2], 'evil', id=4),
    ],
    'a list of the model, by iadd': [
        site('pair', 'input'),
        then('operator.getitem', R[0], 0),
        then('operator.getitem', R[1], 3, id=2),
        then('operator.iadd', R[2], ['evil'], id=3),
    ],
    'gradient that is a parameter, added to': [
        site('last'),
        weight('table', 1),
        then('torch.Tensor.detach', R[1], id=2),
        Node(3, 'torch.zeros', ((6, 4),)),
        then('torch.Tensor.requires_grad_', R[3], True, id=4),
        then('operator.mul', R[3], 1.0, id=5),
        Node(6, 'grad', (R[5], 0)),
        then('update', R[6], R[2], id=7),
        then('torch.sum', R[5], id=8),
        then('torch.Tensor.backward', R[8], retain_graph=True, id=9),
        then('torch.sum', R[5], id=10),
        then('torch.Tensor.backward', R[10], id=11),
    ],
    'gradient given by hand': [
        weight('table'),
        then('torch.Tensor.detach', R[0]),
        Node(2, 'torch.zeros', ((6, 4),)),
        then('torch.Tensor.requires_grad_', R[2], True, id=3),
        then('torch.Tensor.backward', R[2], R[1], id=4),
        then('torch.Tensor.backward', R[2], R[1], id=5),
    ],
    'state of an optimiser': [
        weight('scale'),
        then('torch.nn.Parameter', torch.ones(4)),
        then('torch.optim.SGD', [R[1]], lr=R[0], id=2),
    ],
    'grad of a parameter': [
        weight(),
        then('torch.sum', R[0]),
        then('torch.Tensor.backward', R[1], id=2),
        then('attribute', R[0], 'grad', id=3),
        then('torch.Tensor.fill_', R[3], 7.0, id=4),
    ],
    'flags by apply': [weight(), then('apply', torch.Tensor.requires_grad_, R[0], False)],
    **{
        f'loose, {name}': [
            weight(),
            then(
                op,
                *((torch.detach,) if op == 'apply' else ()),
                *(([R[0]],) if op == 'builtins.tuple' else (R[0],)),
                *args,
                **kwargs,
            ),
            then('builtins.list', [R[1]], id=2),
            then('operator.getitem', R[2], 0, id=3),
            *(
                [then('operator.getitem', R[3], 0, id=4)]
                if op in ('torch.chunk', 'builtins.tuple')
                else [then('torch.Tensor.view_as', R[3], R[3], id=4)]
            ),
            then('apply', torch.Tensor.fill_, R[4], 4.0, id=5),
        ]
        for name, (op, args, kwargs) in LOOSE.items()
    },
}
HARMLESS = {
    'module that works in place',
    'module that works in place, on a buffer',
    'batch norm of the model on its own table',
    'edit that the model goes on with in place',
    'gradient that is a parameter, added to',
    'gradient given by hand',
    'grad of a parameter',
    'flags by apply',
    'a list of the model',
    'a list of the model, by iadd',
    'update, then in place',
    'output that is a view of the table',
    'buffer among the inputs',
    'state of an optimiser',
}  # They do nothing to the model, or what they do is taken back


FROZEN = dict(
    grad=False, models=[REF.model_copy(update=dict(trainable=False))]
)  # Else autograd itself refuses many of them


@pytest.mark.parametrize('changes', [{}, FROZEN], ids=['autograd', 'no_grad'])
@pytest.mark.parametrize('name', ATTACKS)
def test_a_job_cannot_write_to_the_model(name, changes, unchanged):
    try:
        run_job(SERVED, message(ATTACKS[name], **changes))
    except JobError as e:
        assert len(str(e)) > 20 and 'Traceback' not in str(e), e
    else:
        assert name in HARMLESS, 'it should have been refused'


@pytest.mark.parametrize('changes', [{}, FROZEN], ids=['autograd', 'no_grad'])
@pytest.mark.parametrize('name', [n for n in ATTACKS if 'numpy' not in n]) # which torch doesn't see
def test_the_guard_alone_would_do(name, changes, unchanged, monkeypatch):
    "Without the refusals at the door, which only look at the graph."
    monkeypatch.setattr('transformer_experiments.remote.checks._check_writes', lambda *args: None)
    monkeypatch.setattr('transformer_experiments.remote.checks._check_operations', lambda *args: None)
    monkeypatch.setattr('transformer_experiments.tracing.steps.CompiledGraph.refuse_out', lambda *args: None)
    try:
        run_job(SERVED, message(ATTACKS[name], **changes))
    except JobError as e:
        assert (
            not changes
            or name in HARMLESS
            or "the server's model" in str(e)
            or 'does not require grad' in str(e)
            or 'takes no part' in str(e)
        ), e  # with autograd it may speak first
    else:
        assert name in HARMLESS or name in ('in place: requires_grad_', 'in place: detach_'), (
            'it should have been refused'
        )


# Afterwards everything is as in a fresh process

PROBE = [
    site('first'),
    then('torch.rand_like', R[0]),
    then('operator.add', R[0], R[1], id=2),
    then('update', R[0], R[2], id=3),
    site('last', id=4),
    then('torch.Tensor.sum', R[4], id=5),
    weight('first.weight', 6),
    Node(7, 'grad', (R[6], 0)),
    then('torch.Tensor.backward', R[5], id=8),
]
for i, name in ((4, 'out'), (7, 'grad'), (1, 'noise')):
    PROBE[i].save = name


def probe() -> bytes: return message(PROBE, rng=None) # with the generator of the process


FRESH = '''
import sys
sys.path.insert(0, {tests!r})
import test_remote_jobs as t
sys.stdout.buffer.write(t.run_job(t.SERVED, t.probe()))
'''


@pytest.fixture(scope='module')
def fresh() -> bytes: # The result of the first job of another process
    done = subprocess.run(
        [sys.executable, '-c', FRESH.format(tests=os.path.dirname(__file__))],
        capture_output=True,
        env=dict(os.environ, PYTHONPATH=os.path.dirname(os.path.dirname(__file__))),
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout


def set_stop(stop): # As if somebody cancelled the job at its first log
    def emit(kind, text): stop.set()
    return emit


@pytest.mark.parametrize('once', [False, True])
def test_after_finished_failed_and_cancelled_jobs_all_is_as_in_a_fresh_process(once, fresh, unchanged, monkeypatch):
    here = torch.get_rng_state()
    torch.set_rng_state(state_of_import) # where the other process's generator is, too
    if once:
        monkeypatch.setattr(
            sys.modules[__name__], 'run_job', partial(run_job, prepared=PreparedModels(SERVED.values()))
        )  # as in a replica
    try:
        compare_with_fresh(fresh)
    finally:
        torch.set_rng_state(here)


def compare_with_fresh(fresh):
    assert run_job(SERVED, probe()) == fresh
    random_jobs = random.Random(0).choices(list(ATTACKS), k=60)
    for i, name in enumerate(random_jobs):
        try:
            run_job(SERVED, message(ATTACKS[name], **({} if i % 2 else FROZEN)))
        except JobError:
            pass
        if i % 10 == 0:
            assert run_job(SERVED, probe()) == fresh, f'after {name!r}'
    stop = threading.Event()
    with pytest.raises(Cancelled):
        run_job(
            SERVED,
            message(
                [
                    site('first'),
                    then('log', R[0]),
                    then('operator.add', R[0], 1.0, id=2),
                    then('update', R[0], R[2], id=3),
                ]
            ),
            emit=set_stop(stop),
            stop=stop,
        )
    assert run_job(SERVED, probe()) == fresh
    with pytest.raises(JobError, match='more than 0'):
        run_job(SERVED, probe(), limits=Limits(seconds=0))
    assert run_job(SERVED, probe()) == fresh


state_of_import = torch.get_rng_state()


def test_a_write_that_the_guard_does_not_see_taints(monkeypatch):
    model = TracedModel(build())
    monkeypatch.setattr('transformer_experiments.remote.guard.may_write', lambda op: False)
    monkeypatch.setattr('transformer_experiments.remote.checks._check_writes', lambda *args: None)
    with pytest.raises(ModelModified, match='first.weight'):
        run_job({'odd': model}, message(ATTACKS['in place: zero_'], **FROZEN))


# What a job may do

class Client:
    "Writes traces and sessions here, runs them as messages on a model of its own, and compares."
    def __init__(self, model, served, name='m'): self.model, self.served, self.name = model, {name: served}, name

    def check(self, written, **options) -> dict:
        theirs, header, tensors = answer(self.served, self.message, **options)
        mine = {n: written.rec.results[i] for n, i in written.graph.saves.items() if i in written.rec.results}
        assert mine and mine.keys() == theirs.keys()
        for n in mine:
            assert same_value(mine[n], theirs[n]), f'{n}: {mine[n]} and {theirs[n]}'
        assert torch.equal(tensors[header.rng], torch.get_rng_state())
        return theirs

    def watch(self, monkeypatch): # The message as it is written, before the run
        for cls, method in ((Tracer, 'finish'), (Session, '_finish')):
            old = getattr(cls, method)
            def finish(written, *scan, old=old):
                if getattr(written, 'outer', None) is None:
                    self.message = job_message(written, {id(self.model._root): self.name}, attached_modules)
                return old(written, *scan)
            monkeypatch.setattr(cls, method, finish)


def same_value(a: object, b: object) -> bool:
    "`same`, and into model outputs and caches."
    if type(a).__name__ == 'DynamicCache':
        return (
            type(b) is type(a)
            and len(a.layers) == len(b.layers)
            and all(torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values)
                    for x, y in zip(a.layers, b.layers, strict=True))
        )
    if hasattr(a, 'keys') and not isinstance(a, dict) or type(a).__module__.startswith('transformers'):
        return type(a) is type(b) and list(a) == list(b) and all(same_value(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same_value, a, b))
    return same(a, b)


@pytest.fixture(scope='module')
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    return LanguageModel(model), LanguageModel(copy.deepcopy(model))


@pytest.fixture
def client(llama, monkeypatch):
    client = Client(*llama)
    client.watch(monkeypatch)
    return client


IDS = torch.tensor([[5, 6, 7, 8]])


def test_outputs_and_caches_come_back_as_such(client):
    m = client.model
    with m.trace(IDS, output_hidden_states=True) as tracer:
        m.output.save('out')
    theirs = client.check(tracer)['out']
    assert type(theirs).__name__ == 'CausalLMOutputWithPast' and type(theirs.past_key_values).__name__ == 'DynamicCache'
    cache = theirs.past_key_values # one that came back can be sent again
    with m.trace(input_ids=torch.tensor([[9]]), past_key_values=cache) as tracer:
        m.lm_head.output.save('next')
    client.check(tracer)


def test_generate_with_sampling_beams_and_edits(client):
    m = client.model
    for options in (dict(do_sample=True, temperature=.7, top_k=10), dict(num_beams=3), dict(use_cache=False),
                    dict(return_dict_in_generate=True, output_scores=True)):
        with m.generate(IDS, max_new_tokens=6, **options) as tracer:
            m.model.layers[1].mlp.output[:] = 0
            m.lm_head.next().output.save('second')
            m.generator.output.save('tokens')
        client.check(tracer)
    with m.generate(max_new_tokens=3) as tracer: # two prompts, padded
        with tracer.invoke([5, 6, 7]):
            m.lm_head.all().output.save('a')
        with tracer.invoke([8, 9, 10, 11, 12]):
            m.lm_head.output[0, -1].topk(3).save('b')
    client.check(tracer)


def test_lasting_edits_and_attached_modules(client, monkeypatch):
    m = client.model
    with m.edit() as edited:
        m.model.layers[0].output *= 2
    with edited.trace(IDS) as tracer:
        edited.lm_head.output.save('edited')
    client.check(tracer)
    torch.manual_seed(4)
    m.model.layers[1].sae = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 16))
    try:
        with m.trace(IDS) as tracer:
            layer = m.model.layers[1]
            layer.output = layer.sae(layer.output, hook=True)
            layer.sae[1].output.save('features')
            m.lm_head.output.save('logits')
        client.check(tracer)
        assert 'model.layers.1.sae' not in client.served['m']._attached
    finally:
        del m._attached['model.layers.1.sae']


def test_gradients_of_weights_and_loops_that_train(client):
    m = client.model
    m._root.zero_grad()
    with m.trace(IDS) as tracer:
        w = m.model.layers[0].mlp.up_proj.weight
        w.grad.save('grad')
        m.lm_head.output.sum().backward()
    client.check(tracer)
    m._root.zero_grad()
    torch.manual_seed(1)
    loader = torch.utils.data.DataLoader([(torch.tensor([i, i + 1]), i) for i in range(6)], batch_size=2, shuffle=True)
    with m.session() as session:
        up = nn.Parameter(torch.zeros(16)).save('up')
        optimizer = torch.optim.Adam([up], lr=.1)
        losses = tracing.list().save('losses')
        with session.iter(loader) as batch:
            with m.trace(batch[0]):
                m.model.layers[1].output = m.model.layers[1].output + up + torch.randn(16)
                loss = F.cross_entropy(m.lm_head.output[:, -1], batch[1])
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    theirs = client.check(session)
    assert type(theirs['up']) is nn.Parameter and theirs['up'].abs().sum() > 0 and len(theirs['losses']) == 3
    m._root.zero_grad()


def test_errors_are_told_as_here(client):
    m = client.model
    with pytest.raises(IndexError) as mine:
        with m.trace(IDS):
            m.model.layers[0].output[:, 99] = 0
    with pytest.raises(JobError) as theirs:
        run_job(client.served, client.message)
    assert (
        theirs.value.kind == 'IndexError'
        and str(theirs.value).splitlines()[:2] == str(mine.value).splitlines()[:2]
        and f'{__file__}:' in str(theirs.value)
    )


# Bombs

class TestLimits:
    def refuse(self, said, nodes, kind='trace', limits=None, **changes):
        with pytest.raises(JobError, match=said):
            run_job(SERVED, message(nodes, kind=kind, **changes), limits=limits)

    @pytest.mark.parametrize('n', [10**9, 3 * 10**9, 10**12, 10**18])
    def test_a_tensor_bomb_is_an_error(self, unchanged, n):
        self.refuse(
            'memory|Storage size|overflow|array is too big|invalid',
            [then('torch.ones', (n,), id=0)],
            limits=Limits(memory=1 << 30),
        )

    def test_a_list_bomb(self, unchanged):
        doubled = [then('builtins.list', [1, 2, 3, 4], id=0)] + [
            then('operator.add', Ref(i), Ref(i), id=i + 1) for i in range(40)
        ]
        self.refuse('more than 200,000 steps', doubled, limits=Limits(memory=1 << 29))

    def test_a_text_bomb(self, unchanged):
        self.refuse(
            'a sequence of 10,000,000, and 1,000,000 is the most',
            [then('operator.mul', 'x', 10**7, id=0), then('builtins.str.replace', R[0], 'x', R[0])],
            limits=Limits(memory=1 << 29),
        )

    def test_nested_without_end(self, unchanged):
        nested = [then('builtins.list', id=0)] + [then('builtins.list', [Ref(i)], id=i + 1) for i in range(200)]
        nested[-1].save = 'deep'
        self.refuse('nested more than|recursion', nested)
        itself = [then('builtins.list', id=0), then('builtins.list.append', R[0], R[0])]
        itself[0].save = 'loop'
        self.refuse('nested more than|recursion', itself)
        twice = [then('builtins.list', [1], id=0)] + [
            then('builtins.list', [Ref(i), Ref(i)], id=i + 1) for i in range(40)
        ]
        twice[-1].save = 'twice'
        self.refuse('more than 200,000 steps', twice)
        handed = (
            [weight()]
            + [then('builtins.list', [Ref(i), Ref(i)], id=i + 1) for i in range(40)]
            + [then('module', 'act', False, Ref(40), id=41)]
        )
        self.refuse('more than 200,000 steps', handed)

    def loop(self, values):
        return [Node(0, 'loop', (values, 1), {}, body=[Node(1, 'item'), then('operator.add', R[1], 1, id=2)])]

    def test_loops(self, unchanged):
        self.refuse('more than 10,000 turns', self.loop(range(10**12)), kind='session')
        inner = Node(
            0,
            'loop',
            (range(10**6), 1),
            {},
            body=[Node(1, 'item'), Node(2, 'loop', (range(10**6), 3), {}, body=[Node(3, 'item')])],
        )
        self.refuse('more than 10,000 turns', [inner], kind='session')
        self.refuse(
            'ran for more than 0.01 s',
            self.loop(range(10**6)),
            kind='session',
            limits=Limits(iterations=10**7, seconds=0.01),
        )

    def test_counts(self, unchanged):
        self.refuse('nodes', [then('builtins.int', 1, id=i) for i in range(30)], limits=Limits(nodes=20))
        self.refuse(
            'views of views',
            [then('torch.zeros', (2,), id=0)] + [then('torch.Tensor.view', Ref(i), -1, id=i + 1) for i in range(5000)],
        )
        self.refuse('logs more than', [then('log', 'x' * 200, id=0)], limits=Limits(log_bytes=100))
        big = [then('torch.zeros', (1000,), id=0)]
        big[0].save = 'big'
        self.refuse('9,056 bytes', big, limits=Limits(bytes_out=2000))
        with pytest.raises(JobError, match='is the most'):
            run_job(SERVED, message([then('operator.add', torch.zeros(1000), 1, id=0)]), limits=Limits(bytes_in=2000))

    def test_what_goes_to_the_model_and_the_tokenizer_is_on_a_list(self, llama, unchanged):
        m = llama[1]
        def job(method, args, kwargs, options=None, common=None):
            table = Table()
            return pack(
                Job(
                    kind='trace',
                    models=[ModelRef(name='m', tree=tree_hash(m._root))],
                    method=method,
                    graph=encode_graph(Graph([site('lm_head')]), table),
                    inputs=[encode_value((args, kwargs, options or {}), table)],
                    common=encode_value(common or {}, table),
                ),
                table,
            )
        for method, args, kwargs, options, common in (
                ('generate', (IDS,), {'custom_generate': 'evil/repo'}, None, None),
                ('generate', ({'input_ids': IDS, 'custom_generate': 'evil/repo'},), {}, None, None),
                ('generate', (IDS,), {}, None, {'custom_generate': '/tmp/evil', 'trust_remote_code': True}),
                ('generate', (IDS,), {}, None, {'max_new_tokens': 10**9}),
                ('forward', (IDS,), {'nonsense': 1}, None, None),
                ('forward', (IDS,), {}, {'padding': 'max_length', 'max_length': 10**12}, None),
                ('generate', (IDS,), {}, None, {'prompt_lookup_num_tokens': 3})):
            with pytest.raises(JobError, match="can't be passed|more than the|tokenizer takes"):
                run_job({'m': m}, job(method, args, kwargs, options, common))


@pytest.mark.parametrize('op', sorted(REFUSED_OPERATIONS.keys() & OPERATIONS.keys()))
def test_operations_that_are_refused_also_as_arguments(op, unchanged):
    for node in (then(op, torch.ones(2), id=0), then('apply', OPERATIONS[op], torch.ones(2), id=0),
                 then('builtins.sorted', [torch.ones(2)], key=OPERATIONS[op], id=0)):
        with pytest.raises(JobError, match="can't be used on a server"):
            run_job(SERVED, message([node]))


# Damaged and hostile messages

GOOD = [message(nodes) for name, nodes in ATTACKS.items() if name in HARMLESS] + [
    probe(),
    message(
        [
            then('builtins.list', [1, 2], id=0),
            Node(
                1,
                'loop',
                (R[0], 2),
                {},
                body=[
                    Node(2, 'item'),
                    then('operator.add', R[2], 1, id=3),
                    Node(
                        4,
                        'trace',
                        (0, 'forward', [((X,), {}, {})], {}),
                        {},
                        body=[
                            site('first', id=5),
                            then('operator.mul', R[5], R[3], id=6),
                            then('update', R[5], R[6], id=7),
                        ],
                    ),
                ],
            ),
        ],
        kind='session',
    ),
]
names = st.sampled_from(
    [
        *OPERATIONS,
        'os.system',
        'builtins.eval',
        'builtins.__import__',
        'torch.load',
        'torch.Tensor.__reduce__',
        'torch.ops.aten.add',
        'site',
        'parameter',
        'module',
        'apply',
        'update',
        'loop',
        'trace',
        'grad',
        'exit',
        'cond',
        'stop',
        'item',
        'attribute',
        'log',
    ]
)
words = st.sampled_from(
    [
        '',
        'first',
        'first.weight',
        'norm.running_mean',
        'act',
        't0',
        't1',
        'rng',
        '__class__',
        '_modules',
        '../../etc/passwd',
        'forward',
        'generate',
        'backward',
        'input',
        'output',
        'all',
        'nan',
        'inf',
        'float64',
        'cuda',
        'meta',
        'os',
        'odd',
        'lookup',
        '\udc80',
        'x' * 3000,
    ]
)
numbers = st.sampled_from(
    [0, 1, 2, 3, -1, 7, 63, 2**31, 2**63, 10**18, -(10**18), 10**400, 0.5, -0.0, 1e308, 5e-324, True, False, None]
)
kinds = [
    'ref',
    'tuple',
    'dict',
    'slice',
    'set',
    'size',
    'range',
    'tensor',
    'parameter',
    'leaf',
    'output',
    'cache',
    'return_type',
    'named',
    'routing',
    'loader',
    'operation',
    'float',
    'bytes',
    'complex',
    'dtype',
    'device',
    'ellipsis',
    'complex128',
    'memory_format',
    'pickle',
]
hostile = st.recursive(
    numbers | words | names,
    lambda v: (
        st.lists(v, max_size=4)
        | st.dictionaries(st.sampled_from(kinds), v, min_size=1, max_size=1)
        | st.fixed_dictionaries(dict(id=numbers, op=names, args=st.lists(v, max_size=3)))
    ),
    max_leaves=8,
)


def places(value: object, path: tuple = ()):
    "Every place in JSON."
    yield path
    for k, v in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(v, (*path, k))


def changed(value: object, path: tuple, new: object, how: str) -> object:
    "A copy with something else at a place."
    if not path: return new
    value = copy.deepcopy(value)
    holder = value
    for k in path[:-1]:
        holder = holder[k]
    if how == 'drop':
        del holder[path[-1]]
    elif how == 'repeat' and isinstance(holder, list):
        holder.insert(path[-1], copy.deepcopy(holder[path[-1]]))
    else:
        holder[path[-1]] = new
    return value


def parts(data: bytes) -> tuple[dict, dict, bytes]: # Header, its message, the rest
    size = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8 + size])
    return header, json.loads(header['__metadata__']['message']), data[8 + size:]


def whole(header: dict, text: dict | str, rest: bytes) -> bytes:
    header = header | {'__metadata__': {'message': text if isinstance(text, str) else json.dumps(text)}}
    encoded = json.dumps(header).encode()
    return struct.pack('<Q', len(encoded)) + encoded + rest


@st.composite
def damaged(draw) -> bytes:
    data = draw(st.sampled_from(GOOD))
    header, text, rest = parts(data)
    how = draw(
        st.sampled_from(
            ['graph', 'graph', 'graph', 'soft', 'soft', 'soft', 'message', 'header', 'bytes', 'cut', 'length', 'text']
        )
    )
    if how == 'bytes':
        out = bytearray(data)
        for _ in range(draw(st.integers(1, 6))):
            out[draw(st.integers(0, len(out) - 1))] = draw(st.integers(0, 255))
        return bytes(out)
    if how == 'cut': return data[:draw(st.integers(0, len(data) - 1))] + draw(st.binary(max_size=9))
    if how == 'length':
        return (
            struct.pack('<Q', draw(st.sampled_from([0, 1, 2**16, 2**31, 2**63, 2**64 - 1]) | st.integers(0, len(data))))
            + data[8:]
        )
    if how == 'text':
        return whole(
            header,
            draw(
                st.sampled_from(
                    [
                        '{',
                        'NaN',
                        '[' * 100_000,
                        '{"version": 1, "version": 1}',
                        '{"version": NaN}',
                        '1' * 10_000,
                        '"' + '\\u0000' * 9 + '"',
                        '{"version": 2}',
                    ]
                )
            ),
            rest,
        )
    if how == 'header':
        name = draw(st.sampled_from(sorted(set(header) - {'__metadata__'}) or ['t0']))
        entry = draw(
            st.fixed_dictionaries(
                dict(
                    dtype=st.sampled_from(['F32', 'F64', 'I64', 'BOOL', 'C64', 'F8_E5M2', 'F4', 'X', '']),
                    shape=st.lists(numbers, max_size=4),
                    data_offsets=st.lists(numbers, min_size=2, max_size=2),
                )
            )
            | hostile
        )
        return whole(header | {name: entry}, text, rest)
    if how == 'soft': # one number or one operation is another one
        leaves = [p for p in places(text['graph']['nodes']) if p and (p[-1] == 'op' or 'args' in p)]
        path = draw(st.sampled_from(leaves))
        nodes = changed(
            text['graph']['nodes'],
            path,
            draw(st.sampled_from(list(OPERATIONS)) if path[-1] == 'op' else numbers),
            'set',
        )
        return whole(header, text | {'graph': text['graph'] | {'nodes': nodes}}, rest)
    for _ in range(draw(st.integers(1, 3))):
        inner = (
            text
            if how == 'message'
            else text['graph']
            if isinstance(text, dict) and isinstance(text.get('graph'), dict)
            else text
        )
        inner = changed(
            inner,
            draw(st.sampled_from(list(places(inner))[1:] or [()])),
            draw(hostile),
            draw(st.sampled_from(['set', 'set', 'set', 'drop', 'repeat'])),
        )
        text = inner if how == 'message' or inner is text or not isinstance(text, dict) else text | {'graph': inner}
    return whole(header, text, rest)


events, watching = [], [False]
sys.addaudithook(
    lambda event, args: (
        events.append((event, args))
        if watching[0]
        and event.split('.')[0]
        in ('exec', 'compile', 'open', 'import', 'os', 'subprocess', 'socket', 'ctypes', 'pickle', 'shutil', 'code')
        else None
    )
)


WARM = [
    then('torch.zeros', (2,), id=0),
    then('torch.nn.Parameter', R[0]),
    *(
        Node(i + 2, f'torch.optim.{name}', ([R[1]],), dict(lr=0.1))
        for i, name in enumerate(
            n.rpartition('.')[2] for n in OPERATIONS if n.startswith('torch.optim.') and 'Muon' not in n
        )
    ),
    then('torch.optim.Optimizer.step', R[2], id=20),
]


@pytest.fixture(scope='module')
def warm(): # Torch imports parts of itself when an optimiser is first used
    run_job(SERVED, message(WARM))
    decode_value({'output': ['CausalLMOutput', []]}, {}), decode_value({'cache': []}, {})


def off_the_list(event: str, args: tuple) -> bool:
    "Whether something happened that no job may cause. Torch imports parts of itself when they are first used."
    if event == 'open':
        return str(args[0]) not in ('/proc/self/statm', '/proc/meminfo') and not str(args[0]).endswith(('.py', '.pyc'))
    if event == 'import': return str(args[0]).split('.')[0] in ('ctypes', 'pickle', 'subprocess', 'socket', 'shutil')
    return event.startswith(
        (
            'subprocess',
            'socket',
            'pickle',
            'shutil',
            'os.system',
            'os.exec',
            'os.fork',
            'os.posix_spawn',
            'os.remove',
            'os.rename',
            'os.mkdir',
            'ctypes.dlopen',
        )
    )


FEW = Limits(seconds=5, memory=1 << 30, iterations=200, nodes=200, bytes_in=1 << 20, bytes_out=1 << 24)
told = Counter()


@settings(max_examples=FUZZ, **QUIET)
@given(damaged())
def test_damaged_and_hostile_messages_get_a_reason(warm, data):
    before = state(odd._root)
    events.clear()
    watching[0] = True
    try:
        run_job(SERVED, data, limits=FEW)
    except JobError as e:
        watching[0] = False
        told['error'] += 1
        assert str(e).strip()
    else:
        told['result'] += 1
    finally:
        watching[0] = False
    wrong = [e for e in events if off_the_list(*e)]
    assert not wrong, wrong
    for a, b in zip(before, state(odd._root), strict=True):
        assert a == b


def test_the_damage_was_of_both_kinds():
    assert told['error'] > FUZZ / 3 and told['result'] > FUZZ / 200, told


def test_activations_by_name_and_operations_in_a_job(client):
    m = client.model
    with m.trace(IDS) as tracer:
        m.at('attn.qk_probs', 1).output[..., 2] = 0
        m.at('resid.post_attn', 0).output[:, 0] *= 2
        m.at('attn.v_out', 1).output.save('heads')
        m.model.layers[2].self_attn.op('torch.nn.functional.scaled_dot_product_attention').output.save('attention')
        m.at('logits').output.save('logits')
    theirs = client.check(tracer)
    assert theirs['heads'][0, :, 2].abs().max() == 0
    with m.trace(IDS) as tracer:
        m.at('attn.qk_probs', 1).output.grad.save('grad')
        m.at('logits').output.sum().backward()
    client.check(tracer)
