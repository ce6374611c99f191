"""What people do with a tracing library, compared with the same in plain torch.

Patching, steering, lenses, ablations, attribution, causal tracing, early stops, and modules of every awkward kind."""
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import ModelOutput

from transformer_experiments import tracing
from transformer_experiments.tracing import LanguageModel, TracedModel

V, C, H, N = 50, 32, 4, 3 # vocabulary, width, heads, layers


def spread(m: nn.Module, std: float = 0.2) -> nn.Module:
    for p in m.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=std)
    return m.eval()


def make_gpt2():
    torch.manual_seed(0)
    m = spread(
        GPT2LMHeadModel(
            GPT2Config(vocab_size=V, n_positions=64, n_embd=C, n_layer=N, n_head=H, bos_token_id=1, eos_token_id=0)
        )
    )
    m.generation_config.eos_token_id = None
    return m


def make_llama():
    torch.manual_seed(1)
    return spread(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=V,
                hidden_size=C,
                intermediate_size=48,
                num_hidden_layers=N,
                num_attention_heads=H,
                num_key_value_heads=2,
                max_position_embeddings=64,
                bos_token_id=1,
                eos_token_id=0,
            )
        )
    )


class Words:
    "The least that a tokenizer can be: numbers apart from each other."
    eos_token_id = pad_token_id = 0
    def encode(self, text): return [int(w) for w in text.split()]
    def decode(self, ids): return ' '.join(str(int(i)) for i in ids)


@pytest.fixture(scope='module')
def gpt2(): return make_gpt2()


@pytest.fixture
def lm():
    "Through the plain wrapper: these scenarios bring token ids."
    return TracedModel(make_gpt2())


A, B = torch.tensor([[3, 14, 15, 9, 26, 5]]), torch.tensor([[2, 7, 18, 28, 18, 2]])


def with_hooks(model, hooks: dict, *args, pre: dict | None = None, **kwargs):
    "Run plain with `{path: f(output)}` and `{path: f(first input)}`; what `f` returns replaces, unless it is None."
    def before(m, a, k, f):
        new = f(a[0])
        return None if new is None else ((new, *a[1:]), k)
    handles = [model.get_submodule(p).register_forward_hook(lambda m, a, o, f=f: f(o)) for p, f in hooks.items()]
    handles += [
        model.get_submodule(p).register_forward_pre_hook(lambda m, a, k, f=f: before(m, a, k, f), with_kwargs=True)
        for p, f in (pre or {}).items()
    ]
    try:
        return model(*args, **kwargs)
    finally:
        for h in handles:
            h.remove()


def near(got, want):
    torch.testing.assert_close(
        getattr(got, 'value', got), want, rtol=1e-5, atol=1e-5
    )  # float32, another order of sums at most


