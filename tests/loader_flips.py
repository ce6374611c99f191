"""Files with one flipped bit, or cut short, given to the loaders that read them; run by `test_loader_flips.py` as a
program, so that a crash or a hang of a loader is an outcome and not the end of the tests."""

import faulthandler
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from transformer_experiments.accessors import HFModelContext, StandardModelContext, TinyShakespeareModelContext
from transformer_experiments.accessors import export_pieces
from transformer_experiments.common.activation_store import ActivationStore, StoreSpec, StoreWriter
from transformer_experiments.common.headers import sealed
from transformer_experiments.models.checkpoint import FORMAT, load_model, save_model, write_tensors
from transformer_experiments.models.moe_transformer import MoETransformerConfig
from transformer_experiments.models.transformer import TransformerConfig
from transformer_experiments.moe import MoEConfig
from transformer_experiments.tokenizers.char_tokenizer import CharacterTokenizer
from transformer_experiments.tracing import LanguageModel, TracedModel
from transformer_experiments.trained_models.smollm2 import check_converted, convert_gguf
from transformer_experiments.trained_models.tinyshakespeare_transformer import create_model_and_tokenizer
from transformer_experiments.training.optimisers import optimizer_tensors
from transformer_experiments.training.recipe import Recipe
from transformer_experiments.training.run_state import STATE
from transformer_experiments.training.trainer import Trainer

# What a load of these small files may take at most, of the processor, and add to the process's memory
SECONDS, MEGABYTES = 5, 200
TEXT = 'To be, or not to be, that is the question. ' * 8
SIZES = TransformerConfig(block_size=8, n_embed=12, n_head=3, n_layer=2, dropout=0.0)
EXPERTS = MoETransformerConfig(
    block_size=8, n_embed=12, n_head=3, n_layer=2, dropout=0.0, moe=MoEConfig(12, 16, 3), moe_layers=(1,)
)
RECIPE = Recipe(SIZES, max_steps=4, batch_size=2, micro_batch_size=2, warmup_steps=1, eval_every=2, checkpoint_every=2)


@dataclass
class Case:
    "A loader, and files that it reads."

    name: str
    make: Callable[[Path], object]  # Writes the files into a folder
    load: Callable[[Path], dict]  # What was read, by name
    files: tuple[str, ...] = ('*',)  # Patterns of the files that are damaged
    header_only: bool = False  # The format has no hash of its data, so only what is before it is damaged
    foreign: tuple[str, ...] = field(default=())  # Names of files whose values nobody has a hash of


# What is written and read


def our_file(config) -> Callable[[Path], None]:
    def make(folder: Path):
        tokenizer = CharacterTokenizer(TEXT)
        torch.manual_seed(0)
        save_model(folder / 'm.safetensors', config.build(tokenizer.vocab_size), tokenizer, '0' * 64, steps=3)

    return make


def load_ours(folder: Path) -> dict:
    saved = load_model(folder / 'm.safetensors')
    saved.build()
    return saved.weights | {'': repr((saved.config, saved.vocab, saved.data_sha256, saved.facts))}


def all_weights(ctx) -> dict:
    places = [(w, i) for w in ctx.locations() for i in ([None] if w.has_no_layers else range(ctx.n_layers))]
    found = {f'{w} {i}': ctx.get_weight(w, i) for w, i in places if ctx.has_weight(w, i)}
    return found | {'': repr(ctx.facts)}


def load_our_context(folder: Path) -> dict:
    ctx = TinyShakespeareModelContext(folder / 'm.safetensors', device='cpu')
    return all_weights(ctx) | {'vocabulary': ctx.get_encoding().decode(range(ctx.n_vocab))}


def make_pt(zipped: bool) -> Callable[[Path], None]:
    def make(folder: Path):
        torch.manual_seed(0)
        config = TransformerConfig()
        m = config.build(CharacterTokenizer(TEXT).vocab_size)
        torch.save(m.state_dict(), folder / 'm.pt', _use_new_zipfile_serialization=zipped)

    return make


class Dataset:
    text = TEXT


def load_pt(folder: Path) -> dict:
    return create_model_and_tokenizer(folder / 'm.pt', Dataset())[0].state_dict()


def make_pieces(folder: Path):
    torch.manual_seed(0)
    tokenizer = CharacterTokenizer(TEXT)
    m = SIZES.build(tokenizer.vocab_size).eval()
    export_pieces(TinyShakespeareModelContext(m, tokenizer, device='cpu'), folder / 'model')


