"""Jobs of `remote.jobs`, without any server. Every graph of `nbs/tour/walkthrough.ipynb` gives, as a message, what it gives here, bit for bit, and leaves the random
numbers where they are here. Hostile and damaged messages get a reason, and nothing of them outlives the job.

`FUZZ=20000 pytest tests/test_remote_jobs.py` makes as many damaged messages; by default fewer."""
import copy
import json
import math
import os
import random
import struct
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from execnb.shell import CaptureShell
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_walkthrough_graphs import PAGE, apart, has_own_function, page_cells
from torch import nn

import transformer_experiments.tracing as tracing
from transformer_experiments.remote.jobs import REFUSED, Cancelled, JobError, Limits, Tainted, check_job, run_job
from transformer_experiments.remote.messages import Job, ModelRef, Result, Table, decode_value, encode_graph, encode_value, job_message, pack, tree_hash, unpack
from transformer_experiments.remote.registered import attached_modules, register_module
from transformer_experiments.tracing import Graph, LanguageModel, Session, TracedModel, Tracer
from transformer_experiments.tracing.graph import Node, Ref
from transformer_experiments.tracing.operations import OPERATIONS

FUZZ = int(os.environ.get('FUZZ', 1500))
QUIET = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def same(a: object, b: object) -> bool:
    "Bit for bit, at any depth; of the same type, parameters apart."
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and isinstance(a, nn.Parameter) == isinstance(b, nn.Parameter) and a.dtype == b.dtype and torch.equal(a.detach(), b.detach())
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict): return type(a) is type(b) and a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    return type(a) is type(b) and (a == b or a != a)


def answer(models: dict, message: bytes, **options) -> tuple[dict, Result, dict]:
    "Values by name, the header and the tensors of the result."
    header, tensors = unpack(run_job(models, message, **options), Result)
    return {name: decode_value(v, tensors) for name, v in header.values.items()}, header, tensors


# The walkthrough

class Witness:
    "Sends what the page's traces and sessions have written, before they run here, and compares."
    def __init__(self): self.seen, self.faults = Counter(), []

    def watch(self, finish, models_of, kind_of):
        def watched(written, *scan):
            if getattr(written, 'outer', None) is not None: return finish(written, *scan)  # part of a session's graph
            models, random_state, graph, theirs = models_of(written), torch.get_rng_state(), written.graph, None
            if has_own_function(graph): self.seen['refused'] += 1
            else:
                served = {f'model {i}': LanguageModel(m._root, m.tokenizer) if isinstance(m, LanguageModel) else TracedModel(m._root) for i, m in enumerate(models)}
                names = {id(m._root): f'model {i}' for i, m in enumerate(models)}
                has_input = isinstance(written, Session) or written.invokers or written.model._has_input(written.args, written.kwargs)
                if has_input: theirs = self.sent(served, job_message(written, names, attached_modules, models), models, random_state)
            try: finish(written, *scan)
            except Exception as e:
                if theirs is not None: self.compare_errors(graph, e, theirs)
                raise
            if theirs is None: return
            self.seen[kind_of(written)] += 1
            self.compare(graph, written.rec, theirs)
        return watched

    def sent(self, served, message, models, random_state):
        with apart(random_state, *models):
            try: return answer(served, message)
            except JobError as e: return e

    def compare_errors(self, graph, mine, theirs):
        self.seen['errors'] += 1
        if not isinstance(theirs, JobError) or theirs.kind != type(mine).__name__ or str(mine).splitlines()[0].partition(' (')[0] != str(theirs).splitlines()[0].partition(' (')[0]: self.faults.append(f'{mine!r} here, {theirs!r} there:\n{graph}')

    def compare(self, graph, rec, theirs):
        if isinstance(theirs, JobError): return self.faults.append(f'{theirs}:\n{graph}')
        values, header, tensors = theirs
        mine = {name: rec.results[i] for name, i in graph.saves.items() if i in rec.results}
        self.seen['values'] += len(mine)
        if mine.keys() != values.keys() or {n for n, i in graph.saves.items() if i not in rec.results} != header.reasons.keys(): self.faults.append(f'saved {sorted(mine)}, sent {sorted(values)}:\n{graph}')
        self.faults += [f'{n} is {mine[n]} here and {values[n]} there:\n{graph}' for n in mine.keys() & values.keys() if not same(mine[n], values[n])]
        if not torch.equal(tensors[header.rng], torch.get_rng_state()): self.faults.append(f'the generator is elsewhere:\n{graph}')


