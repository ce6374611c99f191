"""The lines of an intervention graph, read from its JSON without the engine's code, for the reference executor."""
import base64
import importlib
from collections import Counter, namedtuple
from types import SimpleNamespace

import torch
from safetensors.torch import load

Ref = namedtuple('Ref', 'id')  # the value of another line


def identity(value): return value


SPECIAL = {'attribute': getattr, 'cond': bool, 'save': identity, 'same': identity, 'stop': identity,
           'log': lambda *values: values, 'apply': lambda f, *args, **kwargs: f(*args, **kwargs)}


def read_lines(nodes: list, trace: int) -> list:
    "A value that is saved later than it is made gets a line of its own for that."
    lines, later = [], []
    for n in nodes:
        lines += [line for at, line in later if at == n['id']]
        line = SimpleNamespace(id=n['id'], op=n['op'], args=tuple(map(decode, n['args'])), guard=n.get('guard'),
                               kwargs=fill(n.get('kwargs', {}), decode), save=n.get('save'), trace=trace, call=None)
        lines.append(line)
        if line.save is None or line.op == 'save': continue
        own = dict(id=('save', line.id), op='save', args=(Ref(line.id),), kwargs={})
        later.append((n.get('saved_at'), SimpleNamespace(**vars(line) | own)))
        line.save = None
    return lines + [line for at, line in later if at is None or at > nodes[-1]['id']]


def fill(v, change):  # in the arguments of a line, at any depth
    if type(v) in (tuple, list): return type(v)(fill(x, change) for x in v)
    if type(v) is dict: return {k: fill(x, change) for k, x in v.items()}
    if type(v) is slice: return slice(*(fill(x, change) for x in (v.start, v.stop, v.step)))
    return change(v)


def references(v) -> list: # ids of the lines whose values these arguments are
    found = []
    fill(v, lambda x: found.append(x.id) if isinstance(x, Ref) else None)
    return found


def decode(v):  # from JSON
    if isinstance(v, list): return [decode(x) for x in v]
    if not isinstance(v, dict): return v
    (kind, v), = v.items()
    if kind == 'dict': return {decode(k): decode(x) for k, x in v}
    if kind == 'slice': return slice(*decode(v))
    if kind in ('tuple', 'size'): return {'tuple': tuple, 'size': torch.Size}[kind](decode(v))
    if kind == 'tensor': return load(base64.b64decode(v))['t']
    if kind == 'ellipsis': return ...
    if kind == 'dtype': return getattr(torch, v)
    return dict(ref=Ref, float=float, device=torch.device, operation=function)[kind](v)


def function(op: str):
    if op in SPECIAL: return SPECIAL[op]
    root, *names = op.split('.')
    found = importlib.import_module(root)
    for name in names:
        found = getattr(found, name)
    return found


def mutates(op: str) -> bool:
    kind, _, name = op.rpartition('.')
    augmented = kind == 'operator' and name[0] == 'i' and hasattr(torch.Tensor, f'__{name}__')
    return op == 'operator.setitem' or augmented or kind == 'torch.Tensor' and name[-1] == '_' and name[-2] != '_'


def expand(lines: list, calls: Counter) -> list:
    "Lines that depend on every call of a module, once for each call."
    found, many = [], {}
    for line in lines:
        used = [line.guard, *references((line.args, line.kwargs))]
        times = {many[i] for i in used if i in many}
        if line.op == 'site' and line.args[2] == 'all':
            times = {calls[line.args[0]]}
        for c in range(min(times)) if times else [None]:
            found.append(at_call(line, c, many) if times else line)
        if times:
            many[line.id] = min(times)
    return found


def at_call(line, c: int, many: dict):
    new = SimpleNamespace(**vars(line) | dict(call=c, id=(line.id, c)))
    def own(v): return Ref((v.id, c)) if isinstance(v, Ref) and v.id in many else v
    new.args, new.kwargs = fill((line.args, line.kwargs), own)
    if line.op == 'site':
        new.args = (*new.args[:2], c, new.args[3])
    if line.guard in many:
        new.guard = line.guard, c
    return new