def load_pieces(folder: Path) -> dict:
    ctx = StandardModelContext(folder / 'model', device='cpu')
    return ctx.get_or_create_model().state_dict() | all_weights(ctx) | {'config': repr(ctx.config)}


def make_training(folder: Path):
    Trainer(RECIPE, TEXT, CharacterTokenizer(TEXT), folder / 'run', '0' * 64).train(progress=False)


def load_training(folder: Path) -> dict:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        t = Trainer(RECIPE, TEXT, CharacterTokenizer(TEXT), folder / 'run', '0' * 64, resume=True)
    if warned:
        raise ValueError(str(warned[0].message))  # a damaged timing.json is named in a warning, and changes no result
    shown = {'': repr((t.step, t.losses, t.evals, t.extended))}
    return t.m.state_dict() | {f'o.{k}': v for k, v in optimizer_tensors(t.optimizers, t.m).items()} | shown


SITES = {'tokens': dict(dtype='int64', shape=[4]), 'x.output': dict(dtype='float32', shape=[4, 6])}
SPEC = StoreSpec(SITES, n_rows=10, batch_rows=4, run={'experiment': 'flips', 'seed': 3, 'blocks': [0]}, shard_bytes=512)


def rows_of(start: int, stop: int) -> dict:
    made = torch.Generator().manual_seed(start)
    n = stop - start
    return {'tokens': torch.randint(9, (n, 4), generator=made), 'x.output': torch.randn(n, 4, 6, generator=made)}


def make_store(folder: Path):
    with StoreWriter(ActivationStore.create(folder / 'store', SPEC)) as writer:
        for rows in (range(0, 4), range(4, 8), range(8, 10)):
            with writer.rows(rows):
                for site, x in rows_of(rows.start, rows.stop).items():
                    writer.put(site, x)
    (folder / 'store' / '.lock').unlink(missing_ok=True)


def read_store(store: ActivationStore) -> dict:
    about = {'': repr((store.spec, store.complete))}
    return {site: torch.cat([x for (x,) in store.batches([site])]) for site in SITES} | about


def load_store(folder: Path) -> dict:
    return read_store(ActivationStore.open(folder / 'store'))


def resume_store(folder: Path) -> dict:
    store = ActivationStore.create(folder / 'store', SPEC)
    if not store.complete:
        raise AssertionError('a damaged store was taken for one that is not complete')
    return read_store(store)


