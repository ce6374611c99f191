"""Several prompts in one forward: each gives what it gives alone.

The lengths of the other prompts and the edits in them make no difference."""
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from transformer_experiments.models.transformer import TransformerConfig, TransformerLanguageModel
from transformer_experiments.tokenizers.char_tokenizer import CharacterTokenizer
from transformer_experiments.tracing import LanguageModel

VOCAB = 60
BASE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=0,
    pad_token_id=None,
)
MAKE = {
    'gpt2': lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=0)
    ),
    'llama': lambda: LlamaForCausalLM(LlamaConfig(**BASE)),
    'gemma2': lambda: Gemma2ForCausalLM(
        Gemma2Config(**BASE, head_dim=8, sliding_window=6, final_logit_softcapping=None)
    ),  # a window shorter than the prompts; the head gives the logits
    'qwen3': lambda: Qwen3ForCausalLM(Qwen3Config(**BASE, head_dim=8)),
    'mixtral': lambda: MixtralForCausalLM(MixtralConfig(**BASE, num_local_experts=4)),
    'ours': lambda: TransformerLanguageModel(
        VOCAB, config=TransformerConfig(block_size=64, n_embed=32, n_head=4, n_layer=3, dropout=0.0)
    ),
}
LAYERS = {'gpt2': 'transformer.h', 'ours': 'blocks'}
GROUPED = {
    'mixtral'
}  # experts compute the rows of all prompts in one product, whose size depends on what the other prompts choose
PROMPTS = [[5, 17, 3], [9, 2, 41, 33, 8, 27, 12, 55, 30, 19, 6], [44], [7, 7, 21, 38, 50, 11]]


@pytest.fixture(params=MAKE, scope='module')
def both(request):
    "An architecture's name, a plain model, and its twin behind `LanguageModel`."
    def make():
        torch.manual_seed(3)
        m = MAKE[request.param]().eval().requires_grad_(False)
        for p in m.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=1.5 / math.sqrt(p.shape[-1])) # so that positions and prompts matter
        if hasattr(m, 'generation_config'):
            m.generation_config.eos_token_id = None # nothing ends early
        return m
    if request.param == 'ours':
        tokenizer = CharacterTokenizer.from_vocab([chr(40 + i) for i in range(VOCAB)])
    else:
        t = Tokenizer(models.WordLevel({f'w{i:02}': i for i in range(VOCAB)}, unk_token='w02'))
        t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=t, bos_token='w01', eos_token='w00', unk_token='w02'
        )  # no padding token, as in GPT-2
    return request.param, make(), LanguageModel(make(), tokenizer=tokenizer)


def as_text(name: str, prompt: list) -> str:
    return ''.join(chr(40 + i) for i in prompt) if name == 'ours' else ' '.join(f'w{i:02}' for i in prompt)


def layers(name: str, root):
    for part in LAYERS.get(name, 'model.layers').split('.'):
        root = getattr(root, part)
    return root


def logits_of(out) -> torch.Tensor: return out[0] if isinstance(out, tuple) else out.logits


def first(out): return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def alone(name: str, plain, prompt: list) -> tuple:
    "By plain hooks: logits and each layer's output, of one prompt without padding."
    kept = []
    handles = [layer.register_forward_hook(lambda m, a, o: kept.append(first(o))) for layer in layers(name, plain)]
    logits = logits_of(plain(torch.tensor([prompt])))
    for h in handles:
        h.remove()
    return logits[0], [k[0] for k in kept]


def near(got, want):
    "To 1e-5 of the largest value: float32 sums over padded rows run in another order."
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1., want.abs().max().item()))


def test_the_models_feel_their_positions_and_masks(both):
    "A control: padding that nobody allows for changes these models' results, so that the tests below can fail."
    name, plain, _ = both
    want, _ = alone(name, plain, PROMPTS[0])
    padded, _ = alone(name, plain, [0] * 8 + PROMPTS[0])
    assert (padded[8:] - want).abs().max() > 0.1


def invoked(name, lm, prompts: list, edit=None) -> list:
    "One trace with an invoke for each prompt: logits and layers' outputs of each."
    kept = []
    with torch.no_grad(), lm.trace() as tracer:
        for i, prompt in enumerate(prompts):
            with tracer.invoke(prompt):
                if edit:
                    edit(i)
                hs = [layer.output.save() for layer in layers(name, lm)]
                kept.append((lm.lm_head.output.save(), hs))
    return [(logits.value, [first(h.value) for h in hs]) for logits, hs in kept]


@pytest.mark.parametrize('form', ['tokens', 'text', 'tensor'])
def test_a_prompt_in_a_batch_gives_what_it_gives_alone(both, form):
    name, plain, lm = both
    given = {
        'tokens': PROMPTS,
        'text': [as_text(name, p) for p in PROMPTS],
        'tensor': [torch.tensor([p]) for p in PROMPTS],
    }[form]
    for prompt, (logits, hidden) in zip(PROMPTS, invoked(name, lm, given), strict=True):
        want_logits, want_hidden = alone(name, plain, prompt)
        n = len(prompt)
        assert logits.shape[0] == 1
        near(logits[0, -n:], want_logits)
        for got, want in zip(hidden, want_hidden, strict=True):
            near(got[0, -n:], want)


