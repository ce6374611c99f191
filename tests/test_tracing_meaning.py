"""Tracing means what is written: random programs of the public interface against the reference executor.

`FUZZ=50000 pytest tests/test_tracing_meaning.py -s` runs as many programs and prints how many there were of each model
and feature; `FUZZ_SEED` is the seed of the first one. A program that fails is made shorter and printed, as source."""
import os
import runpy
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch

from tracing_generator import Generator
from tracing_models import MODELS, build
from tracing_programs import Program
from tracing_reference import Execution, Forbidden
from transformer_experiments.tracing import Graph, TracedModel, TraceError, apply, run_session

PROGRAMS, FIRST = int(os.environ.get('FUZZ', 2000)), int(os.environ.get('FUZZ_SEED', 0))
SHOWN = 10                            # failures that are made shorter, which takes a second each
EXACT = dict(rtol=0, atol=0)
ROUNDED = dict(rtol=1e-4, atol=1e-5)  # float32 rounds otherwise where several prompts are one batch in the engine,
                                      # gradients are added up in another order, and sums over another layout


@dataclass
class Outcome:
    "What a program gave: its saved values and what `apply` saw, or how it was refused."
    values: dict = field(default_factory=dict)
    seen: list = field(default_factory=list)
    refused: str = ''  # 'order', or the type of another error
    message: str = ''

    def __str__(self):
        if self.refused: return f'  {self.refused}: {self.message}'
        return '\n'.join(f'  {k} = {show(v)}' for k, v in self.values.items()) or '  no values'


def show(v) -> str:
    if isinstance(v, list): return '[' + ', '.join(map(show, v)) + ']'
    return str(v) if v is None else f'{tuple(v.shape)} {[round(x, 6) for x in v.detach().flatten()[:6].tolist()]}'


class Seen:
    "What `apply` calls."
    def __init__(self): self.values = []

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        self.values.append(t.detach().clone())
        return t * 0.5


# Both executors

def by_reference(program: Program) -> Outcome:
    net, seen = build(program.model)[0], Seen()
    try:
        with torch.set_grad_enabled(program.grads):
            return Outcome(Execution(program.graph(seen), net, prompts=program.inputs()).run(), seen.values)
    except Forbidden as e:
        return Outcome(refused='order', message=str(e))
    except (RuntimeError, ValueError, IndexError) as e:
        return Outcome(refused=type(e).__name__, message=str(e))
    finally:
        net.zero_grad()


@cache
def traced(model: str) -> TracedModel: return TracedModel(build(model)[0])


def by_engine(program: Program, folder: Path, through_json: bool = False) -> Outcome:
    net, seen, source = build(program.model)[0], Seen(), program.source(through_json)
    file = folder / f'program_{program.seed}_{abs(hash(source))}.py'
    file.write_text(source)
    names = dict(m=traced(program.model), xs=program.inputs(), torch=torch, apply=apply, seen=seen)
    try:
        found = runpy.run_path(str(file), init_globals=names)
        if through_json: return Outcome(from_json(program, found), seen.values)
        return Outcome({k: value_of(found[k]) for k in found if k[0] == 's' and k[1:].isdigit()}, seen.values)
    except TraceError as e:
        return Outcome(refused='order', message=str(e))
    except Exception as e:
        return Outcome(refused=type(e).__name__, message=str(e))
    finally:
        net.zero_grad()


def value_of(saved):
    try:
        return saved.value
    except ValueError:
        return None  # the run was stopped before it, or its condition was false


def by_graph(program: Program, folder: Path) -> dict:
    "What the engine's graph says, to the reference."
    file = folder / f'graph_{program.seed}.py'
    file.write_text(program.source(named=True))
    found = runpy.run_path(str(file), init_globals=dict(m=traced(program.model), xs=program.inputs(), torch=torch))
    graph = found['session' if program.traces > 1 else 't'].graph.to_json()
    with torch.set_grad_enabled(program.grads):
        return Execution(graph, build(program.model)[0], prompts=program.inputs()).run()


def from_json(program: Program, found: dict) -> dict:
    with torch.set_grad_enabled(program.grads):
        if program.traces > 1: return run_session(Graph.from_json(found['session'].graph.to_json()), found['m'])
        graph = Graph.from_json(found['t'].graph.to_json())
        return found.get('edited', found['m']).run(graph, *program.inputs())


# Differences

def same(a, b, tolerance: dict) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor): return False
    if a.shape != b.shape: return False
    largest = float(a.detach().abs().nan_to_num(0, 0, 0).max()) if a.numel() else 0
    atol = tolerance['atol'] * max(1, largest)  # a sum of large parts that nearly cancel
    return torch.allclose(a, b, rtol=tolerance['rtol'], atol=atol, equal_nan=True)


