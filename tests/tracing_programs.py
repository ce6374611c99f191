"""Random programs of traces, each as Python source of the public interface and as the lines of a graph for the reference executor.

A program is a list of lines; a line knows which names it makes and uses, so that a failing program can be made shorter line by line."""
import operator
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import nn
from torch.utils._pytree import tree_map

from transformer_experiments.models.transformer import TransformerConfig, TransformerLanguageModel


# Models: each takes one input, so that a prompt is one tensor

class Whole(nn.Module):
    "A model of transformers as a function of one tensor."
    def __init__(self, net: nn.Module, name: str, more=lambda x: {}, out: str = 'last_hidden_state'):
        super().__init__()
        self.net, self.name, self.more, self.out = net, name, more, out

    def forward(self, x): return getattr(self.net(**{self.name: x}, **self.more(x)), self.out)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(11, 6), nn.LSTM(6, 8, num_layers=2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        states, (h, c) = self.lstm(self.embed(x))
        return self.head(states) + self.head(h[-1] + c[0])[:, None]


class Loop(nn.Module):
    "A module that is called four times, and one in another that is called twice."
    def __init__(self):
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        for _ in range(3): h = h + self.cell(h)
        return self.last(h)


def tokens(n: int): return lambda g, rows: torch.randint(0, 11, (rows, n), generator=g)
def numbers(*shape): return lambda g, rows: torch.randn(rows, *shape, generator=g)


def make_net(name: str) -> tuple: # a module, and what makes its inputs
    import transformers as T
    tiny = dict(vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
    no_cache = dict(use_cache=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    if name == 'feed_forward':
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)), numbers(4)
    if name == 'loop': return Loop(), numbers(4)
    if name == 'lstm': return Recurrent(), tokens(4)
    if name == 'transformer':
        config = TransformerConfig(block_size=6, n_embed=8, n_head=2, n_layer=2, dropout=0.)
        return TransformerLanguageModel(11, 'cpu', config=config), tokens(5)
    if name == 'bert': return Whole(T.BertModel(T.BertConfig(**tiny)), 'input_ids'), tokens(4)
    if name == 'albert': return Whole(T.AlbertModel(T.AlbertConfig(**tiny | dict(num_hidden_layers=3, embedding_size=6))), 'input_ids'), tokens(4)
    if name == 'gpt_neox': return Whole(T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**tiny, **no_cache)), 'input_ids', out='logits'), tokens(4)
    if name == 'mamba':
        config = T.MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, state_size=4, time_step_rank=2, **no_cache)
        return Whole(T.MambaForCausalLM(config), 'input_ids', out='logits'), tokens(4)
    if name == 't5':
        config = T.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0, use_cache=False)
        return Whole(T.T5ForConditionalGeneration(config), 'input_ids', lambda x: dict(decoder_input_ids=x[:, :3]), 'logits'), tokens(4)
    if name == 'whisper':
        config = T.WhisperConfig(vocab_size=11, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                                 encoder_ffn_dim=12, decoder_ffn_dim=12, num_mel_bins=4, max_source_positions=4, max_target_positions=8,
                                 decoder_start_token_id=1, **no_cache)
        ids = lambda x: dict(decoder_input_ids=torch.ones(len(x), 3, dtype=torch.long))
        return Whole(T.WhisperForConditionalGeneration(config), 'input_features', ids, 'logits'), numbers(4, 8)
    if name == 'vit': return Whole(T.ViTModel(T.ViTConfig(**{k: v for k, v in tiny.items() if k != 'vocab_size'}, image_size=8, patch_size=4)), 'pixel_values'), numbers(3, 8, 8)
    if name == 'resnet':
        config = T.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type='basic')
        return Whole(T.ResNetModel(config), 'pixel_values'), numbers(3, 8, 8)
    raise KeyError(name)


MODELS = ['feed_forward', 'loop', 'lstm', 'transformer', 'bert', 'albert', 'gpt_neox', 'mamba', 't5', 'whisper', 'vit', 'resnet']


@dataclass(frozen=True)
class Site:
    path: str
    kind: str        # 'input' or 'output'
    call: object     # a number or 'all'
    leaf: tuple = () # where the tensor is in it: indices, or the name of a field
    envoy: str = ''  # such as m.h[0]
    end: str = ''    # such as .output[0]
    time: float = 0  # when it fires
    calls: int = 1
    sample: object = field(default=None, compare=False) # a tensor of its shape and layout
    shared: int = 0  # equal for sites that hand on the same tensor; 0 where no gradient comes from the output
    axis: int | None = 0 # which one is that of rows; None: none is


