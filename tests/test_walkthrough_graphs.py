"""Every graph that the walkthrough (`nbs/tour/walkthrough*.ipynb`) writes is data.

It comes back equal from its JSON, and replayed from there it gives the values that the page got, bit for bit. Sent to
a server as a message it gives them too, and the random numbers go on as they do here. A graph with a function of the
user's own is refused by name instead.

The pages' cells run here unchanged; what their traces and sessions do at their end is watched."""
import json
from collections import Counter, OrderedDict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from execnb.shell import CaptureShell
from torch import nn

from transformer_experiments.remote.limits import JobError
from transformer_experiments.remote.running import run_job
from transformer_experiments.remote.message_format import Result, unpack
from transformer_experiments.remote.message_values import decode_value
from transformer_experiments.remote.messages import job_message
from transformer_experiments.remote.registered import attached_modules
from transformer_experiments.tracing import Graph, LanguageModel, Session, TracedModel, Tracer, run_session
from transformer_experiments.tracing.nodes import walk
from transformer_experiments.tracing.tracer import Editor, Scanner
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
    "Bit for bit, at any depth; of the same type, parameters apart."
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and isinstance(a, nn.Parameter) == isinstance(b, nn.Parameter)
            and a.dtype == b.dtype
            and torch.equal(a.detach(), b.detach())
        )
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    return type(a) is type(b) and (a == b or a != a)


def answer(models: dict, message: bytes, **options) -> tuple[dict, Result, dict]:
    "Values by name, the header and the tensors of the result."
    header, tensors = unpack(run_job(models, message, **options), Result)
    return {name: decode_value(v, tensors) for name, v in header.values.items()}, header, tensors


def has_own_function(graph: Graph) -> bool: # A function that the list of operations doesn't have
    return any(n.op == 'apply' and n.args[0] not in NAME_OF for n in walk(graph.nodes))


@contextmanager
def apart(random: torch.Tensor, *models):
    "A replay: the random numbers of the run, and none of the page's own hooks, which count the page's runs."
    after, hooks = torch.get_rng_state(), [(m, m._forward_hooks) for model in models for m in model._module.modules()]
    torch.set_rng_state(random)
    for m, _ in hooks:
        m._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for m, its_own in hooks:
            m._forward_hooks = its_own
        torch.set_rng_state(after)


class Witness:
    "Watches traces and sessions end, and sends each graph through JSON."
    def __init__(self): self.seen, self.faults, self.graphs = Counter(), [], []

    def there_and_back(self, kind: str, graph: Graph) -> Graph | None:
        if has_own_function(graph):
            self.seen['refused'] += 1
            with pytest.raises(ValueError, match='is not data'):
                graph.to_json()
            return None
        self.seen[kind] += 1
        text = graph.to_json()
        back = Graph.from_json(text)
        if not (back == graph and back.sha256 == graph.sha256 and back.to_json() == text):
            self.faults.append(f'{kind}: not the same from its JSON:\n{graph}')
        self.graphs.append(back)
        return back

    def compare(self, graph: Graph, results: dict, replay: dict):
        expected = {name: results[i] for name, i in graph.saves.items() if i in results}
        self.seen['values'] += len(expected)
        if expected.keys() != replay.keys():
            self.faults.append(f'saved {sorted(expected)}, replayed {sorted(replay)}:\n{graph}')
        self.faults += [
            f'{name} is {expected[name]}, and replayed {replay[name]}:\n{graph}'
            for name in expected.keys() & replay.keys()
            if not same(expected[name], replay[name])
        ]

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
            with apart(random, model):
                self.compare(
                    graph,
                    tracer.rec.results,
                    model.run(back, *prompts, method=method, invoker_args=options[0], **kwargs),
                )
        return watched

    def watch_session(self, finish):
        def watched(session):
            random, back = torch.get_rng_state(), self.there_and_back('session', session.graph)
            finish(session)
            if back is None: return
            with apart(random, *session.models):
                self.compare(session.graph, session.rec.results, run_session(back, *session.models))
        return watched

    def watch_other(self, kind: str, finish): # An edit, a scan: they have no run of their own
        def watched(tracer, scan):
            self.there_and_back(kind, tracer.graph)
            return finish(tracer, scan)
        return watched


