"""What a trace means, kind by kind: each fault that the engine had, and others of its kind, against plain torch."""
import sys
import threading
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from transformer_experiments import tracing
from transformer_experiments.tracing import Graph, TracedModel, TraceError, apply


class Loop(nn.Module):
    "Two layers, called three times."
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(3):
            x = self.g(self.f(x))
        return x


def near(got, want): torch.testing.assert_close(getattr(got, 'value', got), want, rtol=1e-5, atol=1e-6)


def layers(inplace: bool = True, frozen: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=inplace), nn.Linear(3, 3)).requires_grad_(not frozen)


@pytest.fixture
def net(): return layers()


@pytest.fixture
def m(net): return TracedModel(net)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 3)


# Written order

def test_a_slower_reader_has_what_it_means(net, m, x):
    with m.trace(x):
        h = m[0].output
        sums = [(h + m[2].output).save()]
        h[:, 0] = 0
        sums.append((h + m[2].output).save())
        m[0].output = h * 2
        sums.append((m[0].output + m[2].output).save())
    h = net[0](x)
    edited = h.clone()
    edited[:, 0] = 0
    out = net[2]((edited * 2).relu())
    for got, want in zip(sums, (h, edited, edited * 2), strict=True):
        near(got, want + out)


def test_a_condition_at_every_call():
    net, x = Loop().requires_grad_(False), torch.rand(1, 4)
    m = TracedModel(net)
    with m.trace(x) as tracer:
        h = m.f.all().output
        with tracer.cond(h[0].argmax() >= 0):
            h[:, 0] = 0
        with tracer.cond(h[0].argmax() < 0):
            h[:] = 9
        out = m.output.save()
    for _ in range(3):
        x = net.f(x)
        x[:, 0] = 0
        x = net.g(x)
    near(out, x)


def test_every_call_and_one_call_in_written_order():
    net, x = Loop().requires_grad_(False), torch.rand(1, 4)
    m = TracedModel(net)
    with m.trace(x):
        first = m.f.output.save()
        m.f.next(1).output[:] = 2
        m.f.all().output[:] *= 3
        every = m.f.all().output.save()
    near(first, net.f(x)), near(every.value[0], net.f(x) * 3), near(every.value[1], torch.full((1, 4), 6.))
    with m.trace(x):
        m.f.all().output[:] *= 3
        m.f.output[:] = 2
        every = m.f.all().output.save()
    near(every.value[0], torch.full((1, 4), 2.))
    assert len(every.value) == 3


def test_all_calls_are_there_although_one_call_is_enough_for_others():
    m = TracedModel(Loop())
    with m.trace(torch.rand(1, 4)):
        m.f.output.save('first') # needs one call only
        every = m.f.all().output.save()
    assert len(every.value) == 3


def test_what_the_models_order_forbids_names_both_lines(m, x):
    both_lines = r'0.output needs 2.output, which comes later.*engine.py:\d+: m\[0\].*engine.py:\d+: late = m\[2\]'
    with pytest.raises(TraceError, match=f'(?s){both_lines}'):
        with m.trace(x):
            late = m[2].output.sum()
            m[0].output[:] = late
    with pytest.raises(TraceError, match='comes later'):
        with m.trace(x): # effects keep their order
            apply(lambda t: None, m[2].output)
            m[0].output = apply(torch.Tensor.abs, m[0].output) + apply(lambda t: t, m[0].output)
    loop = TracedModel(Loop())
    with pytest.raises(TraceError, match='comes later'):
        with loop.trace(torch.rand(1, 4)):
            loop.f.all().output[:] = loop.g.all().output


def test_effects_keep_their_order(net, m, x):
    seen = []
    with m.trace(x):
        apply(lambda t: seen.append(t.clone()), m[2].output)
        apply(lambda t: seen.append(t.clone()), m[0].output)
    near(seen[0], net(x)), near(seen[1], net[0](x))


def test_inputs_and_input_are_one_value(net, m, x):
    with m.trace(x):
        before = m[2].input.save()
        m[2].inputs = ((torch.ones(2, 3),), {})
        m[2].input = m[2].input * 2
        all_of_it = m[2].inputs[0][0].save()
        out = m.output.save()
    near(before, net[0](x).relu()), near(all_of_it, torch.full((2, 3), 2.)), near(out, net[2](torch.full((2, 3), 2.)))


