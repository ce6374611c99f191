"""Random programs of traces. The generator knows when each value is there, and so keeps to the model's order, but for
some edits."""
import operator
import random
from collections import Counter
from dataclasses import dataclass

import torch

from tracing_models import MODELS, Site, build
from tracing_programs import Line, Program

FEATURES = {'every': 0.5, 'cond': 0.25, 'prompts': 0.25, 'session': 0.12, 'edit': 0.15, 'grad': 0.35, 'apply': 0.15,
            'second backward': 0.4, 'stop': 0.06} # how likely each is
ALL, REST = {'slice': [None, None, None]}, {'ellipsis': True}
INDICES = {'[:]': ALL, '[0]': 0, '[:, 0]': {'tuple': [ALL, 0]}, '[..., 1]': {'tuple': [REST, 1]},
           '[:, 1:]': {'tuple': [ALL, {'slice': [1, None, None]}]},
           '[..., ::2]': {'tuple': [REST, {'slice': [None, None, 2]}]}}
VIEWS = {'.transpose(0, 1)': ('torch.Tensor.transpose', 0, 1), '.unsqueeze(0)': ('torch.Tensor.unsqueeze', 0),
         '.flatten()': ('torch.Tensor.flatten',), '.view(-1)': ('torch.Tensor.view', -1),
         **{text: ('operator.getitem', index) for text, index in INDICES.items() if text != '[:]'}}
MIXING = '.transpose(0, 1)', '.unsqueeze(0)', '.flatten()', '.view(-1)' # views after which rows are elsewhere
UNARY = {'{} * 1.5': ('operator.mul', 1.5), '{} + 0.5': ('operator.add', 0.5), '-{}': ('operator.neg',),
         '{}.tanh()': ('torch.Tensor.tanh',), 'torch.relu({})': ('torch.relu',), '{}.clone()': ('torch.Tensor.clone',),
         '{}.mean()': ('torch.Tensor.mean',), '{} ** 2': ('operator.pow', 2),
         '{}.sum(-1, True)': ('torch.Tensor.sum', -1, True)}
BINARY = {'{} + {}': 'operator.add', '{} - {}': 'operator.sub', '{} * {}': 'operator.mul',
          'torch.maximum({}, {})': 'torch.maximum'}
METHODS = {'.mul_(0.5)': ('torch.Tensor.mul_', 0.5), '.add_(1.)': ('torch.Tensor.add_', 1.),
           '.zero_()': ('torch.Tensor.zero_',), '.clamp_(0.)': ('torch.Tensor.clamp_', 0.)}
AUGMENTED = {'+=': 'operator.iadd', '*=': 'operator.imul', '-=': 'operator.isub'}
LATE = 10_000    # when the first backward pass is, counted in sites
FORBIDDEN = 0.3 # how often an edit may take a value that comes too late


def try_out(op: str, *args) -> torch.Tensor: # on plain tensors, for shapes and memory
    kind, _, name = op.rpartition('.')
    return getattr({'operator': operator, 'torch': torch, 'torch.Tensor': torch.Tensor}[kind], name)(*map(plain, args))


def plain(v): # an index as Python has it
    if not isinstance(v, dict): return v
    return tuple(map(plain, v['tuple'])) if 'tuple' in v else slice(*v['slice']) if 'slice' in v else ...


@dataclass
class Var:
    "A name of the program."
    name: str
    sample: torch.Tensor       # Of its shape and layout
    time: float                # When its value is there
    memory: object             # Equal for what shares memory
    kind: str = 'value'        # 'site', 'view', 'value', 'grad'
    site: Site | None = None   # Where it comes from, if it shares its memory
    every: str | None = None   # The module, if it is of each call of it
    section: int = 0
    prompt: int | None = None
    block: str | None = None

    def over(self, passes: int) -> bool: # A gradient (or a part of one) whose backward pass has been
        return isinstance(self.memory, tuple) and self.memory[0] == 'grad' and self.memory[1] < passes


