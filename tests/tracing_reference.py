"""What a trace means, a second time: a slow executor of intervention graphs that shares no code with the engine.

Plain hooks stop the model at each site that the graph names. There the lines are walked from the first one, in written order. No tensor
is ever written to: an in-place change makes a new version of its memory, and a line takes the version that is current at its own place in
the list. A line whose arguments aren't there yet gives UNKNOWN, and an edit with such an argument leaves UNKNOWN in what it edits: where
the model needs that to go on, its order forbids the program. What the last line leaves in a site is what the model goes on with.
A backward pass is met in the same way: its sites are the gradients that the graph names. Several prompts are several runs of one prompt
each, side by side, which wait for each other at each site."""
import base64
import importlib
import json
import threading
from collections import Counter, namedtuple
from types import SimpleNamespace

import torch
from safetensors.torch import load
from torch.utils._pytree import tree_leaves, tree_map


class UNKNOWN: "Not there yet."
class ABSENT: "Never there: its condition was false."
class Forbidden(Exception): "The model's order makes the written order impossible."
class Stopped(Exception): "The graph ends the run here."
class Restart(Exception): "A backward pass has run: lines before it have their gradients now."
class Memory: "What an in-place change makes a new version of."


Ref = namedtuple('Ref', 'id')             # the value of another line
Name = namedtuple('Name', 'key first')    # a site or a gradient, or the first argument in a site's input
SPECIAL = {'attribute': getattr, 'cond': bool, 'save': lambda v: v, 'stop': lambda v: v, 'apply': lambda f, *a, **k: f(*a, **k)}
EFFECTS = 'torch.Tensor.backward', 'apply', 'log' # these keep their order among each other
CONTAINERS = 'operator.getitem', 'operator.setitem', 'attribute'


class Handle:
    "A tensor of the graph: a memory, and the views that lead to a part of it, as functions."
    def __init__(self, memory: Memory, path: tuple = ()): self.memory, self.path = memory, path


class Version:
    "What a memory holds between two edits, and views of it: the same object each time, so that it can have a gradient."
    def __init__(self, tensor: torch.Tensor): self.views = {(): tensor}
    def at(self, path: tuple) -> torch.Tensor:
        if path not in self.views: self.views[path] = path[-1](self.at(path[:-1]))
        return self.views[path]


def copy(t): # strides, too: whether a reshape is a view depends on them
    if not isinstance(t, torch.Tensor): return t
    overlaps = any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride()))
    return t.clone() if overlaps else t.new_empty_strided(t.shape, t.stride()).copy_(t)


def fill(v, change): # in the arguments of a line, at any depth
    if type(v) in (tuple, list, set): return type(v)(fill(x, change) for x in v)
    if type(v) is dict: return {k: fill(x, change) for k, x in v.items()}
    return slice(*(fill(x, change) for x in (v.start, v.stop, v.step))) if type(v) is slice else change(v)


def decode(v): # from JSON
    if isinstance(v, list): return [decode(x) for x in v]
    if not isinstance(v, dict): return v
    (kind, v), = v.items()
    if kind == 'dict': return {decode(k): decode(x) for k, x in v}
    if kind in ('slice', 'range', 'complex'): return dict(slice=slice, range=range, complex=complex)[kind](*map(decode, v))
    return dict(ref=Ref, float=float, ellipsis=lambda _: ..., device=torch.device, operation=function, bytes=base64.b64decode,
                tuple=lambda v: tuple(map(decode, v)), set=lambda v: set(map(decode, v)), size=torch.Size,
                dtype=lambda v: getattr(torch, v), tensor=lambda v: load(base64.b64decode(v))['t'])[kind](v)


def function(op: str):
    if op in SPECIAL: return SPECIAL[op]
    root, *names = op.split('.')
    found = importlib.import_module(root)
    for name in names: found = getattr(found, name)
    return found


