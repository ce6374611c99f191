"""A recording that two workers of Ray fill has the bytes of a local one, also when a worker is killed on the way."""
import os
import pickle
import sys

os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')

import pytest
import torch
import transformers as T
from kills import contents
from ray_kills import fill_and_die, local_ray

from transformer_experiments.common.activation_store import ActivationStore, StoreWriter
from transformer_experiments.experiments import recording, recording_on_ray
from transformer_experiments.experiments.recording import arrange, chosen_positions, fill_rows, record
from transformer_experiments.experiments.recording_on_ray import (
    RayJob, fill_on_ray, named_tensors, results, sent_model)
from transformer_experiments.models.moe_transformer import MoETransformerConfig
from transformer_experiments.moe import MoEConfig
from transformer_experiments.tracing import LanguageModel

NAMES = ['resid.post_mlp', 'attn.v_out', 'attn.qk_probs']
torch.set_num_threads(1) # a worker for each core


@pytest.fixture(scope='module')
def workers():
    with local_ray():
        yield


def llama():
    torch.manual_seed(0)
    return T.LlamaForCausalLM(T.LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256)).eval()


def mixture():
    torch.manual_seed(0)
    moe = MoEConfig(24, 20, 4, capacity='switch', capacity_factor=.6, normalize=False, top_k=1, router='switch')
    return MoETransformerConfig(64, 24, 3, 3, 0., moe=moe, moe_layers=(0, 2)).build(60).eval()


def texts(n, longest):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(60, (1 + i * 7 % longest,), generator=generator) for i in range(n)]


def test_a_killed_workers_range_is_taken_up(workers, tmp_path, monkeypatch):
    options = dict(locations=NAMES, batch_tokens=1024, shard_bytes=2_000_000, progress=False)
    corpus = texts(300, 150)
    here = record(llama(), corpus, tmp_path/'here', **options)
    assert here.store.spec.n_shards > 8 # ranges of two workers have several
    monkeypatch.setattr(recording, 'fill_rows', fill_and_die(fill_rows, str(tmp_path/'killed')))
    there = record(llama(), corpus, tmp_path/'ray', **options, ray_address='auto')
    assert int((tmp_path/'killed').read_text()) != os.getpid()
    assert there.store.complete
    assert contents(tmp_path/'here') == contents(tmp_path/'ray')


def test_any_model_and_what_is_there_already(workers, tmp_path):
    "A mixture of ours as a live model, a folder by name, a language model; the last goes on where a run was stopped."
    llama().bfloat16().save_pretrained(tmp_path/'model')
    lm = LanguageModel(T.GPT2LMHeadModel(T.GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=2)).eval())
    for i, model in enumerate([mixture(), str(tmp_path/'model'), lm]):
        options = dict(locations=NAMES, batch_tokens=128, shard_bytes=50_000, positions=[0, -1], progress=False)
        record(model, texts(60, 40), tmp_path/f'here{i}', **options)
        if i == 2:
            record(model, texts(60, 40), tmp_path/'ray2', **options)
            for shard in sorted((tmp_path/'ray2').glob('shard-*'))[::2]:
                shard.unlink()
        record(model, texts(60, 40), tmp_path/f'ray{i}', **options, ray_address='auto')
        assert contents(tmp_path/f'here{i}') == contents(tmp_path/f'ray{i}'), model


def test_a_workers_error_is_the_callers(workers, tmp_path):
    model = llama()
    store = record(model, texts(9, 20), tmp_path/'a', progress=False).store
    inputs = None, [], [] # never read
    job = RayJob(str(tmp_path/'elsewhere'), store.spec.sha256, sent_model(model), fill_rows, inputs, 'cpu')
    with pytest.raises(FileNotFoundError, match="doesn't see .*elsewhere: record into a folder that all machines"):
        next(results(job, [0]))
    with pytest.raises(ValueError, match='is connected to Ray at .* already'):
        record(model, texts(9, 20), tmp_path/'b', progress=False, ray_address='127.0.0.1:6379')


def test_an_interrupted_run_goes_on(workers, tmp_path):
    model, corpus = llama(), texts(60, 40)
    options = dict(batch_tokens=128, shard_bytes=20_000, progress=False)
    here = record(model, corpus, tmp_path/'here', **options)
    keep = [chosen_positions(t, None) for t in corpus]
    inputs = arrange(corpus, options['batch_tokens']), keep, here.locations
    store = ActivationStore.create(tmp_path/'ray', here.store.spec)

    def stop(rows): raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), StoreWriter(store):
        fill_on_ray('auto', store, model, fill_rows, inputs, model, stop)
    assert 0 < len(store.shards) < store.spec.n_shards
    record(model, corpus, tmp_path/'ray', **options)
    stored = [{k: v for k, v in contents(tmp_path/x).items() if k[0] != '.'} for x in ('here', 'ray')]
    assert stored[0] == stored[1] # a worker that was just stopped may leave a temporary file


@pytest.mark.parametrize('address', ['127.0.0.1:9', 'localhost:1'])
def test_nobody_answers(monkeypatch, tmp_path, address):
    monkeypatch.setattr(recording_on_ray, 'connected', recording_on_ray.check_address)
    with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address}"):
        record(llama(), texts(3, 9), tmp_path/'a', progress=False, ray_address=address)


@pytest.mark.parametrize('address', ['ray://head:10001', 'head', 'head:', ':6379', ''])
def test_what_is_no_address(address):
    with pytest.raises(ValueError, match="ray_address is 'local', 'auto' or 'HOST:PORT'"):
        recording_on_ray.check_address(address)


def test_without_ray(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ImportError, match=r"pip install 'transformer-experiments\[remote\]'"):
        record(llama(), texts(3, 9), tmp_path/'a', progress=False, ray_address='local')


def test_what_cannot_be_sent(tmp_path):
    class Mine(T.LlamaForCausalLM):
        pass

    with pytest.raises(ValueError, match="a Mine can't be sent to Ray's workers"):
        sent_model(Mine(llama().config))
    changed = llama()
    changed.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="can't be rebuilt: it differs in model.extra, model.extra.bias"):
        sent_model(changed).build()
    changed = llama()
    changed.model.layers[1].mlp.act_fn = torch.nn.Identity() # no tensor tells
    with pytest.raises(ValueError, match="can't be rebuilt: it differs in model.layers.1.mlp.act_fn"):
        sent_model(changed).build()
    changed = llama()
    changed.model.norm.forward = lambda x: x
    with pytest.raises(ValueError, match="model.norm has one: remove it first"):
        sent_model(changed)


def test_what_is_sent_computes_the_same(tmp_path):
    "Tied weights, buffers that aren't in the state dict in another type, and the attention's kernel travel, too."
    changed = llama().bfloat16()
    changed.set_attn_implementation('eager')
    for model in changed, mixture(), T.GPT2LMHeadModel(T.GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=2)):
        path = tmp_path/'model'
        path.write_bytes(pickle.dumps(sent_model(model.eval()))) # as Ray does
        there, ids = pickle.loads(path.read_bytes()).build(), torch.randint(60, (2, 50))
        assert all(torch.equal(x, y) for (_, x), (_, y) in zip(named_tensors(model), named_tensors(there), strict=True))
        outputs = [m(ids) for m in (model, there)]
        assert torch.equal(*(x.logits if isinstance(model, T.PreTrainedModel) else x[0] for x in outputs))
    assert sent_model(changed).build().config._attn_implementation == 'eager'