class Generator:
    def __init__(self, seed: int, models: list = MODELS, features: set | None = None):
        self.r, self.seed = random.Random(seed), seed
        self.model = self.r.choice(models)
        self.on = {f for f, p in FEATURES.items() if self.r.random() < p}
        if features is not None:
            self.on &= features
        if 'session' in self.on:
            self.on -= {'prompts', 'edit'}
        if 'stop' in self.on:
            self.on -= {'grad', 'session', 'apply'}
        self.rows = self.r.choice([[2, 1], [1, 1], [2, 2], [1, 2, 1]]) if 'prompts' in self.on else [2]
        self.sites = [s for s in build(self.model)[2] if self.may_name(s)]
        self.lines, self.vars, self.names = [], [], Counter()
        self.retired, self.graded, self.saved = set(), {}, set()
        self.section, self.prompt, self.block, self.gate = 0, None, None, None
        self.passes, self.effects, self.late = 0, 0, 0 # backward passes; when the last effect was, and the last pass

    def may_name(self, s: Site) -> bool:
        return (s.axis is not None or len(self.rows) == 1) and (s.call != 'all' or 'every' in self.on)

    # Names

    def fresh(self, kind: str) -> str:
        self.names[kind] += 1
        return f'{kind}{self.names[kind]}'

    def new(self, sample: torch.Tensor, time: float, memory=None, kind: str = 'value', site=None, every=None) -> Var:
        name, memory = self.fresh('g' if kind == 'grad' else 'v'), object() if memory is None else memory
        v = Var(name, sample, time, memory, kind, site, every, self.section, self.prompt, self.block)
        self.vars.append(v)
        return v

    def visible(self) -> list: # also from other prompts and earlier traces
        return [v for v in self.vars if v.block in (None, self.block) and v.memory not in self.retired
                and (v.section == self.section or min(v.section, self.section) >= 0 and not v.every)]

    def own(self, **wanted) -> list:
        here = [v for v in self.visible() if (v.section, v.prompt) == (self.section, self.prompt)]
        return [v for v in here if all(getattr(v, k) == x for k, x in wanted.items())]

    def pick(self) -> Var:
        found = self.own()[-6:]
        return self.r.choice(found) if found and self.r.random() < 0.7 else self.read()

    def write(self, text: str, emit, feature: str, makes: Var | str | None = None, uses=(), site=None, named=None):
        uses, makes = tuple(v.name for v in uses), getattr(makes, 'name', makes)
        self.lines.append(Line(text, emit, feature, makes, uses, site, self.section, self.prompt, self.block, named))

    # What the model's order allows

    def first_time(self, path: str) -> int: return min(s.time for s in self.sites if s.path == path)

    def meet(self, v: Var, u: Var) -> bool: # both may be in one line: what is of each call is there at each call
        if v.every and u.every: return v.every == u.every
        every, other = (v, u) if v.every else (u, v)
        return not every.every or other.time < self.first_time(every.every)

    def allowed(self, target: Var, value: Var) -> bool: # in an edit; now and then a value that comes late
        if value.every and not target.every or not self.meet(target, value): return False
        if target.every: return value.memory == target.memory or value.time <= target.time
        return target.kind == 'value' or value.time <= target.time or self.r.random() < FORBIDDEN

    # Reading

    def read(self, site: Site | None = None) -> Var:
        s = site or self.r.choice(self.chosen)
        memory = self.section, self.prompt, s.path, s.kind, s.call, s.leaf
        v = self.new(s.value, s.time, memory, 'site', s, s.path if s.call == 'all' else None)
        def emit(b): b.env[v.name] = b.site(s)[-1]
        self.write(f'{v.name} = @', emit, 'every' if s.call == 'all' else 'numbered' if s.call else 'read', v, site=s)
        return v

    def operate(self, v: Var, text: str, op: str, *more) -> Var:
        w = self.new(try_out(op, v.sample, *more), v.time, every=v.every)
        def emit(b): b.env[w.name] = b.add(op, b.env[v.name], *more)
        self.write(f'{w.name} = {text.format(v.name)}', emit, 'read', w, [v])
        return w

    def unary(self):
        text, op = self.r.choice(list(UNARY.items()))
        self.operate(self.pick(), text, *op)

    def mean(self, v: Var) -> Var: return self.operate(v, '{}.mean()', 'torch.Tensor.mean')

    def fitting(self, u: Var, v: Var, shape) -> Var: # u, or its mean where it can't stand beside v
        return u if u.sample.shape == shape and (u.section, u.prompt) == (v.section, v.prompt) else self.mean(u)

    def binary(self):
        v, u = self.pick(), self.r.choice(self.visible() or [None])
        if u is None or not self.meet(v, u): return
        u, (text, op) = self.fitting(u, v, v.sample.shape), self.r.choice(list(BINARY.items()))
        w = self.new(v.sample, max(v.time, u.time), every=v.every or u.every)
        def emit(b): b.env[w.name] = b.add(op, b.env[v.name], b.env[u.name])
        self.write(f'{w.name} = {text.format(v.name, u.name)}', emit, 'read', w, [v, u])

    def view(self):
        v, (text, (op, *more)) = self.pick(), self.r.choice(list(VIEWS.items()))
        if len(self.rows) > 1 and (text in MIXING or self.empty_for_one_row(v, text)): return
        try:
            sample = try_out(op, v.sample, *more)
        except (RuntimeError, IndexError):
            return
        if not sample.numel(): return
        shares = sample.untyped_storage().data_ptr() == v.sample.untyped_storage().data_ptr()
        w = self.new(sample, v.time, *((v.memory, 'view', v.site) if shares else (None,)), every=v.every)
        def emit(b): b.env[w.name] = b.add(op, b.env[v.name], *more)
        self.write(f'{w.name} = {v.name}{text}', emit, 'view', w, [v])

    def empty_for_one_row(self, v: Var, index: str) -> bool:
        return index == '[:, 1:]' and len(self.rows) > 1 and v.site is not None and v.site.axis == 1

    def save(self, v: Var | None = None):
        v = v or self.pick()
        if self.gate and not self.meet(v, self.gate): return
        name, again = self.fresh('s'), '.clone()' if v.memory in self.saved else ''
        self.saved.add(v.memory)
        def emit(b): b.add('save', b.env[v.name], save=name)
        named = f"{name} = {v.name}{again}.save('{name}')"
        text = f'{name} = {v.name}{again if self.r.random() < 0.9 else ""}.save()' # of what has changed, a copy
        self.write(text, emit, 'read', None, [v], named=named)

    # Editing

    def editable(self) -> Var | None:
        v = self.pick()
        if v.kind == 'value' and (self.block or 'grad' in self.on):
            v = self.read()
        if v.over(self.passes): return None
        return v if self.gate is None or self.meet(v, self.gate) and self.allowed(v, self.gate) else None

    def right_side(self, v: Var, shape) -> tuple: # text, and a name that is used or None
        u = self.r.choice(self.visible() or [None])
        if u is None or self.section < 0 or self.r.random() < 0.4 or not self.allowed(v, u):
            return self.r.choice(['0.', '2.', '-0.5']), None
        u = self.mean(u) if u.memory == v.memory else self.fitting(u, v, shape)
        for w in self.vars:
            if w.memory == v.memory and v.kind == 'value':
                w.time = max(w.time, u.time)
        return u.name, u

    def put(self):
        v = self.editable()
        index = self.r.choice(list(INDICES) if self.section >= 0 else ['[:]', '[..., 1]']) # a lasting edit: all rows
        if v is None or self.empty_for_one_row(v, index): return
        try:
            shape = v.sample[plain(INDICES[index])].shape
        except IndexError:
            return
        if 0 in shape: return
        text, u = self.right_side(v, shape)
        def emit(b): b.add('operator.setitem', b.env[v.name], INDICES[index], b.env[u.name] if u else float(text))
        self.write(f'{v.name}{index} = {text}', emit, 'edit', None, [v, u] if u else [v])

    def augment(self):
        v, (sign, op) = self.editable(), self.r.choice(list(AUGMENTED.items()))
        if v is None or self.block: return
        text, u = self.right_side(v, v.sample.shape)
        def emit(b): b.env[v.name] = b.add(op, b.env[v.name], b.env[u.name] if u else float(text))
        self.write(f'{v.name} {sign} {text}', emit, 'edit', None, [v, u] if u else [v])

    def method(self):
        v, (text, (op, *more)) = self.editable(), self.r.choice(list(METHODS.items()))
        def emit(b): b.add(op, b.env[v.name], *more)
        if v is not None:
            self.write(f'{v.name}{text}', emit, 'edit', None, [v])

    def whole_sites(self) -> list: return [s for s in self.chosen if not s.leaf] # a tuple's part can't be assigned

    def augment_site(self):
        s, (sign, op) = self.r.choice(self.whole_sites() or [None]), self.r.choice(list(AUGMENTED.items()))
        def emit(b): b.add('update', site := b.site(s)[-1], b.add(op, site, 0.5))
        if s is not None:
            self.write(f'@ {sign} 0.5', emit, 'edit', site=s)

    def replace(self):
        s = self.r.choice(self.whole_sites() or [None])
        if s is None: return
        target = Var('', s.value, s.time, None, 'site', s, s.path if s.call == 'all' else None)
        found = [v for v in self.own(kind='value', block=None) if v.sample.shape == s.value.shape]
        found = [v for v in found if self.allowed(target, v)]
        if found and self.r.random() < 0.3:
            w = self.r.choice(found)
        else:
            w = self.operate(self.read(s), *self.r.choice([('{} * 1.5', 'operator.mul', 1.5), ('-{}', 'torch.neg')]))
        def emit(b): b.add('update', b.site(s)[-1], b.env[w.name])
        self.write(f'@ = {w.name}', emit, 'replace', None, [w], s)
        self.retired |= {w.memory, (self.section, self.prompt, s.path, s.kind, s.call, s.leaf)}

    # Conditions and effects

    def condition(self):
        v, c, block = self.pick(), round(self.r.uniform(-0.5, 0.5), 3), self.fresh('c')
        sites = [s for s in self.chosen if self.fits(s, v)]
        if v.kind == 'grad' or not sites: return
        def emit(b): b.env[block] = b.add('cond', b.add('operator.gt', b.add('torch.Tensor.mean', b.env[v.name]), c))
        self.write(f'with t.cond({v.name}.mean() > {c}):', emit, 'cond', block, [v])
        self.block, self.gate, before, self.chosen = block, v, self.chosen, sites
        for _ in range(self.r.randint(1, 3)):
            self.r.choice([self.put, self.put, self.method, self.save])()
        self.block, self.gate, self.chosen = None, None, before

    def fits(self, s: Site, gate: Var) -> bool: # it may be named under a condition
        if gate.every: return s.call == 'all' and s.path == gate.every
        return s.call != 'all' or gate.time < self.first_time(s.path)

    def effect(self):
        v = self.pick()
        if v.every or v.time > LATE / 2: return
        self.effects = max(self.effects, v.time, self.late)
        w = self.new(v.sample, self.effects)
        def emit(b): b.env[w.name] = b.add('apply', b.seen, b.env[v.name])
        self.write(f'{w.name} = apply(seen, {v.name})', emit, 'apply', w, [v])

    def gradient(self):
        found = [v for v in self.own(kind='site', block=None) if v.site.shared]
        v = self.r.choice(found) if found else self.read()
        if not v.site.shared: return
        edits = self.r.random() < 0.4 and not v.every
        key = self.section, self.prompt, self.passes, v.site.shared
        site, edited = self.graded.setdefault(key, (v.site, edits))
        if site != v.site and (edits or edited): return # sites that hand on one tensor have one gradient
        self.graded[key] = site, edits or edited
        time, memory = LATE * (self.passes + 1) - v.time, ('grad', self.passes, v.memory)
        g = self.new(v.sample, time, memory, 'grad', v.site, v.every)
        def emit(b): b.env[g.name] = b.add('grad', b.env[v.name], b.backwards)
        self.write(f'{g.name} = {v.name}.grad', emit, 'grad', g, [v])
        if edits:
            self.r.choice([self.replace_gradient, self.put_gradient])(v, g)
        if self.r.random() < 0.7:
            self.save(g)

    def replace_gradient(self, v: Var, g: Var):
        def emit(b):
            doubled = b.add('operator.mul', b.env[g.name], 2.)
            b.add('update', b.add('grad', b.env[v.name], b.backwards), doubled)
        self.write(f'{v.name}.grad = {g.name} * 2.', emit, 'edit grad', None, [v, g])

    def put_gradient(self, v: Var, g: Var):
        def emit(b): b.add('operator.setitem', b.env[g.name], INDICES['[..., 1]'], 2.)
        self.write(f'{g.name}[..., 1] = 2.', emit, 'edit grad', None, [g])

    def backward(self, last: bool):
        graded = [site for key, (site, _) in self.graded.items() if key[:3] == (self.section, self.prompt, self.passes)]
        every = any(v.kind == 'grad' and v.every for v in self.own()) # then each call must take part
        own = len(graded) == 1 and graded[0].call != 'all' and not every and self.r.random() < 0.3
        outputs = [s for s in self.sites if s.shared and s.call != 'all' and s.kind == 'output']
        v = self.read(graded[0] if own else outputs[-1])
        def emit(b):
            b.add('torch.Tensor.backward', b.add('torch.Tensor.sum', b.add('operator.pow', b.env[v.name], 2)))
            b.backwards += 1
        text = f'({v.name} ** 2).sum().backward({"" if last else "retain_graph=True"})'
        self.write(text, emit, 'second backward' if self.passes else 'backward', None, [v])
        self.passes += 1
        self.effects = self.late = LATE * self.passes

    # A program

    def some_lines(self, n: int):
        kinds = [self.read, self.save, self.unary, self.unary, self.binary, self.view, self.view, self.put, self.put,
                 self.put, self.augment, self.augment_site, self.method, self.replace, self.replace]
        kinds += [self.condition] * 3 * ('cond' in self.on) + [self.effect] * 3 * ('apply' in self.on)
        kinds += [self.gradient] * 5 * ('grad' in self.on)
        for _ in range(n):
            self.r.choice(kinds)()

    def body(self, n: int):
        self.choose()
        self.some_lines(n)
        passes = ('grad' in self.on) * (1 + ('second backward' in self.on))
        others = 'session' in self.on or self.prompt is not None and self.prompt + 1 < len(self.rows)
        for k in range(passes):
            if k:
                self.some_lines(1)
            self.gradient()
            self.backward(last=k + 1 == passes and not others)
        for v in self.r.sample(self.own(), min(2, len(self.own()))):
            self.save(v)
        self.save(self.read(self.r.choice([s for s in self.sites if s.call != 'all'][-3:])))

    def choose(self): # a few sites, so that the lines of a program meet
        some = self.r.sample(self.sites, min(len(self.sites), 4))
        near = [s for s in self.sites if s.path == some[0].path]
        self.chosen = some + near + [s for s in near if s.call == 'all']

    def lasting_edit(self):
        self.choose()
        self.section = -1
        each = [s for s in self.chosen if s.calls == 1 or s.call == 'all'] # in a lasting edit, .output is of each call
        self.chosen = each or self.sites[-1:]
        for _ in range(self.r.randint(1, 2)):
            self.r.choice([self.put, self.replace, self.augment_site])()
        for line in self.lines:
            line.feature = 'lasting edit'
        self.section, self.retired, self.vars = 0, set(), []

    def program(self) -> Program:
        n = self.r.randint(2, 6)
        if 'edit' in self.on:
            self.lasting_edit()
        for k in range(len(self.rows)):
            self.prompt = k if len(self.rows) > 1 else None
            self.body(n if len(self.rows) == 1 else max(2, n // 2))
        if 'session' in self.on:
            self.section, self.passes, self.effects, self.late = 1, 0, 0, 0
            self.body(max(2, n // 2))
        if 'stop' in self.on:
            self.stop()
        elif len(self.rows) > 1 and self.r.random() < 0.3:
            self.whole_batch()
        return Program(self.model, self.seed, self.lines, self.rows, 'grad' in self.on, 1 + ('session' in self.on))

    def stop(self):
        v = self.pick()
        def emit(b): b.add('stop', b.env[v.name])
        if not v.every:
            self.write(f'{v.name}.stop()', emit, 'stop', None, [v])

    def whole_batch(self): # outside of the invokes
        self.prompt = None
        found = [s for s in self.chosen if s.call != 'all' and not s.leaf and s.kind == 'output']
        if found:
            self.save(self.read(self.r.choice(found)))