def make_hf(folder: Path):
    import transformers as T

    torch.manual_seed(0)
    sizes = dict(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    config = T.LlamaConfig(
        **sizes, num_key_value_heads=2, max_position_embeddings=20, bos_token_id=1, eos_token_id=2, pad_token_id=None
    )
    T.LlamaForCausalLM(config).save_pretrained(folder / 'hf')


def load_hf(folder: Path) -> dict:
    return all_weights(HFModelContext(folder / 'hf', 'cpu'))


def load_hf_model(folder: Path) -> dict:
    return HFModelContext(folder / 'hf', 'cpu').get_or_create_model().state_dict()


def load_hf_language_model(folder: Path) -> dict:
    model = LanguageModel(str(folder / 'hf'), tokenizer=object(), dispatch=True)
    return model._module.state_dict()


def make_edits(folder: Path):
    with small_model().edit() as edited:
        edited.a.output[:] = edited.a.output * 1.25 + torch.tensor([0.5, 2.0, 3.0])
    edited.save_edits(folder / 'edits.json')


def small_model() -> TracedModel:
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.add_module('a', torch.nn.Linear(3, 3))
    net.add_module('b', torch.nn.Linear(3, 2))
    return TracedModel(net)


def load_edits(folder: Path) -> dict:
    edited = small_model().load_edits(folder / 'edits.json')
    with edited.trace(torch.ones(2, 3)):
        y = edited.b.output.save()
    return {'y': y.detach() if isinstance(y, torch.Tensor) else y.value.detach()}


LLAMA = dict(width=8, mlp=12, layers=1, heads=2, vocab=6)


def make_gguf(folder: Path):
    import gguf
    import numpy as np

    w, made = gguf.GGUFWriter(folder / 'm.gguf', 'llama'), np.random.default_rng(0)
    w.add_embedding_length(8)
    w.add_feed_forward_length(12)
    w.add_block_count(1)
    w.add_head_count(2)
    w.add_head_count_kv(2)
    w.add_context_length(16)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(1e4)
    w.add_tokenizer_model('gpt2')
    w.add_tokenizer_pre('smollm')
    w.add_token_list(['<s>', 'a', 'b', 'c', 'ab', 'd'])
    w.add_token_types([3, 1, 1, 1, 1, 1])
    w.add_token_merges(['a b'])
    shapes = {'token_embd': (6, 8), 'output_norm': (8,), 'output': (6, 8)}
    shapes |= {f'blk.0.{k}': s for k, s in dict(attn_norm=(8,), ffn_norm=(8,), attn_q=(8, 8), attn_k=(8, 8)).items()}
    shapes |= {f'blk.0.{k}': s for k, s in dict(attn_v=(8, 8), attn_output=(8, 8), ffn_gate=(12, 8)).items()}
    shapes |= {'blk.0.ffn_up': (12, 8), 'blk.0.ffn_down': (8, 12)}
    for name, shape in shapes.items():
        w.add_tensor(f'{name}.weight', made.standard_normal(shape, dtype='float32'))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def load_gguf(folder: Path) -> dict:
    shutil.rmtree(folder / 'converted', ignore_errors=True)
    convert_gguf(folder / 'm.gguf', folder / 'converted')
    found = load_file(folder / 'converted' / 'model.safetensors')
    about = {n: (folder / 'converted' / n).read_text() for n in ('config.json', 'tokenizer.json')}
    shutil.rmtree(folder / 'converted')
    return found | about


def make_converted(folder: Path):
    make_gguf(folder)
    convert_gguf(folder / 'm.gguf', folder / 'converted')
    (folder / 'm.gguf').unlink()


def load_converted(folder: Path) -> dict:
    check_converted(folder / 'converted')
    return load_file(folder / 'converted' / 'model.safetensors')


CASES = [
    Case('model file', our_file(SIZES), load_ours),
    Case('model file with experts', our_file(EXPERTS), load_ours),
    Case('context of a model file', our_file(SIZES), load_our_context),
    Case('pt zip', make_pt(True), load_pt),
    Case('pt pickle', make_pt(False), load_pt, header_only=True),
    Case('model pieces', make_pieces, load_pieces),
    Case('training state', make_training, load_training, ('run/state.safetensors', 'run/timing.json')),
    Case('store', make_store, load_store),
    Case('store, resumed', make_store, resume_store),
    Case('transformers folder', make_hf, load_hf, ('hf/*',), header_only=True, foreign=('config.json',)),
    Case('transformers model', make_hf, load_hf_model, ('hf/*',), header_only=True, foreign=('config.json',)),
    Case('language model', make_hf, load_hf_language_model, ('hf/*',), header_only=True, foreign=('config.json',)),
    Case('stored edits', make_edits, load_edits),
    Case('gguf', make_gguf, load_gguf, header_only=True, foreign=('m.gguf',)),
    Case('converted gguf', make_converted, load_converted, ('converted/*',)),
]


# Damage


def header_bytes(path: Path) -> int:  # How much of a file is what says how to read the rest
    size = path.stat().st_size
    if path.suffix == '.safetensors':
        return 8 + int.from_bytes(path.read_bytes()[:8], 'little')
    if path.suffix == '.gguf': return path.read_bytes().rindex(b'.weight') + 64
    return min(size, 4096) if path.suffix == '.pt' else size


def damages(path: Path, data: bytes, case: Case, rng: random.Random) -> tuple[str, bytes]:
    end = header_bytes(path) if case.header_only else len(data)
    if rng.random() < 0.05:
        n = rng.randrange(end)
        return f'cut to {n} bytes', data[:n]
    head = min(end, header_bytes(path) if path.suffix == '.safetensors' else 4096)
    at = rng.randrange(head if rng.random() < 0.5 else end)  # half of them where the structure is
    bit = rng.randrange(8)
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return f'byte {at}, bit {bit}: {data[max(at - 12, 0) : at + 12]!r}', bytes(changed)


def same(a: object, b: object) -> bool:  # Bitwise
    if not isinstance(a, torch.Tensor): return a == b
    b = b if isinstance(b, torch.Tensor) else torch.zeros(0)
    as_bytes = lambda t: t.detach().contiguous().flatten().view(torch.uint8)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def differing(found: dict, expected: dict) -> list[str]:
    return [str(k) for k in expected.keys() | found.keys() if not same(found.get(k), expected.get(k))]


def peak() -> int:  # Bytes that the process had at most
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def outcome(case: Case, folder: Path, path: Path, expected: dict) -> str:
    "What a load of damaged files did: 'named', 'harmless', 'foreign' or what is wrong with it."
    before, start = peak(), time.process_time()
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
    try:
        found = case.load(folder)
    except (ValueError, FileNotFoundError) as e:
        text = str(e)
        said = 'named' if str(folder) in text or path.name in text else f'does not name the file: {type(e)} {text:.300}'
    except Exception as e:
        said = f'another error: {type(e).__name__} {str(e):.300}'
    else:
        differ = differing(found, expected)
        unknown = path.name in case.foreign or case.header_only and path.suffix == '.pt'
        said = 'harmless' if not differ else 'foreign' if unknown else f'other values: {", ".join(differ[:4])}'
    finally:
        faulthandler.cancel_dump_traceback_later()
    if (took := time.process_time() - start) > SECONDS: return f'took {took:.1f} s ({said})'
    return said if peak() - before < MEGABYTES << 20 else f'took {(peak() - before) >> 20} MB ({said})'


def flips(case: Case, folder: Path, n: int, seed: int) -> Iterator[tuple[str, str]]:
    made, here = folder / 'made', folder / 'here'
    made.mkdir(parents=True)
    case.make(made)
    shutil.copytree(made, here)
    expected = case.load(made)  # some of them views of files, which nobody changes there
    assert not differing(case.load(here), expected), f'{case.name} gives other values when it is read again'
    files = sorted(p for pattern in case.files for p in here.rglob(pattern) if p.is_file() and p.stat().st_size)
    rng = random.Random(seed)
    for _ in range(n):
        path = rng.choice(files)
        data = path.read_bytes()
        what, damaged = damages(path, data, case, rng)
        path.write_bytes(damaged)
        print('now', case.name, path.name, what, file=sys.stderr, flush=True)
        yield f'{path.relative_to(here)}, {what}', outcome(case, here, path, expected)
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)


