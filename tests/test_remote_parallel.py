"""A model spread over two processes answers every trace as one process does, or refuses it by name."""
import os

os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')

import pytest
import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import transformer_experiments
from transformer_experiments.remote.jobs import JobError, Limits, run_job
from transformer_experiments.remote.messages import Result, decode_value, job_message, unpack
from transformer_experiments.remote.parallel import Broken, Ranks, run_on
from transformer_experiments.remote.registered import attached_modules
from transformer_experiments.tracing import LanguageModel
from transformer_experiments.tracing.model import Tracer
from transformer_experiments.tracing.sessions import Session

ROOT = os.path.dirname(os.path.dirname(transformer_experiments.__file__))
IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A small Llama with random weights."
    torch.manual_seed(1)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                         bos_token_id=1, eos_token_id=0, max_position_embeddings=64, initializer_range=0.2))
    path = tmp_path_factory.mktemp('models')/'llama'
    llama.save_pretrained(path)
    return str(path)


@pytest.fixture(scope='module')
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=dict(env_vars=dict(PYTHONPATH=os.pathsep.join([ROOT, *os.environ.get('PYTHONPATH', '').split(os.pathsep)]))))
    try: yield
    finally: ray.shutdown()


@pytest.fixture(scope='module')
def ranks(folder, cluster):
    found = Ranks('llama', folder, 2, Limits(seconds=30), seconds=60)
    try: yield found
    finally: found.close()


@pytest.fixture(scope='module')
def llama(folder): return LanguageModel(folder, dispatch=True, attn_implementation='sdpa')


def written(llama, write, monkeypatch, session=False, **options) -> bytes:
    "What a client sends for a trace or a session; nothing runs here."
    messages = []
    def finish(self, *scan):
        if getattr(self, 'outer', None) is None: messages.append(job_message(self, {id(llama._root): 'llama'}, attached_modules, [llama]))
        else: self.outer.add_trace(self)
    with monkeypatch.context() as patch:
        patch.setattr(Tracer, 'finish', finish)
        patch.setattr(Session, '_finish', finish)
        begin = llama.session if session else llama.generate if 'max_new_tokens' in options else llama.trace
        with begin(*[IDS] * (not session and write is not two_prompts), **options) as tracer: write(llama, tracer)
    return messages[0]


def answer(data: bytes) -> dict:
    result, tensors = unpack(data, Result)
    return {k: decode_value(v, tensors) for k, v in result.values.items()} | {f'no {k}': v for k, v in result.reasons.items()}


def same(a, b):
    if isinstance(a, torch.Tensor): torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-5)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b): same(x, y)
    elif hasattr(a, 'layers'): same([(x.keys, x.values) for x in a.layers], [(x.keys, x.values) for x in b.layers])
    elif isinstance(a, dict): same([*a.values()], [*b.values()])
    elif isinstance(a, float): assert abs(a - b) <= 1e-5 * max(1, abs(a))
    else: assert a == b, (a, b)


# What people write

def reads(m, t):
    for i, layer in enumerate(m.model.layers):
        for j, site in enumerate([layer, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.act_fn, layer.mlp.down_proj, layer.input_layernorm]):
            site.output.save()
            site.input.save()
    m.output.save()
    m.lm_head.output.save()

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
    kept = [m.model.layers[0].output, m.model.layers[0].mlp.act_fn.output, m.model.layers[1].self_attn.v_proj.output, m.model.layers[1].self_attn.o_proj.input, m.model.embed_tokens.output]
    grads = [k.grad.save() for k in reversed(kept)]
    m.lm_head.output[:, -1].logsumexp(-1).sum().backward()

def edited_gradients(m, t):
    m.model.layers[1].mlp.act_fn.output.grad[:, :, 30:] = 0
    m.model.layers[0].output.grad.save()
    m.output.logits.square().mean().backward()

def steps(m, t):
    with m.lm_head.all(): m.lm_head.output[:, -1].argmax(-1).save()
    m.generator.output.save()

def generated(m, t):
    m.model.layers[0].output[:, -1] *= 1.5
    m.generator.output.save()

def session(m, s):
    with m.trace(IDS): h = m.model.layers[0].mlp.act_fn.output[:, -1]
    with m.trace(IDS.flip(1)):
        m.model.layers[0].mlp.act_fn.output[:, -1] = h
        m.lm_head.output[:, -1].save()

def two_prompts(m, t):
    with t.invoke(IDS[:, :4]): a = m.model.layers[0].mlp.act_fn.output[:, -1]
    with t.invoke(IDS):
        m.model.layers[1].output[:, -1] = m.model.layers[0].output[:, -1]
        m.lm_head.output[:, -1].save()
    a.save()

CASES = [(reads, {}), (heads, {}), (edits, {}), (calls, {}), (gradients, {}), (edited_gradients, {}), (generated, dict(max_new_tokens=6)),
         (generated, dict(max_new_tokens=6, do_sample=True)), (session, dict(session=True)), (two_prompts, {})]


@pytest.mark.parametrize('write,options', CASES, ids=[f'{w.__name__}{len(o)}' for w, o in CASES])
def test_same_as_one_process(llama, ranks, monkeypatch, write, options):
    message = written(llama, write, monkeypatch, **options)
    same(answer(run_job({'llama': llama}, message)), answer(run_on(ranks, message)))
