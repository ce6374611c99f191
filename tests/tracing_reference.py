"""What a trace means, a second time: a slow executor of intervention graphs that shares no code with the engine.

Plain hooks stop the model at each site that the graph names. There the lines are walked from the first one, in written order. No
tensor is ever written to: an in-place change makes a new version of its memory, and a line takes the version that is current at its
place in the list. A line whose arguments aren't there yet gives UNKNOWN, and an edit with such an argument leaves UNKNOWN in what it
edits: if the model needs that to go on, its order forbids the program. What the last line leaves in a site is what the model goes on
with. A backward pass is met in the same way: its sites are the gradients that the graph names. Several prompts are several runs of
one prompt each, side by side, which wait for each other at each site."""
import json
import threading
from collections import Counter, namedtuple
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_leaves, tree_map

from tracing_lines import Ref, decode, expand, fill, function, mutates, read_lines

Name = namedtuple('Name', 'key first')  # a site or a gradient, or the first argument in a site's input
EFFECTS = 'torch.Tensor.backward', 'apply', 'log'  # these keep their order among each other
UNKNOWN, ABSENT = type('Unknown', (), {}), type('Absent', (), {})  # not there yet; never there, since a condition was false


class Forbidden(Exception): "The model's order makes the written order impossible."
class Stopped(Exception): "The graph ends the run here."
class Restart(Exception): "A backward pass has run, so that lines before it have their gradients."
class Memory: "What an in-place change makes a new version of."


class Handle:
    "A tensor of the graph: a memory, and the views that lead to a part of it, as functions."
    def __init__(self, memory: Memory, path: tuple = ()): self.memory, self.path = memory, path


class Version:
    "What a memory holds between two edits, and views of it: the same object each time, so that it can have a gradient."
    def __init__(self, tensor: torch.Tensor): self.views = {(): tensor}
    def at(self, path: tuple = ()) -> torch.Tensor:
        if path not in self.views: self.views[path] = path[-1](self.at(path[:-1]))
        return self.views[path]


def copy(t):  # with its strides, on which it depends whether a reshape is a view
    if not isinstance(t, torch.Tensor): return t
    overlaps = any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride()))
    return t.clone() if overlaps else t.new_empty_strided(t.shape, t.stride()).copy_(t)