# Headers that nobody's accident makes: sizes beyond all bounds, with the right hashes


def rewrite(path: Path, change: Callable[[dict], dict], seal=True) -> None:  # JSON; with a hash if it had one
    was = json.loads(path.read_text())
    now = change(json.loads(path.read_text()))
    path.write_text(json.dumps(sealed(now) if seal and 'sha256' in was else now))


def at(path: str, value) -> Callable[[dict], dict]:  # A change of one field, such as 'spec.n_rows'
    def change(content: dict) -> dict:
        inner, *names = content, *path.split('.')
        for name in names[:-1]:
            inner = inner[int(name) if name.isdecimal() else name]
        inner[names[-1]] = value
        return content

    return change


def rewrite_tensors(path: Path, format: str, change: Callable[[dict], dict]) -> None:  # Of this package, with its hash
    with safe_open(path, 'pt') as f:
        header = json.loads(f.metadata()['transformer_experiments'])
    header.pop('sha256')
    write_tensors(path, load_file(path), change(header))


def with_table(path: Path, change: Callable[[dict], object]) -> None:  # The same data behind another table
    data = path.read_bytes()
    n = int.from_bytes(data[:8], 'little')
    text = json.loads(data[8 : 8 + n])
    changed = change(text)
    new = changed if isinstance(changed, bytes) else json.dumps(text).encode()
    path.write_bytes(struct.pack('<Q', len(new)) + new + data[8 + n :])


def entries(table: dict) -> list[dict]:
    return [e for name, e in table.items() if name != '__metadata__']


def far(table: dict):
    entries(table)[-1]['data_offsets'][1] += 10**12


def over(table: dict):
    entries(table)[-1]['data_offsets'] = entries(table)[0]['data_offsets']


TABLES = {
    'a tensor beyond the file': far,
    'a tensor over another': over,
    'a shape of 2**80': lambda t: entries(t)[0].update(shape=[2**40, 2**40]),
    'a negative shape': lambda t: entries(t)[0].update(shape=[-1, -1]),
    'no type': lambda t: entries(t)[0].pop('dtype'),
    'a list': lambda t: b'[]',
    'a million brackets': lambda t: b'{"a":' + b'[' * 10**6,
    'one name twice': lambda t: b'{"a":{},"a":{}}',
    'a number of 5,000 digits': lambda t: b'{"a":' + b'9' * 5000 + b'}',
    'no UTF-8': lambda t: b'\xff\xfe',
}
SIZES_BEYOND = (10**9, 10**12, -1, 0, True, float('nan'), float('inf'), '2', None, [2], 10**400)


