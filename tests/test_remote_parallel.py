"""A model spread over two processes answers every trace as one process does, or refuses it by name."""
import asyncio
import os
import signal
import time

os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')

import psutil
import pytest
import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import transformer_experiments
from transformer_experiments.remote.limits import JobError, Limits
from transformer_experiments.remote.running import run_job
from transformer_experiments.remote.keys import Keys
from transformer_experiments.remote.message_format import Result, unpack
from transformer_experiments.remote.message_values import decode_value
from transformer_experiments.remote.messages import job_message
from transformer_experiments.remote.ranks import RanksBroken, Ranks, run_on
from transformer_experiments.remote.registered import attached_modules
from transformer_experiments.remote.serve_config import PlaceConfig, ServeConfig
from transformer_experiments.remote.serving import free_port, serving
from transformer_experiments.tracing import LanguageModel
from transformer_experiments.tracing.tracer import Tracer
from transformer_experiments.tracing.sessions import Session

ROOT = os.path.dirname(os.path.dirname(transformer_experiments.__file__))
IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A small Llama with random weights."
    torch.manual_seed(1)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=0,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    )
    path = tmp_path_factory.mktemp('models')/'llama'
    llama.save_pretrained(path)
    return str(path)


@pytest.fixture(scope='module')
def address(folder, tmp_path_factory):
    "A server with a replica of two processes. Its Ray is that of the other tests, too: one start for all."
    keys = tmp_path_factory.mktemp('server')/'keys'
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join([ROOT, os.environ.get('PYTHONPATH', '')]))
        patch.setenv('TRANSFORMER_EXPERIMENTS_API_KEY', Keys(keys).add('alice'))
        place = PlaceConfig(models={'llama': folder}, ranks=2, cpus=0.5, threads=1)
        with serving(ServeConfig(places=[place], keys=str(keys), port=free_port(), limits=Limits(seconds=60))) as url:
            patch.setenv('TRANSFORMER_EXPERIMENTS_HOST', url)
            yield url


@pytest.fixture(scope='module')
def ranks(folder, address):
    found = Ranks('llama', folder, 2, Limits(seconds=30), cpus=0.25, options=dict(attn_implementation='eager'))
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope='module')
def llama(folder): return LanguageModel(folder, dispatch=True, attn_implementation='eager')


def written(llama, write, monkeypatch, session=False, **options) -> bytes:
    "What a client sends for a trace or a session; nothing runs here."
    messages = []
    def finish(self, *scan):
        if getattr(self, 'outer', None) is None:
            messages.append(job_message(self, {id(llama._root): 'llama'}, attached_modules, [llama]))
        else:
            self.outer.add_trace(self)
    with monkeypatch.context() as patch:
        patch.setattr(Tracer, 'finish', finish)
        patch.setattr(Session, '_finish', finish)
        begin = llama.session if session else llama.generate if 'max_new_tokens' in options else llama.trace
        with begin(*[IDS] * (not session and write is not two_prompts), **options) as tracer:
            write(llama, tracer)
    return messages[0]


def answer(data: bytes) -> dict:
    result, tensors = unpack(data, Result)
    return {k: decode_value(v, tensors) for k, v in result.values.items()} | {
        f'no {k}': v for k, v in result.reasons.items()
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-5)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif hasattr(a, 'layers'):
        same([(x.keys, x.values) for x in a.layers], [(x.keys, x.values) for x in b.layers])
    elif isinstance(a, dict):
        same([*a.values()], [*b.values()])
    elif isinstance(a, float):
        assert abs(a - b) <= 1e-5 * max(1, abs(a))
    else:
        assert a == b, (a, b)


# What people write

def reads(m, t):
    for layer in m.model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        sites = [layer, attn.q_proj, attn.k_proj, attn.o_proj, mlp.gate_proj, mlp.act_fn, mlp.down_proj]
        for site in [*sites, layer.input_layernorm]:
            site.output.save()
            site.input.save()
    m.output.save()
    m.lm_head.output.save()

def attention(m, t):
    m.model.layers[0].self_attn.output[1].save()
    m.model.layers[1].self_attn.output[0][:, 2] = 0
    m.output.save()

def heads(m, t):
    z = m.model.layers[1].self_attn.o_proj.input
    z.view(1, -1, 4, 8).norm(dim=-1).save()
    z.view(1, -1, 4, 8)[:, :, 3] = 0
    m.lm_head.output.save()

def edits(m, t):
    m.model.layers[0].mlp.act_fn.output[:, -1, 40] = 3.
    m.model.layers[0].output[:, 0] *= 2
    m.model.layers[1].self_attn.q_proj.output = m.model.layers[0].self_attn.q_proj.output * 0.5
    m.model.layers[1].mlp.down_proj.input[:, :, ::2] = 0
    m.lm_head.output.softmax(-1).save()

