"Pictures, the lens and recordings of many architectures, against what transformers itself gives out."
import copy
import json

import pytest
import torch
import transformers
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from transformer_experiments.accessors.examples import EXAMPLES
from transformer_experiments.cli import main
from transformer_experiments.experiments import (
    attention_picture, attribute_logit, components_picture, draw, lens_logits, lens_picture, next_tokens_picture,
    norms_picture, ov_logits, text_picture, token_streams)
from transformer_experiments.experiments.logit_lens import residual_stream
from transformer_experiments.experiments.pictures import read_text_sites
from transformer_experiments.experiments.reading import read_text, token_texts
from transformer_experiments.experiments.recording import Recording
from transformer_experiments.tokenizers.char_tokenizer import CharacterTokenizer
from transformer_experiments.tracing import LanguageModel

NAMES = ['GPT-2', 'Llama, all else', 'Qwen3', 'Mistral', 'Gemma 2', 'Gemma 3', 'Mixtral', 'Qwen3-MoE',
         'GPT-NeoX', 'GPT-J', 'Phi', 'OPT', 'StableLM, parallel', 'Falcon', 'Phi-3', 'OLMo-2', 'Granite',
         'gpt-oss', 'DeepSeek-V3', 'SmolLM3']
LETTERS = ''.join(map(chr, range(65, 65 + 61)))
IDS = torch.randint(1, 60, (9,), generator=torch.Generator().manual_seed(1))


def built(name: str, **more) -> LanguageModel:
    kind, config, sizes = EXAMPLES[name]
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**copy.deepcopy(sizes) | more)
    settings._attn_implementation = 'eager'
    model = getattr(transformers, kind)(settings).eval()
    for p in model.parameters():
        p.data.normal_(std=0.15)
    return LanguageModel(model, CharacterTokenizer.from_vocab(LETTERS))


@pytest.fixture(params=NAMES)
def lm(request) -> LanguageModel: return built(request.param)


def shades(picture, axes: int = 0): return torch.from_numpy(picture.axes[axes].images[0].get_array().filled(0).copy())


def test_pictures_are_what_transformers_gives_out(lm):
    with torch.no_grad():
        told = lm._module(IDS[None], output_attentions=True, output_hidden_states=True)
    text = ''.join(LETTERS[i] for i in IDS)
    logits, last = told.logits[0], told.logits[0].softmax(-1)
    torch.testing.assert_close(lens_logits(lm, IDS[None])[-1, 0], logits, rtol=0, atol=0)
    for ours, theirs in zip(residual_stream(lm, IDS[None])[1:-1], told.hidden_states[1:-1], strict=True):
        assert torch.equal(ours, theirs)
    targets = [*IDS[1:].tolist(), logits[-1].argmax().item()]
    row = shades(lens_picture(lm, text))[-1].float()
    torch.testing.assert_close(row, last[range(9), targets], rtol=1e-5, atol=1e-6)
    drawn = shades(attention_picture(lm, text, layer=1), 1).float()
    torch.testing.assert_close(drawn, told.attentions[1][0, 1][:, :9], rtol=1e-4, atol=1e-6)
    best = next_tokens_picture(lm, IDS, k=1)
    assert [t.get_text() for t in best.axes[0].texts] == [LETTERS[i] for i in logits.argmax(-1)]
    assert f'probability {last[0, IDS[1]]:.2g}, rank' in text_picture(lm, text).html
    sites = read_text_sites(lm, text)
    added = sites['proj_output'][1] + sites['ffwd_output'][1]
    torch.testing.assert_close(added, (told.hidden_states[2] - told.hidden_states[1])[0], rtol=1e-4, atol=1e-5)
    mean = norms_picture(lm, text).axes[0].lines[2].get_ydata()[1]
    assert mean == pytest.approx(sites['ffwd_output'][1].norm(dim=-1).mean().item(), rel=1e-4)
    assert components_picture(lm, text, layer=2, site='resid.post_mlp').alt