def at(t: torch.Tensor, position: int, new: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t[:, position] = new
    return t


def patched_difference(gpt2, layer: int, position: int, clean: torch.Tensor) -> torch.Tensor:
    "The difference of two answers' logits, with this position of the corrupted run's residual stream replaced."
    patch = {f'transformer.h.{layer}': lambda o: at(o, position, clean[:, position])}
    logits = with_hooks(gpt2, patch, B).logits
    return logits[0, -1, 4] - logits[0, -1, 9]


def test_activation_patching(gpt2, lm):
    "The clean run's residual stream is put into the corrupted run, at every layer and position."
    with torch.no_grad():
        clean = []
        for layer in range(N):
            with_hooks(gpt2, {f'transformer.h.{layer}': lambda o: clean.append(o.clone()) or None}, A)
        want = torch.stack([
            torch.stack([patched_difference(gpt2, layer, t, clean[layer]) for t in range(6)]) for layer in range(N)
        ])

        with lm.trace(A):
            hidden = [lm.transformer.h[layer].output.save() for layer in range(N)]
        got = torch.zeros(N, 6)
        for layer in range(N):
            for t in range(6):
                with lm.trace(B):
                    lm.transformer.h[layer].output[:, t] = hidden[layer][:, t]
                    logits = lm.lm_head.output
                    difference = (logits[0, -1, 4] - logits[0, -1, 9]).save()
                got[layer, t] = difference.value
    near(got, want)
    assert want.std() > 0.1
    near(
        got[:, -1][-1], (lambda l: l[0, -1, 4] - l[0, -1, 9])(gpt2(A).logits)
    )  # all of the last position of the last layer is the clean run


def test_steering_at_every_step(gpt2):
    lm = LanguageModel(make_gpt2(), tokenizer=Words())
    torch.manual_seed(5)
    vector = torch.randn(C) * 2
    with torch.no_grad(), lm.generate(A, max_new_tokens=6):
        lm.transformer.h[1].all().output[:] += vector
        out = lm.generator.output.save()
    tokens = A
    with torch.no_grad():
        for _ in range(6):
            tokens = torch.cat(
                [tokens, with_hooks(gpt2, {'transformer.h.1': lambda o: o + vector}, tokens).logits[:, -1:].argmax(-1)],
                1,
            )
        plain = gpt2.generate(A, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(out.value, tokens) and not torch.equal(tokens, plain)

    with torch.no_grad(), lm.generate(A, max_new_tokens=6): # from the third step on: two tokens are the model's own
        h = lm.transformer.h[1].next(2)
        h.output[:] += vector * 100
        steps = lm.lm_head.all().output[:, -1].save()
        out = lm.generator.output.save()
    assert torch.equal(out.value[:, :8], plain[:, :8]) and len(steps.value) == 6
    assert [int(s.argmax()) for s in steps.value] == out.value[0, 6:].tolist()


def test_a_step_that_never_comes(gpt2):
    lm = LanguageModel(make_gpt2(), tokenizer=Words())
    with pytest.raises(ValueError, match='3'):
        with torch.no_grad(), lm.generate(A, max_new_tokens=3):
            lm.lm_head.next(5).output.save()


def test_logit_lens_over_all_layers(gpt2, lm):
    with torch.no_grad():
        with lm.trace(A):
            lens = torch.stack(
                [lm.lm_head(lm.transformer.ln_f(block.output)).softmax(-1) for block in lm.transformer.h]
            ).save()
        hidden = gpt2(A, output_hidden_states=True).hidden_states
        want = [gpt2.lm_head(gpt2.transformer.ln_f(h)).softmax(-1) for h in hidden[1:-1]]
        want.append(gpt2(A).logits.softmax(-1)) # the last of transformers' hidden states has gone through ln_f
    near(lens, torch.stack(want))


@pytest.mark.parametrize('head', range(H))
def test_ablating_a_head(head):
    plain, lm = make_llama(), TracedModel(make_llama())
    with torch.no_grad():
        with lm.trace(A):
            heads = lm.model.layers[1].self_attn.o_proj.input.reshape(1, 6, H, C // H)
            heads[:, :, head] = 0
            lm.model.layers[1].self_attn.o_proj.input = heads.reshape(1, 6, C)
            logits = lm.lm_head.output.save()
        # without hooks: the columns of the projection that read the head are zero
        w = plain.model.layers[1].self_attn.o_proj.weight
        w.view(C, H, C // H)[:, head] = 0
        want = plain(A).logits
        near(logits, want)
        assert (want - make_llama()(A).logits).abs().max() > 0.01

        with lm.trace(A): # in place, through a view of the input
            lm.model.layers[1].self_attn.o_proj.input.view(1, 6, H, C // H)[:, :, head] = 0
            logits = lm.lm_head.output.save()
        near(logits, want)


def test_attribution_patching(gpt2, lm):
    "The first-order estimate of patching: (clean - corrupted) times the gradient, for all layers from two runs."
    def metric(logits): return logits[0, -1, 4] - logits[0, -1, 9]
    with torch.no_grad(), lm.trace(A):
        clean = [b.output.save() for b in lm.transformer.h]
    with lm.trace(B):
        corrupted, grads = [], []
        for block in lm.transformer.h:
            corrupted.append(block.output.save())
            grads.append(block.output.grad.save())
        metric(lm.lm_head.output).backward()
    triples = zip(clean, corrupted, grads, strict=True)
    got = torch.stack([((a.value - b.value) * g.value).sum(-1) for a, b, g in triples])

    want = []
    for layer in range(N): # by hand, layer by layer: the gradient at a leaf that stands for the layer's output
        ha = with_hooks_value(gpt2, layer, A)
        hb = with_hooks_value(gpt2, layer, B).requires_grad_()
        metric(with_hooks(gpt2, {f'transformer.h.{layer}': lambda o, leaf=hb: leaf}, B).logits).backward()
        want.append(((ha - hb) * hb.grad).sum(-1).detach())
    near(got.detach(), torch.stack(want))
    gpt2.zero_grad()


def with_hooks_value(model, layer: int, x) -> torch.Tensor:
    kept = []
    with torch.no_grad():
        with_hooks(model, {f'transformer.h.{layer}': lambda o: kept.append(o) or None}, x)
    return kept[0].detach().clone()


class SAE(nn.Module):
    def __init__(self, width: int, features: int):
        super().__init__()
        self.encode, self.decode = nn.Linear(width, features), nn.Linear(features, width)

    def forward(self, x): return self.decode(self.encode(x).relu())


def test_an_sae_attached_by_an_edit(gpt2, lm):
    torch.manual_seed(9)
    sae = SAE(C, 64)
    lm.transformer.h[1].sae = sae
    with lm.edit() as with_sae:
        hidden = lm.transformer.h[1].output
        lm.transformer.h[1].output = lm.transformer.h[1].sae(hidden, hook=True)
    with torch.no_grad():
        with with_sae.trace(A):
            features = with_sae.transformer.h[1].sae.encode.output.relu().save()
            logits = with_sae.lm_head.output.save()
        h = with_hooks_value(gpt2, 1, A)
        near(features, sae.encode(h).relu())
        near(logits, with_hooks(gpt2, {'transformer.h.1': sae}, A).logits)
        with with_sae.trace(A): # a feature is switched off inside the attached module
            with_sae.transformer.h[1].sae.encode.output[..., :32] = -1
            off = with_sae.lm_head.output.save()
        near(
            off,
            with_hooks(
                gpt2, {'transformer.h.1': lambda o: sae.decode(sae.encode(o).relu() * (torch.arange(64) >= 32))}, A
            ).logits,
        )
        with lm.trace(A):
            logits = lm.lm_head.output.save()
        near(logits, gpt2(A).logits)
        assert torch.equal(lm._module(A).logits, gpt2(A).logits)


def test_causal_tracing(gpt2):
    "Clean, corrupted, and corrupted with one state restored, in three invokes of one forward."
    lm = LanguageModel(make_gpt2(), tokenizer=Words())
    noise = torch.randn(1, 2, C, generator=torch.Generator().manual_seed(3))
    def corrupt(e): return torch.cat([e[:, :2] + noise, e[:, 2:]], 1)
    with torch.no_grad():
        clean, kept = gpt2(A).logits, []
        with_hooks(gpt2, {'transformer.h.1': lambda o: kept.append(o) or None}, A)
        corrupted = with_hooks(gpt2, {'transformer.wte': corrupt}, A).logits
        for position in range(6):
            def restore(o, t=position): return at(o, t, kept[0][:, t])
            want = with_hooks(gpt2, {'transformer.wte': corrupt, 'transformer.h.1': restore}, A).logits
            with lm.trace() as tracer:
                with tracer.invoke(A):
                    state = lm.transformer.h[1].output[:, position]
                    first = lm.lm_head.output.save()
                with tracer.invoke(A):
                    lm.transformer.wte.output[:, :2] += noise
                    second = lm.lm_head.output.save()
                with tracer.invoke(A):
                    lm.transformer.wte.output[:, :2] += noise
                    lm.transformer.h[1].output[:, position] = state
                    third = lm.lm_head.output.save()
            near(first, clean), near(second, corrupted), near(third, want)
    assert (clean - corrupted).abs().max() > 0.1


def test_gradients_of_embeddings(gpt2, lm):
    "Saliency: the gradient of a logit with respect to the token embeddings, and integrated over a path."
    with lm.trace(A):
        e = lm.transformer.wte.output
        saliency = (e.grad * e).sum(-1).save()
        lm.lm_head.output[0, -1, 7].backward()
    leaf = gpt2.transformer.wte(A).detach().requires_grad_()
    gpt2(inputs_embeds=leaf).logits[0, -1, 7].backward()
    near(saliency, (leaf.grad * leaf).sum(-1).detach())

    total = torch.zeros(1, 6, C)
    for alpha in (0.25, 0.5, 1.):
        with lm.trace(A):
            lm.transformer.wte.output = lm.transformer.wte.output * alpha
            grad = lm.transformer.wte.output.grad.save()
            lm.lm_head.output[0, -1, 7].backward()
        total += grad.value
    want = torch.zeros(1, 6, C)
    for alpha in (0.25, 0.5, 1.):
        leaf = (gpt2.transformer.wte(A) * alpha).detach().requires_grad_()
        gpt2(inputs_embeds=leaf).logits[0, -1, 7].backward()
        want += leaf.grad
    near(total, want)
    gpt2.zero_grad()


def test_several_backwards(gpt2, lm):
    with lm.trace(A):
        h = lm.transformer.h[0].output
        logits = lm.lm_head.output
        one = h.grad.save() # of the next backward
        logits[0, -1, 3].backward(retain_graph=True)
        two = h.grad.save()
        logits[0, -1, 8].backward()
    leaf = with_hooks_value(gpt2, 0, A).requires_grad_()
    logits = with_hooks(gpt2, {'transformer.h.0': lambda o: leaf}, A).logits
    g3, = torch.autograd.grad(logits[0, -1, 3], leaf, retain_graph=True)
    g8, = torch.autograd.grad(logits[0, -1, 8], leaf)
    near(one, g3), near(two, g8) # each pass's own, as a hook on the tensor sees it: not their sum


def counting(net: nn.Module) -> tuple:
    calls = []
    handles = [
        m.register_forward_pre_hook(lambda m, a, name=name: calls.append(name)) for name, m in net.named_modules()
    ]
    return calls, handles


def test_what_comes_after_the_last_site_does_not_run(lm):
    calls, handles = counting(lm._module)
    def ran(part): return sum(c.endswith(part) for c in calls)
    try:
        with lm.trace(A):
            h = lm.transformer.h[0].output.save()
        assert ran('h.0') == 1 and ran('h.1') == 0 and ran('ln_f') == 0 and ran('lm_head') == 0
        near(h, with_hooks_value(make_gpt2(), 0, A))

        calls.clear()
        with lm.trace(A):
            lm.transformer.h[0].output.save()
            lm.transformer.h[1].output.stop()
        assert ran('h.1') == 1 and ran('h.2') == 0

        calls.clear()
        with lm.trace(A):
            pass # an empty trace runs the whole model
        assert ran('lm_head') == 1 and ran('h.2') == 1

        calls.clear()
        with lm.trace(A):
            lm.transformer.h[0].output.save()
            lm.output.save() # the output is asked for
        assert ran('lm_head') == 1

        calls.clear()
        with lm.trace(A):
            lm.transformer.h[1].mlp.input.save() # an input: the module itself needs not run
        assert ran('h.1.mlp.act') == 0 and ran('h.0.mlp') == 1
    finally:
        for handle in handles:
            handle.remove()


def test_a_site_behind_a_stop_is_an_error_only_when_it_is_read(lm):
    with lm.trace(A):
        late = lm.transformer.h[2].output.save()
        early = lm.transformer.h[0].output.save()
        lm.transformer.h[0].output.stop()
    assert early.shape == (1, 6, C)
    with pytest.raises(ValueError, match='stop'):
        late.value.sum()


# Modules of every awkward kind

@dataclass
class Result(ModelOutput):
    hidden: torch.Tensor | None = None
    extra: tuple | None = None


@dataclass
class Plain:
    hidden: torch.Tensor
    scale: float


class Tuples(nn.Module):
    def forward(self, x): return x * 2, (x + 1, x - 1), 'said'


class KwargsOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, *, x, scale=1., shift=None): return self.linear(x) * scale + (0 if shift is None else shift)


class Dicts(nn.Module):
    def forward(self, x): return {'a': x.sin(), 'b': [x.cos(), x.tan()]}


class Odd(nn.Module):
    "A module of each kind: tuple, keywords only, called twice (in two places of the tree), dictionary, dataclasses."
    def __init__(self):
        super().__init__()
        self.tuples, self.kwargs, self.dicts, self.shared = Tuples(), KwargsOnly(), Dicts(), nn.Linear(4, 4)
        self.tied = self.shared
        self.result, self.plain = MakeResult(), MakePlain()

    def forward(self, x):
        a, (b, c), _ = self.tuples(x)
        d = self.kwargs(x=a, scale=0.5, shift=b)
        e = self.shared(self.tied(d) + c)
        f = self.dicts(e)
        r = self.result(f['a'] + f['b'][1])
        p = self.plain(r.hidden + r.extra[0])
        return p.hidden * p.scale


class MakeResult(nn.Module):
    def forward(self, x): return Result(hidden=x + 1, extra=(x * 3,))


class MakePlain(nn.Module):
    def forward(self, x): return Plain(x.tanh(), 0.5)


def unchanged(value): return value
def all_unchanged(*values): return values


def odd(x, net, tuples=all_unchanged, d_=unchanged, first=unchanged, second=unchanged, dicts=all_unchanged,
        result=all_unchanged, plain=unchanged) -> torch.Tensor:
    "The same by hand, with a place for an edit behind each module."
    a, b, c = tuples(x * 2, x + 1, x - 1)
    d = d_(F.linear(a, net.kwargs.linear.weight, net.kwargs.linear.bias) * 0.5 + b)
    t = first(F.linear(d, net.shared.weight, net.shared.bias))
    e = second(F.linear(t + c, net.shared.weight, net.shared.bias))
    s, _, tan = dicts(e.sin(), e.cos(), e.tan())
    h, extra = result(s + tan + 1, (s + tan) * 3)
    return plain((h + extra).tanh()) * 0.5


@pytest.fixture
def strange():
    torch.manual_seed(2)
    net = Odd().requires_grad_(False)
    x = torch.randn(3, 4) * 0.3
    near(net(x), odd(x, net))
    return net, TracedModel(net), x


def test_tuple_outputs(strange):
    net, m, x = strange
    with m.trace(x):
        inner = m.tuples.output[1][0].clone().save()
        m.tuples.output[0][:, 0] = 7
        m.tuples.output[1][1][:] = 0
        word = m.tuples.output[2].save()
        out = m.output.save()
    near(inner, x + 1)
    assert word.value == 'said'
    near(out, odd(x, net, tuples=lambda a, b, c: (torch.cat([torch.full((3, 1), 7.), a[:, 1:]], 1), b, c * 0)))

    with m.trace(x): # the whole tuple replaced
        a, rest = m.tuples.output[0], m.tuples.output[1]
        m.tuples.output = (a * 3, rest, 'new')
        out = m.output.save()
    near(out, odd(x, net, tuples=lambda a, b, c: (a * 3, b, c)))


def test_keywords_only(strange):
    net, m, x = strange
    with m.trace(x):
        args, kwargs = m.kwargs.inputs[0].save(), m.kwargs.inputs[1].save()
        value = m.kwargs.inputs[1]['x'].clone().save()
        given = m.kwargs.input.clone().save() # the first tensor, here a keyword's
        m.kwargs.inputs[1]['x'][:, 1] = 2
        out = m.output.save()
    assert args.value == () and set(kwargs.value) == {'x', 'scale', 'shift'} and kwargs.value['scale'] == 0.5
    near(value, x * 2), near(given, x * 2)
    near(
        out,
        odd(x, net, tuples=lambda a, b, c: (torch.stack([a[:, 0], torch.full((3,), 2.0), a[:, 2], a[:, 3]], 1), b, c)),
    )

    with m.trace(x): # the inputs replaced, keywords and all
        old = m.kwargs.inputs[1]['x']
        m.kwargs.inputs = ((), {'x': old, 'scale': 2., 'shift': None})
        out = m.output.save()
    near(out, odd(x, net, d_=lambda d: F.linear(x * 2, net.kwargs.linear.weight, net.kwargs.linear.bias) * 2))


def test_a_model_called_with_keywords():
    torch.manual_seed(2)
    net = KwargsOnly().requires_grad_(False)
    m, x = TracedModel(net), torch.randn(2, 4)
    with m.trace(x=x, scale=3.):
        inner = m.linear.output.save()
        out = m.output.save()
    near(inner, net.linear(x)), near(out, net(x=x, scale=3.))


def test_a_module_that_runs_twice(strange):
    net, m, x = strange
    W, b = net.shared.weight, net.shared.bias
    with m.trace(x):
        one = m.shared.output.clone().save()
        two = m.shared.next().output.clone().save()
        out = m.output.save()
    kept = []
    odd(x, net, first=lambda t: kept.append(t) or t, second=lambda t: kept.append(t) or t)
    near(one, kept[0]), near(two, kept[1]), near(out, net(x))

    with m.trace(x): # only the second call
        m.shared.next().output[:] = 0.25
        out = m.output.save()
    near(out, odd(x, net, second=lambda t: torch.full_like(t, 0.25)))

    with m.trace(x): # all calls
        m.shared.all().output[:] *= 2
        both = m.shared.all().output.save()
        out = m.output.save()
    near(out, odd(x, net, first=lambda t: t * 2, second=lambda t: t * 2))
    assert len(both.value) == 2
    assert W is m._module.tied.weight and b is m._module.shared.bias

    with pytest.raises(ValueError, match='2'): # it ran twice, not three times
        with m.trace(x):
            m.shared.next(2).output.save()


def test_dictionaries_and_dataclasses(strange):
    net, m, x = strange
    with m.trace(x):
        a = m.dicts.output['a'].clone().save()
        m.dicts.output['b'][1][:] = 0.5
        m.dicts.output['a'] = m.dicts.output['a'] * 2
        hidden = m.result.output.hidden.clone().save()
        m.result.output.extra[0][:, 0] = 1
        m.plain.output.hidden[:, 3] = -1
        scale = m.plain.output.scale.save()
        out = m.output.save()
    seen = {}
    def result(h, e):
        seen['hidden'] = h
        return h, torch.cat([torch.ones(3, 1), e[:, 1:]], 1)
    def dicts(s, c, t):
        seen['a'] = s
        return s * 2, c, torch.full_like(t, 0.5)
    want = odd(x, net, dicts=dicts, result=result, plain=lambda h: torch.cat([h[:, :3], torch.full((3, 1), -1.)], 1))
    near(a, seen['a']), near(hidden, seen['hidden']), near(out, want)
    assert scale.value == 0.5


def test_outputs_of_transformers_models(gpt2, lm):
    with torch.no_grad(), lm.trace(A, output_hidden_states=True, use_cache=False):
        logits = lm.output.logits.save()
        by_key = lm.output['logits'].save()
        hidden = lm.output.hidden_states[1].save()
        whole = lm.output.save()
    want = gpt2(A, output_hidden_states=True)
    near(logits, want.logits), near(by_key, want.logits), near(hidden, want.hidden_states[1])
    assert type(whole.value) is type(want)

    with torch.no_grad(), lm.trace(A):
        lm.output.logits[:, -1] = 0
        out = lm.output.logits.save()
    assert not out.value[:, -1].any() and torch.equal(out.value[:, :-1], want.logits[:, :-1])


# What an edit touches, and what it does not

class Residual(nn.Module):
    "A value with several readers: an edit of what one module receives is not an edit of the others'."
    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4), nn.Identity()

    def forward(self, x):
        h = self.stem(x)
        return h + self.left(h) + self.right(h) * 10


@pytest.fixture
def residual():
    torch.manual_seed(4)
    net = Residual().requires_grad_(False)
    return net, TracedModel(net), torch.randn(2, 4)


def test_an_edited_input_is_the_modules_own(residual):
    net, m, x = residual
    h = net.stem(x)
    with m.trace(x):
        m.left.input[:, 0] = 5
        out = m.output.save()
    changed = torch.cat([torch.full((2, 1), 5.), h[:, 1:]], 1)
    near(out, h + net.left(changed) + h * 10)
    with m.trace(x):
        m.stem.output[:, 0] = 5 # an output: what all of its callers receive
        out = m.output.save()
    near(out, changed + net.left(changed) + changed * 10)
    with m.trace(x):
        m.right.output[:] = 0 # Identity hands on its input; the input's other readers keep theirs
        out = m.output.save()
    near(out, h + net.left(h))


def test_the_users_tensors_stay_as_they_are(residual):
    net, m, x = residual
    mine, before = torch.ones(2, 4), x.clone()
    with m.trace(x):
        m.stem.input[:] = 9
        m.left.output = mine
        m.left.output[:, 0] = 3
        out = m.output.save()
    assert torch.equal(x, before) and torch.equal(mine, torch.ones(2, 4))
    h = net.stem(torch.full_like(x, 9.))
    near(out, h + torch.tensor([3., 1, 1, 1]) + h * 10)
    weight = net.left.weight.clone()
    with m.trace(x):
        m.output.save()
    assert torch.equal(net.left.weight, weight)


def test_order_of_writing_on_one_value_and_order_of_running_between_sites(residual):
    net, m, x = residual
    with m.trace(x):
        out = m.output.save()              # named first, runs last
        m.left.output[:] += 1
        m.stem.output[:] *= 2              # named later, runs earlier
        m.left.output[:] *= 3              # after the += of the same site
        early = m.stem.output.clone().save()
        m.stem.output[:] += 1
        late = m.stem.output.clone().save()
    h = net.stem(x)
    near(early, h * 2), near(late, h * 2 + 1)
    h = h * 2 + 1
    near(out, h + (net.left(h) + 1) * 3 + h * 10)


def test_a_trace_that_changes_nothing_is_bitwise_the_forward(lm, strange):
    plain = make_gpt2()(A).logits
    with lm.trace(A):
        for name, _ in lm._module.named_modules():
            if name.endswith(('mlp', 'ln_1', 'attn', 'lm_head')):
                site = lm
                for part in name.split('.'):
                    site = site[int(part)] if part.isdigit() else getattr(site, part)
                site.output.save(), site.input.save()
        out = lm.output.logits.save()
    assert torch.equal(out.value, plain)
    net, m, x = strange
    with m.trace(x) as tracer:
        m.tuples.output[0].save(), m.dicts.output['a'].save(), m.output.save('out')
    assert torch.equal(m.run(tracer.graph, x)['out'], net(x))
    for row in (x * 2, x[:1], torch.randn(17, 4)):
        assert torch.equal(m.run(tracer.graph, row)['out'], net(row))


# Bad input: each is refused in words, where it is written

def refused(*kinds, match=''): return pytest.raises(kinds or (ValueError, TypeError, AttributeError), match=match)


def test_bad_input(strange):
    net, m, x = strange
    with refused(match='tuples'):                       # near names
        with m.trace(x):
            m.tuple.output.save()
    for use in (bool, int, float, iter, lambda p: {p: 1}, lambda p: range(3)[p], list, lambda p: 1 if p else 2):
        with refused(ValueError, TypeError, match='cond|iter|apply|save'):
            with m.trace(x):
                use(m.shared.output.sum())
    with m.trace(x):
        foreign = m.shared.output
    with refused(ValueError, match='trace|save'):
        with m.trace(x):
            (m.shared.output + foreign).save()
    with refused(ValueError, match='invoke'):
        with m.trace(x) as tracer:
            with tracer.invoke(x):
                m.output.save()
    with refused(ValueError, TypeError, match='input|invoke'):
        with m.trace():
            m.output.save()
    with refused(RuntimeError, ValueError, match='shared'):
        with m.trace(x):
            (m.shared.output @ torch.ones(7, 7)).save()
    with refused(ValueError, RuntimeError, match='shared'):
        with m.trace(x):
            m.shared.output[:] = torch.ones(3, 9)


def test_a_trace_that_is_over_takes_no_more(strange):
    net, m, x = strange
    with m.trace(x) as tracer:
        h = m.shared.output.save()
    before = tracer.graph.to_json()
    lines = [
        h.stop,
        lambda: h.update(0),
        lambda: tracer.log(1),
        lambda: tracer.cond(True),
        lambda: tracer.apply(len, [1]) and tracer.log(2),
    ]
    for late in lines:
        with refused(ValueError, match='over'):
            late()
    assert tracer.graph.to_json() == before
    with refused(ValueError, match='tokenizer'):
        with m.trace(x, invoker_args={'add_special_tokens': False}):
            m.output.save()


def test_names_of_saved_values_are_all_different(strange):
    net, m, x = strange
    with m.trace(x) as tracer:
        values = [(m.shared.output + i).save(name) for i, name in enumerate([None, None, 'operator.add_3', None, None])]
    found = m.run(tracer.graph, x)
    assert len(found) == 5 and all(any(torch.equal(v.value, f) for f in found.values()) for v in values)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.never = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x): return self.used(x)


def test_a_site_that_never_ran_is_an_error_that_names_it():
    m, x = TracedModel(Unused()), torch.randn(2, 4)
    with refused(ValueError, match='never'):
        with m.trace(x):
            m.never.output.save()
    with refused(ValueError, match='never'):
        with m.trace(x):
            m.never.output[:] = 0
            m.output.save()


def test_the_report_says_what_fired_and_how_much_it_changed(residual):
    net, m, x = residual
    with m.trace(x) as tracer:
        m.stem.output[:, 1] += 2.5
        m.left.output.save()
        m.output.save()
    said = str(tracer.report)
    assert 'stem' in said and 'left' in said and '2.5' in said


def test_values_between_models_in_a_session(residual):
    net, m, x = residual
    torch.manual_seed(8)
    other = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=nn.Linear(4, 2))).requires_grad_(False)
    n = TracedModel(other)
    with m.session():
        with m.trace(x):
            h = m.stem.output
        with n.trace(x):
            n.a.output = h * 2
            out = n.output.save()
        with m.trace(x):
            m.left.output[:, :2] = out
            last = m.output.save()
    near(out, other.b(net.stem(x) * 2))
    h = net.stem(x)
    near(last, h + torch.cat([other.b(h * 2), net.left(h)[:, 2:]], 1) + h * 10)


