"""Tracing with what people bring.

Models that count positions in their own ways, masks, caches and what tokenizers give; Python that has no meaning on a
proxy; models that a scan would change; names that are the model's and ours."""
import builtins
import collections
import contextlib
import copy
import functools
import gc
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import BatchEncoding, DynamicCache

from transformer_experiments import tracing
from transformer_experiments.tracing import LanguageModel, TracedModel
from transformer_experiments.tracing.state import STATE
from transformer_experiments.tracing.padding import find_rule

V = 64
SMALL = dict(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
)
SEQ2SEQ = dict(
    vocab_size=V,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    max_position_embeddings=64,
    decoder_start_token_id=2,
)
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=0)
LLAMA = SMALL | dict(num_key_value_heads=2, bos_token_id=1, eos_token_id=0)
MAMBA = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0, bos_token_id=0, eos_token_id=0
)


def make(name: str, **config) -> nn.Module:
    "A tiny model with weights that make positions and neighbours count."
    family = (
        name.removesuffix('ForCausalLM')
        .removesuffix('ForMaskedLM')
        .removesuffix('ForConditionalGeneration')
        .removesuffix('LMHeadModel')
    )
    torch.manual_seed(0)
    net = getattr(transformers, name)(getattr(transformers, f'{family}Config')(**config)).eval().requires_grad_(False)
    for p in net.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=.5 / math.sqrt(p.shape[-1]))
    return net


def language(net: nn.Module, tokenizer=None) -> LanguageModel:
    return LanguageModel(net, tokenizer=tokenizer or object())


def near(got, want): torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * max(1., float(want.abs().max())))


# Positions (F03, F26)

ONE_LENGTH = {
    'RobertaForMaskedLM': SMALL,
    'XLMRobertaForMaskedLM': SMALL,
    'CamembertForMaskedLM': SMALL,
    'MPNetForMaskedLM': SMALL,
    'LongformerForMaskedLM': SMALL | dict(attention_window=4),
    'EsmForMaskedLM': SMALL | dict(pad_token_id=1, mask_token_id=3),
    'IBertForMaskedLM': SMALL,
    'BertForMaskedLM': SMALL,
    'DistilBertForMaskedLM': dict(vocab_size=V, dim=32, n_layers=1, n_heads=2, hidden_dim=32),
    'OPTForCausalLM': SMALL | dict(ffn_dim=32, word_embed_proj_dim=32),
    'XGLMForCausalLM': dict(vocab_size=V, d_model=32, num_layers=1, attention_heads=2, ffn_dim=32),
    'BartForCausalLM': SEQ2SEQ,
    'MBartForCausalLM': SEQ2SEQ,
    'BioGptForCausalLM': SMALL,
    'GPT2LMHeadModel': GPT2,
    'LlamaForCausalLM': LLAMA,
    'RobertaForCausalLM': SMALL | dict(is_decoder=True),
    'MambaForCausalLM': MAMBA,
}


@pytest.fixture(scope='module', params=ONE_LENGTH)
def family(request): return request.param, make(request.param, **ONE_LENGTH[request.param])


@torch.no_grad()
def test_a_full_mask_changes_nothing(family):
    _, net = family
    x = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    inputs = dict(input_ids=x, attention_mask=torch.ones_like(x))
    assert torch.equal(language(net).trace(inputs, trace=False).logits, net(**inputs).logits)


@torch.no_grad()
def test_a_hole_and_padding_behind_change_nothing(family):
    _, net = family
    x = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    for mask in ([1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]):
        inputs = dict(input_ids=x, attention_mask=torch.tensor([mask] * 2))
        assert torch.equal(language(net).trace(inputs, trace=False).logits, net(**inputs).logits)


@torch.no_grad()
def test_prompts_of_unlike_length_are_what_they_are_alone_or_refused(family):
    name, net = family
    m, prompts = language(net), [[7, 8, 9, 10, 11, 12], [20, 21, 22], [30]]
    outs = []
    try:
        with m.trace() as tracer:
            for p in prompts:
                with tracer.invoke(p):
                    outs.append(m.output.logits.save())
    except ValueError as e:
        assert 'padded prompts' in str(e) and name in ('BartForCausalLM', 'MBartForCausalLM')
        return
    for p, out in zip(prompts, outs, strict=True):
        near(out.value[:, -len(p):], net(torch.tensor([p])).logits)


@torch.no_grad()
def test_a_hole_in_a_prompt_among_others_is_where_it_is_alone(family):
    name, net = family
    if name in ('BartForCausalLM', 'MBartForCausalLM'):
        pytest.skip('takes no prompts of unlike length')
    m, p = language(net), dict(input_ids=torch.arange(6)[None] + 10, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1]]))
    with m.trace() as tracer:
        with tracer.invoke(p):
            hole = m.output.logits.save()
        with tracer.invoke([5, 6, 7, 8, 9, 10, 11, 12]):
            pass
    keep = p['attention_mask'][0].bool()
    near(hole.value[0, -6:][keep], net(**p).logits[0][keep])


def test_rules_of_families():
    "What reading transformers' source says, the question finds."
    counts = {
        name: find_rule(make(name, **ONE_LENGTH[name])).offset
        for name in (
            'RobertaForMaskedLM',
            'XLMRobertaForMaskedLM',
            'CamembertForMaskedLM',
            'MPNetForMaskedLM',
            'LongformerForMaskedLM',
            'EsmForMaskedLM',
            'IBertForMaskedLM',
        )
    }
    assert set(counts.values()) == {2}
    assert find_rule(make('RobertaForMaskedLM', **SMALL | dict(pad_token_id=4))).offset == 5
    opt = find_rule(make('OPTForCausalLM', **ONE_LENGTH['OPTForCausalLM']))
    assert (opt.count, opt.offset) == ('unmasked', 0)


NOBODY = {
    'RwkvForCausalLM': dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, context_length=32),
    'BartForConditionalGeneration': SEQ2SEQ,
    'FNetForMaskedLM': {k: v for k, v in SMALL.items() if k != 'num_attention_heads'},
    'BlenderbotForCausalLM': SEQ2SEQ,
}


