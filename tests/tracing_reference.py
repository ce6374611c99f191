"""What a trace means, a second time: a slow executor of intervention graphs that shares no code with the engine.

Plain hooks stop the model at each site that the graph names. There the lines are walked from the first one, in written
order. An in-place change makes a new version of a memory, and a line takes the version that is current at its place.
A line whose arguments aren't there yet gives UNKNOWN, and an edit with such an argument leaves it in what it edits: if
the model needs that to go on, its order forbids the program. What the last line leaves in a site is what the model
goes on with. A backward pass is met in the same way: its sites are the gradients that the graph names. Several prompts
are runs of one prompt each, side by side, which wait for each other at each site."""
import json
import threading
from collections import Counter, namedtuple
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_leaves, tree_map

from tracing_lines import Ref, decode, expand, fill, function, mutates, read_lines
from tracing_versions import UNKNOWN, Handle, Versions, copy, same

Name = namedtuple('Name', 'key first')  # a site or a gradient, or the first argument in a site's input
EFFECTS, READS = ('torch.Tensor.backward', 'apply', 'log'), ('operator.getitem', 'attribute')
class ABSENT:
    "Never there: its condition was false."
class Forbidden(Exception):
    "The model's order makes the written order impossible."
class Stopped(Exception):
    "The graph ends the run here."
class Restart(Exception):
    "A backward pass has run, so that lines before it have their gradients."