def test_every_graph_of_the_walkthrough_as_a_message(monkeypatch):
    witness = Witness()
    monkeypatch.setattr(Tracer, 'finish', witness.watch(Tracer.finish, lambda t: [t.model], lambda t: t.method if len(t.invokers) < 2 else f'{t.method} of several'))
    monkeypatch.setattr(Session, '_finish', witness.watch(Session._finish, lambda s: s.models or [shell.user_ns['llm']], lambda s: 'session'))
    monkeypatch.chdir(PAGE.parent)
    shell = CaptureShell(PAGE.parent)
    for source in page_cells():
        shell.run(source)
        assert not shell.exc, f'{source}\n{shell.exc}'
    print(dict(witness.seen))
    assert not witness.faults, '\n\n'.join(witness.faults[:5])
    assert not {'forward', 'forward of several', 'generate', 'session', 'refused', 'errors', 'values'} - witness.seen.keys()
    assert witness.seen['values'] > 200 and sum(witness.seen.values()) > 300


# A model with everything that could be written to, and a way to tell that nothing was

class Odd(nn.Module):
    "Hands out its own memory: a view of its table, its buffer, a tensor that is no buffer, a list; and works in place."
    def __init__(self):
        super().__init__()
        self.table, self.first, self.act, self.last = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)
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
    job = dict(kind=kind, models=[REF], graph=encode_graph(Graph(nodes, kind), table), inputs=[encode_value((inputs, {}, {}), table)] if kind == 'trace' else [])
    return pack(Job(**job | changes), table)


def every(root: nn.Module) -> dict: # Every tensor that the model holds
    return dict(root.named_parameters()) | dict(root.named_buffers()) | {'plain': root.plain, 'kept': root.kept[0]}


def state(root: nn.Module) -> list:
    "All that could be different, as comparable data."
    hooks = [name for name in dir(nn.Module()) if isinstance(getattr(nn.Module(), name), dict)]
    return [{n: (t.detach().clone().numpy().tobytes(), t.data_ptr(), t.requires_grad, t.is_leaf, t.grad is None, t.stride(), len(t._backward_hooks or ())) for n, t in every(root).items()},
            [(path, m.training, sorted(m.__dict__), [len(getattr(m, h)) for h in hooks if hasattr(m, h)]) for path, m in root.named_modules()], list(root.names), len(root.kept),
            torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes(), torch.is_grad_enabled(), torch.get_default_dtype(), odd._attached, odd._edits,
            [getattr(tracing.interleave.STATE, n) for n in ('context', 'running', 'log', 'guard')]]


@pytest.fixture
def unchanged():
    before = state(odd._root)
    yield
    after = state(odd._root)
    for a, b in zip(before, after, strict=True): assert a == b


def site(path, kind='output', id=0): return Node(id, 'site', (path, kind, 0, None))
def weight(path='first.weight', id=0): return Node(id, 'parameter', (path,))
def then(op, *args, id=1, **kwargs): return Node(id, op, args, kwargs)
R = [Ref(i) for i in range(12)]
NEW = torch.full((4, 4), 9.)
LOOSE = dict(detached=('torch.Tensor.detach', (), {}), viewed=('torch.Tensor.view', (-1,), {}), transposed=('torch.Tensor.t', (), {}), row=('operator.getitem', (0,), {}), parameter=('torch.nn.Parameter', (), {}),
             as_tensor=('torch.as_tensor', (), {}), expanded=('torch.Tensor.expand_as', (R[0],), {}), same_type=('torch.Tensor.float', (), {}), contiguous=('torch.Tensor.contiguous', (), {}), chunk=('torch.chunk', (1,), {}),
             reversed=('builtins.tuple', (), {}), made=('apply', (), {}))