@pytest.mark.parametrize('name', NOBODY)
@torch.no_grad()
def test_models_that_padding_changes_say_so_before_they_run(name):
    net = make(name, **NOBODY[name])
    m, ran = language(net), []
    more = dict(decoder_input_ids=torch.tensor([[2, 5]])) if 'Conditional' in name else {}
    with pytest.raises(ValueError, match='one by one'):
        with m.trace() as tracer:
            for p in ([7, 8, 9], [20]):
                with tracer.invoke(p, **more):
                    m.output.logits.save()
            net.register_forward_pre_hook(lambda *a: ran.append(STATE.running))
    assert not [r for r in ran if r is not None] # nothing but the question has run
    with m.trace() as tracer: # of one length they are right
        with tracer.invoke([7, 8], **more):
            a = m.output.logits.save()
        with tracer.invoke([20, 21], **more):
            b = m.output.logits.save()
    near(b.value, net(torch.tensor([[20, 21]]), **more).logits)
    near(a.value, net(torch.tensor([[7, 8]]), **more).logits)


@torch.no_grad()
def test_a_seq2seq_model_with_relative_positions_pads_its_encoder():
    net = make(
        'T5ForConditionalGeneration',
        vocab_size=V,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    m, start = language(net), torch.tensor([[0, 5]])
    with m.trace() as tracer:
        with tracer.invoke([7, 8, 9, 10], decoder_input_ids=start):
            pass
        with tracer.invoke([20, 21], decoder_input_ids=start + 1):
            b = m.output.logits.save()
    near(b.value, net(torch.tensor([[20, 21]]), decoder_input_ids=start + 1).logits)


class Wrapped(nn.Module):
    "Passes its keywords on."
    def __init__(self, net):
        super().__init__()
        self.net, self.config = net, net.config

    def forward(self, input_ids, **kwargs): return self.net(input_ids, **kwargs)


@pytest.mark.parametrize('name', ['RobertaForMaskedLM', 'GPT2LMHeadModel', 'MambaForCausalLM'])
@torch.no_grad()
def test_a_wrapper_that_passes_keywords_on(name):
    net = make(name, **ONE_LENGTH[name])
    m, outs = language(Wrapped(net)), []
    with m.trace() as tracer:
        for p in ([7, 8, 9, 10], [20, 21]):
            with tracer.invoke(p):
                outs.append(m.net.output.logits.save())
    near(outs[1].value[:, -2:], net(torch.tensor([[20, 21]])).logits)


@torch.no_grad()
def test_tokens_without_a_batch_axis():
    net = make('BertForMaskedLM', **SMALL)
    given = dict(
        input_ids=torch.tensor([5, 6, 7]),
        attention_mask=torch.ones(3, dtype=torch.long),
        token_type_ids=torch.tensor([0, 1, 1]),
    )
    near(language(net).trace(given, trace=False).logits, net(**{k: v[None] for k, v in given.items()}).logits)
    arrays = {k: v[None].numpy() for k, v in given.items()}
    near(language(net).trace(arrays, trace=False).logits, net(**{k: v[None] for k, v in given.items()}).logits)


def test_asking_leaves_a_model_as_it_was():
    net = make('RobertaForMaskedLM', **SMALL).train()
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    find_rule(net)
    assert net.training and all(m.training for m in net.modules()) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_asking_copies_no_weights():
    from transformer_experiments.tracing.restoring import _record
    frozen = nn.Linear(3, 3).requires_grad_(False)
    assert (
        _record(frozen.weight, True) is None
        and _record(torch.zeros(2**22 + 1), True) is None
        and _record(torch.zeros(3), True)
    )


def test_generating_from_prompts_that_transformers_would_misplace():
    net = make('RobertaForCausalLM', **SMALL | dict(is_decoder=True))
    with pytest.raises(ValueError, match='counts positions from 0'):
        language(net).generate([[5, 6, 7], [8]], trace=False, max_new_tokens=2)
    right = BatchEncoding(dict(input_ids=[[5, 6, 0]], attention_mask=[[1, 1, 0]]))
    with pytest.raises(ValueError, match='padding_side'):
        language(make('GPT2LMHeadModel', **GPT2)).generate(right, trace=False)


# A cache made by hand (F04)

CACHED = dict(GPT2LMHeadModel=GPT2, LlamaForCausalLM=LLAMA, OPTForCausalLM=ONE_LENGTH['OPTForCausalLM'])


@pytest.mark.parametrize('name, config', CACHED.items(), ids=CACHED)
@torch.no_grad()
def test_a_cache_made_by_hand(name, config):
    net = make(name, **config)
    m, x = language(net), torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    def cache(ids, **more):
        return net(ids, use_cache=True, past_key_values=DynamicCache(config=net.config), **more).past_key_values
    full = torch.ones_like(x)
    with m.trace(input_ids=x[:, -1:], past_key_values=cache(x[:, :-1]), attention_mask=full):
        out = m.output.logits.save()
    assert out.value.shape == (2, 1, V)
    near(out.value, net(x).logits[:, -1:])
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]) # one of them is padded on the left
    at = (padded.cumsum(-1) - 1).clamp(min=0)
    start = cache(x[:, :-1], attention_mask=padded[:, :-1], position_ids=at[:, :-1])
    with m.trace(input_ids=x[:, -1:], past_key_values=start, attention_mask=padded):
        out = m.output.logits.save()
    near(out.value[:1], net(x[:1, 2:]).logits[:, -1:])


@torch.no_grad()
def test_a_scan_leaves_a_cache_as_it_was():
    net = make('GPT2LMHeadModel', **GPT2)
    m, x = language(net), torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    past = net(x[:, :-1], use_cache=True).past_key_values
    with m.trace(input_ids=x[:, -1:], past_key_values=past, attention_mask=torch.ones_like(x), scan=True):
        assert m.output.logits.shape == (2, 1, V)
        out = m.output.logits.save()
    near(out.value, net(x).logits[:, -1:])
    assert past.get_seq_length() == 7 # read on once, not twice


@pytest.mark.parametrize('prompt', [[[[1, 2]]], [1.5, 2.], [[1.5, 2.]], [[1], []], [None], [{1: 2}]])
def test_what_is_no_prompt(prompt):
    with pytest.raises(ValueError, match='prompt'):
        language(make('GPT2LMHeadModel', **GPT2)).trace(prompt, trace=False)


