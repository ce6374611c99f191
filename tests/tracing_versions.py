"""Tensors that are never written to, for the reference executor: an in-place change makes a new version of a memory."""
import torch
from torch.utils._pytree import tree_leaves, tree_map


class UNKNOWN:
    "Not there yet."
class Memory:
    "What an in-place change makes a new version of."


class Handle:
    "A tensor of the graph: a memory, and the views that lead to a part of it, as functions."
    def __init__(self, memory: Memory, path: tuple = ()): self.memory, self.path = memory, path


class Version:
    "What a memory holds between two edits, and views of it: the same object each time, so that it can have a gradient."
    def __init__(self, tensor: torch.Tensor): self.views = {(): tensor}

    def at(self, path: tuple = ()) -> torch.Tensor:
        if path not in self.views:
            self.views[path] = path[-1](self.at(path[:-1]))
        return self.views[path]


def copy(t):  # with its strides, on which it depends whether a reshape is a view
    if not isinstance(t, torch.Tensor): return t
    overlaps = any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.clone() if overlaps else t.new_empty_strided(t.shape, t.stride()).copy_(t)


def same(a, b) -> bool:
    return isinstance(a, Handle) and isinstance(b, Handle) and (a.memory, a.path) == (b.memory, b.path)


class Versions(dict):
    "The current version of each memory."
    def unknown(self, v) -> bool:
        return v is UNKNOWN or isinstance(v, Handle) and self.get(v.memory, UNKNOWN) is UNKNOWN

    def real(self, tree): return tree_map(lambda v: self[v.memory].at(v.path) if isinstance(v, Handle) else v, tree)

    def remember(self, t):
        if not isinstance(t, torch.Tensor): return t
        memory = Memory()
        self[memory] = Version(t)
        return Handle(memory)

    def edit(self, f, target: Handle, args: tuple, kwargs: dict) -> tuple:
        "A function that writes to its first argument: its value, and the new version."
        new = copy(self[target.memory].at())
        found = f(Version(new).at(target.path), *self.real(args), **self.real(kwargs))
        return None if found is None else target, {target.memory: Version(new)}

    def call(self, f, args: tuple, kwargs: dict) -> tuple:
        "Any other function."
        found, new = f(*self.real(args), **self.real(kwargs)), Versions()
        parts = iter(range(len(tree_leaves(found))))
        return tree_map(lambda t: self.view(t, next(parts), f, (args, kwargs)) or new.remember(t), found), new

    def view(self, t, part: int, f, inputs: tuple) -> Handle | None:
        "A result that shares its memory with an argument."
        for h in [v for v in tree_leaves(inputs) if isinstance(v, Handle)] if isinstance(t, torch.Tensor) else []:
            if t is (whole := self.real(h)): return h
            if t.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr(): continue
            path = *h.path, self.step(h, part, f, inputs)
            self[h.memory].views[path] = t
            return Handle(h.memory, path)

    def step(self, source: Handle, part: int, f, inputs: tuple):
        "A function that makes this view of another version of its source; the other arguments are what they are now."
        others = tree_map(lambda v: v if v is source else self.real(v), inputs)
        def again(base: torch.Tensor) -> torch.Tensor:
            args, kwargs = tree_map(lambda v: base if v is source else v, others)
            return tree_leaves(f(*args, **kwargs))[part]
        return again