def test_a_loop_that_adds_up(residual):
    net, m, x = residual
    xs = [x, x * 2, x - 1]
    with m.session() as session:
        total = tracing.list().save()
        best = tracing.float(-1e9).save()
        with session.iter(xs) as row:
            with m.trace(row):
                s = m.output.sum()
            total.append(s)
            with session.cond(s > best):
                best.update(s)
    want = [net(v).sum() for v in xs]
    for a, b in zip(total.value, want, strict=True):
        near(a, b)
    near(torch.as_tensor(best.value), max(want))


def test_a_condition_of_several_values_names_my_line(residual):
    net, m, x = residual
    with pytest.raises((ValueError, RuntimeError), match='test_tracing_scenarios'):
        with m.trace(x) as tracer:
            with tracer.cond(m.stem.output > 0):
                m.left.output[:] = 0
            m.output.save()


def test_why_a_value_of_a_session_is_not_there(residual):
    net, m, x = residual
    with m.session() as session:
        with m.trace(x):
            total = m.output.sum()
        with session.cond(total > 1e9):
            with m.trace(x):
                never = m.output.save()
        with session.cond(total < 1e9):
            with m.trace(x):
                there = m.output.save()
    near(there, net(x))
    with pytest.raises(ValueError, match='condition'):
        never.value.sum()


