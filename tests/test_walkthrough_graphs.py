"""Every graph that the walkthrough (`nbs/tour/walkthrough*.ipynb`) writes is data: it comes back equal from its JSON, and replayed from there it gives the
values that the page got, bit for bit. Graphs with a function of the user's own are refused by name instead.

The pages' cells run here unchanged; what their traces and sessions do at their end is watched."""
import json
from collections import Counter, OrderedDict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from execnb.shell import CaptureShell

from transformer_experiments.tracing import Graph, Session, Tracer, run_session
from transformer_experiments.tracing.graph import walk
from transformer_experiments.tracing.model import Editor, Scanner
from transformer_experiments.tracing.operations import NAME_OF

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT/'nbs'/'tour'/f'walkthrough{part}.ipynb' for part in ('', '_backward', '_language', '_sessions')]


def run_pages(monkeypatch, shell: CaptureShell):
    "The cells that `make test` runs, one page after the other."
    monkeypatch.chdir(PAGES[0].parent)
    for page in PAGES:
        for cell in json.loads(page.read_text())['cells']:
            source = ''.join(cell['source'])
            if cell['cell_type'] != 'code' or source.startswith('#| slow'): continue
            shell.run(source)
            assert not shell.exc, f'{source}\n{shell.exc}'


def same(a: object, b: object) -> bool:
    "Bit for bit, at any depth."
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor): return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    return type(a) is type(b) and a == b


def has_own_function(graph: Graph) -> bool: # A function that the list of operations doesn't have
    return any(n.op == 'apply' and n.args[0] not in NAME_OF for n in walk(graph.nodes))


@contextmanager
def apart(random: torch.Tensor, *models):
    "A replay: the random numbers of the run, and none of the page's own hooks, which count the page's runs."
    after, hooks = torch.get_rng_state(), [(m, m._forward_hooks) for model in models for m in model._module.modules()]
    torch.set_rng_state(random)
    for m, _ in hooks: m._forward_hooks = OrderedDict()
    try: yield
    finally:
        for m, its_own in hooks: m._forward_hooks = its_own
        torch.set_rng_state(after)


class Witness:
    "Watches traces and sessions end, and sends each graph through JSON."
    def __init__(self): self.seen, self.faults, self.graphs = Counter(), [], []

    def there_and_back(self, kind: str, graph: Graph) -> Graph | None:
        if has_own_function(graph):
            self.seen['refused'] += 1
            with pytest.raises(ValueError, match='is not data'): graph.to_json()
            return None
        self.seen[kind] += 1
        text = graph.to_json()
        back = Graph.from_json(text)
        if not (back == graph and back.sha256 == graph.sha256 and back.to_json() == text): self.faults.append(f'{kind}: not the same from its JSON:\n{graph}')
        self.graphs.append(back)
        return back

    def compare(self, graph: Graph, results: dict, replay: dict):
        expected = {name: results[i] for name, i in graph.saves.items() if i in results}
        self.seen['values'] += len(expected)
        if expected.keys() != replay.keys(): self.faults.append(f'saved {sorted(expected)}, replayed {sorted(replay)}:\n{graph}')
        self.faults += [f'{name} is {expected[name]}, and replayed {replay[name]}:\n{graph}' for name in expected.keys() & replay.keys() if not same(expected[name], replay[name])]

    def watch_trace(self, finish):
        def watched(tracer, scan=None):
            if tracer.outer is not None: return finish(tracer, scan)  # part of a session's graph
            model, method, kwargs, random = tracer.model, tracer.method, tracer.kwargs, torch.get_rng_state()
            invokers = tracer.invokers or [i for i in [tracer.invoker] if i is not None]  # none: a trace without input
            prompts, options = [i.args for i in invokers], [i.invoker_args for i in invokers]
            assert all(o == options[0] for o in options), 'run() has one set of options for all prompts'
            graph = tracer.graph
            back = self.there_and_back(method if len(prompts) < 2 else f'{method} of several', graph)
            finish(tracer, scan)
            if back is None or not prompts: return
            with apart(random, model): self.compare(graph, tracer.rec.results, model.run(back, *prompts, method=method, invoker_args=options[0], **kwargs))
        return watched

    def watch_session(self, finish):
        def watched(session):
            random, back = torch.get_rng_state(), self.there_and_back('session', session.graph)
            finish(session)
            if back is None: return
            with apart(random, *session.models): self.compare(session.graph, session.rec.results, run_session(back, *session.models))
        return watched

    def watch_other(self, kind: str, finish): # An edit, a scan: they have no run of their own
        def watched(tracer, scan):
            self.there_and_back(kind, tracer.graph)
            return finish(tracer, scan)
        return watched


def test_every_graph_of_the_walkthrough_survives_its_json(monkeypatch):
    witness = Witness()
    monkeypatch.setattr(Tracer, 'finish', witness.watch_trace(Tracer.finish))
    monkeypatch.setattr(Session, '_finish', witness.watch_session(Session._finish))
    monkeypatch.setattr(Editor, 'finish', witness.watch_other('edit', Editor.finish))
    monkeypatch.setattr(Scanner, 'finish', witness.watch_other('scan', Scanner.finish))
    run_pages(monkeypatch, CaptureShell(PAGES[0].parent))
    print(dict(witness.seen))
    assert not witness.faults, '\n\n'.join(witness.faults[:5])
    missing = {'forward', 'forward of several', 'generate', 'session', 'edit', 'scan', 'refused', 'values'} - witness.seen.keys()
    assert not missing, f'the page has no graph of this kind any more: {missing}'
    json_of = {g.to_json() for g in witness.graphs}
    assert len(json_of) > 40, 'the witness has not seen the page'


def test_the_witness_notices_a_changed_graph():
    from transformer_experiments.tracing import TracedModel
    witness, model, x = Witness(), TracedModel(torch.nn.Linear(3, 3)), torch.rand(1, 3)
    with model.trace(x) as tracer: (model.output + 1).save('out')
    changed = Graph.from_json(tracer.graph.to_json().replace('"args": [{"ref": 0}, 1]', '"args": [{"ref": 0}, 2]'))
    witness.compare(tracer.graph, tracer.rec.results, model.run(changed, x))
    assert len(witness.faults) == 1 and changed != tracer.graph
    witness.compare(tracer.graph, tracer.rec.results, model.run(Graph.from_json(tracer.graph.to_json()), x))
    assert len(witness.faults) == 1