def test_a_prompt_and_all_prompts_in_written_order(net, m, x):
    with m.trace() as tracer:
        with tracer.invoke(x):
            m[0].output[:] = 1
            first = m[0].output.save()
        whole = m[0].output.save()
        with tracer.invoke(x * 2):
            m[0].output = m[0].output * 0 + 3
        m[0].output[:] *= 2
        with tracer.invoke(x):
            third, out = m[0].output.save(), m.output.save()
        end = m[0].output.save()
    near(first, torch.ones(2, 3)), near(whole.value, torch.cat([torch.ones(2, 3), net[0](x * 2), net[0](x)]))
    near(end, torch.cat([torch.full((2, 3), 2.), torch.full((2, 3), 6.), 2 * net[0](x)]))
    near(third, 2 * net[0](x)), near(out, net[2]((2 * net[0](x)).relu()))


# Gradients

@pytest.mark.parametrize('frozen', [True, False])
def test_each_gradient_is_of_its_own_backward_pass(frozen, x):
    net = layers(False, frozen)
    m = TracedModel(net)
    with m.trace(x):
        v = m[0].output
        if frozen:
            v.requires_grad = True
        g1 = v.grad.save()
        (m.output * 5).sum().backward(retain_graph=True)
        g2 = v.grad.save()
        (v ** 2).sum().backward(retain_graph=True)
        g3 = v.grad.save()
        (v * 7).sum().backward()
        again = v.grad.save()
    h = net[0](x).detach().requires_grad_()
    want, = torch.autograd.grad((net[2](net[1](h)) * 5).sum(), h)
    near(g1, want), near(g2, 2 * h.detach()), near(g3, torch.full((2, 3), 7.)), near(again, torch.full((2, 3), 7.))


def test_a_gradient_penalty(x):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    m = TracedModel(net)
    with m.trace(x):
        g = m[0].output.grad
        m.output.sum().backward(create_graph=True)
        (g ** 2).sum().backward()
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    h = net[0](x)
    out = net[2](net[1](h)).sum()
    g, = torch.autograd.grad(out, h, create_graph=True)
    (out + (g ** 2).sum()).backward()
    for a, p in zip(got, net.parameters(), strict=True):
        near(a, p.grad)


def test_the_gradient_of_a_value_that_is_replaced_or_edited_in_between(x):
    net = layers(False, False)
    m = TracedModel(net)
    with m.trace(x):
        g0 = m[0].output.grad.save()
        m[0].output = m[0].output * 3
        g1 = m[0].output.grad.save()
        m[0].output[:, 0] = 0
        g2 = m[0].output.grad.save()
        m[2].output.sum().backward()
    h = (net[0](x) * 3).detach()
    h[:, 0] = 0
    h.requires_grad_()
    want, = torch.autograd.grad(net[2](h.relu()).sum(), h)
    cut = want.clone()
    cut[:, 0] = 0
    near(g2, want), near(g1, cut), near(g0, 3 * cut)


def test_gradients_of_every_call():
    net, x = Loop(), torch.rand(1, 4)
    m = TracedModel(net)
    with m.trace(x):
        h = m.f.all().output
        values, grads, products = h.save(), h.grad.save(), (h.grad * h).save()
        m.output.sum().backward()
    kept = []
    def keep(module, args, out):
        out.retain_grad()
        kept.append(out)
    handle = net.f.register_forward_hook(keep)
    net(x).sum().backward()
    handle.remove()
    assert len(grads.value) == 3
    for v, g, p, h in zip(values.value, grads.value, products.value, kept, strict=True):
        near(v, h), near(g, h.grad), near(p, h.grad * h)


def test_edits_of_gradients_of_one_value_are_seen_by_all_that_name_it(x):
    net = layers(False, False)
    m = TracedModel(net)
    with m.trace(x):
        before = m[0].output.grad.save()
        m[0].output.grad[:] *= 2
        after = m[0].output.grad.save()
        m.output.sum().backward()
    near(after, 2 * before.value)
    near(net[0].bias.grad, after.value.sum(0))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.ln, self.b = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.a(x)
        return h + self.b(self.ln(h))