class Execution:
    "Of a graph's JSON, as text or read, on plain modules; `prompts` are the inputs of a graph of one trace."
    def __init__(self, graph: str | dict, *nets: torch.nn.Module, prompts: list = ()):
        self.nets, self.lines, self.traces, data = nets, [], [], json.loads(graph) if isinstance(graph, str) else graph
        self.delivered, self.first, self.originals, self.done, self.asked, self.saved = {}, {}, {}, {}, {}, {}
        self.passing, self.local, self.grad, self.stopped = None, threading.local(), torch.is_grad_enabled(), False
        if data['kind'] == 'trace': self.add(data['nodes'], 0, 'forward', [((p,), {}, {}) for p in prompts], {})
        for node in data['nodes'] if data['kind'] == 'session' else []:
            if node['op'] == 'trace': self.add(node['body'], *map(decode, node['args']))
            else: self.lines += read_lines([node], len(self.traces))

    def add(self, nodes: list, net: int, method: str, inputs: list, common: dict):
        lines, calls, start, net = read_lines(nodes, len(self.traces)), Counter(), len(self.lines), self.nets[net]
        if any(line.op == 'site' and line.args[2] == 'all' for line in lines):
            hooks = [m.register_forward_pre_hook(lambda *_, p=p: calls.update([p])) for p, m in net.named_modules()]
            with torch.no_grad(): net(*inputs[0][0], **inputs[0][1], **common)
            for h in hooks: h.remove()
        self.lines += expand(lines, calls)
        inputs = [(args, kwargs | common) for args, kwargs, _ in inputs]
        self.traces.append(SimpleNamespace(number=len(self.traces), start=start, end=len(self.lines), net=net, inputs=inputs))

    def run(self) -> dict:
        for trace in self.traces: self.run_trace(trace, self.walk(trace.start))
        self.walk(len(self.lines))
        return self.saved

    def run_trace(self, trace, before):
        self.running, self.stopped, self.calls, errors = trace, False, Counter(), []
        self.meeting, own = threading.Barrier(len(trace.inputs), self.meet), self.lines[trace.start:trace.end]
        hooks = [self.hook(trace.net.get_submodule(path), path, kind) for path, kind in {x.args[:2] for x in own if x.op == 'site'}]
        def run(k: int, args: tuple, kwargs: dict):
            self.local.prompt = k
            try:
                with torch.set_grad_enabled(self.grad): trace.net(*args, **kwargs)
            except Stopped: pass
            except BaseException as e: errors.append(e), self.meeting.abort()
        inputs = fill(trace.inputs, lambda v: self.real(before, self.value(before, v)) if isinstance(v, Ref) else copy(v))
        threads = [threading.Thread(target=run, args=(k, *i)) for k, i in enumerate(inputs[1:], 1)]
        for t in threads: t.start()
        run(0, *inputs[0])
        for t in threads: t.join()
        for h in hooks: h.remove()
        for e in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)): raise e
        self.meet()
        late = [x for x in own if x.op == 'grad' and self.value(self.now, Ref(x.id)) is UNKNOWN]
        if late and not self.stopped: raise RuntimeError(f'no gradient comes to line {late[0].id}')

    def hook(self, module: torch.nn.Module, path: str, kind: str):
        if kind == 'output': return module.register_forward_hook(lambda m, args, out: self.fire(path, kind, out))
        return module.register_forward_pre_hook(lambda m, args, kwargs: self.fire(path, kind, (args, kwargs)), with_kwargs=True)

    def fire(self, path: str, kind: str, value):
        if self.passing: return None  # a backward pass runs a module again
        key = self.running.number, path, kind, self.calls[path, kind, self.local.prompt], self.local.prompt
        self.calls[path, kind, self.local.prompt] += 1
        self.delivered[key], old = tree_map(self.deliver, value), tree_leaves(value)
        self.meeting.wait()
        if self.stopped: raise Stopped
        left = self.needed(self.now, key)
        if [id(t) for t in tree_leaves(left)] == [id(t) for t in old]: return None
        return tree_map(lambda t: t if any(t is v for v in old) else copy(t), left)  # a copy, since the model may write to it

    def deliver(self, t):  # lines get a copy, since the model may write to its tensor; gradients are of the tensor itself
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

    def needed(self, w, key: tuple):  # what the model, or the backward pass, goes on with
        left = w.cells.get(key, self.delivered[key])
        if key in w.late or any(self.unknown(w, v) for v in tree_leaves(left)): raise Forbidden(f'{key} is edited with what comes later')
        return tree_map(lambda t: self.originals.get(id(t), t), self.real(w, left))

    def walk(self, end: int):
        "All lines before `end`, as far as their values are there."
        w = SimpleNamespace(env={}, cells={}, now=dict(self.first), blocked=False, backwards=Counter(), late=set())
        try:
            for k, line in enumerate(self.lines[:end]):
                w.env[line.id] = self.step(k, line, w)
                value = self.value(w, Ref(line.id)) if line.save else UNKNOWN
                if any(self.unknown(w, v) or v is ABSENT for v in tree_leaves(value)): continue
                kept = tree_map(copy, self.real(w, value))
                if line.call is None: self.saved.setdefault(line.save, kept)
                elif len(self.saved.setdefault(line.save, [])) == line.call: self.saved[line.save].append(kept)
            return w
        except Restart: return self.walk(end)

    def value(self, w, v):
        found = w.env.get(v.id, UNKNOWN) if isinstance(v, Ref) else v
        if not isinstance(found, Name): return found
        if found.key not in self.delivered: return UNKNOWN
        return [*w.cells[found.key][0], *w.cells[found.key][1].values()][0] if found.first else w.cells[found.key]

    def unknown(self, w, v) -> bool: return v is UNKNOWN or isinstance(v, Handle) and w.now.get(v.memory, UNKNOWN) is UNKNOWN
    def real(self, w, v): return tree_map(lambda v: w.now[v.memory].at(v.path) if isinstance(v, Handle) else v, v)

    def step(self, k: int, line, w):
        if line.op == 'site': return self.site(line, w)
        if line.op == 'first_input': return Name(w.env[line.args[0].id].key, True)
        args, kwargs = fill((line.args, line.kwargs), lambda v: self.value(w, v))
        guard = line.guard is None or self.value(w, Ref(line.guard))
        if line.op == 'grad': return self.gradient(line, *args, w)
        w.backwards[line.trace] += line.op == 'torch.Tensor.backward'
        inside = line.op in ('operator.getitem', 'operator.setitem', 'attribute') and not isinstance(args[0], Handle)
        leaves = [*(args[:2] if inside else tree_leaves((args[line.op == 'update':], kwargs))), guard]
        if any(self.unknown(w, v) for v in leaves): return self.postpone(line, args, guard, w)
        if guard is False or any(v is ABSENT for v in leaves): return ABSENT
        if inside: return function(line.op)(*args, **kwargs)  # of Python's containers: anew in each walk
        if line.op in EFFECTS and k not in self.done and w.blocked: return UNKNOWN
        if k not in self.done: self.done[k] = self.compute(k, line, args, kwargs, w)
        self.stopped |= line.op == 'stop'
        w.now.update(self.done[k][1])
        return self.assign(w, line, self.done[k][0]) if line.op == 'update' else self.done[k][0]

    def site(self, line, w):
        path, kind, call, prompt = line.args
        keys = [(line.trace, path, kind, call, k) for k in range(len(self.traces[line.trace].inputs))]
        for key in keys if prompt is None else [keys[prompt]]:
            if key in self.delivered and key not in w.cells: w.cells[key] = tree_map(lambda v: v, self.delivered[key])
        if prompt is not None or len(keys) == 1: return Name(keys[prompt or 0], False)
        if any(key not in self.delivered for key in keys): return UNKNOWN
        whole = tree_map(lambda *ts: torch.cat(ts), *(self.real(w, w.cells[key]) for key in keys))
        return tree_map(lambda t: self.remember(t, w.now), whole)  # outside of the invokes: of all prompts

    def postpone(self, line, args, guard, w):
        "A line whose time hasn't come. If the model needs what it edits, its time never comes."
        w.blocked |= line.op in EFFECTS and guard is not False and guard is not ABSENT
        key = getattr(w.env.get(line.args[0].id), 'key', None) if line.op == 'update' else None
        memory = getattr(args[0], 'memory', UNKNOWN) if args and mutates(line.op) else UNKNOWN
        w.late |= {c for c, tree in w.cells.items() if c == key or any(getattr(v, 'memory', None) is memory for v in tree_leaves(tree))}
        if memory is not UNKNOWN: w.now[memory] = UNKNOWN
        if line.op == 'operator.setitem' and isinstance(args[0], (dict, list)): args[0][args[1]] = UNKNOWN
        return UNKNOWN

    def assign(self, w, line, value):
        name = w.env[line.args[0].id]
        if not isinstance(name, Name): w.env[line.args[0].id] = value
        if not isinstance(name, Name) or name.key not in self.delivered: return value
        args, kwargs = w.cells[name.key] if name.first else ((), {})
        first = dict(zip(list(kwargs)[:1], [value])) if not args else {}
        w.cells[name.key] = ((value, *args[1:])[:len(args)], kwargs | first) if name.first else value
        return value

    def compute(self, k: int, line, args, kwargs, w) -> tuple:  # the value, and the new versions of memories
        versions, f, (real, options) = {}, function(line.op) if line.op != 'update' else None, self.real(w, (args, kwargs))
        if line.op == 'torch.Tensor.backward': self.backward(k, line, real, options, w.backwards[line.trace] - 1)
        if line.op == 'update': return tree_map(lambda t: self.remember(copy(t), versions), real[1]), versions
        if mutates(line.op) and isinstance(args[0], Handle):
            new = copy(w.now[args[0].memory].at())
            found = f(Version(new).at(args[0].path), *real[1:], **options)
            return None if found is None else args[0], {args[0].memory: Version(new)}
        found = f(*(map(copy, real) if mutates(line.op) else real), **options)
        parts = iter(range(len(tree_leaves(found))))
        return tree_map(lambda t: self.wrap(t, next(parts), f, args, kwargs, w, versions), found), versions

    def wrap(self, t, part: int, f, args, kwargs, w, versions: dict):
        "A result as a tensor of the graph: a view if it shares its memory with an argument."
        for h in [v for v in tree_leaves((args, kwargs)) if isinstance(v, Handle)] if isinstance(t, torch.Tensor) else []:
            if t is (whole := self.real(w, h)): return h
            if t.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr(): continue
            others = tree_map(lambda v: v if v is h else self.real(w, v), (args, kwargs))
            def view(base):
                a, k = tree_map(lambda v: base if v is h else v, others)
                return tree_leaves(f(*a, **k))[part]
            w.now[h.memory].views[*h.path, view] = t
            return Handle(h.memory, (*h.path, view))
        return self.remember(t, versions)

    def gradient(self, line, target, which: int, w):
        backwards = sum(x.op == 'torch.Tensor.backward' and x.trace == line.trace for x in self.lines)
        if which >= backwards: raise ValueError('no backward pass follows')
        if not isinstance(target, Handle) or self.unknown(w, target): return UNKNOWN
        t = self.real(w, target)
        t = self.originals.get(id(t), t)
        key = line.trace, 'grad', id(t), which
        if key not in self.asked: self.asked[key] = t, t.register_hook(lambda g: self.arrive(key, g))
        if key in self.delivered: w.cells.setdefault(key, self.delivered[key])
        return Name(key, False)

    def backward(self, k: int, line, args, options: dict, which: int):
        self.passing, self.until, self.create = (line.trace, which), k, options.get('create_graph', False)
        torch.autograd.backward(*args, retain_graph=True, create_graph=self.create)
        self.passing, self.done[k] = None, (None, {})
        raise Restart

    def arrive(self, key: tuple, g: torch.Tensor):
        if (key[0], key[3]) != self.passing: return None
        self.delivered[key] = self.deliver(g)
        with torch.set_grad_enabled(self.grad): left = self.needed(self.walk(self.until), key)
        return None if left is g else left if self.create else left.detach()