def test_a_cache_among_several_prompts_is_refused():
    m = language(make('GPT2LMHeadModel', **GPT2))
    mask = torch.ones(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match='cache'):
        with m.trace() as tracer:
            for _ in range(2):
                with tracer.invoke(dict(input_ids=torch.tensor([[5]]), attention_mask=mask)):
                    m.output.logits.save()


# What tokenizers give, and arguments of each prompt (F23)

@torch.no_grad()
def test_lists_of_unlike_length_go_in():
    net = make('BertForMaskedLM', **SMALL)
    m = language(net)
    given = BatchEncoding(
        dict(input_ids=[[5, 6, 7], [8, 9]], token_type_ids=[[0, 1, 1], [1, 1]], attention_mask=[[1, 1, 1], [1, 1]])
    )
    for form in (given, dict(given), {k: v for k, v in given.items() if k != 'attention_mask'}):
        got = m.trace(form, trace=False).logits
        near(got[0], net(torch.tensor([[5, 6, 7]]), token_type_ids=torch.tensor([[0, 1, 1]])).logits[0])
        near(got[1, 1:], net(torch.tensor([[8, 9]]), token_type_ids=torch.tensor([[1, 1]])).logits[0])
    near(m.trace(**given, trace=False).logits, got)
    near(
        m.trace(BatchEncoding(dict(input_ids=[5, 6, 7], attention_mask=[1, 1, 1])), trace=False).logits,
        net(torch.tensor([[5, 6, 7]])).logits,
    )
    with pytest.raises(ValueError, match='rows of bbox'):
        m.trace(dict(input_ids=[[5, 6], [7]], bbox=[[1, 2], [3]]), trace=False)


@torch.no_grad()
def test_every_argument_of_a_prompt_is_its_own():
    net = make('BertForMaskedLM', **SMALL)
    m, prompts = (
        language(net),
        [dict(input_ids=[[5, 6, 7]], token_type_ids=[[0, 1, 1]]), dict(input_ids=[[8, 9]], token_type_ids=[[1, 1]])],
    )
    outs = []
    with m.trace() as tracer:
        for p in prompts:
            with tracer.invoke(p):
                outs.append(m.output.logits.save())
    for p, out in zip(prompts, outs, strict=True):
        want = net(**{k: torch.tensor(v) for k, v in p.items()}).logits
        near(out.value[:, -want.shape[1]:], want)
    refused = [
        ('bring the same arguments', [prompts[0], dict(input_ids=[[8, 9]])]),
        ("can't have a output_attentions each", [p | dict(output_attentions=bool(i)) for i, p in enumerate(prompts)]),
        ('must be a tensor with 1 row', [p | dict(encoder_hidden_states=torch.ones(3, 2, 32)) for p in prompts]),
    ]
    for message, given in refused:
        with pytest.raises(ValueError, match=message):
            with m.trace() as tracer:
                for p in given:
                    with tracer.invoke(p):
                        m.output.logits.save()