def test_a_prompts_gradient_is_what_it_is_alone():
    net, a, b = Residual(), torch.randn(1, 4), torch.randn(2, 4)
    m = TracedModel(net)
    with m.trace(a):
        alone = m.ln.input.grad.save()
        m.output.pow(2).sum().backward()
    with m.trace() as tracer:
        with tracer.invoke(a):
            first = m.ln.input.grad.save()
            m.output.pow(2).sum().backward(retain_graph=True)
        with tracer.invoke(b):
            m.ln.input[:] *= 2
            edited = m.b.input.grad.save()
            m.output.sum().backward()
    near(first, alone.value), near(edited, net.b.weight.sum(0).expand(2, 4))


# Saved means kept

class Writes(nn.Module):
    "Writes to the memory of what its modules gave, without a module that says so."
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(3, 3)

    def forward(self, x):
        h = self.f(x)
        h += 1
        h[:, 0].mul_(2)
        return h


@pytest.mark.parametrize('make', [layers, Writes])
def test_what_the_model_does_to_saved_memory(make, x):
    net = make().requires_grad_(False)
    m = TracedModel(net)
    f, site = (net.f, m.f) if make is Writes else (net[0], m[0])
    with m.trace(x) as tracer:
        whole = site.output.save('whole')
        part = site.output[:, :1].save()
        out = m.output.save()
    assert torch.equal(whole.value, f(x)) and torch.equal(part.value, f(x)[:, :1]) and torch.equal(out.value, net(x))
    assert torch.equal(m.run(tracer.graph, x)['whole'], f(x))


@pytest.mark.parametrize('f', [lambda t: t, lambda t: t[:1], lambda t: (t, 1)], ids=['same', 'view', 'pair'])
def test_what_the_model_does_to_saved_memory_behind_apply(f, net, m, x):
    "The function may return its argument, which the in-place ReLU writes to."
    with m.trace(x):
        saved = apply(f, m[0].output).save()
        m.output.save('out')
    want = f(net[0](x))
    got, want = (saved.value[0], want[0]) if isinstance(want, tuple) else (saved.value, want)
    assert torch.equal(got, want)


def test_what_the_model_does_to_values_that_are_read_later(net, m, x):
    with m.trace() as tracer:
        with tracer.invoke(x):
            h = m[0].output
        with tracer.invoke(x * 2):
            m[2].output = h * 1
            out = m.output.save()
    near(out, net[0](x))
    with m.session():
        with m.trace(x):
            h = m[0].output
        with m.trace(x):
            m[2].output = h
            out = m.output.save()
    near(out, net[0](x))


def test_saved_before_and_after_an_edit(net, m, x):
    with m.trace(x) as tracer:
        a = m[0].output.save()
        m[0].output[:] = 0
        b = m[0].output.save()
        m[0].output = m[0].output + 1
        c = m[0].output.save()
        bad = m[2].output
        bad.save()
        bad[:] = 0
        with pytest.raises(ValueError, match='clone'):
            bad.save()
    near(a, net[0](x)), near(b, torch.zeros(2, 3)), near(c, torch.ones(2, 3)), near(bad, net[2](torch.ones(2, 3)))
    back = Graph.from_json(tracer.graph.to_json())
    assert back.sha256 == tracer.graph.sha256
    for got, want in zip(m.run(back, x).values(), (a, b, c, bad), strict=True):
        near(got, want.value)


def test_a_trace_that_only_reads_is_the_forward_bit_for_bit(net, m, x):
    with m.trace(x):
        for k in range(3):
            m[k].output.save(), m[k].input.save()
        out = m.output.save()
    assert torch.equal(out.value, net(x))


def test_lists_and_values_that_are_made_to_be_filled(m, x):
    with m.session() as session:
        found, best = tracing.list().save(), tracing.float(-1e9).save()
        with session.iter([1., 2., 3.]) as k:
            with m.trace(x * k):
                total = m.output.sum()
            found.append(total)
            with session.cond(total > best):
                best.update(total)
    assert len(found.value) == 3 and best.value == max(found.value)


def test_a_save_under_a_condition(m, x):
    with m.trace(x) as tracer:
        h = m[0].output
        with tracer.cond(h.sum() > 1e9):
            never = h.save()
        with tracer.cond(h.sum() < 1e9):
            there = m[2].output.save()
    assert there.shape == (2, 3)
    with pytest.raises(ValueError, match='condition'):
        never.value.sum()


# A graph never changes