def test_attribution_and_circuits_take_a_language_model(lm):
    found, ctx = attribute_logit(lm, IDS, 5), lm.accessors()
    with torch.no_grad():
        assert found.logit == pytest.approx(attribute_logit(ctx, IDS, 5).logit)
    streams = token_streams(lm, [3, 4])
    assert torch.equal(ov_logits(lm, 0, 1, streams), ov_logits(ctx, 0, 1, streams))


@pytest.fixture(scope='module')
def bytes_lm(tmp_path_factory) -> LanguageModel:
    "A deep model with one token for each byte, in a folder."
    folder = tmp_path_factory.mktemp('model')
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    sizes = dict(hidden_size=20, intermediate_size=16, num_hidden_layers=34, num_attention_heads=10)
    config = transformers.LlamaConfig(vocab_size=270, max_position_embeddings=256, head_dim=4, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return LanguageModel(str(folder))


def test_parts_of_characters_are_seen(bytes_lm):
    reading = read_text(bytes_lm, 'é東🙂 $x$\n')
    assert reading.tokens[:5] == ['\\xc3', '\\xa9', '\\xe6', '\\x9d', '\\xb1']
    assert reading.tokens[-5:] == [' ', '$', 'x', '$', '\n']
    assert token_texts(bytes_lm, [265]) == ['[265]']
    for name in ('surprise', 'next tokens', 'logit lens', 'attention', 'all attention', 'norms', 'components'):
        drawn = draw(name, bytes_lm, 'é東🙂 $x$\n')
        assert drawn.html if name == 'surprise' else drawn.png()
    labels = [t.get_text() for t in lens_picture(bytes_lm, 'é a').axes[0].get_xticklabels()]
    assert labels == ['\\xc3', '\\xa9', '␣', 'a']


def test_long_texts_and_deep_models_stay_readable(bytes_lm):
    text = 'abcdefghij' * 25
    lens = lens_picture(bytes_lm, text)
    assert 'Shown: the last 26 of 250 tokens.' in lens.axes[0].get_title()
    whole = attention_picture(bytes_lm, text)
    assert 'Drawn: 32 of 34 blocks; each point is the largest of' in whole.alt
    one = attention_picture(bytes_lm, text, layer=3)
    assert 'each point is the largest of 2 x 2 positions' in one.alt
    for picture in (lens, whole, one, next_tokens_picture(bytes_lm, text), norms_picture(bytes_lm, text)):
        assert picture.get_figwidth() < 26 and picture.get_figheight() < 26
    assert text_picture(bytes_lm, text).html.count('title=') == 250


def test_the_command_records_any_model(bytes_lm, tmp_path):
    folder, out = bytes_lm._where, tmp_path/'out'
    (tmp_path/'my.txt').write_text('To be, or not to be: ' * 12, encoding='utf-8')
    asked = ['--model', folder, '--text', str(tmp_path/'my.txt'), '-b', '0,33', '--sample-len', '60', '-q']
    done = CliRunner().invoke(main, ['block-internals', 'run', *asked, '--location', 'resid.post_mlp', str(out)])
    assert done.exit_code == 0, done.output
    recorded = Recording.open(out)
    with torch.no_grad():
        ids = bytes_lm._encode('To be, or not to be: ' * 12)[0][None, :60]
        hidden = bytes_lm._module(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(recorded['resid.post_mlp', 0, 0], hidden[1][0], rtol=1e-5, atol=1e-6)
    shown = CliRunner().invoke(main, ['block-internals', 'show', str(out), '--json'])
    row, = (r for r in json.loads(shown.output)[0]['sites'] if r['block'] == 33)
    norms = recorded.site('resid.post_mlp', 33)[:].norm(dim=-1)
    assert (row['site'], row['shape']) == ('resid.post_mlp', [252, 20])
    assert row['mean_norm'] == pytest.approx(norms.mean().item(), rel=1e-5)
    again = CliRunner().invoke(main, ['block-internals', 'run', *asked[:-3], '--sample-len', '50', str(out)])
    assert again.exit_code == 1 and "holds another run's results" in again.output