def test_several_prompts_in_one_invoke(both):
    name, plain, lm = both
    a, b = [as_text(name, p) for p in PROMPTS[:3]], [as_text(name, PROMPTS[3])]
    (first_logits, _), (second_logits, _) = invoked(name, lm, [a, b])
    assert first_logits.shape[0] == 3 and second_logits.shape[0] == 1
    for prompt, got in zip(PROMPTS, [*first_logits, *second_logits], strict=True):
        near(got[-len(prompt):], alone(name, plain, prompt)[0])


def test_a_list_of_prompts_without_invokes(both):
    name, plain, lm = both
    for given in ([as_text(name, p) for p in PROMPTS], PROMPTS):
        with torch.no_grad(), lm.trace(given):
            logits = lm.lm_head.output.save()
        for prompt, got in zip(PROMPTS, logits.value, strict=True):
            near(got[-len(prompt):], alone(name, plain, prompt)[0])


@pytest.mark.parametrize('side', ['left', 'right'])
def test_a_mask_of_the_users_own(both, side):
    name, plain, lm = both
    if name == 'ours':
        pytest.skip('its forward has no mask')
    longest = max(map(len, PROMPTS))
    ids, mask = (
        torch.zeros(len(PROMPTS), longest, dtype=torch.long),
        torch.zeros(len(PROMPTS), longest, dtype=torch.long),
    )
    for i, p in enumerate(PROMPTS):
        where = slice(longest - len(p), None) if side == 'left' else slice(0, len(p))
        ids[i, where], mask[i, where] = torch.tensor(p), 1
    with torch.no_grad(), lm.trace({'input_ids': ids, 'attention_mask': mask}):
        logits = lm.lm_head.output.save()
    for prompt, got, m in zip(PROMPTS, logits.value, mask, strict=True):
        near(got[m.bool()], alone(name, plain, prompt)[0])


def first_layer(name, lm): return layers(name, lm)[0]


def in_place(name, lm): first_layer(name, lm).output[:, -1] = 3.


def whole(name, lm): first_layer(name, lm).output[:] = 0


def replaced(name, lm): first_layer(name, lm).output = first_layer(name, lm).output * -2 + 1


def by_input(name, lm): first_layer(name, lm).input = first_layer(name, lm).input.flip(-1)


def of_a_part(name, lm):
    part = {'ours': 'ffwd', 'mixtral': 'post_attention_layernorm'}.get(name, 'mlp')
    getattr(layers(name, lm)[1], part).output[:] = 0


@pytest.mark.parametrize('edit', [in_place, whole, replaced, by_input, of_a_part])
def test_an_edit_stays_in_its_invoke(both, edit):
    name, _, lm = both
    before = invoked(name, lm, PROMPTS)
    after = invoked(name, lm, PROMPTS, lambda i: edit(name, lm) if i == 1 else None)
    assert (before[1][0][0, -1] - after[1][0][0, -1]).abs().max() > 1e-3
    for i in (0, 2, 3):
        for a, b in zip([before[i][0], *before[i][1]], [after[i][0], *after[i][1]], strict=True):
            if name in GROUPED:
                near(a, b)
            else:
                assert torch.equal(a, b), f'an edit in invoke 1 is felt in invoke {i}'


def test_an_edit_in_a_batch_is_the_edit_alone(both):
    name, plain, lm = both
    handle = layers(name, plain)[0].register_forward_hook(
        lambda m, a, o: torch.cat([o[:, :-1], torch.full_like(o[:, -1:], 3.)], 1))
    want, _ = alone(name, plain, PROMPTS[1])
    handle.remove()
    got = invoked(name, lm, PROMPTS, lambda i: in_place(name, lm) if i == 1 else None)[1][0]
    near(got[0, -len(PROMPTS[1]):], want)


@torch.no_grad()
def greedy(plain, prompt: list, n: int) -> tuple:
    "Without a cache: the tokens and each step's logits."
    tokens, steps = torch.tensor([prompt]), []
    for _ in range(n):
        steps.append(logits_of(plain(tokens))[0, -1])
        tokens = torch.cat([tokens, steps[-1].argmax()[None, None]], 1)
    return tokens[0], steps


STEPS = 5


def generated(name, lm, prompts: list, edit=None) -> list:
    kept = []
    with torch.no_grad(), lm.generate(max_new_tokens=STEPS) as tracer:
        for i, prompt in enumerate(prompts):
            with tracer.invoke(prompt):
                if edit:
                    edit(i)
                steps = [lm.lm_head.output[:, -1].save()] + [
                    lm.lm_head.next().output[:, -1].save() for _ in range(STEPS - 1)
                ]
                kept.append((lm.generator.output.save(), steps))
    return [(tokens.value, [s.value for s in steps]) for tokens, steps in kept]