ATTACKS = {
    **{f'in place: {op}': [weight(), then(f'torch.Tensor.{op}', R[0], *args)] for op, args in dict(
        add_=(1.,), copy_=(NEW,), zero_=(), fill_=(3.,), normal_=(), t_=(), transpose_=(0, 1), unsqueeze_=(0,), squeeze_=(), clamp_=(0., .1), index_fill_=(0, torch.tensor([0]), 5.), masked_fill_=(NEW > 0, 1.),
        put_=(torch.tensor([0]), torch.ones(1)), exponential_=(), detach_=(), bernoulli_=(.5,), tril_=(), requires_grad_=(False,), swapaxes_=(0, 1), scatter_=(0, torch.zeros(1, 1).long(), 1.)).items()},
    'setitem': [weight(), then('operator.setitem', R[0], 0, 9.)],
    'setitem by mask': [weight(), then('operator.setitem', R[0], NEW > 0, 9.)],
    **{f'operator {op}': [weight(), then(f'operator.{op}', R[0], 2.)] for op in ('iadd', 'imul', 'isub', 'itruediv', 'ipow')},
    'out=': [weight(), then('torch.add', 1., 2., out=R[0])],
    'out= by apply': [weight(), then('apply', torch.add, 1., 2., out=R[0])],
    'out by position': [weight(), then('torch.norm', NEW, 2, 1, False, R[0])],
    'out of normalize': [weight(), then('torch.nn.functional.normalize', NEW, 2., 1, 1e-12, R[0])],
    'relu in place': [weight(), then('torch.nn.functional.relu', R[0], True)],
    'relu in place by keyword': [weight(), then('torch.nn.functional.relu', R[0], inplace=True)],
    'silu in place, true by value': [weight(), then('builtins.bool', 1), then('torch.nn.functional.silu', R[0], R[1], id=2)],
    'dropout in place': [weight(), then('torch.nn.functional.dropout', R[0], .5, True, True)],
    'embedding renormalised': [weight('table'), then('torch.nn.functional.embedding', torch.tensor([1]), R[0], None, .01)],
    'batch norm statistics': [weight('norm.running_mean'), weight('norm.running_var', 1), then('torch.nn.functional.batch_norm', torch.randn(3, 4), R[0], R[1], None, None, True, id=2)],
    'instance norm statistics': [weight('norm.running_mean'), weight('norm.running_var', 1), then('torch.instance_norm', torch.randn(3, 4, 2), None, None, R[0], R[1], True, .1, 1e-5, False, id=2)],
    'apply': [weight(), then('apply', torch.Tensor.zero_, R[0])],
    'a function as a key': [weight(), then('builtins.list', (R[0],)), then('builtins.sorted', R[1], key=torch.Tensor.zero_, id=2)],
    'a function as a key, of max': [weight(), then('builtins.max', [R[0], R[0]], key=torch.Tensor.zero_)],
    'a function as a key, of sort': [weight(), then('builtins.list', (R[0], R[0])), then('builtins.list.sort', R[1], key=torch.Tensor.zero_, id=2)],
    'a function in a list': [weight(), then('builtins.list', (torch.Tensor.zero_,)), then('operator.getitem', R[1], 0, id=2), then('builtins.sorted', [R[0]], key=R[2], id=3)],
    'numpy': [weight(), then('torch.Tensor.numpy', R[0]), then('operator.setitem', R[1], 0, 1., id=2)],
    'numpy by apply': [weight(), then('torch.Tensor.detach', R[0]), then('apply', torch.Tensor.numpy, R[1], id=2), then('operator.iadd', R[2], 1., id=3)],
    **{f'optimiser {name}': [weight(), then('torch.sum', R[0]), then('torch.Tensor.backward', R[1], id=2), then(f'torch.optim.{name}', [R[0]], lr=.1, id=3), then('torch.optim.Optimizer.step', R[3], id=4)] for name in ('SGD', 'Adam', 'AdamW')},
    'optimiser, fused': [weight(), then('torch.nn.Parameter', R[0]), then('torch.Tensor.detach', R[1], id=2), then('torch.nn.Parameter', R[2], id=3), then('torch.optim.AdamW', [R[3]], fused=True, id=4), then('torch.optim.Optimizer.step', R[4], id=5)],
    'optimiser of groups': [weight(), then('builtins.dict', params=[R[0]]), then('torch.optim.SGD', [R[1]], lr=.1, id=2), then('torch.optim.Optimizer.step', R[2], id=3)],
    'optimiser by apply': [weight(), then('apply', torch.optim.SGD, [R[0]], lr=.1), then('torch.optim.Optimizer.step', R[1], id=2)],
    'optimiser through a list': [weight(), then('builtins.list'), then('builtins.list.append', R[1], R[0], id=2), then('torch.optim.SGD', R[1], lr=.1, id=3)],
    'update, then in place': [site('first'), weight(id=1), then('torch.sum', R[0], id=2), then('update', R[2], R[1], id=3), then('torch.Tensor.add_', R[2], 1., id=4)],
    'module that works in place': [weight(), then('module', 'act', False, R[0])],
    'module that works in place, on a buffer': [weight('norm.running_mean'), then('torch.Tensor.view', R[0], 2, 2), then('module', 'act', True, R[1], id=2)],
    'batch norm of the model on its own table': [weight('table'), then('module', 'norm', False, R[0])],
    'edit that the model goes on with in place': [site('act', 'input'), weight('table', 1), then('torch.Tensor.expand', R[1], 2, -1, -1, id=2), then('operator.getitem', R[2], (slice(None), slice(0, 5)), id=3), then('first_input', R[0], id=4), then('update', R[4], R[3], id=5)],
    'output that is a view of the table': [site('same'), then('torch.nn.functional.relu', R[0], True)],
    'output that is a view, by max': [site('same'), then('builtins.max', [R[0], R[0]], key=torch.Tensor.zero_)],
    'output that is a view, out by position': [site('same'), then('torch.norm', torch.randn(5, 4), 2, 1, True, R[0])],
    'buffer among the inputs': [site('pair', 'input'), then('operator.getitem', R[0], (0)), then('operator.getitem', R[1], 1, id=2), then('torch.nn.functional.relu', R[2], True, id=3)],
    'plain tensor among the inputs': [site('pair', 'input'), then('operator.getitem', R[0], 0), then('operator.getitem', R[1], 2, id=2), then('apply', torch.Tensor.zero_, R[2], id=3)],
    'a tensor in a list of the model': [site('pair', 'input'), then('operator.getitem', R[0], 0), then('operator.getitem', R[1], 4, id=2), then('operator.getitem', R[2], 0, id=3), then('apply', torch.Tensor.zero_, R[3], id=4)],
    'a list of the model': [site('pair', 'input'), then('operator.getitem', R[0], 0), then('operator.getitem', R[1], 3, id=2), then('builtins.list', R[2], id=3), then('builtins.list.append', R[2], 'evil', id=4)],
    'a list of the model, by iadd': [site('pair', 'input'), then('operator.getitem', R[0], 0), then('operator.getitem', R[1], 3, id=2), then('operator.iadd', R[2], ['evil'], id=3)],
    'gradient that is a parameter, added to': [site('last'), weight('table', 1), then('torch.Tensor.detach', R[1], id=2), Node(3, 'torch.zeros', ((6, 4),)), then('torch.Tensor.requires_grad_', R[3], True, id=4), then('operator.mul', R[3], 1., id=5),
        Node(6, 'grad', (R[5], 0)), then('update', R[6], R[2], id=7), then('torch.sum', R[5], id=8), then('torch.Tensor.backward', R[8], retain_graph=True, id=9), then('torch.sum', R[5], id=10), then('torch.Tensor.backward', R[10], id=11)],
    'gradient given by hand': [weight('table'), then('torch.Tensor.detach', R[0]), Node(2, 'torch.zeros', ((6, 4),)), then('torch.Tensor.requires_grad_', R[2], True, id=3), then('torch.Tensor.backward', R[2], R[1], id=4), then('torch.Tensor.backward', R[2], R[1], id=5)],
    'state of an optimiser': [weight('scale'), then('torch.nn.Parameter', torch.ones(4)), then('torch.optim.SGD', [R[1]], lr=R[0], id=2)],
    'grad of a parameter': [weight(), then('torch.sum', R[0]), then('torch.Tensor.backward', R[1], id=2), then('attribute', R[0], 'grad', id=3), then('torch.Tensor.fill_', R[3], 7., id=4)],
    'flags by apply': [weight(), then('apply', torch.Tensor.requires_grad_, R[0], False)],
    **{f'loose, {name}': [weight(), then(op, *((torch.detach,) if op == 'apply' else ()), *(([R[0]],) if op == 'builtins.tuple' else (R[0],)), *args, **kwargs), then('builtins.list', [R[1]], id=2), then('operator.getitem', R[2], 0, id=3),
        *([then('operator.getitem', R[3], 0, id=4)] if op in ('torch.chunk', 'builtins.tuple') else [then('torch.Tensor.view_as', R[3], R[3], id=4)]), then('apply', torch.Tensor.fill_, R[4], 4., id=5)] for name, (op, args, kwargs) in LOOSE.items()},
}
HARMLESS = {'module that works in place', 'module that works in place, on a buffer', 'batch norm of the model on its own table', 'edit that the model goes on with in place', 'gradient that is a parameter, added to', 'gradient given by hand',
            'grad of a parameter', 'flags by apply', 'a list of the model', 'a list of the model, by iadd', 'update, then in place', 'output that is a view of the table', 'buffer among the inputs', 'state of an optimiser'} # They do nothing to the model, or what they do is taken back