def calls(m, t):
    h = m.model.layers[0].output
    m.lm_head(m.model.norm(h)).save()
    m.model.layers[1].mlp(h).save()
    m.model.layers[1].mlp.down_proj(m.model.layers[1].mlp.up_proj(h)).save()
    (m.model.layers[0].self_attn.q_proj.weight.norm() + m.lm_head.weight[3].sum()).save()

def gradients(m, t):
    kept = [
        m.model.layers[0].output,
        m.model.layers[0].mlp.act_fn.output,
        m.model.layers[1].self_attn.v_proj.output,
        m.model.layers[1].self_attn.o_proj.input,
        m.model.embed_tokens.output,
    ]
    _ = [k.grad.save() for k in reversed(kept)]
    m.lm_head.output[:, -1].logsumexp(-1).sum().backward()

def norm_gradient(m, t):
    m.model.norm.weight.grad.save()
    m.lm_head.output.square().sum().backward()

def edited_gradients(m, t):
    m.model.layers[1].mlp.act_fn.output.grad[:, :, 30:] = 0
    m.model.layers[0].output.grad.save()
    m.output.logits.square().mean().backward()

def steps(m, t):
    with m.lm_head.all():
        m.lm_head.output[:, -1].argmax(-1).save()
    m.generator.output.save()

def generated(m, t):
    m.model.layers[0].output[:, -1] *= 1.5
    m.generator.output.save()

def session(m, s):
    with m.trace(IDS):
        h = m.model.layers[0].mlp.act_fn.output[:, -1]
    with m.trace(IDS.flip(1)):
        m.model.layers[0].mlp.act_fn.output[:, -1] = h
        m.lm_head.output[:, -1].save()

LOCATIONS = """attn.q attn.kv_k attn.v attn.qk_probs attn.v_out attn_ln.scale mlp.pre_act mlp.post_act
resid.delta_attn resid.post_attn resid.post_mlp""".split()

def activations(m, t):
    for where in LOCATIONS:
        m.at(where, 1).output.save()
    m.at('logits').output.save()

def edited_activations(m, t):
    m.at('attn.qk_probs', 0).output[:, :, :, 3] = 0
    m.at('attn.kv_v', 1).output[:, 2, 1] = 1.
    m.at('mlp.post_act', 1).output[..., 40] *= -2
    m.at('resid.post_mlp', 1).output[:, -1] *= 2
    m.at('logits').output.save()

def activation_gradients(m, t):
    kept = [m.at('attn.v_out', 1).output, m.at('mlp.post_act', 0).output]
    for value in reversed(kept):
        value.grad.save()
    m.at('logits').output[:, -1].logsumexp(-1).sum().backward()

def two_prompts(m, t):
    with t.invoke(IDS[:, :4]):
        a = m.model.layers[0].mlp.act_fn.output[:, -1]
    with t.invoke(IDS):
        m.model.layers[1].output[:, -1] = m.model.layers[0].output[:, -1]
        m.lm_head.output[:, -1].save()
    a.save()

CASES = [
    (reads, {}),
    (attention, {}),
    (heads, {}),
    (edits, {}),
    (calls, {}),
    (gradients, {}),
    (edited_gradients, {}),
    (norm_gradient, {}),
    (generated, dict(max_new_tokens=6)),
    (generated, dict(max_new_tokens=6, do_sample=True)),
    (session, dict(session=True)),
    (two_prompts, {}),
    (activations, {}),
    (edited_activations, {}),
    (activation_gradients, {}),
]


@pytest.mark.parametrize('write,options', CASES, ids=[f'{w.__name__}{len(o)}' for w, o in CASES])
def test_same_as_one_process(llama, ranks, monkeypatch, write, options):
    message = written(llama, write, monkeypatch, **options)
    same(answer(run_job({'llama': llama}, message)), answer(run_on(ranks, message)))


# What is refused, and what fails alike everywhere

def cache_read(m, t): m.model.layers[0].self_attn.inputs[1]['past_key_values'].layers.save()
def cache_saved(m, t): m.model.layers[0].self_attn.inputs[1]['past_key_values'].save()
def weight_gradient(m, t):
    m.model.layers[0].mlp.up_proj.weight.grad.save()
    m.lm_head.output.sum().backward()
def no_such_row(m, t): (m.model.layers[0].output[:, 50] * 2).save()
def wrong_shape(m, t): m.model.layers[0].mlp.act_fn.output = m.model.layers[0].mlp.act_fn.output[..., :24]