def test_tensors_of_the_graph_stay_as_they_are(m, x):
    acc, mine, table = torch.zeros(2, 3), torch.randn(2, 3), torch.zeros(5, 3)
    before = mine.clone()
    with m.trace(x) as tracer:
        acc += m[0].output
        acc.save('acc')
        m[0].output = mine # the model writes to it
        rows = apply(torch.narrow, table, 0, m[2].output.argmax().clamp(0, 1), 2)
        rows[:] = 1
        rows.save('rows')
    graph = tracer.graph
    hash_, results = graph.sha256, [m.run(graph, x) for _ in range(3)]
    assert graph.sha256 == hash_ and torch.equal(mine, before) and not table.any()
    for r in results:
        assert torch.equal(r['acc'], results[0]['acc']) and torch.equal(r['rows'], torch.ones(2, 3))


def test_writes_to_the_users_tensors_and_parameters_are_refused(net, m, x):
    store, weight = torch.zeros(2, 3), net[0].weight.clone()
    def elu(): apply(torch.nn.functional.elu, store, m.output.min().item(), True)
    for write in (lambda: store.__setitem__(0, m.output[0]), lambda: store.add_(m.output), elu):
        with pytest.raises(TraceError, match='(?s)of yours.*test_tracing_meaning_engine'):
            with m.trace(x):
                write()
    def zero(): m[0].weight[:] = 0
    def zero_view(): m[0].weight.T[0].mul_(0)
    for write in (zero, zero_view):
        with pytest.raises(TraceError, match='0.weight'):
            with m.trace(x):
                write()
    with m.trace(x):
        m[0].output = x @ m[0].weight # reading it is fine
        m[0].output[:] = 0
        out = m.output.save()
    near(out, net[2](torch.zeros(2, 3)))
    assert torch.equal(net[0].weight, weight) and not store.any()


# Batches