FROZEN = dict(grad=False, models=[REF.model_copy(update=dict(trainable=False))]) # Else autograd itself refuses many of them


@pytest.mark.parametrize('changes', [{}, FROZEN], ids=['autograd', 'no_grad'])
@pytest.mark.parametrize('name', ATTACKS)
def test_a_job_cannot_write_to_the_model(name, changes, unchanged):
    try: run_job(SERVED, message(ATTACKS[name], **changes))
    except JobError as e: assert len(str(e)) > 20 and 'Traceback' not in str(e), e
    else: assert name in HARMLESS, 'it should have been refused'


@pytest.mark.parametrize('changes', [{}, FROZEN], ids=['autograd', 'no_grad'])
@pytest.mark.parametrize('name', [n for n in ATTACKS if 'numpy' not in n]) # which torch doesn't see
def test_the_guard_alone_would_do(name, changes, unchanged, monkeypatch):
    "Without the refusals at the door, which only look at the graph."
    monkeypatch.setattr('transformer_experiments.remote.jobs._check_writes', lambda *args: None)
    monkeypatch.setattr('transformer_experiments.remote.jobs._check_operations', lambda *args: None)
    try: run_job(SERVED, message(ATTACKS[name], **changes))
    except JobError as e: assert not changes or name in HARMLESS or "the server's model" in str(e) or 'does not require grad' in str(e) or 'takes no part' in str(e), e # with autograd it may speak first
    else: assert name in HARMLESS or name in ('in place: requires_grad_', 'in place: detach_'), 'it should have been refused'
