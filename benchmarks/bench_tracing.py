"""What a trace costs above the bare forward.

Compared are this library's `trace`, its `run` of a graph that is there, hand-written hooks, and `nnsight` 0.8 in a
process and an environment of its own. Candidates take turns with the bare forward, call by call, and an overhead is the
median over many such rounds of a candidate's time minus the bare forward's. Most of it is code that the forward has
driven out of the caches, so what is compared keeps the same company: hooks and `run` take turns with each other,
`trace`, as `nnsight`, with the bare forward alone.

    python benchmarks/bench_tracing.py                  # all models
    python benchmarks/bench_tracing.py tiny shipped     # some of them
    python benchmarks/bench_tracing.py --env FOLDER     # nnsight's environment: made there, or used if it is there
    python benchmarks/bench_tracing.py --memory         # what 5,000 traces and 500 scans leave behind

In every row but the first each candidate delivers the same tensors: the row's activations and the logits.
"""
import argparse
import copy
import gc
import hashlib
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
NNSIGHT = '0.8.1'
COMPANY = ('hooks', 'run'), ('trace',)
ROWS = {'empty': 'empty trace', 'save': 'one save in the middle', 'all': "all layers' outputs",
        'edit': 'one edit in the middle', 'stop': 'one save, and no layer after it'}
CALLS, ROUNDS = {'tiny': 9, 'shipped': 3, 'small': 1}, {'tiny': 200, 'shipped': 81, 'small': 25}


# The models, the same in both processes

def gpt2(tokens: int, **sizes) -> tuple:
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).eval()
    return model, torch.randint(model.config.vocab_size, (1, tokens)), 'transformer.h'


def shipped() -> tuple:
    from transformer_experiments.trained_models.tinyshakespeare_transformer import create_model_and_tokenizer
    torch.manual_seed(0)
    return create_model_and_tokenizer()[0].eval(), torch.randint(65, (1, 64)), 'blocks'


TINY = dict(n_layer=2, n_embd=32, n_head=4, vocab_size=256, n_positions=64)
MODELS = {'tiny': ('GPT-2, 2 layers, 32 wide, 8 tokens', lambda: gpt2(8, **TINY)),
          'shipped': ('the shipped tinyshakespeare model, 64 tokens', shipped),
          'small': ('GPT-2 small in size, random, 32 tokens', lambda: gpt2(32))}


def twin(model: torch.nn.Module) -> torch.nn.Module:
    "The same model on the same weights, in modules of its own, which nothing has wrapped."
    return copy.deepcopy(model, {id(p): p for p in [*model.parameters(), *model.buffers()]})


def forward_of(model: torch.nn.Module, x: torch.Tensor): return lambda: model(x)


def logits(out) -> torch.Tensor: return out[0] if isinstance(out, tuple) else out.logits


def follow(wrapped, path: str):
    for name in path.split('.'):
        wrapped = getattr(wrapped, name)
    return wrapped


def digest(tensors) -> str:
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.detach().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


# The candidates: each gives a function for each row, which returns the row's tensors