class Containers(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.f, self.make = nn.Linear(3, 4), make

    def forward(self, x): return self.make(self.f(x))


Pair = namedtuple('Pair', 'a b')


@dataclass
class Plain:
    h: torch.Tensor
    n: int


KINDS = {
    'ordered': (lambda h: OrderedDict(out=h), lambda v: v['out']),
    'default': (lambda h: defaultdict(list, out=h), lambda v: v['out']),
    'named': (lambda h: Pair(h, None), lambda v: v.a),
    'dataclass': (lambda h: Plain(h, 1), lambda v: v.h),
    'nested': (lambda h: {'a': [(h, h.mean())]}, lambda v: v['a'][0][0]),
    'transposed': (lambda h: (h.T, h), lambda v: v[0]),
    'torch': (lambda h: h.max(-1), lambda v: v[0]),
}


@pytest.mark.parametrize('kind', KINDS)
def test_a_prompt_has_its_own_rows_of_every_container(kind):
    make, get = KINDS[kind]
    net = nn.Sequential(OrderedDict(seg=Containers(make), pick=nn.Identity())).requires_grad_(False)
    m, a, b = TracedModel(net), torch.rand(1, 3), torch.rand(2, 3)
    with m.trace() as tracer:
        with tracer.invoke(a):
            get(m.seg.output)[:] = 0
            zero = get(m.output).save()
        with tracer.invoke(b):
            mine, out = get(m.seg.output).save(), get(m.output).save()
    near(mine, get(net.seg(b))), near(out, get(net(b)))
    assert not zero.value.any() and zero.value.shape == get(net(a)).shape


class Mine(dict):
    pass


def test_a_container_that_nobody_knows_is_refused_by_name():
    m = TracedModel(nn.Sequential(Containers(lambda h: Mine(h=h)), nn.Identity()))
    with pytest.raises(TypeError, match='Mine.*register'):
        with m.trace() as tracer:
            for _ in range(2):
                with tracer.invoke(torch.rand(1, 3)):
                    m[0].output.save()


class Recurrent(nn.Module):
    "The batch is the second axis of what the LSTM gives."
    def __init__(self):
        super().__init__()
        self.r, self.o = nn.LSTM(3, 4, 2), nn.Linear(4, 2)

    def forward(self, x): return self.o(self.r(x.transpose(0, 1))[0]).transpose(0, 1)


def test_the_batch_is_not_always_the_first_axis():
    net, a, b = Recurrent().requires_grad_(False), torch.rand(2, 5, 3), torch.rand(3, 5, 3)
    m = TracedModel(net)
    with m.trace() as tracer:
        with tracer.invoke(a):
            h = m.r.output[0]
            h.requires_grad = True
            g = h.grad.save()
            (m.output.sum() + (h ** 2).sum()).backward()
        with tracer.invoke(b):
            state, out = m.r.output[1][0].save(), m.output.save()
    y, _ = net.r(a.transpose(0, 1))
    (
        near(g, net.o.weight.sum(0).expand(5, 2, 4) + 2 * y),
        near(out.value.detach(), net(b)),
        near(state, net.r(b.transpose(0, 1))[1][0]),
    )


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.pos = nn.Embedding(9, 4), nn.Embedding(9, 4)

    def forward(self, x, scale=1., cond=None, name='a'):
        h = self.emb(x) + self.pos(torch.arange(x.shape[1]))
        return h * scale + (cond['bias'][0] if cond else 0)


@pytest.mark.parametrize('rows', [1, 3])
def test_a_table_of_as_many_rows_as_there_are_prompts(rows):
    m, xs = TracedModel(Table().requires_grad_(False)), torch.randint(0, 9, (3, rows, 3))
    with pytest.raises(TraceError, match='pos.output.*no rows of its own'):
        with m.trace() as tracer:
            for k in range(3):
                with tracer.invoke(xs[k]):
                    if k == 0:
                        m.pos.output[:] = 0
                    m.output.save()
    with m.trace() as tracer:
        for k in range(3):
            with tracer.invoke(xs[k]):
                table = m.pos.output.save()
    near(table, m._module.pos(torch.arange(3)))


def test_every_argument_of_a_prompt_is_its_own_or_refused():
    net, a, b = Table().requires_grad_(False), torch.randint(0, 9, (2, 3)), torch.randint(0, 9, (1, 3))
    m, biases = TracedModel(net), [{'bias': [torch.rand(2, 1, 4)]}, {'bias': [torch.rand(1, 1, 4)]}]
    with m.trace() as tracer:
        with tracer.invoke(a, cond=biases[0]):
            first = m.output.save()
        with tracer.invoke(b, cond=biases[1]):
            second = m.output.save()
    near(first, net(a, cond=biases[0])), near(second, net(b, cond=biases[1]))
    different = (
        [dict(scale=1.0), dict(scale=2.0)],
        [dict(name='x'), dict(name='y')],
        [dict(cond={'bias': [torch.rand(4)]}), dict(cond={'bias': [torch.rand(4)]})],
    )
    for one, other in different:
        with pytest.raises(ValueError, match=next(iter(one))):
            with m.trace() as tracer:
                with tracer.invoke(a, **one):
                    pass
                with tracer.invoke(b, **other):
                    m.output.save()
    with pytest.raises(ValueError, match='argument 1'):
        with m.trace() as tracer:
            with tracer.invoke(a, 1.):
                pass
            with tracer.invoke(b, 2.):
                m.output.save()


def test_a_batch_axis_that_is_declared():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.i = nn.Identity()
        def forward(self, x):
            if len(x) != 2: raise ValueError('two rows')
            return self.i(x) * 2
    m = TracedModel(Picky())
    def run():
        with m.trace() as tracer:
            with tracer.invoke(torch.ones(1, 2)):
                m.i.output[:] = 3
            with tracer.invoke(torch.ones(1, 2)):
                out = m.i.output.save()
        return out
    with pytest.raises(ValueError, match='one row more'):
        run()
    m.set_batch_axis('i.output', 0)
    near(run(), torch.ones(1, 2))


# Recomputation, threads, and models of other kinds

class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.a, self.b, self.on, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 4), True, reentrant

    def forward(self, x):
        def f(t): return self.b(self.a(t).tanh())
        for _ in range(2):
            x = checkpoint(f, x, use_reentrant=self.reentrant) if self.on else f(x)
        return x


@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize('when', ['inside', 'afterwards', 'lasting'])
def test_what_is_recomputed_is_edited_and_is_no_other_call(reentrant, when):
    net, x, grads = Checkpointed(reentrant), torch.rand(2, 4, requires_grad=True), []
    m = TracedModel(net)
    with m.edit() as edited:
        m.b.output = m.b.output * 2
    model = edited if when == 'lasting' else m
    for net.on in (False, True):
        net.zero_grad()
        with model.trace(x) as tracer:
            model.a.next(1).output[:, 0] = 3.
            model.a.all().output[:] *= 2
            calls, out = model.a.all().output.save(), model.output.save()
            if when == 'inside':
                model.output.pow(2).sum().backward()
        if when != 'inside':
            out.value.pow(2).sum().backward()
        assert len(calls.value) == 2 and all(r.fired <= 2 for r in tracer.report)
        grads.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        near(a, b)


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_recomputation_without_edits_is_no_call(reentrant):
    m = TracedModel(Checkpointed(reentrant))
    with m.trace(torch.rand(2, 4, requires_grad=True)):
        h = m.a.all().output.save()
        m.output.sum().backward()
    assert len(h.value) == 2


