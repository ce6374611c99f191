"""A sweep that two workers of Ray fill has the bytes of a local one, also when a worker is killed on the way."""

import os

os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')

import pytest
import torch
import transformers as T
from kills import contents
from ray_kills import fill_and_die, local_ray

from transformer_experiments.experiments import Contrast, sweep, sweeps
from transformer_experiments.models.transformer import TransformerConfig
from transformer_experiments.tracing import LanguageModel

torch.set_num_threads(1)  # a worker for each core


@pytest.fixture(scope='module')
def workers():
    with local_ray():
        yield


def llama():
    torch.manual_seed(0)
    return T.LlamaForCausalLM(
        T.LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ).eval()


def task_for(model, metric='logit difference', **more):
    "Pairs of two lengths, which differ in one token."
    g = torch.Generator().manual_seed(1)
    clean = [torch.randint(60, (6 + i % 2,), generator=g) for i in range(6)]
    corrupt = [t.clone() for t in clean]
    for t in corrupt:
        t[2] = (t[2] + 1) % 60
    return Contrast(model, clean, corrupt, [(5, 9)] * 6, metric, dict(subject=2), threshold=None, **more)


def test_a_killed_workers_rows_are_taken_up(workers, tmp_path, monkeypatch):
    options = dict(by=('layer', 'position', 'neuron'), positions=['subject', 'last', -2], units=range(30))
    options['memory'] = 1 << 19
    task = task_for(llama())
    here = sweep(task, 'mlp.post_act', folder=tmp_path / 'here', **options)
    assert len(contents(tmp_path / 'here')) > 17  # several files for each of eight ranges
    monkeypatch.setattr(sweeps, 'fill_sent', fill_and_die(sweeps.fill_sent, str(tmp_path / 'killed')))
    there = sweep(task, 'mlp.post_act', folder=tmp_path / 'ray', **options, ray_address='auto')
    assert int((tmp_path / 'killed').read_text()) != os.getpid()
    assert torch.equal(here.scores, there.scores) and here.facts == there.facts
    assert contents(tmp_path / 'here') == contents(tmp_path / 'ray')


@pytest.mark.parametrize('change', ['patch', 'mean', 'noise', 'resample', 'direction'])
def test_every_change_and_any_model(workers, tmp_path, change):
    torch.manual_seed(0)
    ours = TransformerConfig(16, 32, 4, 2, 0.0).build(60).eval()
    gpt2 = T.GPT2LMHeadModel(T.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2)).eval()
    model = {'mean': ours, 'noise': LanguageModel(gpt2)}.get(change, llama())
    task = task_for(model, 'kl' if change == 'mean' else 'probability')
    more = dict(direction=torch.ones(32)) if change == 'direction' else {}
    options = dict(by=('layer', 'position'), positions=range(5), change=change, seed=3, **more)
    here = sweep(task, 'resid.post_mlp', folder=tmp_path / 'here', **options)
    there = sweep(task, 'resid.post_mlp', folder=tmp_path / 'ray', **options, ray_address='auto')
    assert torch.equal(here.scores, there.scores) and contents(tmp_path / 'here') == contents(tmp_path / 'ray')


def test_a_sweep_begun_on_ray_ends_here(workers, tmp_path):
    task, options = task_for(llama()), dict(by=('layer', 'neuron'), units=range(40), memory=1 << 19)
    sweep(task, 'mlp.post_act', folder=tmp_path / 'ray', **options, ray_address='auto')
    whole = contents(tmp_path / 'ray')
    for shard in sorted((tmp_path / 'ray').glob('shard-*'))[::2]:
        shard.unlink()
    sweep(task, 'mlp.post_act', folder=tmp_path / 'ray', **options)
    assert contents(tmp_path / 'ray') == whole


def test_what_cannot_be_sent(tmp_path):
    class Mine(T.LlamaForCausalLM):
        pass

    with pytest.raises(ValueError, match="a Mine can't be sent to Ray's workers"):
        sweep(task_for(Mine(llama().config).eval()), 'attn.v_out', 'layer', folder=tmp_path, ray_address='auto')