def by_hand(model, x, layers: str) -> dict:
    "What a careful person writes without a library: hooks, and `finally: remove()`."
    blocks = model.get_submodule(layers)
    middle = blocks[len(blocks) // 2]

    class Enough(Exception):
        pass

    def hooked(hooks: list, run) -> object:
        handles = []
        try:
            for module, hook in hooks:
                handles.append(module.register_forward_hook(hook))
            return run(x)
        finally:
            for handle in handles:
                handle.remove()

    def save():
        kept = {}
        out = hooked([(middle, lambda m, args, o: kept.__setitem__('middle', o))], model)
        return [kept['middle'], logits(out)]

    def every():
        kept = []
        out = hooked([(b, lambda m, args, o: kept.append(o)) for b in blocks], model)
        return [*kept, logits(out)]

    def edit():
        def zero(m, args, o):
            o = o.clone()
            o[:, -1] = 0
            return o
        return [logits(hooked([(middle, zero)], model))]

    def stop():
        kept = {}
        def keep(m, args, o):
            kept['middle'] = o
            raise Enough
        try:
            hooked([(middle, keep)], model)
        except Enough:
            pass
        return [kept['middle']]

    return dict(empty=lambda: [logits(model(x))] and [], save=save, all=every, edit=edit, stop=stop)


def by_trace(model, x, layers: str) -> tuple[dict, dict]:
    "This library: a `trace` written anew at each call, and `run` of the graph that it made."
    from transformer_experiments.tracing import TracedModel
    traced = TracedModel(model)
    blocks = follow(traced, layers)
    n = len(model.get_submodule(layers))

    def empty():
        with traced.trace(x) as tracer:
            pass
        return [], tracer

    def save():
        with traced.trace(x) as tracer:
            middle = blocks[n // 2].output.save('middle')
            out = traced.output.save('out')
        return [middle.value, logits(out.value)], tracer

    def every():
        with traced.trace(x) as tracer:
            kept = [blocks[i].output.save(f'h{i}') for i in range(n)]
            out = traced.output.save('out')
        return [*[k.value for k in kept], logits(out.value)], tracer

    def edit():
        with traced.trace(x) as tracer:
            blocks[n // 2].output[:, -1] = 0
            out = traced.output.save('out')
        return [logits(out.value)], tracer

    def stop():
        with traced.trace(x) as tracer:
            middle = blocks[n // 2].output.save('middle')
        return [middle.value], tracer

    traces = dict(empty=empty, save=save, all=every, edit=edit, stop=stop)

    def replay(row: str):
        graph = traces[row]()[1].graph
        if row in ('empty', 'stop'): return lambda: [*traced.run(graph, x).values()]
        def run():
            *kept, out = traced.run(graph, x).values()
            return [*kept, logits(out)]
        return run
    return {row: lambda f=f: f()[0] for row, f in traces.items()}, {row: replay(row) for row in traces}


def by_nnsight(model, x, layers: str) -> dict:
    "nnsight 0.8, as its README writes it (it wants the body of a `with` on lines of its own)."
    from nnsight import NNsight
    wrapped = NNsight(model)
    blocks = follow(wrapped, layers)
    n = len(model.get_submodule(layers))

    def empty():
        with wrapped.trace(x):
            pass
        return []

    def save():
        with wrapped.trace(x):
            middle = blocks[n // 2].output.save()
            out = wrapped.output.save()
        return [middle, logits(out)]

    def every():
        with wrapped.trace(x):
            kept = [block.output for block in blocks].save()
            out = wrapped.output.save()
        return [*kept, logits(out)]

    def edit():
        with wrapped.trace(x):
            blocks[n // 2].output[:, -1] = 0
            out = wrapped.output.save()
        return [logits(out)]

    def stop():
        with wrapped.trace(x) as tracer:
            middle = blocks[n // 2].output.save()
            tracer.stop()
        return [middle]

    # the same without the logits, which this library and hooks would answer with a shorter run
    def save_alone():
        with wrapped.trace(x):
            middle = blocks[n // 2].output.save()
        return [middle]

    def every_alone():
        with wrapped.trace(x):
            kept = [block.output for block in blocks].save()
        return kept

    def edit_alone():
        with wrapped.trace(x):
            blocks[n // 2].output[:, -1] = 0
        return []

    alone = dict(save_alone=save_alone, all_alone=every_alone, edit_alone=edit_alone)
    return dict(empty=empty, save=save, all=every, edit=edit, stop=stop, **alone)


# Clocks

def one_round(candidates: dict, calls: int) -> dict:
    "Seconds of a call of each: the median of some. They take turns call by call, in another order each time."
    names, took = list(candidates), {name: [] for name in candidates}
    for name in names * (2 if calls > 1 else 0):
        candidates[name]() # not counted: another process has just run
    for _ in range(calls):
        for name in ORDER.sample(names, len(names)):
            before = time.perf_counter()
            candidates[name]()
            took[name].append(time.perf_counter() - before)
    return {name: statistics.median(t) for name, t in took.items()}


ORDER = random.Random(0)


def serve():
    "The child: a line asks for a model, for a row's digest, or for one round of a row; a line answers."
    warnings.filterwarnings('ignore')
    answers, sys.stdout = sys.stdout, sys.stderr # whatever a library prints must not look like an answer
    torch.set_num_threads(1)
    candidates = bare = None
    with torch.no_grad():
        for line in sys.stdin:
            what, *rest = line.split()
            if what == 'model':
                candidates = None
                model, x, layers = MODELS[rest[0]][1]()
                alone = twin(model)
                candidates, bare, answer = by_nnsight(model, x, layers), forward_of(alone, x), 'ok'
            elif what == 'digest':
                answer = digest(candidates[rest[0]]())
            else: # a round: the row, and calls
                took = one_round({'bare': bare, 'nnsight': candidates[rest[0]]}, int(rest[1]))
                answer = f"{took['bare']!r} {took['nnsight']!r}"
            print(answer, file=answers, flush=True)


class Child:
    "nnsight's process."
    def __init__(self, python: Path):
        env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
        command = [python, __file__, '--serve']
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, *words) -> str:
        print(*words, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            asked = ' '.join(map(str, words))
            raise SystemExit(f"nnsight's process ended at {asked!r}; what it said is above")
        return answer.strip()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def environment(folder: Path) -> Path | None:
    "The interpreter of nnsight's environment, made where there is none; None where that fails, and a line says why."
    python = folder/('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
    version = 'import nnsight; print(nnsight.__version__)'
    def works() -> bool:
        if not python.exists(): return False
        return subprocess.run([python, '-c', version], capture_output=True, text=True).stdout.strip() == NNSIGHT
    if works(): return python
    from importlib.metadata import requires
    ours = [r for r in requires('transformer-experiments') or () if 'extra ==' not in r]
    print(f'making an environment for nnsight {NNSIGHT} in {folder}', file=sys.stderr, flush=True)
    made = subprocess.run([sys.executable, '-m', 'venv', folder], capture_output=True, text=True)
    if made.returncode == 0:
        install = [python, '-m', 'pip', 'install', '-q', '-c', ROOT/'constraints.txt']
        made = subprocess.run([*install, f'nnsight=={NNSIGHT}', 'transformers', *ours], capture_output=True, text=True)
    if made.returncode == 0 and works(): return python
    last = (made.stderr.strip().splitlines() or ['nothing was said'])[-1]
    print(f'nnsight {NNSIGHT} could not be installed in {folder}, '
          f'so its columns are empty and its goal is not checked: {last}\n')
    return None


def ours_or_nothing(model, x, layers: str) -> tuple[dict, dict]:
    try:
        return by_trace(model, x, layers)
    except ImportError as e:
        print(f'{e}: the columns of this library are empty')
        return {}, {}


def measure(row: str, here: dict, child: Child | None, calls: int, rounds: int, quick: bool) -> dict:
    "Seconds of each candidate and of its bare forward in each round; nnsight's come from the child."
    groups = [g for names in COMPANY if (g := {n: here[n] for n in names if n in here})]
    times = {name: [] for name in [*here, *(['nnsight'] if child else [])] if name != 'bare'}
    for _ in range(8 if quick else rounds):
        for group in groups:
            took = one_round({'bare': here['bare'], **group}, calls)
            for name in group:
                times[name].append((took['bare'], took[name]))
        if child:
            times['nnsight'].append(tuple(map(float, child.ask('round', row, calls).split())))
    return times


def over(times: dict, name: str) -> float | None:
    "The median overhead of a candidate, in seconds."
    return statistics.median(took - bare for bare, took in times[name]) if name in times else None


def cell(value: float | None, form: str, width: int) -> str:
    return (format(value, form) if value is not None else '-').rjust(width)


def goal(value: float | None, at_most: float, form: str) -> str:
    return '-'.rjust(9) if value is None else f'{value:{form}} {"ok" if value <= at_most else "OVER"}'.rjust(9)


def check_same(title: str, said: str, want: str, got: dict):
    "Stop if a candidate's tensors are not those of hooks."
    for who, digest_of_who in got.items():
        if digest_of_who != want:
            raise SystemExit(f'{title}, {said}: {who} gives other tensors than hooks ({digest_of_who}, {want})')


def above_hooks(t: dict, who: str) -> str:
    "How much longer a candidate takes than hooks, each as a multiple of its bare forward; with its goal."
    if who not in t: return goal(None, 0.03, '.1%')
    shares = [took / bare / (by_hooks / its_bare) - 1
              for (bare, took), (its_bare, by_hooks) in zip(t[who], t['hooks'], strict=True)]
    return goal(statistics.median(shares), 0.03, '.1%')


def in_microseconds(t: dict, said: str, o: dict) -> str:
    "A row's name, the bare forward, and each candidate's overhead."
    bare = statistics.median(bare for bare, _ in t['hooks'])
    cells = [cell(v and v * 1e6, '.1f', 9 if who == 'nnsight' else 8) for who, v in o.items()]
    return f"  {said:<32}{bare * 1e6:8.0f}" + ''.join(cells)


def without_logits(name: str, child: Child, quick: bool):
    found = []
    for row in ('save', 'all', 'edit'):
        times = measure(f'{row}_alone', {}, child, CALLS[name], ROUNDS[name], quick)
        found.append(f"{ROWS[row]} {over(times, 'nnsight') * 1e6:.1f}")
    print(f"  nnsight without the logits: {', '.join(found)}")


def table(name: str, child: Child | None, quick: bool):
    title, make = MODELS[name]
    model, x, layers = make()
    hooks, (traces, runs) = by_hand(model, x, layers), ours_or_nothing(model, x, layers)
    if child:
        child.ask('model', name)
    print(f'\n{title}: overhead over the bare forward, in microseconds')
    small = name == 'tiny'
    goals = 'trace over hooks, run over hooks (at most 3%)'
    if small:
        goals = 'trace / nnsight (at most 0.5)  run / hooks (at most 2)'
    print(f"  {'':<32}{'bare':>8}{'hooks':>8}{'run':>8}{'trace':>8}{'nnsight':>9}  {goals}")
    for row, said in ROWS.items():
        ours = {who: f[row] for who, f in (('trace', traces), ('run', runs)) if row in f}
        want, got = digest(hooks[row]()), {who: digest(f()) for who, f in ours.items()}
        if child:
            got['nnsight'] = child.ask('digest', row)
        check_same(title, said, want, got)
        here = dict(bare=forward_of(model, x), hooks=hooks[row], **ours)
        t = measure(row, here, child, CALLS[name], ROUNDS[name], quick)
        o = {who: over(t, who) for who in ('hooks', 'run', 'trace', 'nnsight')}
        line = in_microseconds(t, said, o)
        if small:
            theirs = o['trace'] / o['nnsight'] if o['trace'] is not None and o['nnsight'] and row != 'stop' else None
            floor = o['run'] / o['hooks'] if o['run'] is not None and row not in ('empty', 'stop') else None
            line += f'  {goal(theirs, 0.5, ".2f")}{goal(floor, 2, ".2f"):>26}'
        else:
            line += f"  {above_hooks(t, 'trace')}  {above_hooks(t, 'run')}"
        print(line, flush=True)
    if child and small:
        without_logits(name, child, quick)


# Memory

def resident() -> float:
    "Megabytes of this process."
    gc.collect()
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def memory():
    "What traces and scans of unlike shapes leave behind: megabytes of the process after each tenth of them."
    from transformer_experiments.tracing import TracedModel
    traced = TracedModel(MODELS['tiny'][1]()[0])
    block, draw = traced.transformer.h[1], random.Random(0)

    def trace():
        x = torch.randint(TINY['vocab_size'], (draw.randint(1, 4), draw.randint(2, 48)))
        with traced.trace(x):
            for _ in range(draw.randint(1, 6)): # graphs of unlike shapes: no schedule is there already for most
                block.output[:, :draw.randint(1, 2)] *= draw.random()
            block.output.sum().save()

    def scan():
        x = torch.randint(TINY['vocab_size'], (draw.randint(1, 8), draw.randint(2, 60)))
        with traced.scan(x):
            _ = block.output.shape

    print('megabytes of the process after each tenth (the first is after a tenth, for what is made once)')
    for name, one, times in (('traces', trace, 5000), ('scans', scan, 500)):
        found = []
        for _ in range(10):
            for _ in range(times // 10):
                one()
            found.append(resident())
        grown = f'growth {found[-1] - found[0]:+.1f} MB'
        print(f"  {times:,} {name:<7} {' '.join(f'{m:.0f}' for m in found)}   {grown}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('models', nargs='*', help=f'some of {", ".join(MODELS)}; all by default')
    parser.add_argument('--env', type=Path, help="the folder of nnsight's environment; by default in the user's cache")
    parser.add_argument('--quick', action='store_true', help='a few rounds, to see that it runs')
    parser.add_argument('--memory', action='store_true', help='what traces and scans leave behind, and no times')
    parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve: return serve()
    if args.memory: return memory()
    if unknown := set(args.models) - set(MODELS):
        parser.error(f'no such model: {", ".join(sorted(unknown))}; there are {", ".join(MODELS)}')
    from transformer_experiments.common.files import user_cache_dir
    python = environment(args.env or user_cache_dir()/f'nnsight-{NNSIGHT}')
    child = python and Child(python)
    torch.set_num_threads(1)
    print(f'torch {torch.__version__}, one thread' + (f', nnsight {NNSIGHT} in a process of its own' if child else ''))
    try:
        with torch.no_grad():
            for name in args.models or MODELS:
                table(name, child, args.quick)
    finally:
        if child:
            child.close()


if __name__ == '__main__':
    main()