class Command:
    def __reduce__(self):
        return os.system, ('touch executed',)


def with_pickle(path: Path, pickled: bytes) -> None:  # A zip of torch.save, its checksums right, with this pickle
    with zipfile.ZipFile(path) as was:
        records = {r.filename: was.read(r) for r in was.infolist()}
    with zipfile.ZipFile(path, 'w') as z:
        for name, data in records.items():
            z.writestr(name, pickled if name.endswith('data.pkl') else data)


def long_storage(path: Path) -> None:  # Its first tensor says that it has 2**30 numbers, and so does its storage
    with zipfile.ZipFile(path) as z:
        pickled = z.read(next(n for n in z.namelist() if n.endswith('data.pkl')))
    at = pickled.index(b'cpuq')
    size = re.compile(rb'(cpuq.)(K.|M..|J....)', re.S)
    n = size.search(pickled, at).group(2)
    with_pickle(path, pickled.replace(n, b'J' + struct.pack('<i', 2**30), 1))


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('m/data.pkl', bytes(10**9))


TUPLES = b''.join(b'h' + bytes([i]) + b'h' + bytes([i]) + b'\x86q' + bytes([i + 1]) for i in range(60))
PICKLES = {
    'a storage longer than its record': long_storage,
    'a zip bomb': zip_bomb,
    'a command': lambda path: torch.save({'w': Command()}, path),
    'a tuple of tuples': lambda path: with_pickle(path, b'\x80\x02}(K\x01\x85q\x00' + TUPLES + b'K\x01u.'),
    'a tensor of 10**12 numbers': lambda path: torch.save({'w': torch.zeros(1).expand(10**12)}, path),
    'a sparse tensor': lambda path: torch.save({'w': torch.eye(3).to_sparse()}, path),
    'a tensor without memory': lambda path: torch.save({'w': torch.zeros(3, device='meta')}, path),
    'numbers as keys': lambda path: torch.save({3: torch.zeros(3)}, path),
    'a number': lambda path: torch.save(3, path),
}


def patch_gguf(folder: Path, key: bytes, skip: int, value: bytes) -> None:
    path = folder / 'm.gguf'
    data = bytearray(path.read_bytes())
    start = data.index(key) + len(key) + skip
    data[start : start + len(value)] = value
    path.write_bytes(data)


