"""Tracing means what is written: random programs of the public interface against the reference executor (tests/tracing_reference.py).

`FUZZ=50000 pytest tests/test_tracing_meaning.py -s` runs as many programs, and prints how many there were of each model and feature; `FUZZ_SEED` is the first one's seed.
A program that fails is made shorter and printed, as source that can be pasted."""
import os
import runpy
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch

from tracing_generator import Generator
from tracing_models import MODELS, build
from tracing_programs import Program
from tracing_reference import Execution, Forbidden
from transformer_experiments.tracing import Graph, TracedModel, TraceError, apply, run_session

PROGRAMS, FIRST = int(os.environ.get('FUZZ', 2000)), int(os.environ.get('FUZZ_SEED', 0))
EXACT = dict(rtol=0, atol=0)       # one prompt, no gradient: the same operations on the same numbers
ROUNDED = dict(rtol=1e-4, atol=1e-5) # several prompts are one batch in the engine, and gradients add up in another order: float32 rounds otherwise


@dataclass
class Outcome:
    "What a program gave: its saved values and what `apply` saw, or how it was refused."
    values: dict = field(default_factory=dict)
    seen: list = field(default_factory=list)
    refused: str = ''   # 'order', or another error's type
    message: str = ''

    def __str__(self): return self.refused + ' ' + self.message if self.refused else '\n'.join(f'  {k} = {show(v)}' for k, v in self.values.items())


def show(v) -> str: return str([show(x) for x in v]) if isinstance(v, list) else f'{tuple(v.shape)} {v.detach().flatten()[:6].tolist()}'


class Seen:
    "What `apply` calls."
    def __init__(self): self.values = []
    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        self.values.append(t.detach().clone())
        return t * 0.5


def by_reference(program: Program) -> Outcome:
    out, net = Outcome(), build(program.model)[0]
    seen = Seen()
    try:
        with torch.set_grad_enabled(program.grads): out.values = Execution(program.graph(seen), net, prompts=program.inputs()).run()
        out.seen = seen.values
    except Forbidden as e: out.refused, out.message = 'order', str(e)
    except (RuntimeError, ValueError, IndexError) as e: out.refused, out.message = type(e).__name__, str(e)
    net.zero_grad()
    return out


def by_engine(program: Program, folder, again: bool = False) -> Outcome:
    "With `again`, what its graph gives after it has been through JSON."
    out, net, seen = Outcome(), build(program.model)[0], Seen()
    source = program.source(named=again)
    file = folder / f'program_{program.seed}_{abs(hash(source))}.py'
    file.write_text(source)
    m = TracedModel(net)
    try:
        found = runpy.run_path(str(file), init_globals=dict(m=m, xs=program.inputs(), torch=torch, apply=apply, seen=seen))
        if again: out.values = from_json(program, found)
        else: out.values = {k: v for k in names(program) if (v := value_of(found[k])) is not None}
        out.seen = seen.values
    except TraceError as e: out.refused, out.message = 'order', str(e)
    except Exception as e: out.refused, out.message = type(e).__name__, str(e)
    net.zero_grad()
    return out


def names(program: Program) -> list: return [line.text.split(' ')[0] for line in program.lines if '.save()' in line.text]


def value_of(saved):
    try: return saved.value
    except ValueError: return None # stopped before it, or its condition was false


def from_json(program: Program, found: dict) -> dict:
    with torch.set_grad_enabled(program.grads):
        if program.traces > 1: return run_session(Graph.from_json(found['session'].graph.to_json()), found['m'])
        return found.get('edited', found['m']).run(Graph.from_json(found['t'].graph.to_json()), *program.inputs())


def same(a, b, tolerance: dict) -> bool:
    if isinstance(a, list) or isinstance(b, list):
        return isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b))
    return a.shape == b.shape and torch.allclose(a, b, equal_nan=True, **tolerance)


def difference(program: Program, folder, again: bool = False, want: Outcome | None = None) -> tuple: # its kind, and in full; nothing if they agree
    want, got = want or by_reference(program), by_engine(program, folder, again)
    full = f'reference:\n{want}\nengine:\n{got}'
    if want.refused or got.refused: return () if agreed_refusal(want, got) else (f'{want.refused} and {got.refused}', full)
    tolerance = ROUNDED if program.grads or len(program.rows) > 1 else EXACT
    if set(want.values) != {k for k, v in got.values.items() if v is not None and v != []}: return 'not there', full
    if not same(want.seen, got.seen, tolerance): return 'apply', f'{full}\napply saw {show(want.seen)} and {show(got.seen)}'
    wrong = [k for k in want.values if not same(want.values[k], got.values[k], tolerance)]
    return ('values', f'{wrong} differ\n{full}') if wrong else ()


def agreed_refusal(want: Outcome, got: Outcome) -> bool:
    if not want.refused: return '.clone()' in got.message or 'modified by an inplace operation' in got.message # what may be refused, if it is not silent
    return bool(want.refused) and (got.refused == 'order' or bool(got.refused) and want.refused != 'order')


def shortest(program: Program, folder, again: bool) -> Program:
    "Without the lines that the difference doesn't need."
    kind, k = difference(program, folder, again)[0], len(program.lines) - 1
    while k >= 0:
        less = program.without(k)
        if difference(less, folder, again)[:1] == (kind,): program = less
        k = min(k, len(program.lines)) - 1
    return program


def failure(program: Program, folder, again: bool) -> str:
    less = shortest(program, folder, again)
    inputs = f"Generator({program.seed}).program().inputs()"
    return (f'program {program.seed} of {program.model}{" through JSON" if again else ""}, {sorted(less.features())}:\n\n'
            f"m, xs = TracedModel(build('{program.model}')[0]), {inputs} # rows {program.rows}\n{less.source(named=again)}\n{difference(less, folder, again)}")


def run(seeds, folder, models=MODELS, features=None) -> tuple:
    "Counts, and a text for each program that fails."
    counts, failures = Counter(), []
    for seed in seeds:
        program = Generator(seed, models, features).program()
        counts.update(['programs', f'model {program.model}', *(f'feature {f}' for f in program.features())])
        want = by_reference(program)
        counts['refused: ' + want.refused if want.refused else 'run'] += 1
        for again in [False, True][:1 + (seed % 4 == 0 and not program.features() & {'apply'})]:
            if again: counts['through JSON'] += 1
            if not difference(program, folder, again, want): continue
            failures.append(failure(program, folder, again))
            break
    return counts, failures


def test_programs_mean_what_they_say(tmp_path):
    torch.set_num_threads(1)
    counts, failures = run(range(FIRST, FIRST + PROGRAMS), tmp_path)
    table = '\n'.join(f'{n:7,}  {what}' for what, n in sorted(counts.items()))
    print(table)
    assert not failures, f'{len(failures)} of {PROGRAMS:,} programs\n\n' + '\n\n'.join(failures[:10]) + '\n\n' + table
    assert counts['refused: order'] <= PROGRAMS * 0.15
