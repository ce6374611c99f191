"""The lines of an intervention graph, read from its JSON by code that is not the engine's."""
import base64
import importlib
from collections import Counter, namedtuple
from types import SimpleNamespace

import torch
from safetensors.torch import load

Ref = namedtuple('Ref', 'id')  # the value of another line
SPECIAL = {'attribute': getattr, 'cond': bool, 'save': lambda v: v, 'stop': lambda v: v, 'log': lambda *v: v, 'apply': lambda f, *v: f(*v)}


def read_lines(nodes: list, trace: int) -> list:
    return [SimpleNamespace(id=n['id'], op=n['op'], args=tuple(map(decode, n['args'])), trace=trace, call=None, guard=n.get('guard'),
                            kwargs=fill(n.get('kwargs', {}), decode), save=n.get('save')) for n in nodes]


def fill(v, change):  # in the arguments of a line, at any depth
    if type(v) in (tuple, list): return type(v)(fill(x, change) for x in v)
    if type(v) is dict: return {k: fill(x, change) for k, x in v.items()}
    return slice(*(fill(x, change) for x in (v.start, v.stop, v.step))) if type(v) is slice else change(v)


def decode(v):  # from JSON
    if isinstance(v, list): return [decode(x) for x in v]
    if not isinstance(v, dict): return v
    (kind, v), = v.items()
    if kind == 'dict': return {decode(k): decode(x) for k, x in v}
    if kind in ('tuple', 'size', 'slice'): return {'tuple': tuple, 'size': torch.Size, 'slice': lambda s: slice(*s)}[kind](decode(v))
    return dict(ref=Ref, float=float, ellipsis=lambda _: ..., device=torch.device, operation=function,
                dtype=lambda name: getattr(torch, name), tensor=lambda text: load(base64.b64decode(text))['t'])[kind](v)


def function(op: str):
    root, *names = op.split('.')
    found = SPECIAL.get(op) or importlib.import_module(root)
    for name in names: found = getattr(found, name)
    return found


def mutates(op: str) -> bool:
    kind, _, name = op.rpartition('.')
    augmented = kind == 'operator' and name[0] == 'i' and hasattr(torch.Tensor, f'__{name}__')
    return op == 'operator.setitem' or augmented or kind == 'torch.Tensor' and name[-1] == '_' and name[-2] != '_'


def expand(lines: list, calls: Counter) -> list:
    "Lines that depend on every call of a module, once for each call."
    found, many = [], {}
    for line in lines:
        used = [line.guard]
        fill((line.args, line.kwargs), lambda v: used.append(v.id) if isinstance(v, Ref) else None)
        times = {calls[line.args[0]]} if line.op == 'site' and line.args[2] == 'all' else {many[i] for i in used if i in many}
        for c in range(min(times)) if times else [None]:
            new = SimpleNamespace(**vars(line) | dict(call=c, id=line.id if c is None else (line.id, c)))
            new.args, new.kwargs = fill((line.args, line.kwargs), lambda v: Ref((v.id, c)) if isinstance(v, Ref) and v.id in many else v)
            if line.op == 'site' and times: new.args = (*new.args[:2], c, new.args[3])
            if line.guard in many: new.guard = line.guard, c
            found.append(new)
        if times: many[line.id] = min(times)
    return found
