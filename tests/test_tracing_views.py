"""Values that share memory with what the model has: the trace keeps them as they were when their line was written.

The list of views is held against torch itself: every listed operation is called in many ways, and one whose result has
its operand's memory must be on the list. Programs with such values are held against hooks written by hand."""
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transformer_experiments.tracing import TracedModel, apply
from transformer_experiments.tracing.errors import TraceError
from transformer_experiments.tracing.operations import OPERATIONS, always_changes, changes_operand, is_view

SHAPES = (2, 4), (4,), (1, 4), (4, 4), (1, 4, 4, 4), ()
OTHERS = [
    (), (0,), (1,), (0, 0), (0, 1), (1, 1), (-1,), ((0,),), ((),), (2,), (1, 0, 1), ('mean',), ((1, 1),), (0.0, 1.0),
    (1.0,), (0, 0, 1), (torch.float32,), ('a b -> a b',), ('a b -> a b', 'mean'), (True,), (False,), (0.5, False),
]
CONTAINERS = {'operator.add', 'operator.mul', 'operator.or_'}  # share entries of lists and dicts, no tensor's memory


def tensors(value: object, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, set, dict)) and depth < 4:
        for v in value.values() if isinstance(value, dict) else value:
            yield from tensors(v, depth + 1)


def calls(h: torch.Tensor) -> Iterator[tuple[tuple, dict]]:
    for others in [*OTHERS, (h,), (h, h), (h.shape,)]:
        for first in (h, [h], (h, h)):
            yield (first, *others), {}
            yield (*others, first), {}
    yield from (((h,), dict(dim=0)), ((h,), dict(p=0.5, training=False)), (({'a': h},), {}))
    yield from ((('ab->ba', h), {}), (('i->i', h), {}))


def shares(name: str) -> bool:
    "Whether some call of an operation, with nothing that means in place, returns memory of its operand."
    for shape in SHAPES:
        h = torch.ones(shape)
        for args, kwargs in calls(h):
            if changes_operand(name, args, kwargs): continue
            try:
                out = OPERATIONS[name](*args, **kwargs)
            except Exception:  # not a call that this operation takes
                continue
            memory = h.untyped_storage().data_ptr()
            if any(t.numel() and t.untyped_storage().data_ptr() == memory for t in tensors(out)): return True
    return False