def words(side='right'):
    from tokenizers import Tokenizer, models, pre_tokenizers
    t = Tokenizer(models.WordLevel({f'w{i:02}': i for i in range(V)}, unk_token='w02'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, unk_token='w02', pad_token='w00', padding_side=side)


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('name', ['GPT2LMHeadModel', 'LlamaForCausalLM', 'RobertaForMaskedLM'])
@torch.no_grad()
def test_a_tokenizers_padding_keeps_its_mask(name, side):
    net = make(name, **ONE_LENGTH[name])
    m, text, ids = language(net, words(side)), 'w05 w06 w07', torch.tensor([[5, 6, 7]])
    options = dict(padding='max_length', max_length=18)
    where = slice(-3, None) if side == 'left' else slice(0, 3)
    with m.trace(text, invoker_args=options):
        alone = m.output.logits.save()
    with m.trace() as tracer:
        with tracer.invoke(text, **options):
            one = m.output.logits.save()
        with tracer.invoke(' '.join(['w09'] * 20)):
            pass
    assert alone.value.shape[1] == 18
    near(alone.value[:, where], net(ids).logits)
    near(one.value[:, -18:][:, where], net(ids).logits)
    near(m.trace(text, invoker_args=dict(return_tensors='pt'), trace=False).logits, net(ids).logits)


def test_no_argument_of_a_prompt_is_swallowed():
    m, x = language(make('LlamaForCausalLM', **LLAMA)), torch.tensor([[5, 6, 7]])
    with m.trace() as tracer:
        with tracer.invoke(x, output_hidden_states=True):
            out = m.output.save() # by the model's **kwargs
        with tracer.invoke(x[:, :2], output_hidden_states=True):
            pass
    assert len(out['hidden_states']) == 3
    with pytest.raises(ValueError, match='atention_mask would be for a tokenizer'):
        with m.trace() as tracer:
            with tracer.invoke(x, atention_mask=torch.ones_like(x)):
                m.output.save()
    with pytest.raises(ValueError, match='would be for a tokenizer'):
        m.trace(x, invoker_args=dict(max_length=2), trace=False)
    class Words:
        def encode(self, text): return [int(w) for w in text.split()]
    with pytest.raises(ValueError, match='takes max_length alone; got padding'):
        LanguageModel(m._module, tokenizer=Words()).trace(
            '5 6 7', invoker_args=dict(padding='max_length', max_length=18), trace=False
        )


def test_generating_from_features_and_pixels():
    config = transformers.WhisperConfig(
        vocab_size=V,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    net = transformers.WhisperForConditionalGeneration(config).eval()
    m, sound = language(net), torch.randn(1, 8, 20)
    for given in (dict(input_features=sound), None):
        with m.generate(*(() if given else (sound,)), max_new_tokens=4, **(given or {})):
            out, states = m.generator.output.save(), m.model.encoder.output[0].save()
        assert torch.equal(out.value, net.generate(input_features=sound, max_new_tokens=4)) and states.value.shape == (
            1,
            10,
            32,
        )
    other = torch.randn(1, 8, 20)
    with m.generate(max_new_tokens=4) as tracer:
        with tracer.invoke(sound):
            a = m.model.encoder.output[0].save()
        with tracer.invoke(other):
            b = m.model.encoder.output[0].save()
    with torch.no_grad():
        near(b.value, net.model.encoder(other)[0])
    near(a.value, states.value)


def test_a_name_that_is_nearly_registered():
    for name in ('SmolLM2', 'tiny-shakespeare', 'smollm'):
        with pytest.raises(ValueError, match="did you mean '(smollm2|tinyshakespeare)'"):
            LanguageModel(name)


# What Python asks at once (F28), contexts (F19)

class Attn(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(3, 3)

    def forward(self, x): return self.f(x), None


def pair(): return TracedModel(nn.Sequential(Attn())), torch.rand(2, 3)


def by_match(o):
    match o:
        case tuple():
            return o[0]
        case _:
            return o


def by_mapping(o): return o if not isinstance(o, collections.abc.Mapping) else o['x']


def unpacked(o):
    a, b = o
    return a


alias = isinstance
PERCENT = 'the value %s'
QUESTIONS = {
    'isinstance': lambda o: o[0] if isinstance(o, tuple) else o,
    'isinstance of two': lambda o: o[0] if isinstance(o, (list, tuple)) else o,
    'of torch': lambda o: o if isinstance(o, torch.Tensor) else o[0],
    'of a parameter': lambda o: isinstance(o, nn.Parameter),
    'of an abstract class': by_mapping,
    'in a generator': lambda o: any(isinstance(v, tuple) for v in [o]),
    'by builtins': lambda o: builtins.isinstance(o, tuple),
    'is_tensor': lambda o: torch.is_tensor(o),
    'by another name': lambda o: alias(o, tuple),
    'as an argument': (lambda f: lambda o: f(o, tuple))(isinstance),
    'match': by_match,
    'class': lambda o: o[0] if o.__class__ is tuple else o,
    'issubclass': lambda o: issubclass(o.__class__, tuple),
    'hasattr': lambda o: o.logits if hasattr(o, 'logits') else o[0],
    'getattr': lambda o: getattr(o, 'logits', None) or o,
    'bool': lambda o: o[0] if o else None,
    'not': lambda o: not o,
    'and': lambda o: o and 1,
    'in': lambda o: 1 in o,
    'in a list': lambda o: o in [1, 2],
    'len': len,
    'iter': list,
    'unpack': unpacked,
    'star': lambda o: max(*o),
    'dict': lambda o: {o: 1},
    'set': lambda o: {o},
    'sorted': sorted,
    'zip': lambda o: list(zip(o)),
    'f-string': lambda o: f'{o}',
    'f-string with a format': lambda o: f'{o:.2f}',
    'format': '{}'.format,
    'percent': lambda o: PERCENT % o,
    'str': lambda o: str(o),
    'f-string of a text': lambda o: f'{str(o)}',
    'math': math.sqrt,
    'floor': math.floor,
    'ceil': math.ceil,
    'round': round,
    'divmod': lambda o: divmod(o, 2),
    'int': int,
    'float': float,
    'range': range,
    'numpy function': np.sqrt,
    'numpy reduction': np.mean,
    'numpy array': np.asarray,
    'copy': copy.deepcopy,
    'list index': lambda o: [1, 2][o],
    'min': lambda o: min(o[0, 0], 1),
    'a helper': lambda o: states(o),
    'single dispatch': lambda o: kinds(o),
    'chained comparison': lambda o: 0 < o < 1,
}


def states(o): return o[0] if isinstance(o, tuple) else o # as most tutorials have it


@functools.singledispatch
def kinds(o): return o
@kinds.register
def _(o: tuple): return o[0]


@pytest.mark.parametrize('name', QUESTIONS)
def test_no_question_is_answered_before_the_run(name):
    m, x = pair()
    for _ in range(60): # the interpreter specialises what is called often
        with contextlib.suppress(Exception):
            QUESTIONS[name]((torch.ones(2, 3), None))
    advice = 'apply|tracer.cond|index it|after the run|after the with block|save'
    with pytest.raises((TypeError, ValueError), match=advice):
        with m.trace(x):
            QUESTIONS[name](m[0].output)
    assert torch.zeros is ZEROS and 'expand' not in vars(torch.Tensor)


ZEROS = torch.zeros


def test_a_scan_answers_what_a_value_is():
    m, x = pair()
    with m.trace(x, scan=True):
        out = m[0].output
        assert (
            isinstance(out, tuple)
            and not isinstance(out, torch.Tensor)
            and len(out) == 2
            and not hasattr(out, 'logits')
        )
        h = states(out).save()
        assert isinstance(h, torch.Tensor) and hasattr(h, 'shape')
    torch.testing.assert_close(h.value, m._module(x)[0])


def test_what_can_only_be_a_tensor_says_so():
    m, x = TracedModel(nn.Linear(3, 3)), torch.rand(2, 3)
    with m.trace(x):
        h = m.output
        tensors = [
            h.clone(), torch.relu(h), h.clone() * 2, 2 - h.clone(), h.sum(-1)[0], h.clone().T, torch.ones(3) + h,
            torch.nn.functional.softmax(h, -1), abs(-h.clone()), torch.zeros(h.shape[0]),
        ]
        for v in tensors:
            assert (
                isinstance(v, torch.Tensor)
                and not isinstance(v, (int, float, tuple, list))
                and torch.is_tensor(v)
                and hasattr(v, 'shape')
                and not hasattr(v, 'logits')
            )
        others = [
            h, h * 2, h.max(-1), h.shape, h.shape[0], h.size(0), h.sum().item(), h.tolist(), h.split(1), h.dim(),
            m(h), tracing.apply(len, h), h.clone().shape,
        ]
        for v in others:
            with pytest.raises(TypeError, match='apply'):
                isinstance(v, torch.Tensor)


def test_after_the_run_a_value_answers():
    m, x = pair()
    with m.trace(x):
        out, h = m[0].output.save(), m[0].output[0].save()
    assert (
        isinstance(out, tuple)
        and isinstance(h, torch.Tensor)
        and not isinstance(h, tuple)
        and hasattr(h, 'shape')
        and not hasattr(h, 'logits')
    )
    assert (
        getattr(h, 'logits', 5) == 5
        and len(out) == 2
        and f'{h.shape}' == 'torch.Size([2, 3])'
        and str(h) == str(h.value)
    )
    a, b = out
    assert (
        b is None
        and math.isclose(float(h[0, 0]), float(a[0, 0]))
        and np.allclose(np.sqrt(abs(h.detach())), np.sqrt(abs(a.detach())))
    )
    assert torch.is_tensor(
        torch.add(torch.ones(2, 3), h)
    )  # torch's own question gets the truth: a proxy is no tensor in memory
    assert torch.equal(torch.ones(2, 3) + h, 1 + a)


def test_what_can_be_written_down_still_is():
    m, x = TracedModel(nn.Linear(3, 3)), torch.rand(2, 3)
    n = np.full((2, 3), 2., dtype=np.float32)
    with torch.no_grad(), m.trace(x):
        h = m.output
        saved = [
            v.save()
            for v in (
                torch.ones(2, 3) + h,
                torch.ones(2, 3) * h,
                h + np.float32(2),
                np.float32(2) * h,
                h * n,
                h.T,
                torch.add(1, h),
            )
        ]
        print(h) # shows the node
    y = m._module(x).detach()
    for got, want in zip(saved, (1 + y, y, y + 2, 2 * y, y * 2, y.T, 1 + y), strict=True):
        torch.testing.assert_close(torch.as_tensor(got.value), want)


CONTEXTS = {
    'no_grad': torch.no_grad,
    'enable_grad': torch.enable_grad,
    'inference_mode': torch.inference_mode,
    'set_grad_enabled': lambda: torch.set_grad_enabled(False),
    'autocast': lambda: torch.autocast('cpu', dtype=torch.bfloat16),
    'device': lambda: torch.device('meta'),
}


@pytest.mark.parametrize('name', CONTEXTS)
def test_a_context_around_lines_is_refused(name):
    m, x = TracedModel(nn.Linear(3, 3)), torch.rand(2, 3)
    outer = torch.no_grad() if name == 'enable_grad' else contextlib.nullcontext()
    with pytest.raises(ValueError, match='around the whole trace'), outer:
        with m.trace(x):
            with CONTEXTS[name]():
                (m.output * 2).save()
    with pytest.raises(ValueError, match='around the whole trace'), outer:
        with m.trace(x):
            with CONTEXTS[name]():
                m.output[:] = 0
    if name != 'device': # around the whole trace
        with outer, CONTEXTS[name](), m.trace(x):
            (m.output * 2).save()
    with outer, m.trace(x): # by a function
        def inside(h):
            with CONTEXTS[name]():
                return h * 2, h @ torch.ones(3, 3, device='cpu')
        done = tracing.apply(inside, m.output).save()
    assert name not in ('no_grad', 'inference_mode', 'set_grad_enabled') or not done[0].requires_grad
    assert name != 'autocast' or done[1].dtype == torch.bfloat16


def test_a_decorated_helper_is_refused_and_a_session_too():
    m, x = TracedModel(nn.Linear(3, 3)), torch.rand(2, 3)
    @torch.no_grad()
    def doubled(h): return h * 2
    with pytest.raises(ValueError, match='no_grad'):
        with m.trace(x):
            doubled(m.output)
    with pytest.raises(ValueError, match='no_grad'):
        with m.session():
            with torch.no_grad():
                with m.trace(x):
                    m.output.save()


MODULES = {
    'BatchNorm1d': lambda: nn.BatchNorm1d(3),
    'GRU': lambda: nn.GRU(3, 3),
    'LSTM': lambda: nn.LSTM(3, 3),
    'RNN': lambda: nn.RNN(3, 3),
    'GRUCell': lambda: nn.GRUCell(3, 3),
    'TransformerEncoderLayer': lambda: nn.TransformerEncoderLayer(3, 1, 4, 0.0),
    'MultiheadAttention': lambda: Selfish(),
    'InstanceNorm1d': lambda: nn.InstanceNorm1d(3),
}


class Selfish(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1)

    def forward(self, x): return self.attention(x, x, x)[0]


@pytest.mark.parametrize('name', MODULES)
def test_a_module_that_looks_at_its_input(name):
    torch.manual_seed(0)
    module, m, x = MODULES[name]().eval(), TracedModel(nn.Linear(3, 3)), torch.rand(2, 3)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    try:
        with torch.no_grad(), m.trace(x):
            direct = module(m.output).save()
    except (TypeError, ValueError) as e:
        assert 'apply(' in str(e)
    else:
        torch.testing.assert_close(direct.value, module(m._module(x)))
    with torch.no_grad(), m.trace(x):
        applied = tracing.apply(module, m.output).save()
    torch.testing.assert_close(applied.value, module(m._module(x).detach()))
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


# Sizes (F16)

TABLE = torch.arange(8.)
SIZES = {
    'zeros': lambda h: torch.zeros(h.shape[0], 4),
    'ones': lambda h: torch.ones(4, h.shape[0]),
    'zeros of a tuple': lambda h: torch.zeros((h.shape[0], 4)),
    'zeros by name': lambda h: torch.zeros(size=(h.shape[0], 4)),
    'one size': lambda h: torch.zeros(h.shape[0]),
    'a type': lambda h: torch.zeros(h.shape[0], 4, dtype=torch.int64),
    'rand': lambda h: torch.rand(h.shape[0], 4),
    'randn': lambda h: torch.randn(h.shape[0], 4),
    'full': lambda h: torch.full((h.shape[0], 4), 2.0),
    'arange': lambda h: torch.arange(h.shape[0]),
    'eye': lambda h: torch.eye(h.shape[0]),
    'linspace': lambda h: torch.linspace(0, 1, h.shape[0]),
    'logspace': lambda h: torch.logspace(0, 1, h.shape[0]),
    'randint': lambda h: torch.randint(0, 5, (h.shape[0],)),
    'randperm': lambda h: torch.randperm(h.shape[0]),
    'tensor': lambda h: torch.tensor([h.shape[0]]),
    'nested': lambda h: torch.tensor([[h.shape[0], 1], [2, h.shape[1]]]),
    'as_tensor': lambda h: torch.as_tensor([h.shape[0]]),
    'scalar_tensor': lambda h: torch.scalar_tensor(h.shape[0]),
    'size': lambda h: torch.zeros(h.size()),
    'size of an axis': lambda h: torch.zeros(h.size(0), 3),
    'numel': lambda h: torch.zeros(h.numel()),
    'item': lambda h: torch.zeros(h.argmax().item(), 2),
    'expand': lambda h: TABLE.expand(h.shape[0], 8),
    'view': lambda h: TABLE.view(h.shape[0], 4),
    'reshape': lambda h: TABLE.reshape(h.shape[0], -1),
    'repeat': lambda h: TABLE.repeat(h.shape[0], 1),
    'new_zeros': lambda h: TABLE.new_zeros(h.shape[0], 4),
    'new_ones': lambda h: TABLE.new_ones(h.shape[0], 4),
    'new_full': lambda h: TABLE.new_full((h.shape[0], 4), 1.0),
    'new_tensor': lambda h: TABLE.new_tensor([h.shape[0]]),
    'narrow': lambda h: TABLE.narrow(0, 0, h.shape[1]),
    'an index': lambda h: TABLE[h.shape[0]],
    'split': lambda h: torch.split(TABLE, h.shape[0])[0],
    'split of a tensor': lambda h: TABLE.split(h.shape[0])[0],
    'pad': lambda h: torch.nn.functional.pad(TABLE, (h.shape[0], 0)),
    'one_hot': lambda h: torch.nn.functional.one_hot(torch.tensor([0, 1]), h.shape[0]),
    'arithmetic': lambda h: torch.zeros(h.shape[0] * 2 + 1, h.shape[1] // 2),
    'of itself': lambda h: h.view(h.shape[0], 3, 1).expand(h.shape[0], 3, 2),
    'a longer shape': lambda h: torch.zeros(h.shape + (2,)),
}


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('name', SIZES)
@torch.no_grad()
def test_sizes_of_values_that_are_not_there_yet(name, scan):
    m, x = TracedModel(nn.Linear(3, 3)), torch.rand(2, 3)
    torch.manual_seed(0)
    want = SIZES[name](m._module(x))
    torch.manual_seed(0)
    with m.trace(x, scan=scan):
        made = SIZES[name](m.output)
        got = made.save() if type(made).__name__ == 'Proxy' else made
    torch.testing.assert_close(getattr(got, 'value', got), want)
    assert torch.zeros is ZEROS and 'expand' not in vars(torch.Tensor)


def test_a_slice_of_a_tensor_that_is_there():
    m, x = TracedModel(nn.Linear(3, 3)), torch.rand(2, 3)
    with pytest.raises(TypeError, match='narrow'):
        with m.trace(x):
            TABLE[:m.output.shape[0]]
    with m.trace(x, scan=True):
        assert torch.equal(TABLE[:m.output.shape[0]], TABLE[:2])


def test_what_is_empty_is_zeros_in_a_graph():
    m, x = TracedModel(nn.Linear(3, 3)), torch.rand(2, 3)
    with m.trace(x):
        a, b = torch.empty(m.output.shape[0], 4).save(), TABLE.new_empty(m.output.shape[0], 4).save()
    assert not a.value.any() and not b.value.any() and a.value.shape == b.value.shape == (2, 4)
    assert torch.equal(TABLE, torch.arange(8.))


def test_a_device_context_that_is_first_used_in_a_trace_still_works():
    code = """if True:
        import torch
        from transformer_experiments.tracing import TracedModel
        with TracedModel(torch.nn.Linear(3, 3)).trace(torch.ones(1, 3)):
            with torch.device('meta'): assert torch.zeros(2).is_meta and torch.nn.Linear(2, 2).weight.is_meta
        with torch.device('meta'): assert torch.zeros(2).is_meta and torch.empty(2).is_meta
        with TracedModel(torch.nn.Linear(3, 3)).trace(torch.ones(1, 3), scan=True): pass # imports what scans need
        from torch.overrides import get_testing_overrides
        assert torch.zeros in torch.utils._device._device_constructors()"""
    subprocess.run([sys.executable, '-c', code], check=True)


def test_functions_are_back_after_an_error():
    m, x = TracedModel(nn.Linear(3, 3)), torch.rand(2, 3)
    with pytest.raises(KeyError):
        with m.trace(x):
            raise KeyError
    with pytest.raises(ValueError):
        with m.trace():
            pass
    assert torch.zeros is ZEROS and 'expand' not in vars(torch.Tensor) and '__getitem__' not in vars(torch.Tensor)


# A scan leaves nothing (F13, F25)

@functools.lru_cache
def remembered(n: int): return torch.arange(n).float()


GLOBAL, HELD = {}, None


class Holder:
    def __init__(self): self.states, self.deep = [], {'a': [collections.deque()]}


class Slotted:
    __slots__ = ('kept',)


class Untidy(nn.Module):
    tables, runs = {}, 0

    def __init__(self):
        super().__init__()
        self.lin, self.drop, self.bn = nn.Linear(3, 3), nn.Dropout(.5), nn.BatchNorm1d(3)
        self.register_buffer('seen', torch.zeros(3))
        self.holder, self.slotted, self.cache, self.generator = (
            Holder(),
            Slotted(),
            None,
            torch.Generator().manual_seed(0),
        )
        self.list, self.set, self.ordered = [], set(), collections.OrderedDict(a=1, b=2)
        self.step = lambda x, memo={}: memo.setdefault('x', x)

    def forward(self, x, fail=False):
        global HELD
        if self.cache is None:
            self.cache = x.sum(0)
        self.holder.states.append(x)
        self.holder.deep['a'][0].append(x)
        self.slotted.kept = x
        self.list += [x]
        self.set.add(x)
        self.ordered.move_to_end('a')
        self.tables[x.shape[0]] = Untidy.last = GLOBAL['x'] = HELD = x
        Untidy.runs += 1
        self.seen += x.sum(0)
        self.register_buffer('late', x + 1)
        self.extra = nn.Linear(3, 3)
        self.bound = torch.rand(2, generator=self.generator)
        self.step(x)
        x = self.drop(self.bn(self.lin(x))) + torch.rand(3) + random.random() + np.random.rand() + remembered(3)
        if fail: raise KeyError('broken')
        return x


def state_of(net: Untidy):
    return (
        dict(vars(net)),
        {k: (v, v.clone()) for k, v in net.state_dict(keep_vars=True).items()},
        list(net.holder.states),
        list(net.holder.deep['a'][0]),
        hasattr(net.slotted, 'kept'),
        list(net.list),
        set(net.set),
        list(net.ordered),
        dict(Untidy.tables),
        Untidy.runs,
        hasattr(Untidy, 'last'),
        dict(GLOBAL),
        id(HELD),
        net.step.__defaults__[0].copy(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        net.generator.get_state().tolist(),
        remembered.cache_info().currsize,
        set(net._modules),
        set(net._buffers),
    )


@pytest.mark.parametrize('fail', [False, True])
@pytest.mark.parametrize('how', ['scan', 'trace'])
def test_a_scan_leaves_nothing(how, fail):
    remembered.cache_clear()
    net = Untidy()
    m, x, before = TracedModel(net), torch.rand(2, 3), state_of(net)
    def run():
        if how == 'scan':
            with m.scan(x, fail=fail):
                m.lin.output.save()
        else:
            m.trace(x, fail=fail, scan=True).__enter__().__exit__(
                KeyError, KeyError(), None
            )  # scanned, and given up before it runs
    if fail:
        with pytest.raises(KeyError, match='broken'):
            run()
    else:
        run()
    after = state_of(net)
    assert [
        k for k, (v, copy) in after[1].items() if v is not before[1][k][0] or not torch.equal(copy, before[1][k][1])
    ] == []
    for a, b in zip(before[2:], after[2:], strict=True):
        assert a == b
    assert before[0].keys() == after[0].keys()
    assert type(net(x)).__name__ == 'Tensor' and type(net.cache).__name__ == 'Tensor'
    Untidy.tables.clear()
    GLOBAL.clear()


def test_a_models_own_hooks_see_a_scan_and_keep_nothing_of_it():
    net, seen = nn.Linear(3, 3), []
    net.register_forward_hook(lambda module, args, out: seen.append(out))
    with TracedModel(net).scan(torch.rand(2, 3)):
        pass
    assert seen == []


@pytest.mark.parametrize('name', ['LlamaForCausalLM', 'GPT2LMHeadModel', 'MambaForCausalLM', 'BioGptForCausalLM'])
def test_a_language_model_after_a_scan(name):
    net = make(name, **ONE_LENGTH[name])
    m, x = language(net), torch.randint(5, 60, (1, 7))
    want = net(x).logits
    with m.scan(x[:, :4]):
        pass
    with m.scan(x):
        pass
    assert torch.equal(net(x).logits, want)
    def fakes(module):
        return [v for m in module.modules() for v in vars(m).values() if type(v).__name__ == 'FakeTensor']
    assert not fakes(net)


def test_scans_of_many_shapes_are_bounded():
    m = TracedModel(nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)]))
    def count():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    counts = []
    for start in (1, 31, 61):
        for n in range(start, start + 30):
            with m.scan(torch.rand(n, 8)):
                shape = m[3].output.shape
            assert shape == (n, 8)
        counts.append(count())
    assert counts[2] <= counts[0] + 8


def test_a_module_called_in_a_graph_under_a_scan_keeps_nothing():
    net = nn.Sequential(nn.Linear(3, 3), Untidy())
    m, x = TracedModel(net), torch.rand(2, 3)
    net(x)
    cache, n = net[1].cache, len(net[1].list)
    with m.scan(x):
        m[1](m[0].output).save()
    with pytest.raises(IndexError):
        with m.trace(x, validate=True):
            m[1](m[0].output)[:, 5]
    assert net[1].cache is cache and len(net[1].list) == n and type(GLOBAL['x']) is torch.Tensor


# Names that are the model's and ours (F20)

class Scanning(nn.Module):
    def forward(self, x, scan=1., validate=0., trace=None, remote=None, blocking=None, invoker_args=None):
        for v in (trace, remote, blocking, invoker_args):
            x = x if v is None else x + v
        return x * scan + validate


def test_arguments_that_a_trace_has_too():
    net = Scanning()
    m, x = TracedModel(net), torch.ones(1)
    with m.trace(x, scan=2., validate=torch.tensor(5.), remote=3, blocking=1., invoker_args=torch.ones(1)):
        out = m.output.save()
    assert torch.equal(
        out.value, net(x, scan=2.0, validate=torch.tensor(5.0), remote=3, blocking=1.0, invoker_args=torch.ones(1))
    )
    with m.trace(scan=True) as tracer: # the trace's own
        with tracer.invoke(x, scan=2., validate=5., trace=1.): # the model's
            assert m.output.shape == (1,)
            out = m.output.save()
    assert out.value.item() == 9
    with m.trace(x, 2., scan=True):
        assert m.output.shape == (1,) # the model has its own by position


EITHER = [('scan', True), ('scan', False), ('validate', True), ('remote', True), ('blocking', False), ('trace', False)]


@pytest.mark.parametrize('name, value', EITHER)
def test_arguments_that_may_be_either_are_refused(name, value):
    m = TracedModel(Scanning())
    with pytest.raises(ValueError, match=f"has a parameter {name!r}, and so has trace"):
        m.trace(torch.ones(1), **{name: value})


def test_what_the_models_forward_names_doesnt_matter_otherwise():
    class Net(nn.Module):
        def forward(self, x, f=0., op=0., rec=0., path=0.): return x + f + op + rec + path
    m, x = TracedModel(nn.Sequential(Net())), torch.ones(1)
    with m.trace(x):
        again = m[0](m[0].output, f=1., op=2., rec=3., path=4.).save()
        applied = tracing.apply(Net(), m[0].output, f=1., op=2., rec=3.).save()
    assert (again.value.item(), applied.value.item()) == (11, 7)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input, self.output, self.next = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x): return self.next(self.output(self.input(x)))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.module, self.run, self.trace, self.block = (
            nn.Linear(3, 3),
            nn.Sequential(nn.Linear(3, 3)),
            nn.Linear(3, 3),
            Block(),
        )

    def forward(self, x): return self.block(self.trace(self.run(self.module(x))))


def test_children_with_our_names():
    net, x = Named(), torch.rand(2, 3)
    m = TracedModel(net)
    with m.trace(x):
        outs = [
            m[path].output.save()
            for path in ('module', 'run', 'run.0', 'trace', 'block.input', 'block.output', 'block.next')
        ] + [m.block['output'].output.save(), m.block.output.save()]
    y = [net.module(x)]
    y += [net.run(y[0])] * 2
    y += [net.trace(y[1])]
    y += [net.block.input(y[3])]
    y += [net.block.output(y[4])]
    y += [net.block.next(y[5]), y[5]]
    y += [y[6]]
    for got, want in zip(outs, y, strict=True):
        torch.testing.assert_close(got.value, want)
    uses = {
        'run': lambda: m.run[0],
        'module': lambda: m.module.weight,
        'trace': lambda: m.trace.output,
        'block.next': lambda: m.block.next.weight,
    }
    for path, use in uses.items():
        with pytest.raises(AttributeError, match=rf"model\['{path}'\]"):
            use()
    with pytest.raises(ValueError, match=r"model\['block.output'\]"):
        m.block.output.save()
    with pytest.raises(AttributeError, match=r"model\['block.output'\]"):
        with m.trace(x):
            m.block.output.in_features.save()
    with pytest.raises(AttributeError, match=r"model\['block.input'\]"):
        with m.trace(x):
            m.block.input.weight.save()
    assert m.run(tracer_graph(m, x), x) # the method


def tracer_graph(m, x):
    with m.trace(x) as tracer:
        m.output.save()
    return tracer.graph


def test_loops_over_modules_give_envoys():
    net = nn.ModuleDict(dict(h=nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), out=nn.Linear(3, 3)))
    net.forward = lambda x: net['out'](net['h'][1](net['h'][0](x)))
    m, x = TracedModel(net), torch.rand(2, 3)
    with m.trace(x):
        a = [e.output.save() for e in m.h.children()]
        b = {name: e.output.save() for name, e in m.h.named_children()}
        c = {name: e.output.save() for name, e in m.named_modules() if isinstance(e._module, nn.Linear)}
        d = {name: e for name, e in m.items()}
        e = m['out'].output.save()
    want = [net['h'][0](x)]
    want += [net['h'][1](want[0])]
    for got in (a, list(b.values()), [c['h.0'], c['h.1']]):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.value, w)
    assert (
        list(m) == ['h', 'out']
        and 'h' in m
        and list(c) == ['h.0', 'h.1', 'out']
        and [v._path for v in d.values()] == ['h', 'out']
    )
    assert (
        [e._path for e in m.values()] == ['h', 'out']
        and len(m.modules()) == 5
        and m.get_submodule('h.1')._path == 'h.1'
        and torch.equal(e.value, c['out'].value)
    )