def test_scan_with_several_prompts():
    lm = LanguageModel(make_gpt2(), tokenizer=Words())
    with torch.no_grad(), lm.trace(scan=True, validate=True) as tracer:
        with tracer.invoke('3 4 5'):
            one = lm.transformer.h[0].output.shape
        with tracer.invoke('5 6 7'):
            two = lm.lm_head.output.shape
            out = lm.lm_head.output.save()
    assert tuple(one) == (1, 3, C) and tuple(two) == (1, 3, V) == tuple(out.value.shape)
    with pytest.raises(ValueError, match='padded to 5'): # the shape that was read is not what the run would have had
        with lm.trace(scan=True) as tracer:
            with tracer.invoke('3 4 5'):
                assert lm.transformer.h[0].output.shape == (1, 3, C)
            with tracer.invoke('3 4 5 6 7'):
                lm.lm_head.output.save()
    with torch.no_grad(), lm.trace(validate=True) as tracer: # nobody reads a shape
        with tracer.invoke('3 4 5'):
            out = lm.lm_head.output.save()
        with tracer.invoke('3 4 5 6 7'):
            lm.lm_head.output.save()
    assert out.value.shape == (1, 5, V)
    with pytest.raises(RuntimeError):
        with lm.trace(scan=True, validate=True) as tracer:
            with tracer.invoke('3 4 5'):
                lm.lm_head.output @ torch.ones(3, 3)
                raise AssertionError('it should have been raised by the line above')