@pytest.mark.parametrize('write,said', [
    (cache_read, 'past_key_values: there is no whole value'), (cache_saved, 'past_key_values: there is no whole value'),
    (weight_gradient, 'no gradient came|no backward pass reached'), (no_such_row, 'out of bounds'),
    (wrong_shape, r'shape \(1, 6, 48\)')])
def test_says_why_not(llama, ranks, monkeypatch, write, said):
    with pytest.raises(JobError, match=said):
        run_on(ranks, written(llama, write, monkeypatch))
    assert ranks.broken == ''
    message = written(llama, generated, monkeypatch, max_new_tokens=2)
    same(answer(run_job({'llama': llama}, message)), answer(run_on(ranks, message)))


def test_cancelled_together(llama, ranks, monkeypatch):
    def forever(m, s):
        with s.iter(list(range(5000))):
            with m.trace(IDS):
                m.lm_head.output[:, -1].sum().save()
    message = written(llama, forever, monkeypatch, session=True)
    async def leave():
        steps = ranks.run(message)
        async for kind, _ in steps:
            if kind == 'RUNNING':
                await asyncio.sleep(0.5)
                break
        await steps.aclose()
    start = time.monotonic()
    asyncio.run(leave())
    assert ranks.broken == '' and time.monotonic() - start < 20 # its own time would end it after 30
    again = written(llama, reads, monkeypatch)
    same(answer(run_job({'llama': llama}, again)), answer(run_on(ranks, again)))


@pytest.fixture(scope='module')
def hasty(folder, address):
    "Two processes that give a job two seconds."
    options = dict(attn_implementation='eager')
    found = Ranks('llama', folder, 2, Limits(seconds=2), cpus=0.2, seconds=60, options=options)
    try:
        yield found
    finally:
        found.close()


@pytest.mark.parametrize('stopped', [[0], [1], [0, 1]])
def test_an_operation_without_end_is_ended_and_the_next_job_is_answered(llama, hasty, monkeypatch, stopped):
    "A process that is stopped stands for one: nothing of ours runs there."
    good = written(llama, reads, monkeypatch)
    expected = answer(run_job({'llama': llama}, good))
    same(expected, answer(run_on(hasty, good)))
    pids, before = [ray.get(hasty.actors[i].pid.remote()) for i in stopped], hasty.restarts
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(JobError, match='ran for more than 2 s') as e:
        run_on(hasty, good)
    took = time.monotonic() - began
    print(f'over after {took:.2f} s of 2; the restart took {hasty.restarted:.2f} s')
    assert e.value.kind == 'TimeoutError' and hasty.broken == '' and hasty.restarts == before + 1
    assert took - hasty.restarted < 2 + 30 # it would never end; how long it and a start take is printed
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != 'zombie' for pid in pids)
    same(expected, answer(run_on(hasty, good)))


@pytest.mark.parametrize('i', [0, 1])
def test_a_rank_that_dies_costs_its_job_alone(llama, hasty, monkeypatch, i):
    good = written(llama, reads, monkeypatch)
    os.kill(ray.get(hasty.actors[i].pid.remote()), signal.SIGKILL)
    with pytest.raises(JobError, match='of this replica died|to another end'):
        run_on(hasty, good)
    assert hasty.broken == ''
    same(answer(run_job({'llama': llama}, good)), answer(run_on(hasty, good)))


def test_a_model_that_cant_be_spread(folder, address):
    with pytest.raises(ValueError, match='num_key_value_heads=2.*divide'):
        Ranks('llama', folder, 4, cpus=0.5)


def test_ends_with_any_of_its_processes(llama, ranks, monkeypatch):
    message = written(llama, generated, monkeypatch, max_new_tokens=2)
    ray.kill(ranks.actors[1])
    with pytest.raises(RanksBroken, match='rank [01] of this replica'):
        run_on(ranks, message)
    with pytest.raises(RanksBroken):
        run_on(ranks, message)


def test_served(folder, address):
    "From a client; a process is killed, and the replica comes back."
    here, there = LanguageModel(folder, dispatch=True), LanguageModel(folder, name='llama')
    def ask(model, **options):
        with model.trace(IDS, **options):
            z, logits = model.model.layers[1].mlp.act_fn.output.save(), model.lm_head.output.save()
        return z.value, logits.value
    same(ask(here), ask(there, remote=True))
    for p in _rank_processes():
        p.kill()
    same(ask(here), ask(there, remote=True))


def _rank_processes() -> list[psutil.Process]: # Of the Ray that this process has started
    alive = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in alive if (p.cmdline() or [''])[0].startswith('ray::Rank')]