def test_compiled_and_scripted_modules_say_so():
    torch.manual_seed(0)
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))
    x = torch.rand(2, 3)
    torch.manual_seed(0)
    ways = [
        (torch.jit.script, '0'),
        (lambda net: torch.jit.trace(net, x), '0'),
        (lambda net: torch.compile(net, backend='eager'), '_orig_mod.0'),
    ]
    for how, part in ways:
        net = plain()
        whole = how(net)
        m = TracedModel(whole)
        with pytest.raises(ValueError, match='compiled by torch.compile|scripted or traced'):
            with m.trace(x):
                m[part].output.save()
        with m.trace(x):
            out = m.output.save() # of itself it is seen
        torch.testing.assert_close(out.value, net(x))
    forward = plain()
    forward.forward = torch.compile(forward.forward, backend='eager')
    with pytest.raises(ValueError, match='compiled by torch.compile'):
        m = TracedModel(forward)
        with m.trace(x):
            m[0].output.save()
    in_place = plain()
    in_place.compile(backend='eager') # its hooks are compiled, too
    in_place(x)
    m = TracedModel(in_place)
    with m.trace(x):
        m[0].output[:] = 0
        out = m.output.save()
    torch.testing.assert_close(out.value, plain()[1](torch.zeros(2, 3)))
    inside = plain()
    inside[1] = torch.compile(inside[1], backend='eager')
    m = TracedModel(inside)
    with m.trace(x):
        m[0].output[:] = 0
        out = m[1].output.save()
    torch.testing.assert_close(out.value, inside[1](torch.zeros(2, 3)))
    with pytest.raises(ValueError, match='_orig_mod'):
        with m.trace(x):
            m[1]._orig_mod[0].output.save()


