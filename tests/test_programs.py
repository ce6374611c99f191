"""One graph file, with one hash, on many architectures: by the command, in sessions and generations."""

import json

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file

from transformer_experiments.accessors.tiny_models import tiny_model
from transformer_experiments.cli import main
from transformer_experiments.tracing import Graph, LanguageModel, load_program
from transformer_experiments.tracing.programs import tokenizer_sha256
from transformer_experiments.tracing.stored_edits import open_program

ARCHITECTURES = ('GPT-2', 'Llama, all else', 'Qwen2', 'Qwen3', 'Mistral', 'Gemma 2', 'Gemma 3', 'Mixtral', 'OLMoE',
                 'GPT-NeoX', 'GPT-J', 'Phi', 'OPT', 'StableLM', 'Falcon', 'Phi-3', 'OLMo-2', 'SmolLM3', 'Granite',
                 'Qwen2-MoE', 'gpt-oss', 'DeepSeek-V3')
IDS = [[7, 3, 11, 2, 9, 30, 4]]
HEAD, LAYER, SCALE = 1, 1, 0.5


def write(lm):
    "A program by roles alone: one head silenced, the stream of a later layer halved."
    with lm.trace(torch.tensor(IDS)) as tracer:
        lm.at('attn.v_out', LAYER).output[:, :, HEAD] = 0
        lm.at('resid.post_mlp', LAYER).output *= SCALE
        lm.at('resid.post_mlp', 2).output.save('stream')
        lm.at('logits').output[:, -1].save('logits')
    return tracer


def by_hooks(lm):
    "The same with plain hooks on the modules that the layout names; what the last block and the head give."
    ctx, model, kept = lm.accessors(), lm._root, {}

    def first(out):
        return out if isinstance(out, torch.Tensor) else out[0]

    def silence(module, args):
        x = args[0].clone()
        x.unflatten(-1, (ctx.n_attention_heads, -1))[..., HEAD, :] = 0
        return (x, *args[1:])

    def halve(module, args, out):
        return out * SCALE if isinstance(out, torch.Tensor) else (out[0] * SCALE, *out[1:])

    def keep(module, args, out):
        kept['stream'] = first(out).clone()

    def at(role, layer):
        return model.get_submodule(ctx.module_path(role, layer))

    handles = [at('attn_out', LAYER).register_forward_pre_hook(silence),
               at('block', LAYER).register_forward_hook(halve), at('block', 2).register_forward_hook(keep)]
    try:
        with torch.no_grad():
            kept['logits'] = model(torch.tensor(IDS)).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    return kept


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "A program, and an edit, written on a Llama."
    folder = tmp_path_factory.mktemp('programs')
    lm = LanguageModel(tiny_model('Llama', torch.float32))
    with torch.no_grad():
        tracer = write(lm)
    with lm.edit() as edited:
        lm.at('resid.post_mlp', LAYER).output += torch.linspace(-2, 2, 32)
    return (lm.save_program(tracer.graph, folder/'graph.json'), edited.save_edits(folder/'edits.json'),
            tracer.graph.sha256)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_one_file_on_many_architectures(name, files, tmp_path):
    path, edits, sha256 = files
    module = tiny_model(name, torch.float32)
    lm = LanguageModel(module)
    with torch.no_grad():
        assert write(lm).graph.sha256 == sha256 # written here, it is the same program
    program = load_program(path)
    assert program.graph.sha256 == sha256
    with torch.no_grad():
        got = program.run(lm, torch.tensor(IDS))
    want = by_hooks(lm)
    for key in ('stream', 'logits'):
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-4 * float(want[key].abs().max()))
    module.save_pretrained(tmp_path/'model')
    common = ['--model', str(tmp_path/'model'), '--ids', ' '.join(map(str, IDS[0])), '--device', 'cpu', '--json']
    result = CliRunner().invoke(main, ['run', str(path), *common, '--out', str(tmp_path/'out.safetensors')])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said['sha256'] == sha256 and said['roles'] == program.roles == ['attn.v_out:1', 'resid.post_mlp:1',
                                                                           'resid.post_mlp:2', 'logits']
    assert any(d.startswith('weights: written for') for d in said['differs'])
    kind = type(module).__name__
    assert (f'model: written for LlamaForCausalLM, here {kind}' in said['differs']) == (kind != 'LlamaForCausalLM')
    stored = load_file(tmp_path/'out.safetensors')
    torch.testing.assert_close(stored['logits'].float(), got['logits'], rtol=1e-4, atol=1e-3)
    assert torch.equal(torch.tensor(said['saved']['logits']['values']), stored['logits'])
    result = CliRunner().invoke(main, ['run', str(edits), *common])
    assert result.exit_code == 0, result.output
    saved = {k: torch.tensor(v['values']) for k, v in json.loads(result.stdout)['saved'].items()}
    assert (saved['logits'] - saved['clean_logits']).abs().max() > 1e-3