def test_what_shares_memory_is_on_the_list():
    names = [n for n in OPERATIONS if not (is_view(n) or always_changes(n) or n.endswith('seed') or n in CONTAINERS)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        missing = [n for n in names if n != 'torch.Tensor.backward' and shares(n)]
    assert missing == []


class Net(nn.Module):
    "A ReLU that overwrites what the first layer has returned."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Linear(3, 4), nn.Linear(4, 3), nn.ReLU(inplace=True)
        self.same, self.drop = nn.Identity(), nn.Dropout(0.5)
    def forward(self, x): return self.b(self.relu(self.a(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


X = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
WAYS = {
    'apply': lambda m, h: apply(lambda t: t, h),
    'apply by keyword': lambda m, h: apply(lambda n, t: t, 3, t=h),
    'entry of apply': lambda m, h: apply(lambda t: (t, 1), h)[0],
    'view in apply': lambda m, h: apply(lambda t: t[:], h),
    'module': lambda m, h: m.same(h),
    'dropout': lambda m, h: m.drop(h),
    'einsum': lambda m, h: torch.einsum('ab->ba', h).mT,
    'plus': lambda m, h: +h,
    'keyword': lambda m, h: torch.reshape(input=h, shape=(2, 4)),
}


@pytest.mark.parametrize('way', WAYS)
class TestShared:
    def test_saved(self, net, way):
        m = TracedModel(net)
        with m.trace(X):
            saved, out = WAYS[way](m, m.a.output).save(), m.output.save()
        assert torch.equal(saved.value, net.a(X)) and torch.equal(out.value, net(X))

    def test_read_after_the_model_has_gone_on(self, net, way):
        m = TracedModel(net)
        with m.trace(X):
            both = (WAYS[way](m, m.a.output) + m.output.sum()).save()
        assert torch.equal(both.value, net.a(X) + net(X).sum())

    def test_written_before_an_edit(self, net, way):
        m = TracedModel(net)
        with m.trace(X):
            both = WAYS[way](m, m.a.output) + m.output.sum()
            m.a.output[:] = 0
            both.save('both')
        assert torch.equal(both.value, net.a(X) + net.b(torch.zeros(2, 4)).sum())

    def test_written_to(self, net, way):
        m = TracedModel(net)
        with m.trace(X):
            before = m.a.output.save()
            WAYS[way](m, m.a.output)[:] = 0
            after, out = m.a.output.save(), m.output.save()
        assert torch.equal(before.value, net.a(X)) and torch.equal(out.value, net.b(torch.zeros(2, 4)))
        assert torch.equal(after.value, torch.zeros(2, 4))


@pytest.mark.parametrize('inplace', [True, 1])
def test_an_inplace_flag_by_position(net, inplace):
    m = TracedModel(net)
    with m.trace(X):
        before = m.a.output.save()
        F.relu(m.a.output, inplace)
        after = m.a.output.save()
        m.output.save('out')
    assert torch.equal(before.value, net.a(X)) and torch.equal(after.value, net.a(X).relu())


def test_out_is_refused(net):
    with pytest.raises(TraceError, match=r'(?s)out= of torch.add.*test_tracing_views.*\[:\]'):
        with TracedModel(net).trace(X) as tracer:
            h = tracer.model.a.output
            torch.add(h, 1, out=h)
            tracer.model.output.save()
    mine = torch.zeros(2, 4)
    m = TracedModel(net)
    with pytest.raises(TraceError, match='out='), m.trace(X):
        torch.add(m.a.output, 1, out=mine).save()
    assert not mine.any()


# Calls that write to their operands

def double(h: torch.Tensor): h.mul_(2)


@pytest.fixture
def with_relu():
    torch.manual_seed(0)
    return TracedModel(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)))


def saved_before(m, call):
    h = m[0].output.clone()
    h.save()
    call(h)

def view_saved_before(m, call):
    h = m[0].output.clone()
    h[0].save()
    call(h)

def of_the_model(m, call):
    call(m[0].output)

def view_of_the_model(m, call):
    call(m[0].output[0])

def input_of_the_model(m, call):
    call(m[1].input)

def read_too_late(m, call):
    "The sum is written before the call, and needs what comes after it."
    h = m[0].output.clone()
    (h.sum() + m.output.sum()).save()
    torch.add(h, m.output[0, 0]).save()
    call(h)


@pytest.mark.parametrize('how', ['apply', 'module'])
@pytest.mark.parametrize('program', [saved_before, view_saved_before, of_the_model, view_of_the_model,
                                     input_of_the_model, read_too_late])
def test_a_call_that_writes_to_what_others_see_is_an_error(with_relu, program, how):
    m = with_relu
    call = (lambda h: apply(double, h)) if how == 'apply' else m[1]
    with pytest.raises(TraceError, match='(?s)writes to its argument in place.*test_tracing_views'), torch.no_grad():
        with m.trace(torch.ones(2, 3)):
            program(m, call)


def test_a_call_may_write_to_a_copy(with_relu):
    m, x = with_relu, torch.ones(2, 3)
    with m.trace(x):
        h = m[0].output.clone()
        before = h.sum().save()
        relu = m[1](h)
        entry = relu[0].sum().save()
        after = h.sum().save()
        h.save('h')  # saved after the call, so it has the call's values
        out = m.output.save()
    first = m._module[0](x)
    assert torch.equal(before, first.sum()) and torch.equal(after, first.relu().sum())
    assert torch.equal(entry, first.relu()[0].sum()) and torch.equal(out, m._module(x))
