"""Programs of traces: each is Python source of the public interface, and lines of a graph for the reference executor.

A program is a list of lines. A line knows which names it makes and uses, so that a program can be made shorter."""
from dataclasses import dataclass, replace

import torch

from tracing_models import Site, build


@dataclass
class Line:
    text: str                   # Source, where @ stands for the site
    emit: object                # Writes its nodes: a function of `Nodes`
    feature: str
    makes: str | None = None    # A name
    uses: tuple = ()            # Names
    site: Site | None = None
    section: int = 0            # Which trace of a session; -1: a lasting edit
    prompt: int | None = None
    block: str | None = None    # The condition that it is under
    named: str | None = None    # Source for graphs that go through JSON: there a value can have one name


class Nodes:
    "The nodes of a graph as its JSON has them."
    def __init__(self, seen):
        self.nodes, self.env, self.seen = [], {}, seen  # env: for each name of the program, a reference
        self.prompt, self.guard, self.backwards, self.count = None, None, 0, 0

    def add(self, op: str, *args, save: str | None = None, **kwargs) -> dict:
        guard = self.guard['ref'] if self.guard and op not in ('site', 'first_input') else None
        self.nodes.append(dict(id=self.count, op=op, args=list(args), kwargs=kwargs, guard=guard, save=save))
        self.count += 1
        return {'ref': self.count - 1}

    def site(self, s: Site) -> list: # the nodes that lead to its tensor
        found = [self.add('site', s.path, s.kind, s.call, self.prompt)]
        if s.kind == 'input':
            found.append(self.add('first_input', found[0]))
        for k in s.leaf:
            found.append(self.add('attribute' if isinstance(k, str) else 'operator.getitem', found[-1], k))
        return found

    def write(self, lines: list):
        for line in lines:
            self.prompt, self.guard = line.prompt, self.env[line.block] if line.block else None
            line.emit(self)


@dataclass
class Program:
    model: str
    seed: int
    lines: list
    rows: list                  # Of each prompt's input
    grads: bool
    traces: int = 1

    def inputs(self) -> list:
        g = torch.Generator().manual_seed(self.seed)
        return [build(self.model)[1](g, rows) for rows in self.rows]

    def features(self) -> set:
        several = {'prompts'} if len(self.rows) > 1 else {'session'} if self.traces > 1 else set()
        return several | {line.feature for line in self.lines}

    def exact(self) -> bool: # both executors do the same operations on numbers that lie in memory in the same way
        sites = [line.site for line in self.lines if line.site]
        return not self.grads and len(self.rows) == 1 and all(s.value.is_contiguous() for s in sites)

    def part(self, section: int) -> list: return [line for line in self.lines if line.section == section]

    def source(self, named: bool = False) -> str:
        edits, out, several = self.part(-1), [], len(self.rows) > 1
        quiet, session = '' if self.grads else 'torch.no_grad(), ', self.traces > 1
        if edits:
            out += ['with m.edit() as edited:', *indented(edits, 1, False, named)]
        if session:
            out += [f'with {quiet}m.session() as session:']
        for k in range(self.traces):
            traced = f'{"edited" if edits else "m"}.trace({"" if several else "xs[0]"})'
            out += ['    ' * session + f'with {"" if session else quiet}{traced} as t:']
            out += indented(self.part(k), 1 + session, several, named) or ['    ' * (1 + session) + 'pass']
        return '\n'.join(out) + '\n'

    def graph(self, seen) -> dict:
        b, traces = Nodes(seen), []
        prompts = range(len(self.rows)) if len(self.rows) > 1 else [None]
        for k in range(self.traces):
            b.nodes, b.backwards = [], 0
            for prompt in prompts:
                b.write([replace(x, prompt=prompt) for x in self.part(-1)])
            b.write(self.part(k))
            traces.append(b.nodes)
        if self.traces == 1: return dict(kind='trace', nodes=traces[0])
        inputs = [{'tuple': [{'tuple': [x]}, {'dict': []}, {'dict': []}]} for x in self.inputs()]
        args = [0, 'forward', inputs, {'dict': []}]
        return dict(kind='session', nodes=[dict(id=-k, op='trace', args=args, body=x) for k, x in enumerate(traces, 1)])

    def without(self, k: int) -> 'Program': # a line, and all that need it
        gone, kept = set(), []
        for i, line in enumerate(self.lines):
            if i == k or gone & {*line.uses, line.block}:
                gone |= {line.makes} - {None}
            else:
                kept.append(line)
        return replace(self, lines=kept)


def indented(lines: list, depth: int, invokes: bool, named: bool) -> list:
    out, prompt, moves = [], None, []
    for line in lines:
        if invokes and line.prompt != prompt:
            moves = [] # an invoke starts at the first call of each module
            if line.prompt is not None:
                out.append('    ' * depth + f'with t.invoke(xs[{line.prompt}]):')
        prompt, inner = line.prompt, depth + (invokes and line.prompt is not None)
        text = line.named if named and line.named else line.text
        if line.site:
            text = text.replace('@', site_text(line, moves))
        out.append('    ' * (inner + (line.block is not None)) + text)
        empty = text.startswith('with') and not any(x.block == line.makes for x in lines)
        if empty:
            out.append('    ' * (inner + 1) + 'pass')
    return out


def site_text(line: Line, moves: list) -> str:
    s = line.site
    return s.envoy + (move(moves, s) if line.section >= 0 else '') + s.end # in a lasting edit, each call is meant


def move(moves: list, s: Site) -> str:
    "What brings an envoy to a call. `next` goes on from where it is; `all` takes the modules inside along."
    def concerns(path: str, call) -> bool:
        return path == s.path or call == 'all' and s.path.startswith(path and path + '.')
    now = next((call for path, call in reversed(moves) if concerns(path, call)), 0)
    if s.call == 'all':
        moves.append((s.path, 'all'))
        return '.all()'
    if s.call == now: return ''
    back = now != 'all' and s.call < now
    moves += [(s.path, 'all'), (s.path, s.call)] if back else [(s.path, s.call)]
    return f'.all().next({s.call})' if back else f'.next({s.call if now == "all" else s.call - now})'