RESERVED = {'input', 'inputs', 'output', 'grad', 'all', 'next', 'path', 'module'}


def leaves_of(value, kind: str) -> list:
    if kind == 'input': return [((), value[0][0] if value[0] else next(iter(value[1].values()), None))]
    if isinstance(value, torch.Tensor): return [((), value)]
    if isinstance(value, dict): return [((k,), v) for k, v in value.items()]
    if not isinstance(value, tuple): return []
    return [((i,), v) for i, v in enumerate(value)] + [((i, j), w) for i, v in enumerate(value) if isinstance(v, tuple) for j, w in enumerate(v)]


@cache
def build(name: str):
    "A seeded model, what makes its inputs, and the sites that programs may name, in the order in which they fire."
    torch.manual_seed(0)
    net, inputs = make_net(name)
    for p in net.parameters():
        if p.dim() > 1: nn.init.normal_(p, std=0.4)
    net.eval()
    fired, calls, kept = [], Counter(), []
    def note(path, kind, value):
        kept.append(value)
        for leaf, v in leaves_of(value, kind):
            if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() > 1 and v.numel() > 3:
                fired.append((path, kind, calls[path, kind], leaf, v.detach().new_empty_strided(v.shape, v.stride()).copy_(v.detach()), v, len(kept)))
        calls[path, kind] += 1
    hooks = []
    for path, m in net.named_modules():
        names = set(path.split('.')) | {n for n, _ in m.named_children()}
        if names & RESERVED or isinstance(m, nn.ModuleList): continue
        hooks.append(m.register_forward_pre_hook(lambda m, a, k, p=path: note(p, 'input', (a, k)), with_kwargs=True))
        hooks.append(m.register_forward_hook(lambda m, a, out, p=path: note(p, 'output', out)))
    net(inputs(torch.Generator().manual_seed(0), 3))
    rows_3 = [f[4].shape for f in fired]
    fired.clear(), calls.clear()
    out = net(inputs(torch.Generator().manual_seed(0), 2))
    for h in hooks: h.remove()
    parts = {id(f[5]): f[5] for f in fired if f[5].requires_grad}
    grads = torch.autograd.grad((out[0] if isinstance(out, tuple) else out).sum(), list(parts.values()), allow_unused=True)
    with_grad = {i for i, g in zip(parts, grads) if g is not None}
    shapes = defaultdict(set)
    for f in fired: shapes[f[:2] + f[3:4]].add(f[4].shape)
    sites = []
    for (path, kind, call, leaf, sample, value, time), other in zip(fired, rows_3, strict=True):
        if len(shapes[path, kind, leaf]) > 1: continue # calls of unlike shapes
        envoy = 'm' + ''.join(f'[{p}]' if p.isdigit() else f'.{p}' for p in path.split('.') if p)
        end = f'.{kind}' + ''.join(f'.{k}' if isinstance(k, str) else f'[{k}]' for k in leaf)
        n = calls[path, kind]
        sites.append(Site(path, kind, call, leaf, envoy, end, time, n, sample, id(value) if id(value) in with_grad else 0, next((d for d in range(sample.dim()) if other[d] != sample.shape[d]), None)))
        if call == 0 and n > 1: sites.append(Site(path, kind, 'all', leaf, envoy, end, time, n, sample, id(value) if id(value) in with_grad else 0, next((d for d in range(sample.dim()) if other[d] != sample.shape[d]), None)))
    return net, inputs, sites


# Lines

ALL, REST = {'slice': [None, None, None]}, {'ellipsis': True}
INDICES = {'[:]': ALL, '[0]': 0, '[:, 0]': {'tuple': [ALL, 0]}, '[..., 1]': {'tuple': [REST, 1]}, '[:, 1:]': {'tuple': [ALL, {'slice': [1, None, None]}]},
           '[..., ::2]': {'tuple': [REST, {'slice': [None, None, 2]}]}}