def mutates(op: str) -> bool:
    kind, _, name = op.rpartition('.')
    augmented = kind == 'operator' and name[0] == 'i' and hasattr(torch.Tensor, f'__{name}__')
    return op == 'operator.setitem' or augmented or kind == 'torch.Tensor' and name[-1] == '_' and name[-2] != '_'


def read_lines(nodes: list, trace: int | None) -> list:
    return [SimpleNamespace(id=n['id'], op=n['op'], args=tuple(map(decode, n['args'])), trace=trace, guard=n.get('guard'), call=None,
                            save=n.get('save'), kwargs={k: decode(v) for k, v in n.get('kwargs', {}).items()}) for n in nodes]


def expand(lines: list, calls: Counter) -> list:
    "Lines that depend on every call of a module, once for each call."
    found, many = [], {}
    for line in lines:
        used = [line.guard]
        fill((line.args, line.kwargs), lambda v: used.append(v.id) if isinstance(v, Ref) else None)
        times = {many[i] for i in used if i in many}
        if line.op == 'site' and line.args[2] == 'all': times = {calls[line.args[0]]}
        if len(times) > 1: raise ValueError('modules that are called unequal numbers of times meet')
        for c in range(*times) if times else [None]:
            args, kwargs = fill((line.args, line.kwargs), lambda v: Ref((v.id, c)) if isinstance(v, Ref) and v.id in many else v)
            if line.op == 'site' and c is not None: args = (*args[:2], c, args[3])
            changed = dict(id=line.id if c is None else (line.id, c), args=args, kwargs=kwargs, call=c,
                           guard=(line.guard, c) if line.guard in many else line.guard)
            found.append(SimpleNamespace(**vars(line) | changed))
        if times: many[line.id] = times.pop()
    return found


def with_first(inputs: tuple, new) -> tuple:
    args, kwargs = inputs
    return ((new, *args[1:]), kwargs) if args else (args, {k: new if i == 0 else v for i, (k, v) in enumerate(kwargs.items())})