class Sender:
    "Sends what the page's traces and sessions have written, before they run here, and compares."
    def __init__(self): self.seen, self.faults, self.served = Counter(), [], {}

    def serve(self, model: TracedModel) -> TracedModel:
        "The model as a server has it: a wrapper of its own, which stays from job to job."
        language = isinstance(model, LanguageModel)
        given = (model._root, model.tokenizer) if language else (model._root,)
        key = tuple(map(id, given))
        if key not in self.served:
            self.served[key] = given, LanguageModel(*given) if language else TracedModel(*given)
        return self.served[key][1]

    def watch(self, finish, models_of, kind_of):
        def watched(written, *scan):
            if getattr(written, 'outer', None) is not None: return finish(written, *scan)  # part of a session's graph
            models, random_state, graph, theirs = models_of(written), torch.get_rng_state(), written.graph, None
            if has_own_function(graph):
                self.seen['refused'] += 1
            else:
                served = {f'model {i}': self.serve(m) for i, m in enumerate(models)}
                names = {id(m._root): f'model {i}' for i, m in enumerate(models)}
                has_input = (
                    isinstance(written, Session)
                    or written.invokers
                    or written.model._has_input(written.args, written.kwargs)
                )
                if has_input:
                    theirs = self.sent(
                        served, job_message(written, names, attached_modules, models), models, random_state
                    )
            try:
                finish(written, *scan)
            except Exception as e:
                if theirs is not None:
                    self.compare_errors(graph, e, theirs)
                raise
            if theirs is None: return
            self.seen[kind_of(written)] += 1
            self.compare(graph, written.rec, theirs)
        return watched

    def sent(self, served, message, models, random_state):
        with apart(random_state, *models):
            try:
                return answer(served, message)
            except JobError as e:
                return e

    def compare_errors(self, graph, mine, theirs):
        self.seen['errors'] += 1
        same_kind = isinstance(theirs, JobError) and theirs.kind == type(mine).__name__
        if not same_kind or self.what_is_wrong(mine) != self.what_is_wrong(theirs):
            self.faults.append(f'{mine!r} here, {theirs!r} there:\n{graph}')

    def what_is_wrong(self, error: Exception) -> str: # the first line, without the place in brackets
        return str(error).splitlines()[0].partition(' (')[0]

    def compare(self, graph, rec, theirs):
        if isinstance(theirs, JobError): return self.faults.append(f'{theirs}:\n{graph}')
        values, header, tensors = theirs
        mine = {name: rec.results[i] for name, i in graph.saves.items() if i in rec.results}
        self.seen['values'] += len(mine)
        missing = graph.saves.keys() - mine.keys()
        if mine.keys() != values.keys() or missing != header.reasons.keys():
            self.faults.append(f'saved {sorted(mine)}, sent {sorted(values)}:\n{graph}')
        self.faults += [
            f'{n} is {mine[n]} here and {values[n]} there:\n{graph}'
            for n in mine.keys() & values.keys()
            if not same(mine[n], values[n])
        ]
        if not torch.equal(tensors[header.rng], torch.get_rng_state()):
            self.faults.append(f'the generator is elsewhere:\n{graph}')


@pytest.fixture(scope='module')
def watched():
    "Both, after one run of the pages."
    witness, sender, shell = Witness(), Sender(), CaptureShell(PAGES[0].parent)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Editor, 'finish', witness.watch_other('edit', Editor.finish))
        monkeypatch.setattr(Scanner, 'finish', witness.watch_other('scan', Scanner.finish))
        finish = witness.watch_trace(Tracer.finish)
        monkeypatch.setattr(
            Tracer,
            'finish',
            sender.watch(
                finish, lambda t: [t.model], lambda t: t.method if len(t.invokers) < 2 else f'{t.method} of several'
            ),
        )
        finish = witness.watch_session(Session._finish)
        monkeypatch.setattr(
            Session, '_finish', sender.watch(finish, lambda s: s.models or [shell.user_ns['llm']], lambda s: 'session')
        )
        run_pages(monkeypatch, shell)
    return witness, sender


KINDS = {'forward', 'forward of several', 'generate', 'session', 'refused', 'values'}


def test_every_graph_of_the_walkthrough_survives_its_json(watched):
    witness, _ = watched
    print(dict(witness.seen))
    assert not witness.faults, '\n\n'.join(witness.faults[:5])
    missing = (KINDS | {'edit', 'scan'}) - witness.seen.keys()
    assert not missing, f'the page has no graph of this kind any more: {missing}'
    json_of = {g.to_json() for g in witness.graphs}
    assert len(json_of) > 40, 'the witness has not seen the page'


def test_every_graph_of_the_walkthrough_as_a_message(watched):
    _, sender = watched
    print(dict(sender.seen))
    assert not sender.faults, '\n\n'.join(sender.faults[:5])
    assert not (KINDS | {'errors'}) - sender.seen.keys()
    assert sender.seen['values'] > 200 and sum(sender.seen.values()) > 300


def test_the_witness_notices_a_changed_graph():
    witness, model, x = Witness(), TracedModel(torch.nn.Linear(3, 3)), torch.rand(1, 3)
    with model.trace(x) as tracer:
        (model.output + 1).save('out')
    changed = Graph.from_json(tracer.graph.to_json().replace('"args": [{"ref": 0}, 1]', '"args": [{"ref": 0}, 2]'))
    witness.compare(tracer.graph, tracer.rec.results, model.run(changed, x))
    assert len(witness.faults) == 1 and changed != tracer.graph
    witness.compare(tracer.graph, tracer.rec.results, model.run(Graph.from_json(tracer.graph.to_json()), x))
    assert len(witness.faults) == 1
