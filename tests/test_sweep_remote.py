"""A sweep of a model that only a server has: the values of a local one, with no weights in this process."""

import pytest
import torch
from remote_server import KEY, Served, served
from transformers import LlamaConfig, LlamaForCausalLM

from transformer_experiments.experiments import Contrast, find_circuit, path_patch, remote_sweeps, sweep
from transformer_experiments.tracing import LanguageModel


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    where = tmp_path_factory.mktemp('llama')
    LlamaForCausalLM(config).double().save_pretrained(where)
    return str(where)


def model_in(folder):
    return LanguageModel(folder, tokenizer=object())


@pytest.fixture(scope='module')
def app(folder):
    return Served({folder: model_in(folder)})


@pytest.fixture(autouse=True)
def host(app, monkeypatch, tmp_path):
    with served(app) as host:
        monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_HOME', str(tmp_path))
        monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_HOST', host)
        monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_API_KEY', KEY)
        yield host


def task_for(model, metric='logit difference', **more):
    g = torch.Generator().manual_seed(1)
    clean = [torch.randint(60, (6 + i % 2,), generator=g) for i in range(3)]
    corrupt = [t.clone() for t in clean]
    for t in corrupt:
        t[2] = (t[2] + 1) % 60
    return Contrast(model, clean, corrupt, [(5, 9)] * 3, metric, dict(subject=2), threshold=None, **more)


def own_metric(logits):
    return logits[:, 7] - logits.mean(-1)


def on_meta(model):
    return {p.device.type for p in model._module.parameters()} == {'meta'}


@pytest.mark.parametrize('metric', ['logit difference', 'kl', own_metric])
def test_values_are_those_of_a_local_sweep(folder, app, monkeypatch, metric):
    monkeypatch.setattr(remote_sweeps, 'ROWS', 16)
    lm, before = model_in(folder), len(app.jobs)
    there, here = task_for(lm, metric, remote=True), task_for(model_in(folder), metric)
    assert torch.allclose(there.clean_logits, here.clean_logits, rtol=0, atol=1e-9)
    for location, by, more in (
        ('attn.v_out', ('layer', 'head'), {}),
        ('resid.post_mlp', ('layer', 'position'), dict(positions=['subject', 'last'], mode='noising')),
        ('attn.kv_k', 'head', dict(layers=[1], change='zero')),
        ('mlp.post_act', 'group', dict(groups={'two': [dict(layer=0, neuron=3), dict(layer=2, neuron=1)]})),
        ('attn.qk_probs', 'layer', dict(sample=2)),
    ):
        far, near = (sweep(task, location, by, **more) for task in (there, here))
        assert far.axes == near.axes and far.facts['control']['itself'] < 1e-9
        assert torch.allclose(far.scores, near.scores, rtol=0, atol=1e-9, equal_nan=True), location
        assert (near.values - near.neutral).nan_to_num().abs().max() > 1e-6  # something to compare
    assert on_meta(lm) and len(app.jobs) > before


def test_what_cannot_be_sent(folder):
    task = task_for(model_in(folder), remote=True)
    for wrong, said in (
        (dict(method='attribution'), 'a remote sweep is exact'),
        (dict(change='mean'), "can patch and zero, got 'mean'"),
        (dict(folder='somewhere'), 'neither stored nor spread over Ray'),
        (dict(ray_address='local', folder='somewhere'), 'neither stored nor spread over Ray'),
    ):
        with pytest.raises(ValueError, match=said):
            sweep(task, 'attn.v_out', 'layer', **wrong)
    with pytest.raises(ValueError, match='remote=True needs a LanguageModel by the name that the server has'):
        task_for(LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1)), remote=True)
    for f in (lambda: find_circuit(task, edges=3), lambda: path_patch(task, ['head 0.1'], ['logits'])):
        with pytest.raises(ValueError, match="aren't here, and edges, paths and circuits need them"):
            f()