class Execution:
    "Of a graph's JSON, as text or read, on plain modules; `prompts` are the inputs of a graph of one trace."
    def __init__(self, graph: str | dict, *nets: torch.nn.Module, prompts: list = ()):
        self.nets, self.lines, self.traces = nets, [], []
        self.delivered, self.originals, self.done, self.asked, self.saved, self.first = {}, {}, {}, {}, {}, Versions()
        self.named = {}  # ids of tensors that the model has, by those of the copies that lines have
        self.passing, self.local, self.grad, self.stopped = None, threading.local(), torch.is_grad_enabled(), False
        data = json.loads(graph) if isinstance(graph, str) else graph
        if data['kind'] == 'trace':
            self.add(data['nodes'], 0, 'forward', [((p,), {}, {}) for p in prompts], {})
        for node in data['nodes'] if data['kind'] == 'session' else []:
            if node['op'] == 'trace':
                self.add(node['body'], *map(decode, node['args']))
            else:
                self.lines += read_lines([node], len(self.traces))

    def add(self, nodes: list, net: int, method: str, inputs: list, common: dict):
        lines, calls, start, net = read_lines(nodes, len(self.traces)), Counter(), len(self.lines), self.nets[net]
        if any(line.op == 'site' and line.args[2] == 'all' for line in lines):
            hooks = [m.register_forward_pre_hook(lambda *_, p=p: calls.update([p])) for p, m in net.named_modules()]
            with torch.no_grad():
                net(*inputs[0][0], **inputs[0][1], **common)
            for h in hooks:
                h.remove()
        self.lines += expand(lines, calls)
        self.traces.append(SimpleNamespace(number=len(self.traces), start=start, end=len(self.lines), net=net,
                                           inputs=[(args, kwargs | common) for args, kwargs, _ in inputs]))

    def run(self) -> dict:
        try:
            for trace in self.traces:
                self.run_trace(trace, self.walk(trace.start))
            self.walk(len(self.lines))
        finally:
            for _, hook in self.asked.values():
                hook.remove()  # it would keep this executor, and all values with it
        found, every = {}, sorted(key for key in self.saved if key[1] is not None)
        for name, call in every:
            found.setdefault(name, []).append(self.saved[name, call])
        return found | {name: v for (name, call), v in self.saved.items() if call is None}

    def run_trace(self, trace, before):
        self.running, self.stopped, self.calls, errors = trace, False, Counter(), []
        self.meeting, own = threading.Barrier(len(trace.inputs), self.meet), self.lines[trace.start:trace.end]
        sites = {line.args[:2] for line in own if line.op == 'site'}
        hooks = [self.hook(trace.net.get_submodule(path), path, kind) for path, kind in sites]
        def run(k: int, args: tuple, kwargs: dict):
            self.local.prompt = k
            try:
                with torch.set_grad_enabled(self.grad):
                    trace.net(*args, **kwargs)
            except Stopped:
                pass
            except BaseException as e:
                errors.append(e), self.meeting.abort()
        inputs = fill(trace.inputs, lambda v: before.now.real(self.value(before, v)) if isinstance(v, Ref) else copy(v))
        threads = [threading.Thread(target=run, args=(k, *i)) for k, i in enumerate(inputs[1:], 1)]
        for t in threads:
            t.start()
        run(0, *inputs[0])
        for t in threads:
            t.join()
        for h in hooks:
            h.remove()
        for e in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise e
        self.meet()
        asked = [x for x in own if x.op == 'grad' and x.args[1] < self.now.backwards[x.trace]]
        missing = any(self.value(self.now, Ref(x.id)) is UNKNOWN for x in asked)
        if missing and not self.stopped: raise RuntimeError('a value takes no part in a gradient')

    def hook(self, m: torch.nn.Module, path: str, kind: str):
        if kind == 'output': return m.register_forward_hook(lambda m, args, out: self.fire(path, kind, out))
        return m.register_forward_pre_hook(lambda m, *inputs: self.fire(path, kind, inputs), with_kwargs=True)

    def meet(self): self.now = self.walk(self.running.end)
    def fire(self, path: str, kind: str, value):
        if self.passing: return None  # a backward pass runs a module again
        k, old = self.local.prompt, list(map(id, tree_leaves(value)))
        key = self.running.number, path, kind, self.calls[path, kind, k], k
        self.calls[path, kind, k], self.delivered[key] = key[3] + 1, tree_map(self.deliver, value)
        self.meeting.wait()
        if self.stopped: raise Stopped
        left = self.needed(self.now, key)
        if list(map(id, tree_leaves(left))) == old: return None
        return tree_map(lambda t: t if id(t) in old else self.hand_on(t, self.now.cells.get(key)), left)

    def hand_on(self, t, cell):  # the model may write to it, so lines go on with a copy, whose gradient is that of `t`
        for h in tree_leaves(cell):
            version = self.now.now.get(h.memory) if isinstance(h, Handle) and not h.path else None
            if version is None or version.views[()] is not t: continue
            version.views = {(): copy(t)}
            self.originals[id(version.views[()])], self.named[id(version.views[()])] = t, id(t)
            return t
        return t if id(t) in self.named.values() else copy(t)

    def deliver(self, t):  # lines get a copy, gradients are of the tensor itself
        seen = copy(t)
        self.originals[id(seen)] = t
        return self.first.remember(seen)

    def needed(self, w, key: tuple):  # by the model or the backward pass, to go on
        left = w.cells.get(key, self.delivered[key])
        if key in w.late or any(map(w.now.unknown, tree_leaves(left))): raise Forbidden(f'an edit of {key} is late')
        return tree_map(lambda t: self.originals.get(id(t), t), w.now.real(left))

    def walk(self, end: int):
        "All lines before `end`, as far as their values are there."
        w = SimpleNamespace(env={}, cells={}, now=Versions(self.first), blocked=False, backwards=Counter(), late=set(),
                            replaced=set(), awaited=set())
        try:
            for k, line in enumerate(self.lines[:end]):
                w.env[line.id] = self.step(k, line, w)
                kept = self.value(w, Ref(line.id)) if line.save else ABSENT
                if any(w.now.unknown(v) or v is ABSENT for v in tree_leaves(kept)): continue
                self.saved.setdefault((line.save, line.call), tree_map(copy, w.now.real(kept)))
            return w
        except Restart:
            return self.walk(end)

    def value(self, w, v):
        found = w.env.get(v.id, UNKNOWN) if isinstance(v, Ref) else v
        if not isinstance(found, Name): return found
        if found.key not in self.delivered or found.key in w.replaced: return UNKNOWN
        if not found.first: return w.cells[found.key]
        return [*w.cells[found.key][0], *w.cells[found.key][1].values()][0]

    def step(self, k: int, line, w):
        if line.op == 'site': return self.site(line, w)
        if line.op == 'first_input': return Name(w.env[line.args[0].id].key, True)
        args, kwargs = fill((line.args, line.kwargs), lambda v: self.value(w, v))
        guard = line.guard is None or self.value(w, Ref(line.guard))
        if line.op == 'grad': return self.gradient(line, *args, w)
        w.backwards[line.trace] += line.op == 'torch.Tensor.backward'
        inside = line.op in (*READS, 'operator.setitem') and not isinstance(args[0], Handle)
        leaves = [*(args[:2] if inside else tree_leaves((args[line.op == 'update':], kwargs))), guard]
        if guard is UNKNOWN and line.op in READS:
            guard = leaves[-1] = True  # for now: edits through it are late
        if any(map(w.now.unknown, leaves)): return self.postpone(line, args, guard, w)
        if guard is False or any(v is ABSENT for v in leaves): return ABSENT
        if inside: return function(line.op)(*args, **kwargs)  # of Python's containers: anew in each walk
        if w.blocked and line.op in EFFECTS and k not in self.done: return UNKNOWN
        if line.op == 'torch.Tensor.backward' and (line.trace, w.backwards[line.trace] - 1) in w.awaited:
            return self.postpone(line, args, guard, w)
        if k not in self.done:
            self.done[k] = self.compute(k, line, args, kwargs, w)
        self.stopped |= line.op == 'stop'
        value, versions = self.done[k]
        w.now.update(versions)
        return self.assign(w, line, value) if line.op == 'update' else value

    def site(self, line, w):
        path, kind, call, prompt = line.args
        keys = [(line.trace, path, kind, call, k) for k, _ in enumerate(self.traces[line.trace].inputs)]
        for key in keys if prompt is None else [keys[prompt]]:
            if key in self.delivered and key not in w.cells:
                w.cells[key] = tree_map(lambda v: v, self.delivered[key])
        if prompt is not None or len(keys) == 1: return Name(keys[prompt or 0], False)
        parts = [w.cells.get(key, UNKNOWN) for key in keys]
        if any(map(w.now.unknown, tree_leaves(parts))): return UNKNOWN
        whole = tree_map(lambda *ts: torch.cat(ts), *w.now.real(parts))
        return tree_map(w.now.remember, whole)  # outside of the invokes: of all prompts

    def postpone(self, line, args, guard, w):
        "A line whose time hasn't come. If the model needs what it edits, its time never comes."
        w.blocked |= line.op in EFFECTS and guard is not False and guard is not ABSENT
        key = getattr(w.env.get(line.args[0].id), 'key', None) if line.op == 'update' else None
        memory = getattr(args[0], 'memory', UNKNOWN) if args and mutates(line.op) else UNKNOWN
        for cell, tree in w.cells.items():
            if cell == key:
                w.replaced.add(cell)  # by what isn't there yet
            if cell == key or any(getattr(v, 'memory', None) is memory for v in tree_leaves(tree)):
                w.late.add(cell)
        w.now[memory] = UNKNOWN
        if line.op == 'operator.setitem' and isinstance(args[0], (dict, list)):
            args[0][args[1]] = UNKNOWN
        return UNKNOWN

    def assign(self, w, line, value):
        name = w.env[line.args[0].id]
        if not isinstance(name, Name):
            w.env[line.args[0].id] = value
        elif name.key in self.delivered and not name.first:
            w.cells[name.key] = value
        elif name.key in self.delivered:
            args, kwargs = w.cells[name.key]
            w.cells[name.key] = ((value, *args[1:]), kwargs) if args else ((), kwargs | {next(iter(kwargs)): value})
        return value

    def compute(self, k: int, line, args, kwargs, w) -> tuple:  # the value, and new versions
        if line.op == 'torch.Tensor.backward':
            self.backward(k, line, w, *w.now.real((args, kwargs)))
        if line.op == 'update' and same(*args): return args[1], {}
        if line.op == 'update': return w.now.call(lambda v: tree_map(copy, v), args[1:], {})
        if not mutates(line.op): return w.now.call(function(line.op), args, kwargs)
        if isinstance(args[0], Handle): return w.now.edit(function(line.op), args[0], args[1:], kwargs)
        return w.now.call(function(line.op), tuple(map(copy, args)), kwargs)

    def gradient(self, line, target, which: int, w):
        if not isinstance(target, Handle) or w.now.unknown(target):
            if target is UNKNOWN:
                w.awaited.add((line.trace, which))
            return UNKNOWN
        seen = w.now.real(target)
        key = line.trace, 'grad', self.named.get(id(seen), id(seen)), which
        t = self.originals.get(id(seen), seen)
        if key not in self.asked:
            self.asked[key] = seen, t.register_hook(lambda g: self.arrive(key, g))
        if key in self.delivered:
            w.cells.setdefault(key, self.delivered[key])
        return Name(key, False)

    def backward(self, k: int, line, w, args: tuple, options: dict):
        self.passing, self.until, self.create = (line.trace, w.backwards[line.trace] - 1), k, 'create_graph' in options
        torch.autograd.backward(*args, retain_graph=True, create_graph=self.create)
        self.passing, self.done[k] = None, (None, {})
        raise Restart

    def arrive(self, key: tuple, g: torch.Tensor):
        if (key[0], key[3]) != self.passing: return None
        self.delivered[key] = self.deliver(g)
        with torch.set_grad_enabled(self.grad):
            left = self.needed(self.walk(self.until), key)
        return None if left is g else copy(left if self.create else left.detach())  # autograd may add to it in place