def test_another_thread_that_calls_the_model():
    net, x = layers(), torch.rand(1, 3)
    m, errors, stop, was, want = TracedModel(net), [], [], sys.getswitchinterval(), layers()(x)
    def plain():
        while not stop and not errors:
            try:
                assert torch.equal(net(x), want)
            except Exception as e:
                errors.append(e)
    threads = [threading.Thread(target=plain) for _ in range(3)]
    sys.setswitchinterval(1e-6)
    try:
        for t in threads:
            t.start()
        for _ in range(300):
            with m.trace(x):
                m[2].input[:] = 7
                m[1].inputs.save()
                m[0].output.save()
    finally:
        stop.append(True)
        for t in threads:
            t.join()
        sys.setswitchinterval(was)
    assert not errors


def test_a_model_that_was_edited_in_place_is_called(x):
    net = layers()
    m = TracedModel(net)
    with m.edit(inplace=True):
        m[0].output[:, 0] = 5
    h = net[0](x)
    h[:, 0] = 5
    near(m(x), net[2](h.relu())), near(m.trace(x, trace=False), m(x))
    m.clear_edits()
    near(m(x), net(x))


class To(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x): return x.to(self.kind)


NUMBERS = [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.complex64, torch.bool,
    torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int64,
]


@pytest.mark.parametrize('kind', NUMBERS)
def test_reports_of_every_type_of_number(kind):
    m = TracedModel(nn.Sequential(To(kind), nn.Identity()))
    with m.trace(torch.zeros(2, 3)) as tracer:
        m[0].output[:, 0] = 1
    row, = tracer.report
    assert (row.touched, row.of, row.largest) == (2, 6, 1.)


def test_hidden_states_show_the_edits_every_time():
    from transformers import LlamaConfig, LlamaForCausalLM
    net = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    m = TracedModel(net)
    for _ in range(3):
        with torch.no_grad(), m.trace(torch.arange(5)[None], output_hidden_states=True):
            m.model.layers[0].output[:] = 0
            seen = m.output.hidden_states[1].save()
        assert not seen.value.any()


def test_a_gradient_of_one_call_beside_an_edit_of_every_call():
    net, x = Loop(), torch.rand(1, 4)
    m = TracedModel(net)
    with m.trace(x):
        before = m.f.next(1).output.grad.save()
        m.f.all().output[:] += 1.
        after = m.f.output.grad.save()
        m.output.sum().backward()
    out, h = x, []
    for _ in range(3):
        h.append(net.f(out) + 1)
        h[-1].retain_grad()
        out = net.g(h[-1])
    out.sum().backward()
    near(before, h[1].grad)
    assert len(after.value) == 3
    for got, want in zip(after.value, h, strict=True):
        near(got, want.grad)


def test_a_gradient_beside_an_edit_whose_condition_was_false(x):
    net = layers(False, False)
    m = TracedModel(net)
    with m.trace(x) as tracer:
        h = m[2].input
        with tracer.cond(h.sum() > 1e9):
            h.mul_(0.5)
        g = h.grad.save()
        m.output.sum().backward()
    near(g, net[2].weight.sum(0).expand(2, 3))


def test_what_one_prompt_saves_when_another_replaces_its_part():
    "The model goes on with new memory then, and writes to it in place: what was saved is not seen through it."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    m, xs = TracedModel(net), [torch.randn(n, 3) for n in (1, 2, 1)]
    for late in (False, True):
        with m.trace() as t:
            with t.invoke(xs[0]):
                first = m[0].output
                if late:
                    m.output.sum().backward(retain_graph=True)
                first.save()
            with t.invoke(xs[1]):
                m[0].output = -m[0].output
            with t.invoke(xs[2]):
                last = m[0].output.save()
        torch.testing.assert_close(first.value, net[0](xs[0]))
        torch.testing.assert_close(last.value, net[0](xs[2]))