def agreed_refusal(want: Outcome, got: Outcome) -> bool:
    if '.clone()' in got.message: return True  # a value is saved and edited later: a copy, or an error that says so
    autograd = 'modified by an inplace operation', 'is being used in an in-place operation'
    if any(said in got.message for said in autograd): return True  # what autograd itself refuses
    if want.refused == 'order' or not want.refused: return want.refused == got.refused
    return bool(got.refused)


def difference(program: Program, folder: Path, through_json: bool = False, want: Outcome | None = None) -> tuple:
    "Its kind, and both outcomes; nothing if they agree."
    want, got = want or by_reference(program), by_engine(program, folder, through_json)
    full = f'reference:\n{want}\nengine:\n{got}'
    if want.refused or got.refused:
        return () if agreed_refusal(want, got) else (want.refused, got.refused, full)
    tolerance = EXACT if program.exact() else ROUNDED
    there = {k for k, v in got.values.items() if v is not None and v != []}
    if there != set(want.values): return 'not there', full
    if not same(want.seen, got.seen, tolerance):
        return 'apply', f'{full}\napply saw in the reference {show(want.seen)}\nin the engine {show(got.seen)}'
    wrong = [k for k in want.values if not same(want.values[k], got.values[k], tolerance)]
    return ('values', f'{", ".join(wrong)} differ\n{full}') if wrong else ()


def shortest(program: Program, folder: Path, through_json: bool) -> Program:
    "Without the lines that the difference doesn't need."
    kind, k = difference(program, folder, through_json)[:-1], len(program.lines) - 1
    while k >= 0:
        less = program.without(k)
        if difference(less, folder, through_json)[:-1] == kind:
            program = less
        k = min(k, len(program.lines)) - 1
    return program


def failure(program: Program, folder: Path, through_json: bool) -> str:
    less = shortest(program, folder, through_json)
    way = ', through JSON' if through_json else ''
    return f'''program {program.seed} of {program.model}, rows {program.rows}{way}:

net, make_input, sites = build({program.model!r})
m, xs = TracedModel(net), Generator({program.seed}).program().inputs()
{less.source(through_json)}
{difference(less, folder, through_json)[-1]}'''


# Many programs

def run(seeds, folder: Path, models: list = MODELS, features: set | None = None) -> tuple:
    "Counts, and a text for each program that fails."
    counts, failures = Counter(), []
    for seed in seeds:
        program = Generator(seed, models, features).program()
        want = by_reference(program)
        counts.update(['programs', f'model {program.model}', f'refused: {want.refused}' if want.refused else 'run'])
        counts.update(f'feature {f}' for f in program.features())
        counts['compared bit for bit'] += program.exact()
        for through_json in ways(program):
            counts['through JSON'] += through_json
            if not difference(program, folder, through_json, want): continue
            failures.append(failure(program, folder, through_json) if len(failures) < SHOWN else f'program {seed}')
            break
    return counts, failures


def ways(program: Program) -> list: # functions, which `apply` takes, are no data
    return [False, True] if program.seed % 4 == 0 and 'apply' not in program.features() else [False]


def test_graphs_say_what_was_written(tmp_path):
    "The graph of a trace, run by the reference, gives what the reference makes of the program itself."
    compared = 0
    for seed in range(FIRST, FIRST + max(4, PROGRAMS // 20)):
        program = Generator(seed).program()
        want = by_reference(program)
        if want.refused or program.features() & {'apply', 'lasting edit'}: continue
        if by_engine(program, tmp_path, through_json=True).refused: continue # for the other test
        got = by_graph(program, tmp_path)
        wrong = [k for k in want.values if not same(want.values[k], got.get(k), EXACT)]
        assert not wrong, f'{", ".join(wrong)} of program {seed} of {program.model}:\n\n{program.source(named=True)}'
        compared += 1
    assert compared > PROGRAMS // 50


@pytest.fixture
def one_thread(): # as many are slower, and another number of them rounds otherwise
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_programs_mean_what_they_say(tmp_path, one_thread):
    counts, failures = run(range(FIRST, FIRST + PROGRAMS), tmp_path)
    table = '\n'.join(f'{n:7,}  {what}' for what, n in sorted(counts.items()))
    print(table)
    assert not failures, f'{len(failures)} of {PROGRAMS:,} programs differ\n\n' + '\n\n'.join(failures) + '\n\n' + table
    assert counts['refused: order'] <= PROGRAMS * 0.15, table
    if PROGRAMS >= 1000:
        assert all(counts[f'model {m}'] for m in MODELS) and counts['refused: order'], table