def test_an_envoy_is_an_instance_of_its_modules_class():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Sequential())
    m = TracedModel(net)
    assert (
        [isinstance(e, nn.Linear) for e in m] == [True, False, False]
        and isinstance(m[1], nn.Module)
        and not isinstance(m[0], (nn.ReLU, dict))
    )
    assert [e._path for e in m.modules() if isinstance(e, (nn.Linear, nn.ReLU))] == ['0', '1'] and isinstance(
        m[0], tracing.Envoy
    )
    assert m[0] and not m[2] # as of the modules


def test_verify_says_which_models_take_no_padding():
    found = tracing.verify(language(make('BartForCausalLM', **SEQ2SEQ)))
    assert any('one by one' in c.found for c in found if not c.ok) and sum(c.ok for c in found) > 3


def test_a_model_that_sees():
    net = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(
            transformers.ViTConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=8,
                patch_size=4,
            )
        ),
        decoder=transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, add_cross_attention=True)),
    ).eval()
    (
        net.generation_config.decoder_start_token_id,
        net.generation_config.eos_token_id,
        net.config.decoder_start_token_id,
    ) = 1, None, 1
    net.generation_config.pad_token_id = 0
    m, a, b = language(net), torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    want = net.generate(pixel_values=a, max_new_tokens=3)
    with m.generate(pixel_values=a, max_new_tokens=3):
        out, seen = m.generator.output.save(), m.encoder.output[0].save()
    assert torch.equal(out.value, want)
    with m.generate(max_new_tokens=3) as tracer:
        with tracer.invoke(a):
            one = m.encoder.output[0].save()
        with tracer.invoke(pixel_values=b):
            two = m.encoder.output[0].save()
    near(one.value, seen.value)
    with torch.no_grad():
        near(two.value, net.encoder(b)[0])
    start = torch.tensor([[1, 5]])
    with torch.no_grad(), m.trace(pixel_values=b, decoder_input_ids=start):
        logits = m.output.logits.save()
    with torch.no_grad():
        near(logits.value, net(pixel_values=b, decoder_input_ids=start).logits)
