"""What random programs found: gradients that are one tensor, values the model writes to, readers that come late."""
import pytest
import torch
from torch import nn

from transformer_experiments.tracing import TracedModel


class Twice(nn.Module):
    "Its two outputs are two tensors of one tuple."
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(3, 3)

    def forward(self, x):
        h = self.f(x)
        return h.tanh(), h.exp()


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.two = Twice()

    def forward(self, x):
        a, b = self.got = self.two(x)
        return a + b


class Residual(nn.Module):
    "The part's input is used beside it."
    def __init__(self, calls: int = 1):
        super().__init__()
        self.first, self.part, self.calls = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), calls

    def forward(self, x): return self.rest(self.first(x))

    def rest(self, x):
        for _ in range(self.calls):
            x = x + self.part(x)
        return x


def in_place() -> TracedModel:
    return TracedModel(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)))


def loss(y): return (y ** 2).sum()


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


@pytest.fixture
def x(): return torch.rand(2, 3)


@pytest.mark.parametrize('bound', [-1e9, 1e9])
def test_a_gradient_beside_an_edit_under_a_condition(x, bound):
    "If the condition is false, both gradients are one tensor's; if it is true, the first is made of the second."
    m = TracedModel(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    with m.trace(x) as t:
        v = m[0].output
        first = v.grad
        with t.cond(v.mean() > bound):
            v.mul_(0.5)
        second = v.grad
        v.grad = second * 2
        loss(m.output).backward()
        got = first.clone().save()
    h = m._module[0](x).detach().requires_grad_()
    edited = bound < 0
    want, = torch.autograd.grad(loss((h * 0.5 if edited else h).tanh()), h)
    torch.testing.assert_close(got.value, 2 * want)


def test_a_gradient_beside_an_edit_of_another_entry(x):
    m = TracedModel(Pair())
    with m.trace(x):
        b = m.two.output[1]
        before = b.grad.save()
        m.two.output[0][:, 0] = 0.
        after = b.grad
        b.grad = after * 2
        loss(m.output).backward()
        doubled = before.clone().save()
    a, e = m._module.two(x)
    a = a.detach().clone()
    a[:, 0] = 0
    want = 2 * (a + e.detach())
    torch.testing.assert_close(before.value, want)
    torch.testing.assert_close(doubled.value, 2 * want)


def test_a_value_that_returns_itself_has_one_gradient(x):
    m = TracedModel(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    with m.trace(x):
        v = m[0].output
        w = m[0].output
        w += 1.
        of_v, of_w = v.grad, w.grad
        of_w[:, 1] = 7.
        loss(m.output).backward()
        got = of_v.clone().save()
    assert (got.value[:, 1] == 7).all() and (got.value[:, 0] != 7).all()


@pytest.mark.parametrize('ask', [False, True])
def test_a_value_that_is_read_later_is_what_it_was_before_the_model_wrote_to_it(x, ask):
    m = in_place()
    with m.trace(x):
        v = m[1].input
        if ask:
            g = v.grad.save()
        late = m[2].output
        late -= v
        out = m.output.save()
        loss(out).backward()
    h = m._module[0](x).detach().requires_grad_()
    want = m._module[2](h.relu()) - h
    torch.testing.assert_close(out.value, want)
    if ask:
        torch.testing.assert_close(g.value, torch.autograd.grad(loss(want), h)[0])


def test_a_gradient_edited_by_its_own_value(x):
    m = in_place()
    with m.trace(x):
        v = m[1].input
        g = v.grad
        g -= v
        got = v.grad.clone().save()
        loss(m.output).backward()
    h = m._module[0](x).detach().requires_grad_()
    torch.testing.assert_close(got.value, torch.autograd.grad(loss(m._module[2](h.relu())), h)[0] - h.detach())


def test_what_a_prompt_saved_when_another_replaces_its_rows(x):
    m = in_place()
    with torch.no_grad(), m.trace() as t:
        with t.invoke(x):
            saved = m[1].input.save()
        with t.invoke(x + 1):
            m[1].input = m[1].input * 1.5
    torch.testing.assert_close(saved.value, m._module[0](x))


@pytest.mark.parametrize('calls', [1, 3])
@pytest.mark.parametrize('edit', ['in place', 'replaced'])
def test_the_gradient_of_a_prompt_whose_neighbour_edits_the_same_value(x, calls, edit):
    "Alone, the input of the part is the tensor that the residual uses, too."
    net = Residual(calls)
    m = TracedModel(net)
    with m.trace() as t:
        with t.invoke(x):
            if edit == 'in place':
                m.part.input.mul_(0.5)
            else:
                m.part.input = m.part.input * 0.5
        with t.invoke(x + 1):
            g = m.part[0].input.grad.save()
            loss(m.output).backward()
    with m.trace(x + 1):
        alone = m.part[0].input.grad.save()
        loss(m.output).backward()
    h = net.first(x + 1).detach().requires_grad_()
    torch.testing.assert_close(alone.value, torch.autograd.grad(loss(net.rest(h)), h)[0])
    torch.testing.assert_close(g.value, alone.value)


def test_what_follows_a_gradient_has_a_graph_of_its_own(x):
    m = TracedModel(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    with m.trace(x):
        g = m[0].output.grad
        v = m.output
        loss(v).backward(retain_graph=True)
        v[:, 0] = g.mean()
        second = m[0].output.grad.save()
        loss(m.output).backward()
    h = m._module[0](x).detach().requires_grad_()
    y = h.tanh()
    mean = torch.autograd.grad(loss(y), h, retain_graph=True)[0].mean()
    y = y.clone()
    y[:, 0] = mean
    torch.testing.assert_close(second.value, torch.autograd.grad(loss(y), h)[0])


def test_values_of_every_call_beside_the_gradients_of_these_calls(x):
    net = Residual(3)
    m = TracedModel(net)
    with m.trace(x):
        a = m.part.all().input
        g = a.grad
        b = m.part.all().output
        difference = (b - g).save()
        before = (a + g).save()
        b[:] = 0.
        loss(m.output).backward()
    h = net.first(x).detach().requires_grad_()
    want = torch.autograd.grad(loss(h), h)[0] # the edit makes every call's output 0, so the value stays as it is
    for k in range(3):
        torch.testing.assert_close(difference.value[k], (net.part(h) - want).detach())
        torch.testing.assert_close(before.value[k], (h + want).detach())


def test_a_slow_reader_is_overtaken_by_the_second_write_when_the_first_did_not_happen(x):
    m = TracedModel(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    with torch.no_grad(), m.trace(x) as t:
        v = m[0].output
        slow = v - m.output
        with t.cond(v.mean() > 1e9):
            v[:] = -0.5
        m[0].output += 0.5
        got = slow.save()
    h = m._module[0](x)
    torch.testing.assert_close(got.value, h - (h + 0.5).tanh())


@pytest.mark.parametrize('bound', [-1e9, 1e9])
def test_an_entry_that_nobody_edits_is_the_models_own(x, bound):
    m, given = TracedModel(Pair()), []
    handle = m._module.two.register_forward_hook(lambda module, args, out: given.extend(out))
    with torch.no_grad(), m.trace(x) as t:
        with t.cond(m.two.output[0].mean() > bound):
            m.two.output[0][:] = 0.
        m.output.save()
    handle.remove()
    assert [now is was for now, was in zip(m._module.got, given, strict=True)] == [bound > 0, True]