class Execution:
    def __init__(self, graph: str | dict, *nets: torch.nn.Module, prompts: list = ()):
        self.nets, self.lines, self.traces = nets, [], []
        self.delivered, self.first, self.originals, self.done, self.asked, self.saved = {}, {}, {}, {}, {}, {}
        self.running, self.passing, self.local, self.logged = None, None, threading.local(), []
        data = json.loads(graph) if isinstance(graph, str) else graph
        if data['kind'] == 'trace': self.add_trace(data, 0, 'forward', [((p,), {}, {}) for p in prompts], {})
        for node in data['nodes'] if data['kind'] != 'trace' else []:
            if node['op'] == 'trace': self.add_trace(dict(nodes=node['body']), *map(decode, node['args']))
            else: self.lines += read_lines([node], None)

    def add_trace(self, data: dict, net: int, method: str, inputs: list, common: dict):
        lines, calls, start = read_lines(data['nodes'], len(self.traces)), Counter(), len(self.lines)
        if any(line.op == 'site' and line.args[2] == 'all' for line in lines):
            hooks = [m.register_forward_pre_hook(lambda *_, p=p: calls.update([p])) for p, m in self.nets[net].named_modules()]
            with torch.no_grad(): self.nets[net](*inputs[0][0], **inputs[0][1], **common)
            for h in hooks: h.remove()
        self.lines += expand(lines, calls)
        self.traces.append(SimpleNamespace(number=len(self.traces), start=start, end=len(self.lines), net=self.nets[net],
                                           inputs=[(args, kwargs | common) for args, kwargs, _ in inputs]))

    def run(self) -> dict:
        for trace in self.traces: self.run_trace(trace, self.walk(trace.start))
        self.walk(len(self.lines))
        for net in self.nets: net.zero_grad()
        return self.saved

    # The models: a run of each prompt

    def run_trace(self, trace, before):
        self.running, self.stopped, self.calls, errors = trace, False, Counter(), []
        self.meeting, self.grad = threading.Barrier(len(trace.inputs), self.meet), torch.is_grad_enabled()
        sites = {line.args[:2] for line in self.lines[trace.start:trace.end] if line.op == 'site'}
        hooks = [self.hook(trace.net.get_submodule(path), path, kind) for path, kind in sites]
        def run(k: int, args: tuple, kwargs: dict):
            self.local.prompt = k
            try:
                with torch.set_grad_enabled(self.grad): trace.net(*args, **kwargs)
            except Stopped: pass
            except BaseException as e: errors.append(e), self.meeting.abort()
        inputs = fill(trace.inputs, lambda v: self.real(before, self.value(before, v)) if isinstance(v, Ref) else copy(v))
        threads = [threading.Thread(target=run, args=(k, *i)) for k, i in enumerate(inputs)]
        for t in threads: t.start()
        for t in threads: t.join()
        for h in hooks: h.remove()
        for e in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)): raise e
        self.meet()
        for line in self.lines[trace.start:trace.end]:
            if line.op == 'grad' and not self.stopped and self.value(self.now, Ref(line.id)) is UNKNOWN: raise RuntimeError('takes no part in a gradient')
        self.running = None

    def hook(self, module: torch.nn.Module, path: str, kind: str):
        if kind == 'output': return module.register_forward_hook(lambda m, args, out: self.fire(path, kind, out))
        return module.register_forward_pre_hook(lambda m, args, kwargs: self.fire(path, kind, (args, kwargs)), with_kwargs=True)

    def fire(self, path: str, kind: str, value):
        if self.passing is not None or self.local.__dict__.get('aside'): return None
        k, old = self.local.prompt, tree_leaves(value)
        key = self.running.number, path, kind, self.calls[path, kind, k], k
        self.calls[path, kind, k] += 1
        self.delivered[key] = tree_map(self.deliver, value)
        self.meeting.wait()
        if self.stopped: raise Stopped
        left = self.needed(self.now, self.now.cells.get(key, self.delivered[key]), key)
        if [id(t) for t in tree_leaves(left)] == [id(t) for t in old]: return None
        return tree_map(lambda t: t if any(t is v for v in old) else copy(t), left) # a copy, since the model may write to it

    def deliver(self, t): # lines get a copy, since the model may write to it later; gradients are of the tensor itself
        if not isinstance(t, torch.Tensor): return t
        seen = copy(t)
        self.originals[id(seen)] = t
        return self.remember(seen, self.first)

    def remember(self, t, versions: dict):
        if not isinstance(t, torch.Tensor): return t
        memory = Memory()
        versions[memory] = Version(t)
        return Handle(memory)

    def meet(self): self.now = self.walk(self.running.end)

    def needed(self, w, value, what): # by the model, or by the backward pass, to go on
        if any(self.unknown(w, v) for v in tree_leaves(value)): raise Forbidden(f'{what} is edited with what comes later')
        return tree_map(lambda t: self.originals.get(id(t), t), self.real(w, value))

    # The lines

    def walk(self, end: int):
        "All lines before `end`, as far as their values are there."
        while True:
            w = SimpleNamespace(env={}, cells={}, now=dict(self.first), blocked=False, backwards=Counter())
            try:
                for k, line in enumerate(self.lines[:end]):
                    w.env[line.id] = self.step(k, line, w)
                    if line.save is not None: self.keep(line, w)
                return w
            except Restart: pass

    def value(self, w, v):
        if not isinstance(v, Ref): return v
        found = w.env.get(v.id, UNKNOWN)
        if not isinstance(found, Name): return found
        if found.key not in self.delivered: return UNKNOWN
        if not found.first: return w.cells[found.key]
        args, kwargs = w.cells[found.key]
        return [*args, *kwargs.values()][0]

    def unknown(self, w, v) -> bool: return v is UNKNOWN or isinstance(v, Handle) and w.now.get(v.memory, UNKNOWN) is UNKNOWN
    def real(self, w, v): return tree_map(lambda v: w.now[v.memory].at(v.path) if isinstance(v, Handle) else v, v)

    def keep(self, line, w):
        value = self.value(w, Ref(line.id))
        if any(self.unknown(w, v) or v is ABSENT for v in tree_leaves(value)): return
        kept = tree_map(copy, self.real(w, value))
        if line.call is None: self.saved.setdefault(line.save, kept)
        elif len(self.saved.setdefault(line.save, [])) == line.call: self.saved[line.save].append(kept)

    def step(self, k: int, line, w):
        if line.op == 'site': return self.site(line, w)
        if line.op == 'first_input': return Name(w.env[line.args[0].id].key, True)
        args, kwargs = fill((line.args, line.kwargs), lambda v: self.value(w, v))
        if line.op == 'grad': return self.gradient(line, args, w)
        guard = True if line.guard is None else self.value(w, Ref(line.guard))
        if line.op == 'torch.Tensor.backward': w.backwards[line.trace] += 1
        inside = line.op in CONTAINERS and not isinstance(args[0], Handle) or line.op.startswith('builtins.')
        leaves = [*(args[:2] if inside else tree_leaves((args, kwargs))), guard]
        if any(self.unknown(w, v) for v in leaves): return self.postpone(line, args, guard, w)
        if guard is False or any(v is ABSENT for v in leaves): return ABSENT
        if line.op == 'stop': self.stopped = True
        if inside: return function(line.op)(*args, **kwargs) # of Python's containers: anew in each walk
        if k not in self.done:
            if line.op in EFFECTS and w.blocked: return UNKNOWN
            if line.op == 'torch.Tensor.backward': self.backward(k, line, *self.real(w, (args, kwargs)), w.backwards[line.trace] - 1)
            self.done[k] = self.compute(line, args, kwargs, w)
        value, versions = self.done[k]
        w.now.update(versions)
        return self.set(w, line, value) if line.op == 'update' else value

    def site(self, line, w):
        path, kind, call, prompt = line.args
        keys = [(line.trace, path, kind, call, k) for k in range(len(self.traces[line.trace].inputs))]
        if prompt is None and len(keys) > 1: # outside of the invokes: of all prompts
            if any(key not in self.delivered for key in keys): return UNKNOWN
            trees = [self.real(w, w.cells.get(key, self.delivered[key])) for key in keys]
            return tree_map(lambda *ts: self.remember(torch.cat(ts), w.now) if isinstance(ts[0], torch.Tensor) else ts[0], *trees)
        key = keys[prompt or 0]
        if key in self.delivered and key not in w.cells: w.cells[key] = tree_map(lambda v: v, self.delivered[key])
        return Name(key, False)

    def postpone(self, line, args, guard, w):
        "A line whose time hasn't come. If it edits what the model needs now, its time never comes."
        name = w.env.get(line.args[0].id) if line.op == 'update' else None
        if line.op in EFFECTS and guard is not False and guard is not ABSENT: w.blocked = True
        if isinstance(name, Name) and name.key in self.delivered:
            if self.running and name.key[0] == self.running.number == line.trace: raise Forbidden(f'line {line.id} needs what comes later')
            w.cells[name.key] = UNKNOWN
        if not args or not mutates(line.op): return UNKNOWN
        if isinstance(args[0], (dict, list)) and args[1] is not UNKNOWN: args[0][args[1]] = UNKNOWN
        if not isinstance(args[0], Handle): return UNKNOWN
        w.now[args[0].memory] = UNKNOWN
        sites = [tree for key, tree in w.cells.items() if self.running and key[0] == self.running.number == line.trace]
        if any(isinstance(v, Handle) and v.memory is args[0].memory for v in tree_leaves(sites)): raise Forbidden(f'line {line.id} needs what comes later')
        return UNKNOWN

    def set(self, w, line, value): # what is assigned as a whole
        name = w.env[line.args[0].id]
        if not isinstance(name, Name): w.env[line.args[0].id] = value
        elif name.key in self.delivered: w.cells[name.key] = with_first(w.cells[name.key], value) if name.first else value
        return value

    def compute(self, line, args, kwargs, w) -> tuple: # the value, and new versions of memories
        versions, target = {}, args[0] if args else None
        real, options = self.real(w, (args, kwargs))
        if line.op == 'update': return tree_map(lambda t: self.remember(copy(t), versions), real[1]), versions
        f = self.function(line)
        if mutates(line.op) and isinstance(target, Handle):
            if line.op == 'torch.Tensor.requires_grad_' and real[0].requires_grad: return target, {}
            new = Version(copy(w.now[target.memory].at(())))
            found = f(new.at(target.path), *real[1:], **options)
            return None if found is None else target, {target.memory: Version(new.at(()))}
        found = f(*(map(copy, real) if mutates(line.op) else real), **options)
        counter = iter(range(len(tree_leaves(found))))
        return tree_map(lambda t: self.wrap(t, next(counter), f, args, kwargs, w, versions), found), versions

    def wrap(self, t, i: int, f, args, kwargs, w, versions: dict):
        "A result as a tensor of the graph: a view if it shares its memory with an argument."
        for h in [v for v in tree_leaves((args, kwargs)) if isinstance(v, Handle)] if isinstance(t, torch.Tensor) else []:
            if t is (whole := self.real(w, h)): return h
            if t.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr(): continue
            fixed = tree_map(lambda v: v if v is h else self.real(w, v), (args, kwargs))
            def view(base):
                a, k = tree_map(lambda v: base if v is h else v, fixed)
                return tree_leaves(f(*a, **k))[i]
            path = (*h.path, view)
            w.now[h.memory].views[path] = t
            return Handle(h.memory, path)
        return self.remember(t, versions)

    def function(self, line):
        net = self.traces[line.trace or 0].net
        def module(path, hook, *args, **kwargs):
            self.local.aside = True
            try: return net.get_submodule(path)(*args, **kwargs)
            finally: self.local.aside = False
        own = {'log': lambda *v: self.logged.append(v), 'module': module, 'parameter': lambda path: dict(net.named_parameters())[path]}
        return own.get(line.op) or function(line.op)

    # Gradients

    def gradient(self, line, args, w):
        target, which = args
        if which >= sum(x.op == 'torch.Tensor.backward' and x.trace == line.trace for x in self.lines): raise ValueError('no backward pass follows')
        if not isinstance(target, Handle) or self.unknown(w, target): return UNKNOWN
        t = self.real(w, target)
        t = self.originals.get(id(t), t)
        key = line.trace, 'grad', id(t), which
        if key not in self.asked: self.asked[key] = t, t.register_hook(lambda g: self.arrive(key, g))
        if key in self.delivered: w.cells.setdefault(key, self.delivered[key])
        return Name(key, False)

    def backward(self, k: int, line, args, kwargs, which: int):
        self.passing, self.until = (line.trace, which), k
        self.create = kwargs.get('create_graph', False)
        torch.autograd.backward(args[0], *args[1:2], retain_graph=True, create_graph=self.create)
        self.passing, self.done[k] = None, (None, {})
        raise Restart

    def arrive(self, key: tuple, g: torch.Tensor):
        if (key[0], key[3]) != self.passing: return None
        self.delivered[key] = self.deliver(g)
        with torch.set_grad_enabled(self.grad): left = self.needed(w := self.walk(self.until), w.cells[key], 'a gradient')
        return None if left is g else left if self.create else left.detach()


def run_reference(graph: str | dict, *nets: torch.nn.Module, prompts: list = ()) -> dict:
    "The saved values of a graph (its JSON, as text or read), run on plain modules."
    return Execution(graph, *nets, prompts=prompts).run()
