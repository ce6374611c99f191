"""What an editor and a type checker know: methods that `@patch` adds are seen in their classes, with their types."""
import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jedi
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/'transformer_experiments'
STUBS = sorted(p.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.') for p in PACKAGE.rglob('*.pyi'))

# The twenty most used methods. `assert_type` fails where the checker knows less than is written here.
USES = '''
from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

from torch import Tensor

from transformer_experiments.accessors import ModelContext, ViewModelContext, WeightLocationType
from transformer_experiments.common import DataBatcher
from transformer_experiments.experiments import BlockInternalsExperiment
from transformer_experiments.models import EncodingHelpers, LogitsWrapper, TransformerAccessors
from transformer_experiments.models.transformer import TransformerLanguageModel
from transformer_experiments.moe import MoEConfig, SparseMoE
from transformer_experiments.shapes import ShapeWalk, walk_shapes
from transformer_experiments.tracing import Graph, LanguageModel, Session, Tracer
from transformer_experiments.trained_models import create_model_and_tokenizer

def use_models() -> None:
    m, tokenizer = create_model_and_tokenizer()
    assert_type(m, TransformerLanguageModel)
    assert_type(tokenizer.encode('a'), list[int])
    assert_type(tokenizer.decode([1]), str)
    eh, accessors = EncodingHelpers(m, tokenizer), TransformerAccessors(m)
    tokens = eh.tokenize_string('a')
    assert_type(m.generate(tokens, 3), Tensor)
    _, io = accessors.copy_block_from_model(0)
    assert_type(io.input('sa.proj'), Tensor)
    assert_type(accessors.run_model(tokens), Tensor)
    logits = LogitsWrapper(accessors.run_model(tokens), tokenizer)
    assert_type(logits.topk_tokens(3), list[list[list[tuple[str, float]]]])
    experiment = BlockInternalsExperiment(eh, accessors, 0, Path('folder'))
    experiment.run(DataBatcher(tokens[0], 3, 4, 5))
    assert_type(experiment.load(), Iterator[tuple[Tensor, Tensor, Tensor, Tensor]])

def use_traces() -> None:
    lm = LanguageModel('tinyshakespeare')
    with lm.trace('a') as tracer:
        assert_type(tracer, Tracer)
        with tracer.invoke('b'):
            lm.blocks[0].output.save()
    assert_type(lm.session(), Session)
    assert_type(tracer.graph, Graph)
    assert_type(Graph.from_json(tracer.graph.to_json()), Graph)
    values: dict = lm.run(tracer.graph, 'a')

def use_contexts() -> None:
    context = ModelContext.from_model_type('tinyshakespeare')
    assert_type(context.encode('a'), list[int])
    assert_type(context.decode([1]), str)
    assert_type(context.get_weight(WeightLocationType.ATTN_TO_QUERY, 0), Tensor)
    assert_type(context.view(), ViewModelContext)
    moe = SparseMoE(MoEConfig(8, 8, 4))
    assert_type(SparseMoE.from_hf(moe), SparseMoE)
    assert_type(walk_shapes(moe, 3), ShapeWalk)
'''


def type_check(source: str, folder: Path) -> str:
    "What pyrefly says of a file that uses the package as it is installed: modules and stubs."
    (folder/'uses.py').write_text(source)
    options = ['--search-path', ROOT, '--python-interpreter-path', sys.executable, '--preset=default']
    checker = Path(sys.executable).parent/'pyrefly'
    command = [checker, 'check', '--output-format=min-text', *options, folder/'uses.py']
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    return '\n'.join(line for line in done.stdout.splitlines() if line.startswith('ERROR'))


def test_the_most_used_methods_have_types(tmp_path):
    assert type_check(USES, tmp_path) == ''


@pytest.mark.parametrize('right, wrong', [
    ('lm.trace(', 'lm.trase('), ('generate(tokens, 3), Tensor', 'generate(tokens, 3), str'),
    ("context.encode('a')", 'context.encode(3.5)'), ('tracer.invoke', 'tracer.invoked')])
def test_a_wrong_use_is_found(tmp_path, right, wrong):
    assert right in USES
    assert type_check(USES.replace(right, wrong), tmp_path)


def test_the_checker_sees_an_operator_that_a_type_lacks(tmp_path):
    "The fault that nothing had noticed: two tuples of roots were intersected with `&`."
    source = 'def shared(roots: dict[int, tuple[int, ...]], i: int):\n    return {0}(roots[i]) & {0}(roots[0])\n'
    assert '`&` is not supported' in type_check(source.format(''), tmp_path)
    assert type_check(source.format('set'), tmp_path) == ''


@pytest.mark.parametrize('code, name', [
    ("from transformer_experiments.tracing import LanguageModel\nlm = LanguageModel('smollm2')\nlm.tr", 'trace'),
    ('from transformer_experiments.accessors import ModelContext\nc: ModelContext\nc.get_we', 'get_weight'),
    ('from transformer_experiments.models import TransformerLanguageModel as T\nm: T\nm.gen', 'generate'),
    ('from transformer_experiments.moe import SparseMoE\nSparseMoE.from', 'from_hf')])
def test_an_editor_completes(code, name):
    assert name in [c.name for c in jedi.Script(code, project=jedi.Project(ROOT)).complete()]


def names_in_stub(cls: ast.ClassDef) -> set[str]:
    functions = {n.name for n in cls.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}
    fields = {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign)}
    return functions | fields | {t.id for n in cls.body if isinstance(n, ast.Assign) for t in n.targets}


def is_ours(value: object) -> bool:
    "A function that was written in the package, also behind a decorator or in a property."
    f = inspect.unwrap(getattr(value, '__func__', None) or getattr(value, 'fget', None) or value)
    return inspect.isfunction(f) and f.__code__.co_filename.startswith(str(PACKAGE))


@pytest.mark.parametrize('module', STUBS)
def test_stubs_name_what_is_there(module):
    "Each method that a class has once the package is imported, wherever it was patched on, is in its stub."
    for page in ('accessors', 'experiments', 'remote.client', 'tracing'):
        import_module(f'transformer_experiments.{page}')
    imported = vars(import_module(module))
    tree = ast.parse((ROOT/module.replace('.', '/')).with_suffix('.pyi').read_text())
    stubs = {c.name: names_in_stub(c) for c in tree.body if isinstance(c, ast.ClassDef)}
    ours = {(name, k) for name in stubs for k, v in vars(imported[name]).items() if is_ours(v)}
    missing = {(name, k) for name, k in ours if k not in stubs[name]}
    missing = {k for k in missing if not k[1].startswith(('_orig_', '__'))}  # kept by `patch`; operators, from a loop
    assert ours and not missing