VIEWS = {'.transpose(0, 1)': ('torch.Tensor.transpose', 0, 1), '.unsqueeze(0)': ('torch.Tensor.unsqueeze', 0), '.flatten()': ('torch.Tensor.flatten',),
         '.view(-1)': ('torch.Tensor.view', -1), **{i: ('operator.getitem', v) for i, v in INDICES.items() if i != '[:]'}}
UNARY = {'{} * 1.5': ('operator.mul', 1.5), '{} + 0.5': ('operator.add', 0.5), '-{}': ('operator.neg',), '{}.tanh()': ('torch.Tensor.tanh',),
         'torch.relu({})': ('torch.relu',), '{}.clone()': ('torch.Tensor.clone',), '{}.mean()': ('torch.Tensor.mean',), '{} ** 2': ('operator.pow', 2),
         '{}.sum(-1, keepdim=True)': ('torch.Tensor.sum', -1, True)}
BINARY = {'{} + {}': 'operator.add', '{} - {}': 'operator.sub', '{} * {}': 'operator.mul', 'torch.maximum({}, {})': 'torch.maximum'}
METHODS = {'.mul_(0.5)': ('torch.Tensor.mul_', 0.5), '.add_(1.)': ('torch.Tensor.add_', 1.), '.zero_()': ('torch.Tensor.zero_',), '.clamp_(0.)': ('torch.Tensor.clamp_', 0.)}
AUGMENTED = {'+=': 'operator.iadd', '*=': 'operator.imul', '-=': 'operator.isub'}
LATE = 10_000 # when a backward pass is, counted like sites


@dataclass
class Line:
    text: str                  # source
    emit: object               # writes its nodes
    feature: str
    makes: str | None = None
    uses: tuple = ()
    section: int = 0           # which trace of a session; -1: a lasting edit
    prompt: int | None = None
    block: str | None = None   # the condition that it is under
    named: str | None = None   # source where saved values have names, of which a value can have one
    site: Site | None = None   # what @ in the source stands for


@dataclass
class Var:
    name: str
    sample: torch.Tensor
    time: float                # when its value is there
    memory: object             # equal for what shares memory
    site: Site | None = None   # if it names a site (or the gradient of one)
    kind: str = 'value'        # 'site', 'value', 'grad'
    every: str | None = None   # the module, if of every call of it
    section: int = 0
    prompt: int | None = None
    block: str | None = None


class Nodes:
    "Collects the nodes of a graph in the form of its JSON."
    def __init__(self, seen): self.nodes, self.env, self.prompt, self.guard, self.backwards, self.seen, self.n = [], {}, None, None, 0, seen, 0

    def add(self, op: str, *args, save=None, **kwargs) -> dict:
        node = dict(id=self.n, op=op, args=list(args), kwargs=kwargs)
        self.n += 1
        if save is not None: node['save'] = save
        if self.guard is not None and op not in ('site', 'first_input'): node['guard'] = self.guard['ref']
        self.nodes.append(node)
        return {'ref': node['id']}

    def site(self, s: Site) -> list: # the site, and what leads to its leaf
        found = [self.add('site', s.path, s.kind, s.call, self.prompt)]
        if s.kind == 'input': found.append(self.add('first_input', found[0]))
        for k in s.leaf: found.append(self.add('attribute' if isinstance(k, str) else 'operator.getitem', found[-1], k))
        return found

    def assign(self, s: Site, chain: list, value: dict):
        if s.leaf: self.add('operator.setitem', chain[-2], s.leaf[-1], value)
        else: self.add('update', chain[-1], value)


