"""The models of the random programs: tiny, seeded, functions of one tensor, with the sites that a program may name."""
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import cache

import torch
import transformers as T
from torch import nn

from transformer_experiments.models.transformer import TransformerConfig, TransformerLanguageModel

TINY = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
NO_CACHE = dict(use_cache=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)


class Whole(nn.Module):
    "A model of transformers as a function of one tensor."
    def __init__(self, net: nn.Module, name: str, out: str = 'last_hidden_state', more=lambda x: {}):
        super().__init__()
        self.net, self.name, self.out, self.more = net, name, out, more

    def forward(self, x): return getattr(self.net(**{self.name: x}, **self.more(x)), self.out)


class Recurrent(nn.Module):
    "Its states have the rows of the batch in the middle."
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(8, 5)
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True)

    def forward(self, x):
        states, (h, c) = self.lstm(self.embed(x))
        return self.head(states) + self.head(h[-1] + c[0])[:, None]


class Loop(nn.Module):
    "A module that is called three times, with two in it."
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.cell = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x):
        h = self.first(x)
        for _ in range(3):
            h = h + self.cell(h)
        return self.last(h)


def tokens(n: int): return lambda g, rows: torch.randint(0, 11, (rows, n), generator=g)
def numbers(*shape): return lambda g, rows: torch.randn(rows, *shape, generator=g)
def first_three(x): return dict(decoder_input_ids=x[:, :3])
def three_ones(x): return dict(decoder_input_ids=torch.ones(len(x), 3, dtype=torch.long))


def feed_forward():
    layers = nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
    return nn.Sequential(*layers), numbers(4)


def loop(): return Loop(), numbers(4)
def lstm(): return Recurrent(), tokens(4)


def transformer():
    config = TransformerConfig(block_size=6, n_embed=8, n_head=2, n_layer=2, dropout=0.)
    return TransformerLanguageModel(11, 'cpu', config=config), tokens(5)


def bert(): return Whole(T.BertModel(T.BertConfig(vocab_size=11, **TINY)), 'input_ids'), tokens(4)


def albert():
    config = T.AlbertConfig(vocab_size=11, embedding_size=6, **TINY | dict(num_hidden_layers=3))
    return Whole(T.AlbertModel(config), 'input_ids'), tokens(4)


def gpt_neox():
    config = T.GPTNeoXConfig(vocab_size=11, **TINY, **NO_CACHE)
    return Whole(T.GPTNeoXForCausalLM(config), 'input_ids', 'logits'), tokens(4)


def mamba():
    config = T.MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, state_size=4, time_step_rank=2,
                           **NO_CACHE)
    return Whole(T.MambaForCausalLM(config), 'input_ids', 'logits'), tokens(4)


def t5():
    config = T.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, use_cache=False,
                        decoder_start_token_id=0)
    return Whole(T.T5ForConditionalGeneration(config), 'input_ids', 'logits', first_three), tokens(4)


def whisper():
    config = T.WhisperConfig(
        vocab_size=11, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=12,
        decoder_attention_heads=2, decoder_ffn_dim=12, num_mel_bins=4, max_source_positions=4, max_target_positions=8,
        decoder_start_token_id=1, **NO_CACHE)
    return Whole(T.WhisperForConditionalGeneration(config), 'input_features', 'logits', three_ones), numbers(4, 8)


def vit():
    return Whole(T.ViTModel(T.ViTConfig(image_size=8, patch_size=4, **TINY)), 'pixel_values'), numbers(3, 8, 8)


def resnet():
    config = T.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type='basic')
    return Whole(T.ResNetModel(config), 'pixel_values'), numbers(3, 8, 8)


MAKERS = {f.__name__: f for f in (
    feed_forward, loop, lstm, transformer, bert, albert, gpt_neox, mamba, t5, whisper, vit, resnet)}
MODELS = list(MAKERS)


# Sites

