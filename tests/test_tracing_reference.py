"""The reference executor is right where tracing was once wrong: each case is a graph, compared with torch."""
import pytest
import torch
from torch import nn

from tracing_programs import Nodes
from tracing_reference import Execution, Forbidden

ALL = {'slice': [None, None, None]}
COLUMN = {'tuple': [ALL, 0]}


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(3):
            x = self.f(x)
        return x


torch.manual_seed(0)
net, x, loop, y = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.rand(2, 3), Loop(), torch.rand(1, 4)
h = net[0](x).detach()


def site(b, path: str, call=0, prompt=None) -> dict: return b.add('site', path, 'output', call, prompt)
def save(b, value: dict, name: str): b.add('save', value, save=name)


def run(write, module, *prompts) -> dict:
    b = Nodes(None)
    write(b)
    return Execution(dict(kind='trace', nodes=b.nodes), module, prompts=prompts).run()


def backward(b, value: dict): b.add('torch.Tensor.backward', b.add('torch.Tensor.sum', value), retain_graph=True)


def test_a_read_before_an_edit_that_waits(): # F01
    def write(b):
        first = site(b, '0')
        save(b, b.add('operator.add', first, site(b, '1')), 'sum')
        b.add('operator.setitem', first, COLUMN, 0)
    edited = h.clone()
    edited[:, 0] = 0
    assert torch.equal(run(write, net, x)['sum'], h + net[1](edited))


def test_a_condition_at_every_call(): # F01c
    def write(b):
        every = site(b, 'f', call='all')
        b.guard = b.add('cond', b.add('operator.ge', b.add('torch.Tensor.sum', every), -1e9))
        b.add('operator.setitem', every, COLUMN, 0)
        b.guard = None
        save(b, site(b, ''), 'out')
    want = y
    for _ in range(3):
        want = loop.f(want).clone()
        want[:, 0] = 0
    assert torch.equal(run(write, loop, y)['out'], want)


@pytest.mark.parametrize('frozen', [False, True])
def test_two_backward_passes_in_written_order(frozen): # F02; F02b with frozen weights
    def write(b):
        v = site(b, '0')
        if frozen:
            b.add('torch.Tensor.requires_grad_', v, True)
        save(b, b.add('grad', v, 0), 'first')
        backward(b, site(b, ''))
        save(b, b.add('grad', v, 1), 'second')
        backward(b, b.add('operator.pow', v, 2))
    net.requires_grad_(not frozen)
    got = run(write, net, x)
    net.requires_grad_(True)
    torch.testing.assert_close(got['first'], net[1].weight.detach().sum(0).repeat(2, 1))
    torch.testing.assert_close(got['second'], 2 * h)


def test_what_the_model_writes_is_not_in_what_was_read(): # F08
    rectified = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    got = run(lambda b: save(b, site(b, '0'), 'before'), rectified, x)
    assert torch.equal(got['before'], rectified[0](x)) and (got['before'] < 0).any()


def test_gradients_of_every_call(): # F18
    def write(b):
        save(b, b.add('grad', site(b, 'f', call='all'), 0), 'grads')
        backward(b, site(b, ''))
    got = run(write, loop, y)['grads']
    assert len(got) == 3
    torch.testing.assert_close(got[2], torch.ones(1, 4))
    torch.testing.assert_close(got[1], loop.f.weight.detach().sum(0)[None])


def test_gradients_of_replacements(): # F22
    def write(b):
        v = site(b, '0')
        b.add('update', v, b.add('operator.mul', v, 1.))
        save(b, b.add('grad', v, 0), 'first')
        b.add('update', v, b.add('operator.mul', v, 3))
        save(b, b.add('grad', v, 0), 'second')
        backward(b, site(b, ''))
    got = run(write, net, x)
    torch.testing.assert_close(got['first'], 3 * got['second'])
    torch.testing.assert_close(got['second'], net[1].weight.detach().sum(0).repeat(2, 1))


def test_every_call_and_a_numbered_one(): # F27
    def after(b):
        b.add('operator.setitem', site(b, 'f', call=1), ALL, 0)
        save(b, site(b, 'f', call='all'), 'every')
    def before(b):
        save(b, site(b, 'f'), 'first')
        b.add('operator.setitem', site(b, 'f', call='all'), ALL, 0)
    assert not run(after, loop, y)['every'][1].any()
    assert torch.equal(run(before, loop, y)['first'], loop.f(y))


def test_what_comes_too_late_is_forbidden():
    def write(b): b.add('operator.setitem', site(b, '0'), ALL, b.add('torch.Tensor.sum', site(b, '1')))
    try:
        run(write, net, x)
    except Forbidden:
        return
    raise AssertionError('not found to be forbidden')


def test_a_prompt_takes_a_value_from_another():
    def write(b):
        first = site(b, '0', prompt=0)
        b.add('operator.setitem', first, ALL, 1.)
        second = site(b, '0', prompt=1)
        b.add('update', second, b.add('operator.add', second, b.add('torch.Tensor.sum', first)))
        save(b, site(b, '', prompt=1), 'out')
        save(b, site(b, '0'), 'both')
    got = run(write, net, x, x[:1])
    assert torch.equal(got['out'], net[1](h[:1] + 6.))
    assert torch.equal(got['both'], torch.cat([torch.ones(2, 3), h[:1] + 6.]))