@pytest.mark.parametrize('before', [True, False])
def test_a_scan_in_a_session_writes_nothing_down(before):
    """Tensors that the model's own code makes are not part of the graph.

    The model was scanned before, or is scanned there."""
    llm = LanguageModel('tinyshakespeare')
    if before:
        with llm.scan('A'):
            pass
    with llm.session():
        with llm.trace('A', scan=not before):
            width = llm.lm_head.output.shape[-1]
            logits = llm.lm_head.output.save()
    assert width == logits.value.shape[-1] == 65


# What is kept from one run to the next

def small() -> tuple[nn.Module, TracedModel]:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).requires_grad_(False)
    return net, TracedModel(net)


def written(model: TracedModel, x: torch.Tensor, index: tuple, value: object, stop: bool = False):
    with model.trace(x) as tracer:
        h = model[0].output
        h[index] = value
        out = h.save('h') if stop else model.output.save('out')
    return tracer, out


def expected(net: nn.Module, x: torch.Tensor, index: tuple, value: object) -> tuple:
    "What `written` gives, in plain torch: with a stop, and without."
    h = net[0](x)
    h[index] = value
    return h, net[1](h)


STEPS = ['number', 'tensor', 'wrong', 'stop', 'replace', 'clear', 'run', 'edit', 'nested']
step = st.tuples(st.sampled_from(STEPS), st.integers(0, 3), st.integers(-5, 5), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(step, max_size=12))
def test_nothing_of_a_run_is_left_for_the_next(steps):
    """Graphs give what they give on a model that was never traced.

    They share an order of lines, and differ in constants, inputs, models and line numbers."""
    pairs, graphs = [small(), small()], []
    for i, (kind, column, number, rows) in enumerate(steps):
        net, model = pairs[i % 2]
        x = torch.randn(rows, 4)
        index, value = (slice(None), column), torch.full((rows,), float(number)) if kind == 'tensor' else number
        if kind == 'wrong':
            with pytest.raises(Exception, match='test_tracing_scenarios.py') as failed:
                written(model, x, (slice(None), 4 + column), number)
            assert 'index' in str(failed.value)
        elif kind == 'replace':
            net[0] = nn.Linear(4, 4).requires_grad_(False)
        elif kind == 'clear':
            net[0]._forward_hooks, net[1]._forward_hooks = OrderedDict(), OrderedDict() # as people take all hooks away
        elif kind == 'run' and graphs:
            graph, at, put = graphs[number % len(graphs)]
            assert torch.equal(model.run(graph, x)['out'], expected(net, x, at, put)[1])
        elif kind == 'edit':
            with model.edit() as edited:
                edited[1].output[:, 0] = 1
            want = expected(net, x, index, number)[1]
            want[:, 0] = 1
            assert torch.equal(written(edited, x, index, number)[1].value, want)
        elif kind == 'nested': # the same lines on the same model while they run
            def inner(h, lines=(model, x, index, number)): return written(*lines)[1].value
            with model.trace(x):
                h = model[0].output
                h[index] = number
                out, twice = model.output.save('out'), tracing.apply(inner, h).save('inner')
            assert torch.equal(out.value, expected(net, x, index, number)[1]) and torch.equal(twice.value, out.value)
        else:
            tracer, got = written(model, x, index, value, kind == 'stop')
            assert torch.equal(got.value, expected(net, x, index, value)[kind != 'stop'])
            row, = (r for r in tracer.report if r.site == '0.output')
            assert (row.fired, row.of) == (1, rows * 4) and row.touched <= rows
            if kind == 'number':
                graphs.append((tracer.graph, index, number))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