@pytest.mark.parametrize('name', ['GPT-2', 'Gemma 2', 'Mixtral', 'DeepSeek-V3'])
def test_sites_by_role_in_a_session_and_a_generation(name, tmp_path):
    torch.set_grad_enabled(False)
    try:
        llama, lm = (LanguageModel(tiny_model(n, torch.float32)) for n in ('Llama', name))
        first, second = torch.tensor(IDS), torch.tensor(IDS).flip(1)

        def session_of(model):
            with model.session() as session:
                with model.trace(first):
                    heads = model.at('attn.v_out', 1).output
                with model.trace(second):
                    model.at('attn.v_out', 1).output = heads
                    model.at('logits').output[:, -1].save('logits')
            return session

        def generation_of(model):
            with model.generate(first, max_new_tokens=4, do_sample=False) as tracer:
                with tracer.steps():
                    model.at('resid.post_mlp', 1).output[:] *= -1
                    model.at('resid.post_mlp', 2).output[:, -1].norm().save('norms')
                model.generator.output.save('tokens')
            return tracer

        path = llama.save_program(session_of(llama).graph, tmp_path/'session.json')
        with lm.trace(first):
            heads = lm.at('attn.v_out', 1).output.save()
        with lm.trace(second):
            lm.at('attn.v_out', 1).output = heads.value
            want = lm.at('logits').output[:, -1].save()
        assert torch.equal(load_program(path).run(lm)['logits'], want.value)

        path = llama.save_program(generation_of(llama).graph, tmp_path/'generation.json', 'generate',
                                  max_new_tokens=4, do_sample=False)
        got = load_program(path).run(lm, first)
        tokens = first
        for step in range(4): # the whole text each time, without a cache
            with lm.trace(tokens):
                lm.at('resid.post_mlp', 1).output[:] *= -1
                norm = lm.at('resid.post_mlp', 2).output[:, -1].norm().save()
                best = lm.at('logits').output[:, -1].argmax(-1).save()
            torch.testing.assert_close(got['norms'][step], norm.value, rtol=1e-4, atol=1e-4)
            tokens = torch.cat([tokens, best.value[:, None]], 1)
        assert torch.equal(got['tokens'], tokens)
        with pytest.raises(ValueError, match='a session has its prompts in itself'):
            load_program(tmp_path/'session.json').run(lm, first)
        with llama.session() as session:
            with llama.trace(first):
                stream = llama.at('resid.post_mlp', 0).output
            with lm.trace(first):
                (lm.at('resid.post_mlp', 0).output - stream).norm().save('apart')
        llama.save_program(session.graph, tmp_path/'session.json')
        with pytest.raises(ValueError, match='this session traces 2 models'):
            load_program(tmp_path/'session.json').run(lm)
        with llama.trace(first) as tracer: # a step of a generation, without a sign that it is one
            llama.at('resid.post_mlp', 0).output[:] *= 2
            llama.at('logits').output[:, -1].save('logits')
        path = llama.save_program(tracer.graph, tmp_path/'forward.json')
        assert load_program(path).run(lm, first, max_new_tokens=2)['logits'].shape == (1, 61)
    finally:
        torch.set_grad_enabled(True)


def test_what_is_refused(files, tmp_path):
    path, edits, _ = files
    shallow = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2,
                                                                   bos_token_id=None, eos_token_id=None))
    shallow.save_pretrained(tmp_path/'shallow')
    common = ['--model', str(tmp_path/'shallow'), '--ids', '1 2', '--device', 'cpu']

    def said(*args):
        result = CliRunner().invoke(main, ['run', *map(str, args)])
        assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.output
        return result.output

    assert 'has no resid.post_mlp in layer 2: the layers are 0 to 1' in said(path, *common)
    narrow = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=2,
                                                                  bos_token_id=None, eos_token_id=None))
    narrow.save_pretrained(tmp_path/'narrow')
    assert "can't run on" in said(edits, '--model', tmp_path/'narrow', '--ids', '1 2', '--device', 'cpu')
    about = json.loads(path.read_text())
    del about['sha256']
    changes = {'version 2, and this library reads 1': dict(version=2), 'not an intervention graph': dict(format='x'),
               'another graph than': dict(graph_sha256='0' * 64), 'should be 64 digits': dict(graph_sha256=1)}
    for message, change in changes.items():
        (tmp_path/'other.json').write_text(json.dumps(about | change))
        assert message in said(tmp_path/'other.json', *common)
    (tmp_path/'other.json').write_text(json.dumps(about).replace('@attn.v_out:1', '@attn.v_aut:1'))
    assert 'another graph than' in said(tmp_path/'other.json', *common)
    bare = json.loads(load_program(path).graph.to_json())
    (tmp_path/'other.json').write_text(json.dumps(bare).replace('@attn.v_out:1', '@attn.v_aut:1'))
    assert 'nearest: attn.v_out' in said(tmp_path/'other.json', *common)
    newer = {k: v for k, v in json.loads(edits.read_text()).items() if k != 'sha256'} | dict(version=7)
    (tmp_path/'newer.json').write_text(json.dumps(newer))
    assert 'has edits of version 7, and this library reads 1' in said(tmp_path/'newer.json', *common)
    assert 'runs on one prompt' in said(edits, *common, '--ids', '3')
    assert 'and not both' in said(path, *common, '--prompt', 'x')


def test_a_file_is_the_graphs_json(files):
    path, edits, sha256 = files
    assert Graph.from_json(path.read_text()).sha256 == sha256
    program, steered = open_program(path), open_program(edits)
    assert program.written_for == steered.written_for and program.written_for['layout'] == 'Llama'
    assert steered.roles == ['resid.post_mlp:1']


def test_a_tokenizer_is_what_it_does_with_text():
    from tokenizers import Tokenizer, models
    tokenizer = Tokenizer(models.WordLevel({'a': 0, 'b': 1}, unk_token='a'))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='b')
    before = tokenizer_sha256(fast)
    fast(['a', 'a b'], padding=True, truncation=True, max_length=3)
    assert tokenizer_sha256(fast) == before
    other = Tokenizer(models.WordLevel({'a': 0, 'c': 1}, unk_token='a'))
    assert tokenizer_sha256(transformers.PreTrainedTokenizerFast(tokenizer_object=other)) != before
    assert tokenizer_sha256(object()) is None
