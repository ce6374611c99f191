"Texts of unlike length before a context: each gives what it gives alone, in every architecture, padded on either side."
import copy

import pytest
import torch
import transformers

from transformer_experiments.accessors import HFModelContext, TinyShakespeareModelContext
from transformer_experiments.accessors.examples import EXAMPLES
from transformer_experiments.accessors.registry import ActivationLocationType as A
from transformer_experiments.models.moe_transformer import MoETransformerConfig
from transformer_experiments.moe import MoEConfig
from transformer_experiments.tokenizers.char_tokenizer import CharacterTokenizer

LENGTHS = 7, 1, 12, 12, 4
TEXTS = [torch.randint(1, 60, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


def context(name: str) -> HFModelContext:
    kind, config, sizes = EXAMPLES[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**copy.deepcopy(sizes))).eval()
    for p in model.parameters():
        p.data.normal_(std=0.15)
    return HFModelContext(model)


def mixture(router: str) -> TinyShakespeareModelContext:
    "Experts have room for some of the tokens of a batch: padding would take it."
    torch.manual_seed(0)
    moe = MoEConfig(24, 20, 4, router=router, capacity_factor=0.6)
    sizes = MoETransformerConfig(64, 24, 3, 3, 0.1, moe=moe, moe_layers=(0, 2))
    return TinyShakespeareModelContext(sizes.build(60))


@pytest.mark.parametrize('name', ['GPT-2', 'Mixtral', 'Gemma 3', 'Llama, longrope', 'Phi-3, longrope', 'GPT-NeoX',
                                  'OPT', 'DeepSeek-V3', 'gpt-oss', 'top_k', 'expert_choice'])
def test_each_text_alone_gives_the_same(name):
    ctx = context(name) if name in EXAMPLES else mixture(name)
    wanted = [a for a in A if any(b is a for b, _ in ctx.activation_locations())]
    ragged, wide = ctx.run(TEXTS, wanted), max(LENGTHS)
    left = torch.stack([torch.nn.functional.pad(t, (wide - len(t), 0), value=3) for t in TEXTS])
    mask = torch.stack([torch.arange(wide) >= wide - len(t) for t in TEXTS])
    padded = ctx.run(left, wanted, mask=mask)
    for i, text in enumerate(TEXTS):
        alone, n = ctx.run(text, wanted), len(text)
        for (location, layer), x in alone.items():
            axes = sum(d.is_sequence_token_dimension for d in location.shape_spec_per_token_sequence)
            for found, here in ((ragged, slice(n)), (padded, slice(wide - n, None))):
                y = found[location, layer][i]
                assert torch.equal(y[(here,) * axes], x), (location, layer, i)
                rest = torch.ones(y.shape[:axes], dtype=torch.bool)
                rest[(here,) * axes] = False
                nothing = float('-inf') if location is A.ATTN_QK_LOGITS else 0
                assert (y[rest] == nothing).all(), (location, layer, i)


def test_a_first_token_comes_from_the_tokenizer():
    ctx = context('GPT-2')
    with pytest.raises(ValueError, match='came without a tokenizer, and its configuration has no bos_token_id'):
        ctx.run(TEXTS, [A.LOGITS], prepend_bos=True)
    ctx.config['bos_token_id'] = 2
    found = ctx.run(TEXTS, [A.LOGITS], prepend_bos=True)
    for i, text in enumerate(TEXTS):
        alone = ctx.run(torch.cat([torch.tensor([2]), text]), [A.LOGITS])[A.LOGITS]
        assert torch.equal(found[A.LOGITS][i, :len(text) + 1], alone)
        assert found.tokens[i, :len(text) + 1].tolist() == [2, *text.tolist()]
    left = ctx.run([[0, 0, 5, 6], [1, 2, 3, 4]], [A.LOGITS], mask=[[0, 0, 1, 1], [1, 1, 1, 1]], prepend_bos=True)
    assert left.tokens.tolist() == [[0, 0, 2, 5, 6], [2, 1, 2, 3, 4]]
    assert torch.equal(left[A.LOGITS][0, 2:], ctx.run([2, 5, 6], [A.LOGITS])[A.LOGITS])
    one = ctx.run([5, 6], [A.LOGITS], prepend_bos=True)
    assert torch.equal(one[A.LOGITS], ctx.run([2, 5, 6], [A.LOGITS])[A.LOGITS])
    ctx.config['bos_token_id'] = 61 # not one of the vocabulary
    with pytest.raises(ValueError, match='no bos_token_id of its vocabulary'):
        ctx.run([5], [A.LOGITS], prepend_bos=True)
    letters = CharacterTokenizer.from_vocab(''.join(map(chr, range(65, 65 + 61))))
    named = HFModelContext(ctx.get_or_create_model(), encoding=letters)
    named.config['bos_token_id'] = 1
    with pytest.raises(ValueError, match='its tokenizer has no bos_token_id'):
        named.run('AB', [A.LOGITS], prepend_bos=True)


@pytest.mark.parametrize('tokens, options, said', [
    ([[1, 2], [3, 4]], dict(mask=[[1, 1], [0, 0]]), 'nothing to read in text 1: its mask is all zeros'),
    ([1, 2], dict(mask=[0, 0]), 'nothing to read in text 0: its mask is all zeros'),
    ([[1, 2], [3]], dict(mask=[[1, 1], [1, 0]]), 'Texts of unlike length, as lists, need none'),
    ([[1, 2], []], {}, 'nothing to read in text 1: its list is empty'),
    ([[1, 2], [61]], {}, 'token ids are 0 to 60'),
    ([[1, 2], [[3, 4]]], {}, 'a text among several is a string or ids'),
    ([[1] * 41, [1]], {}, '41 tokens are too many')])
def test_what_cannot_be_read_says_so(tokens, options, said):
    with pytest.raises(ValueError, match=said):
        context('GPT-2').run(tokens, [A.LOGITS], **options)


def test_texts_as_strings():
    letters = CharacterTokenizer.from_vocab(''.join(map(chr, range(65, 65 + 61))))
    ctx = HFModelContext(context('Llama').get_or_create_model(), encoding=letters)
    found = ctx.run(['ABC', 'D'], [A.LOGITS])
    assert torch.equal(found[A.LOGITS][1, :1], ctx.run('D', [A.LOGITS])[A.LOGITS])
    assert found.mask.tolist() == [[True] * 3, [True, False, False]]
    assert ctx.run(['AB', 'CD'], [A.LOGITS]).mask is None