def hostile() -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    "Case, what is wrong, and what makes it so in the folder of that case."
    for case, state in (('model file', 0), ('context of a model file', 0), ('model file with experts', 1)):
        names = ('n_layer', 'n_embed', 'n_head', 'block_size', 'dropout') + (('moe.n_experts', 'moe.top_k') * state)
        for name in names:
            for v in SIZES_BEYOND:
                if name == 'dropout' and v == 0: continue
                edit = lambda f, n=name, v=v: rewrite_tensors(f / 'm.safetensors', FORMAT, at(f'config.{n}', v))
                yield case, f'{name}={v!r:.20}', edit
        yield case, 'n_layer=40', lambda f: rewrite_tensors(f / 'm.safetensors', FORMAT, at('config.n_layer', 40))
        yield case, 'vocab', lambda f: rewrite_tensors(f / 'm.safetensors', FORMAT, at('vocab', ['a'] * 10**6))
        for what, change in TABLES.items():
            yield case, what, lambda f, c=change: with_table(f / 'm.safetensors', c)
    names = ('recipe.model.n_layer', 'recipe.max_steps', 'recipe.batch_size', 'step', 'losses', 'extended', 'evals')
    for name in names:
        for v in (-1, 10**400, True, 'x', {'x': 1}, [[1]]):
            edit = lambda f, n=name, v=v: rewrite_tensors(f / 'run/state.safetensors', STATE, at(n, v))
            yield 'training state', f'{name}={v!r:.20}', edit
    names = tuple(f'spec.{k}' for k in ('n_rows', 'batch_rows', 'shard_bytes', 'sites', 'run'))
    for name in (*names, 'shards', 'shards.0.shard', 'shards.0.bytes'):
        for v in (10**9, 2**80, -1, True, float('nan'), 'x', [10**9]):
            edit = lambda f, n=name, v=v: rewrite(f / 'store/manifest.json', at(n, v))
            yield 'store', f'{name}={v!r:.20}', edit
    yield 'store', 'another run', lambda f: rewrite(f / 'store/manifest.json', at('spec.run', {'seed': 4}))
    for name in ('n_layers', 'd_model', 'n_heads', 'ctx_window', 'm_attn', 'm_mlp', 'n_vocab'):
        for v in SIZES_BEYOND:
            if v is None and name != 'n_layers': continue  # a default, which other pieces have
            def edit(f, n=name, v=v):
                (f / 'model/manifest.json').unlink()
                rewrite(f / 'model/config.json', at(n, v))

            yield 'model pieces', f'{name}={v!r:.20}', edit
    for what, change in PICKLES.items():
        yield 'pt zip', what, lambda f, c=change: c(f / 'm.pt')

        def edit(f, c=change):
            (f / 'model/manifest.json').unlink()
            c(f / 'model/model_pieces/tok_embed.weight.pt')

        yield 'model pieces', what, edit
    names = ('num_hidden_layers', 'hidden_size', 'num_attention_heads', 'vocab_size', 'rms_norm_eps')
    for case in ('transformers folder', 'transformers model', 'language model'):
        for name in names:
            for v in (10**12, -1, True, float('nan'), '2'):
                yield case, f'{name}={v!r:.20}', lambda f, n=name, v=v: rewrite(f / 'hf/config.json', at(n, v))
        more = dict(model_type=[1], architectures={'a': 1}, layer_types=[3], rope_parameters=[[]], hidden_act={})
        for name, v in (dict(num_hidden_layers=10**9, vocab_size=2**24, hidden_size=2**20) | more).items():
            yield case, f'{name}={v}', lambda f, n=name, v=v: rewrite(f / 'hf/config.json', at(n, v))
        for what, change in TABLES.items():
            yield case, what, lambda f, c=change: with_table(f / 'hf/model.safetensors', c)
    for name in ('edits', 'weights', 'version', 'edits.0.nodes'):
        for v in (10**9, True, {'x': 'y'}, [[[]]] * 10**5):
            yield 'stored edits', f'{name}={v!r:.20}', lambda f, n=name, v=v: rewrite(f / 'edits.json', at(n, v))
    for key in (b'block_count', b'head_count', b'embedding_length', b'context_length'):
        for v in (2**32 - 1, 0):
            yield 'gguf', f'{key}={v}', lambda f, k=key, v=v: patch_gguf(f, k, 4, struct.pack('<I', v))
    for v in (2**60, 2**32, 2**21):
        yield 'gguf', f'a list of {v}', lambda f, v=v: patch_gguf(f, b'ggml.tokens', 8, struct.pack('<Q', v))
    yield 'converted gguf', 'files', lambda f: rewrite(f / 'converted/manifest.json', at('files', {'../x': 3}))


HOSTILE = 'hostile headers'


def main_hostile(folder: str, n: int, seed: int):
    counts, wrong, start = {}, [], time.perf_counter()
    cases, expected = {case.name: (i, case) for i, case in enumerate(CASES)}, {}
    all_of_them = list(hostile())
    for name, what, make in random.Random(seed).sample(all_of_them, min(n, len(all_of_them))):
        i, case = cases[name]
        made, here = Path(folder) / f'made{i}', Path(folder) / f'here{i}'
        if not made.exists():
            made.mkdir(parents=True)
            case.make(made)
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(made, here)
        if name not in expected:
            expected[name] = case.load(made)
        make(here)
        print('now', name, what, file=sys.stderr, flush=True)
        said = outcome(case, here, here, expected[name])
        counts[said] = counts.get(said, 0) + 1
        if said not in ('named', 'harmless'):
            wrong.append(f'{name}, {what}: {said}')
    report(HOSTILE, counts, wrong, start)


def report(name: str, counts: dict, wrong: list[str], start: float):
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps(dict(case=name, counts=counts, wrong=wrong, seconds=seconds)), flush=True)


def main(folder: str, n: int, seed: int, names: list[str]):
    torch.set_num_threads(1)
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, limit))
    for i, case in enumerate(CASES):
        if names and case.name not in names: continue
        counts, wrong, start = {}, [], time.perf_counter()
        for what, said in flips(case, Path(folder) / f'case{i}', n, seed):
            if said in ('named', 'harmless', 'foreign'):
                counts[said] = counts.get(said, 0) + 1
            else:
                wrong.append(f'{what}: {said}')
        report(case.name, counts, wrong, start)
    if not names or HOSTILE in names:
        main_hostile(folder, 8 * n, seed)


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