@dataclass(frozen=True)
class Site:
    path: str
    kind: str             # 'input' or 'output'
    call: int | str       # A number, or 'all'
    leaf: tuple           # Where the tensor is in it: indices, or the name of a field
    time: int             # When it fires, counted in sites
    value: torch.Tensor = field(repr=False, compare=False)  # What it had in a run with two rows
    calls: int = 1        # How often its module is called
    axis: int | None = 0  # Of the rows; None: it is the same for all prompts
    shared: int = 0       # Equal where one tensor is handed on; 0 where no gradient comes from the model's output

    @property
    def envoy(self) -> str: # Such as m.h[0]
        return 'm' + ''.join(f'[{p}]' if p.isdigit() else f'.{p}' for p in self.path.split('.') if p)

    @property
    def end(self) -> str: # Such as .output[0]
        return f'.{self.kind}' + ''.join(f'.{k}' if isinstance(k, str) else f'[{k}]' for k in self.leaf)


RESERVED = {'input', 'inputs', 'output', 'grad', 'all', 'next', 'skip'}  # names of modules that hide an envoy's own


def leaves_of(value, kind: str) -> list:
    "Where tensors may be in what a module gets or gives."
    if kind == 'input': return [((), next(iter([*value[0], *value[1].values()]), None))]
    if isinstance(value, dict): return [((k,), v) for k, v in value.items()]
    if not isinstance(value, tuple): return [((), value)]
    return [(path, v) for i, part in enumerate(value) for path, v in (
        [((i, j), v) for j, v in enumerate(part)] if isinstance(part, tuple) else [((i,), part)])]


def run_once(net: nn.Module, x: torch.Tensor) -> tuple: # the output, and all sites that fired
    fired, calls, hooks = [], Counter(), []
    def note(path: str, kind: str, value):
        for leaf, v in leaves_of(value, kind):
            if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() > 1 and v.numel() > 3:
                fired.append(Site(path, kind, calls[path, kind], leaf, len(fired), v))
        calls[path, kind] += 1
    for path, m in net.named_modules():
        if {*path.split('.'), *(name for name, _ in m.named_children())} & RESERVED: continue
        hooks.append(m.register_forward_pre_hook(lambda m, *inputs, p=path: note(p, 'input', inputs), with_kwargs=True))
        hooks.append(m.register_forward_hook(lambda m, args, out, p=path: note(p, 'output', out)))
    out = net(x)
    for h in hooks:
        h.remove()
    return out, [replace(s, calls=calls[s.path, s.kind]) for s in fired]


@cache
def build(name: str) -> tuple: # a seeded model, what makes its inputs, its sites in the order in which they fire
    torch.manual_seed(0)
    net, inputs = MAKERS[name]()
    net.eval()
    for p in net.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.4)
    (out, sites), (_, more) = (run_once(net, inputs(torch.Generator().manual_seed(0), rows)) for rows in (2, 3))
    sites = [replace(s, axis=next((d for d, n in enumerate(s.value.shape) if n != other.value.shape[d]), None))
             for s, other in zip(sites, more, strict=True)]
    shared = with_gradient(out, sites)
    sites = [replace(s, value=s.value.detach(), shared=k) for s, k in zip(sites, shared, strict=True)]
    return net, inputs, with_every(sites)


def with_gradient(out, sites: list) -> list: # a number for each site's tensor; 0 where no gradient comes
    parts = list({id(s.value): s.value for s in sites if s.value.requires_grad}.values())
    grads = torch.autograd.grad((out[0] if isinstance(out, tuple) else out).sum(), parts, allow_unused=True)
    numbers = {id(v): k for k, (v, g) in enumerate(zip(parts, grads, strict=True), 1) if g is not None}
    return [numbers.get(id(s.value), 0) for s in sites]


def with_every(sites: list) -> list: # beside the first call, every call; none of calls of unlike shapes
    shapes, found = defaultdict(set), []
    for s in sites:
        shapes[s.path, s.kind, s.leaf].add(s.value.shape)
    for s in sites:
        if len(shapes[s.path, s.kind, s.leaf]) > 1: continue
        found += [s, replace(s, call='all')] if s.call == 0 and s.calls > 1 else [s]
    return found