@dataclass
class Program:
    model: str
    seed: int
    lines: list
    rows: list                 # of each prompt's input
    grads: bool
    traces: int = 1

    def inputs(self) -> list:
        g = torch.Generator().manual_seed(self.seed)
        return [build(self.model)[1](g, rows) for rows in self.rows]

    def features(self) -> set: return {line.feature for line in self.lines} | ({'prompts'} if len(self.rows) > 1 else set()) | ({'session'} if self.traces > 1 else set())

    def source(self, named: bool = False) -> str: # with names for saved values, as JSON has them
        edits, out, invokes = [x for x in self.lines if x.section < 0], [], len(self.rows) > 1
        if edits: out += ['with m.edit() as edited:', *indented(edits, 1, False, named)]
        pad = '    ' if self.traces > 1 else ''
        quiet = '' if self.grads else 'torch.no_grad(), '
        if pad: out.append(f'with {quiet}m.session() as session:')
        for k in range(self.traces):
            model = 'edited' if edits else 'm'
            out.append(f'{pad}with {"" if pad else quiet}{model}.trace({"" if invokes else "xs[0]"}) as t:')
            body = indented([x for x in self.lines if x.section == k], 1 + bool(pad), invokes, named)
            out += body or [pad + '    pass']
        return '\n'.join(out) + '\n'

    def graph(self, seen) -> dict:
        b, traces = Nodes(seen), []
        for k in range(self.traces):
            b.nodes, b.backwards = [], 0
            for prompt in range(len(self.rows)) if any(x.section < 0 for x in self.lines) else []:
                b.prompt = prompt if len(self.rows) > 1 else None
                self.emit(b, [x for x in self.lines if x.section < 0])
            self.emit(b, [x for x in self.lines if x.section == k], own_prompt=True)
            traces.append(b.nodes)
        if self.traces == 1: return dict(kind='trace', prompts=len(self.rows), nodes=traces[0])
        inputs = [{'tuple': [{'tuple': [x]}, {'dict': []}, {'dict': []}]} for x in self.inputs()]
        return dict(kind='session', nodes=[dict(id=-1 - i, op='trace', args=[0, 'forward', inputs, {'dict': []}], body=nodes) for i, nodes in enumerate(traces)])

    def emit(self, b: Nodes, lines: list, own_prompt: bool = False):
        for line in lines:
            if own_prompt: b.prompt = line.prompt
            b.guard = b.env[line.block] if line.block else None
            line.emit(b)

    def without(self, k: int) -> 'Program': # a line, and all that need it
        gone, kept = set(), []
        for i, line in enumerate(self.lines):
            if i == k or gone & {*line.uses, line.block}: gone |= {line.makes} - {None}
            else: kept.append(line)
        return Program(self.model, self.seed, kept, self.rows, self.grads, self.traces)


def indented(lines: list, depth: int, invokes: bool, named: bool) -> list:
    out, prompt, moves = [], None, []
    for line in lines:
        if invokes and line.prompt != prompt:
            moves = [] # an invoke starts at the first call of each module
            if line.prompt is not None: out.append('    ' * depth + f'with t.invoke(xs[{line.prompt}]):')
        prompt, inner = line.prompt, depth + (invokes and line.prompt is not None)
        text = line.named if named and line.named else line.text
        if line.site: text = text.replace('@', line.site.envoy + ('' if line.section < 0 else move(moves, line.site)) + line.site.end)
        out.append('    ' * (inner + (line.block is not None)) + text)
        if text.startswith('with') and not any(x.block == line.makes for x in lines): out.append('    ' * (inner + 1) + 'pass')
    return out


def move(moves: list, site: Site) -> str:
    "What brings an envoy to a call. `next` goes on from the call that was named last; `all` takes the modules inside along."
    now = next((call for path, call in reversed(moves) if path == site.path or call == 'all' and site.path.startswith(path and path + '.')), 0)
    back = now != 'all' and site.call != 'all' and site.call < now
    if back or site.call == 'all': moves.append((site.path, 'all'))
    if site.call == 'all' or site.call == now: return '.all()' if site.call == 'all' else ''
    moves.append((site.path, site.call))
    return f'.all().next({site.call})' if back else f'.next({site.call if now == "all" else site.call - now})'