def test_prompts_of_several_lengths_are_continued_as_alone(both):
    name, plain, lm = both
    for prompt, (tokens, steps) in zip(PROMPTS, generated(name, lm, PROMPTS), strict=True):
        want_tokens, want_steps = greedy(plain, prompt, STEPS)
        for got, want in zip(steps, want_steps, strict=True):
            near(got[0], want)
        assert torch.equal(tokens[0, -len(want_tokens):], want_tokens)


def test_an_edit_while_generating_stays_in_its_invoke(both):
    name, plain, lm = both
    def edit(i):
        if i == 1:
            layers(name, lm)[1].all().output[:, -1] += 2.
    before, after = generated(name, lm, PROMPTS), generated(name, lm, PROMPTS, edit)
    for i in (0, 2, 3):
        assert torch.equal(before[i][0], after[i][0])
        for a, b in zip(before[i][1], after[i][1], strict=True):
            if name in GROUPED:
                near(a, b)
            else:
                assert torch.equal(a, b)
    # the prompt that is edited: by hand, without a cache, the edit at the last position of each step
    tokens, marks = torch.tensor([PROMPTS[1]]), [len(PROMPTS[1]) - 1]
    def push(m, a, o):
        o = o.clone()
        o[:, marks] += 2.
        return o
    for step in range(STEPS):
        handle = layers(name, plain)[1].register_forward_hook(push)
        with torch.no_grad():
            logits = logits_of(plain(tokens))[0, -1]
        handle.remove()
        near(after[1][1][step][0], logits)
        tokens = torch.cat([tokens, logits.argmax()[None, None]], 1)
        marks.append(tokens.shape[1] - 1)
    assert not torch.equal(before[1][1][-1], after[1][1][-1])


SHARED = {'gpt2': 'transformer.wpe', 'ours': 'position_embedding_table'}


SQUARE = [[5, 6, 7], [8, 9, 10], [11, 12, 13]] # as many prompts as tokens


@pytest.mark.parametrize('prompts', [SQUARE, PROMPTS], ids=['as many rows as tokens', 'several lengths'])
def test_what_all_prompts_share_is_not_edited_for_one(both, prompts):
    """Prompts of one length may share their position embeddings, in one row or in none.

    An edit in one invoke changes that prompt only, or an error says that it can't."""
    name, _, lm = both
    path = SHARED.get(name, 'model.rotary_emb')
    def site():
        s = lm
        for part in path.split('.'):
            s = getattr(s, part)
        return s
    def edit(i):
        if i == 1:
            if name in SHARED:
                site().output[:] = 0
            else:
                site().output = (site().output[0] * 0, site().output[1])
    before = invoked(name, lm, prompts)
    try:
        after = invoked(name, lm, prompts, edit)
    except ValueError as e:
        assert path in str(e), e
        return
    assert (before[1][0][0, -1] - after[1][0][0, -1]).abs().max() > 1e-3
    for i in {*range(len(prompts))} - {1}:
        if name in GROUPED:
            near(before[i][0], after[i][0])
        else:
            assert torch.equal(before[i][0], after[i][0]), f'an edit in invoke 1 is felt in invoke {i}'


BEAMS, ANSWERS = dict(num_beams=3), dict(num_return_sequences=3, do_sample=True)


@pytest.mark.parametrize('options', [BEAMS, ANSWERS], ids=['beams', 'answers'])
def test_beams_and_several_answers_of_a_prompt_are_its_own(both, options):
    "Then the model runs on several rows for each prompt, and each prompt has its own; or it is refused in words."
    name, plain, lm = both
    if name == 'ours':
        pytest.skip('its generate has neither')
    prompts, n = [PROMPTS[1], PROMPTS[3]], 3
    def run(edit):
        kept = []
        torch.manual_seed(0)
        with torch.no_grad(), lm.generate(max_new_tokens=4, **options) as tracer:
            for i, prompt in enumerate(prompts):
                with tracer.invoke(prompt):
                    if edit and i == 1:
                        layers(name, lm)[0].all().output[:] *= -1
                    kept.append((layers(name, lm)[0].output.save(), lm.generator.output.save()))
        return [
            (h.value[0] if isinstance(h.value, list) else h.value, tokens.value) for h, tokens in kept
        ]  # after all(), one for each step
    try:
        before, after = run(False), run(True)
    except (ValueError, NotImplementedError) as e:
        assert 'prompt' in str(e) or 'invoke' in str(e), e
        return
    for prompt, (h, tokens) in zip(prompts, before, strict=True):
        assert h.shape[0] == n
        for row in tokens:
            assert row.tolist()[:-4][-len(prompt):] == prompt
        near(h[0, -len(prompt):], alone(name, plain, prompt)[1][0])
    if 'num_beams' in options: # nothing is drawn: the first prompt's answer is the same, whatever happens in the second
        assert torch.equal(before[0][1], after[0][1])
        with torch.no_grad():
            want = plain.generate(torch.tensor([prompts[0]]), max_new_tokens=4, pad_token_id=0, **options)
        assert torch.equal(before[0][1][:, -want.shape[1]:], want)
    assert torch.equal(before[0][0], after[0][0]) and not torch.equal(before[1][0], after[1][0])