class Generator:
    "Writes one program. It knows when each value is there, and so keeps to the model's order but for a few edits."
    def __init__(self, seed: int, models: list = MODELS, features: set | None = None):
        self.r, self.seed, r = random.Random(seed), seed, None
        self.model = self.r.choice(models)
        self.sites, chance = build(self.model)[2], self.r.random
        on = {f for f, p in FEATURES.items() if chance() < p}
        self.on = on if features is None else on & features
        if 'session' in self.on: self.on -= {'prompts', 'edit'}
        if 'stop' in self.on: self.on -= {'grad', 'session', 'apply'}
        self.rows = [2] if 'prompts' not in self.on else self.r.choice([[2, 1], [1, 1], [2, 2], [1, 2, 1]])
        if 'prompts' in self.on: self.sites = [s for s in self.sites if s.axis is not None]
        if 'every' not in self.on: self.sites = [s for s in self.sites if s.call != 'all']
        self.lines, self.vars, self.names, self.retired, self.graded, self.saved = [], [], Counter(), set(), {}, set()
        self.section, self.prompt, self.block, self.gate, self.passes, self.effects, self.late = 0, None, None, None, 0, 0, 0

    # What there is

    def name(self, kind: str = 'v') -> str:
        self.names[kind] += 1
        return f'{kind}{self.names[kind]}'

    def visible(self, **wanted) -> list:
        found = [v for v in self.vars if v.block in (None, self.block) and v.memory not in self.retired
                 and (v.section == self.section or self.section >= 0 and v.section >= 0)]
        return [v for v in found if all(getattr(v, k) == x for k, x in wanted.items())]

    def mine(self, **wanted) -> list: return [v for v in self.visible(**wanted) if (v.section, v.prompt) == (self.section, self.prompt)]

    def write(self, text, emit, feature, makes=None, uses=(), site=None):
        self.lines.append(Line(text, emit, feature, makes, tuple(uses), self.section, self.prompt, self.block, site=site))

    def new(self, sample, time, memory=None, every=None, site=None, kind='value', name=None) -> Var:
        v = Var(name or self.name(), sample, time, memory if memory is not None else object(), site, kind, every, self.section, self.prompt, self.block)
        self.vars.append(v)
        return v

    def focus(self) -> list: # a few sites of which a program speaks, so that its lines meet
        if len(self.sites) < 3: return self.sites
        some = self.r.sample(self.sites, min(len(self.sites), 4))
        near = [s for s in self.sites if s.path == some[0].path]
        return some + near

    # Lines

    def read(self, site=None) -> Var:
        s = site or self.r.choice(self.chosen)
        v = self.new(s.sample, s.time if s.call != 'all' else s.time, (self.section, self.prompt, s.path, s.kind, s.call, s.leaf), s.path if s.call == 'all' else None, s, 'site')
        def emit(b): b.env[v.name] = b.site(s)[-1]
        self.write(f'{v.name} = @', emit, 'every' if s.call == 'all' else 'numbered' if s.call else 'read', v.name, site=s)
        return v

    def any(self, **wanted) -> Var:
        found = self.mine(**wanted)
        return self.r.choice(found) if found and self.r.random() < 0.75 else self.read()

    def pick(self) -> Var:
        found = self.mine()
        return self.r.choice(found[-6:]) if found and self.r.random() < 0.7 else self.read()

    def unary(self):
        v = self.pick()
        text, (op, *more) = self.r.choice(list(UNARY.items()))
        w = self.new(with_sample(op, v.sample, *more), v.time, every=v.every)
        def emit(b): b.env[w.name] = b.add(op, b.env[v.name], *more)
        self.write(f'{w.name} = {text.format(v.name)}', emit, 'read', w.name, [v.name])

    def binary(self):
        v, u = self.pick(), self.operand()
        if u is None or not self.meet(v, u) or not self.meet(u, v): return
        text, op = self.r.choice(list(BINARY.items()))
        w = self.new(v.sample, max(v.time, u.time), every=v.every or u.every)
        if u.sample.shape != v.sample.shape or u.prompt != v.prompt: u = self.mean(u)
        def emit(b): b.env[w.name] = b.add(op, b.env[v.name], b.env[u.name])
        self.write(f'{w.name} = {text.format(v.name, u.name)}', emit, 'read', w.name, [v.name, u.name])

    def meet(self, v: Var, u: Var) -> bool: # at each call there is what a line takes from elsewhere
        if not v.every or u.every: return not v.every or v.every == u.every
        return u.time < min(s.time for s in self.sites if s.path == v.every)

    def operand(self):
        found = [v for v in self.visible() if self.section == v.section or v.every is None]
        return self.r.choice(found) if found else None

    def mean(self, v: Var) -> Var:
        w = self.new(v.sample.mean(), v.time, every=v.every)
        def emit(b): b.env[w.name] = b.add('torch.Tensor.mean', b.env[v.name])
        self.write(f'{w.name} = {v.name}.mean()', emit, 'read', w.name, [v.name])
        return w

    def view(self):
        v = self.pick()
        text, (op, *more) = self.r.choice(list(VIEWS.items()))
        try: sample = with_sample(op, v.sample, *more)
        except (RuntimeError, IndexError): return
        if not sample.numel() or len(self.rows) > 1 and (text in ('.transpose(0, 1)', '.flatten()', '.view(-1)', '.unsqueeze(0)') or self.few(v, text)): return
        shares = sample.untyped_storage().data_ptr() == v.sample.untyped_storage().data_ptr()
        w = self.new(sample, v.time, v.memory if shares else None, v.every, v.site, 'view' if shares else 'value')
        def emit(b): b.env[w.name] = b.add(op, b.env[v.name], *more)
        self.write(f'{w.name} = {v.name}{text}', emit, 'view', w.name, [v.name])

    def allowed(self, target: Var, value: Var) -> bool:
        "Whether the model's order allows an edit with this value; now and then one that it doesn't."
        if value.every and value.every != target.every: return False
        if target.every and not value.every: return value.site is None and value.time < min(s.time for s in self.sites if s.path == target.every)
        if target.every: return value.memory == target.memory or value.time <= target.time
        if target.kind == 'value' and target.site is None: return True
        return value.time <= target.time or self.r.random() < 0.15

    def editable(self) -> Var:
        "Something whose memory may be written to."
        v = self.pick()
        if v.kind == 'value' and (self.block or 'grad' in self.on): v = self.read()
        if isinstance(v.memory, tuple) and v.memory[0] == 'grad' and v.memory[1] < self.passes: return None # what has come is past
        if self.gate and not (self.meet(v, self.gate) and self.meet(self.gate, v) and self.allowed(v, self.gate)): return None
        return v

    def right_side(self, v: Var, sample) -> tuple: # text, a name or a number, names used
        u = self.operand()
        if u is None or self.section < 0 or self.r.random() < 0.4 or not self.allowed(v, u): return (c := self.r.choice([0., 2., -0.5])), str(c), []
        if u.sample.shape != sample.shape or (u.prompt, u.section) != (self.prompt, self.section) or u.memory == v.memory: u = self.mean(u)
        self.settle(v, u)
        return u, u.name, [u.name]

    def settle(self, v: Var, u: Var): # what shares memory with it waits for it, too
        for w in self.vars:
            if w.memory == v.memory and v.kind == 'value': w.time = max(w.time, u.time)

    def few(self, v: Var, index: str) -> bool: return index == '[:, 1:]' and len(self.rows) > 1 and v.site and v.site.axis == 1 # of one row, the rest is nothing

    def put(self):
        v, index = self.editable(), self.r.choice([i for i in INDICES if self.section >= 0 or i in ('[:]', '[..., 1]')]) # a lasting edit: of all rows
        if v is None: return
        try: sample = v.sample[eval_index(index)]
        except IndexError: return
        if not sample.numel() or self.few(v, index): return
        new, text, uses = self.right_side(v, sample)
        def emit(b): b.add('operator.setitem', b.env[v.name], INDICES[index], new if not uses else b.env[new.name])
        self.write(f'{v.name}{index} = {text}', emit, 'edit', None, [v.name, *uses])

    def augment(self):
        v, (text, op) = self.editable(), self.r.choice(list(AUGMENTED.items()))
        if v is None or self.block: return
        new, right, uses = self.right_side(v, v.sample)
        def emit(b): b.env[v.name] = b.add(op, b.env[v.name], new if not uses else b.env[new.name])
        self.write(f'{v.name} {text} {right}', emit, 'edit', None, [v.name, *uses])

    def augment_site(self):
        s = self.r.choice([s for s in self.chosen if not s.leaf] or [None]) # x[0] += 1 of a tuple is an error in Python, too
        if s is None: return
        text, op = self.r.choice(list(AUGMENTED.items()))
        def emit(b):
            chain = b.site(s)
            b.assign(s, chain, b.add(op, chain[-1], 0.5))
        self.write(f'@ {text} 0.5', emit, 'edit', site=s)

    def method(self):
        v, (text, (op, *more)) = self.editable(), self.r.choice(list(METHODS.items()))
        if v is None: return
        def emit(b): b.add(op, b.env[v.name], *more)
        self.write(f'{v.name}{text}', emit, 'edit', None, [v.name])

    def replace(self):
        s = self.r.choice(self.chosen)
        if s.leaf: return # a tuple's part can't be assigned
        target = Var('', s.sample, s.time, (self.section, self.prompt, s.path, s.kind, s.call, s.leaf), s, 'site', s.path if s.call == 'all' else None)
        found = [v for v in self.mine(kind='value', block=None) if v.sample.shape == s.sample.shape and self.allowed(target, v)]
        if self.r.random() < 0.7 or not found:
            v = self.read(s)
            text, op = self.r.choice([('{} * 1.5', ('operator.mul', 1.5)), ('{} + 0.5', ('operator.add', 0.5)), ('{}.tanh()', ('torch.Tensor.tanh',))])
            w = self.new(s.sample, s.time, every=v.every)
            def emit_value(b): b.env[w.name] = b.add(op[0], b.env[v.name], *op[1:])
            self.write(f'{w.name} = {text.format(v.name)}', emit_value, 'read', w.name, [v.name])
        else: w = self.r.choice(found)
        def emit(b): b.assign(s, b.site(s), b.env[w.name])
        self.write(f'@ = {w.name}', emit, 'replace', None, [w.name], s)
        self.retired |= {w.memory, target.memory}

    def save(self, v=None):
        v = v or self.pick()
        if self.gate and not (self.meet(v, self.gate) and self.meet(self.gate, v)): return
        name = self.name('s')
        def emit(b): b.add('save', b.env[v.name], save=name)
        self.write(f'{name} = {v.name}.save()', emit, 'read', None, [v.name])
        self.lines[-1].named = f"{name} = {v.name}{'.clone()' if v.memory in self.saved else ''}.save('{name}')"
        self.saved.add(v.memory)

    def condition(self):
        v = self.any()
        if self.block or v.kind == 'grad': return
        c, block = round(self.r.uniform(-0.5, 0.5), 3), self.name('c')
        def emit(b): b.env[block] = b.add('cond', b.add('operator.gt', b.add('torch.Tensor.mean', b.env[v.name]), c))
        self.write(f'with t.cond({v.name}.mean() > {c}):', emit, 'cond', block, [v.name])
        self.block, self.gate = block, v
        for _ in range(self.r.randint(1, 3)): self.r.choice([self.put, self.method, self.save, self.put])()
        self.block, self.gate = None, None

    def effect(self):
        v = self.pick()
        if v.every or self.block or v.time > LATE / 2: return
        self.effects = max(self.effects, v.time, self.late)
        w = self.new(v.sample * 0.5, self.effects)
        def emit(b): b.env[w.name] = b.add('apply', b.seen, b.env[v.name])
        self.write(f'{w.name} = apply(seen, {v.name})', emit, 'apply', w.name, [v.name])

    # Gradients

    def gradient(self):
        found = [v for v in self.mine(kind='site') if v.site.shared and v.kind == 'site' and v.block is None and v.prompt == self.prompt]
        v = self.r.choice(found) if found else self.read()
        if self.block or not v.site.shared: return
        which, group, edits = self.passes, (self.section, self.prompt, v.site.shared), self.r.random() < 0.4 and not v.every
        known = self.graded.setdefault((group, which), [v.site, False])
        if known[0] != v.site and (edits or known[1]): return
        known[1] |= edits
        time = LATE * (which + 1) - v.time
        g = self.new(v.sample, time, ('grad', which, v.memory), v.every, v.site, 'grad', self.name('g'))
        def emit(b): b.env[g.name] = b.add('grad', b.env[v.name], b.backwards)
        self.write(f'{g.name} = {v.name}.grad', emit, 'grad', g.name, [v.name])
        if edits and self.r.random() < 0.5: return self.edit_gradient(v, g)
        if edits: self.write(f'{g.name}[..., 1] = 2.', lambda b: b.add('operator.setitem', b.env[g.name], INDICES['[..., 1]'], 2.), 'edit grad', None, [g.name])
        if self.r.random() < 0.7: self.save(g)

    def edit_gradient(self, v: Var, g: Var):
        def emit(b): b.add('update', b.add('grad', b.env[v.name], b.backwards), b.add('operator.mul', b.env[g.name], 2.))
        self.write(f'{v.name}.grad = {g.name} * 2.', emit, 'edit grad', None, [v.name, g.name])
        self.save(g)

    def backward(self, last: bool):
        last_site = [s for s in self.sites if s.shared and s.call != 'all' and s.kind == 'output'][-1]
        graded = [s for (group, which), (s, _) in self.graded.items() if which == self.passes and group[:2] == (self.section, self.prompt)]
        own = len(graded) == 1 and graded[0].call != 'all' and self.r.random() < 0.3
        v = self.read(graded[0] if own else last_site)
        loss, keep = self.name('loss'), '' if last else 'retain_graph=True'
        def emit(b):
            b.add('torch.Tensor.backward', b.add('torch.Tensor.sum', b.add('operator.pow', b.env[v.name], 2)), retain_graph=True)
            b.backwards += 1
        self.write(f'({v.name} ** 2).sum().backward({keep})', emit, 'backward' if not self.passes else 'second backward', None, [v.name])
        self.passes += 1
        self.late = LATE * self.passes
        self.effects = max(self.effects, self.late)

    # All of it

    def some_lines(self, n: int, grads: bool):
        kinds = [self.read, self.save, self.unary, self.unary, self.binary, self.view, self.view, self.put, self.put, self.put, self.augment, self.augment_site, self.method, self.replace, self.replace]
        if 'cond' in self.on: kinds += [self.condition] * 3
        if 'apply' in self.on: kinds += [self.effect] * 3
        if grads: kinds += [self.gradient] * 5
        for _ in range(n): self.r.choice(kinds)()

    def body(self, n: int):
        self.chosen, grads = self.focus(), 'grad' in self.on
        self.some_lines(n, grads)
        if grads:
            self.gradient()
            twice = 'second backward' in self.on
            others = self.prompt is not None and self.prompt + 1 < len(self.rows)
            self.backward(last=not twice and not others)
            if twice:
                self.some_lines(1, True)
                self.gradient()
                self.backward(last=not others)
        for v in self.r.sample(self.mine(), min(2, len(self.mine()))): self.save(v)
        if self.section >= 0: self.save(self.read(self.r.choice([s for s in self.sites if s.call != 'all'][-3:])))

    def program(self) -> Program:
        n = self.r.randint(2, 6)
        if 'edit' in self.on: self.lasting_edit()
        for k in range(len(self.rows)):
            self.prompt = k if len(self.rows) > 1 else None
            self.body(n if len(self.rows) == 1 else max(2, n // 2))
        if 'session' in self.on:
            self.section, self.passes, self.graded = 1, 0, {}
            self.body(max(2, n // 2))
        if 'stop' not in self.on and len(self.rows) > 1 and self.r.random() < 0.3: self.whole_batch()
        if 'stop' in self.on:
            v = self.pick()
            if not v.every and v.time < LATE: self.write(f'{v.name}.stop()', lambda b: b.add('stop', b.env[v.name]), 'stop', None, [v.name])
        return Program(self.model, self.seed, self.lines, self.rows, 'grad' in self.on, 1 + ('session' in self.on))

    def lasting_edit(self):
        self.section, self.chosen = -1, [s for s in self.focus() if s.calls == 1 or s.call == 'all'] # in an edit, .output is that of every call
        if not self.chosen: self.chosen = [self.sites[-1]]
        for _ in range(self.r.randint(1, 2)): self.r.choice([self.put, self.replace, self.augment_site])()
        for line in self.lines: line.feature = 'lasting edit'
        self.section, self.retired, self.vars = 0, set(), []

    def whole_batch(self):
        self.prompt = None
        found = [s for s in self.chosen if s.call != 'all' and not s.leaf and s.kind == 'output']
        if found: self.save(self.read(self.r.choice(found)))


FEATURES = {'every': 0.35, 'cond': 0.25, 'prompts': 0.25, 'session': 0.12, 'edit': 0.15, 'grad': 0.35, 'second backward': 0.4, 'apply': 0.15, 'stop': 0.06}


def with_sample(op: str, sample, *more):
    kind, _, name = op.rpartition('.')
    f = getattr({'operator': operator, 'torch': torch, 'torch.Tensor': torch.Tensor}[kind], name)
    return f(sample, *map(plain_index, more))


def plain_index(v):
    if isinstance(v, dict) and 'tuple' in v: return tuple(map(plain_index, v['tuple']))
    return slice(*v['slice']) if isinstance(v, dict) and 'slice' in v else ... if isinstance(v, dict) else v


def eval_index(text: str): return plain_index(INDICES[text])
