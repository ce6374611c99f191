"""Numbers that are not the model's are refused: weights, read-outs and positions, of files and of live models."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from transformer_experiments.accessors import (
    ActivationLocationType,
    HFModelContext,
    InvalidTokenException,
    StandardModelContext,
    WeightLocationType,
    check_reassembly,
    export_pieces,
)
from transformer_experiments.accessors.diagnosis import why_different
from transformer_experiments.accessors.tiny_models import TINY_MODELS, tiny_context
from transformer_experiments.experiments.attribution import attribute_logit, head_sources
from transformer_experiments.tracing import LanguageModel

A, W = ActivationLocationType, WeightLocationType
SIZE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=40,
)
NO_TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)


def llama(**more) -> T.LlamaForCausalLM:
    torch.manual_seed(0)
    return T.LlamaForCausalLM(T.LlamaConfig(**SIZE | NO_TOKENS | more)).eval()


def gpt2() -> T.GPT2LMHeadModel:
    torch.manual_seed(0)
    return T.GPT2LMHeadModel(
        T.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=40, vocab_size=61, **NO_TOKENS)
    ).eval()


def change_config(folder: Path, **more):
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def change_tensors(folder: Path, change):
    path = folder / 'model.safetensors'
    save_file(change(load_file(path)), path, metadata={'format': 'pt'})


def all_weights(ctx) -> dict:
    places = [(w, i) for w in ctx.locations() for i in ([None] if w.has_no_layers else range(ctx.n_layers))]
    return {at: ctx.get_weight(*at) for at in places if ctx.has_weight(*at)}


# A head that isn't in the file

HEADLESS = [
    T.LlamaModel,
    T.LlamaForSequenceClassification,
    T.LlamaForTokenClassification,
    T.Qwen3Model,
    T.GPT2Model,
    T.GPT2ForSequenceClassification,
    T.Gemma2Model,
    T.MixtralForSequenceClassification,
]


@pytest.mark.parametrize('cls', HEADLESS, ids=lambda c: c.__name__)
def test_a_folder_without_a_head_has_no_logits(cls, tmp_path):
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=40, vocab_size=61) if 'GPT2' in cls.__name__ else SIZE
    cls(cls.config_class(**sizes | NO_TOKENS)).save_pretrained(tmp_path)
    ctx = HFModelContext(tmp_path, 'cpu')
    assert not ctx.has_weight(W.UNEMBEDDING)
    with pytest.raises(ValueError, match='has no logits: this model ends with its final norm and has no head'):
        ctx.run([1, 2, 3], [A.LOGITS])
    once, again = (HFModelContext(tmp_path, 'cpu').run([1, 2, 3], [A.RESID_POST_FINAL_LAYER_NORM]) for _ in range(2))
    assert torch.equal(once[A.RESID_POST_FINAL_LAYER_NORM], again[A.RESID_POST_FINAL_LAYER_NORM])
    assert check_reassembly(ctx).worst < 1e-4


def test_a_configuration_without_class_names_is_read_by_its_file(tmp_path):
    llama().save_pretrained(tmp_path / 'with')
    T.LlamaModel(llama().config).save_pretrained(tmp_path / 'without')
    for name in ('with', 'without'):
        change_config(tmp_path / name, architectures=None)
    assert HFModelContext(tmp_path / 'with', 'cpu').has_weight(W.UNEMBEDDING)
    assert not HFModelContext(tmp_path / 'without', 'cpu').has_weight(W.UNEMBEDDING)


@pytest.mark.parametrize('lost', ['lm_head.weight', 'model.layers.1.mlp.up_proj.weight', 'model.norm.weight'])
def test_weights_that_transformers_would_make_at_random_are_an_error(lost, tmp_path):
    llama().save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != lost})
    with pytest.raises(ValueError, match=f'lacks {lost}.*at random'):
        HFModelContext(tmp_path, 'cpu').run([1, 2, 3], [A.RESID_POST_MLP])
    with pytest.raises(ValueError, match=f'lacks {lost}.*at random'):
        LanguageModel(tmp_path, tokenizer=object(), dispatch=True)


def test_a_traced_folder_without_a_head_is_an_error_when_it_first_runs(tmp_path):
    T.LlamaModel(llama().config).save_pretrained(tmp_path)
    model = LanguageModel(str(tmp_path))
    with pytest.raises(ValueError, match='lacks lm_head.weight of a LlamaForCausalLM'):
        model.trace(torch.tensor([[1, 2, 3]]), trace=False)


# Folders whose names differ from the modules'


TEXT = SIZE | NO_TOKENS
INTERN = VISION | dict(image_size=[28, 28], patch_size=[14, 14])
LLAMA = T.LlamaConfig(**TEXT)
SEEING = {  # Class -> its configuration's class and values
    'LlavaForConditionalGeneration': ('LlavaConfig', dict(text_config=LLAMA, image_token_index=60)),
    'VipLlavaForConditionalGeneration': ('VipLlavaConfig', dict(text_config=LLAMA, image_token_index=60)),
    'LlavaNextForConditionalGeneration': ('LlavaNextConfig', dict(text_config=LLAMA, image_token_index=60)),
    'Mistral3ForConditionalGeneration': (
        'Mistral3Config',
        dict(text_config=T.MistralConfig(**TEXT), vision_config=T.PixtralVisionConfig(**VISION), image_token_index=60),
    ),
    'Gemma3ForConditionalGeneration': ('Gemma3Config', dict(text_config=TEXT | dict(head_dim=8), vision_config=VISION)),
    'Idefics3ForConditionalGeneration': (
        'Idefics3Config',
        dict(text_config=LLAMA, vision_config=VISION, image_token_id=60, tie_word_embeddings=False),
    ),
    'InternVLForConditionalGeneration': (
        'InternVLConfig',
        dict(text_config=T.Qwen2Config(**TEXT), vision_config=INTERN, image_token_id=60),
    ),
}


def multimodal(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config, values = SEEING[kind]
    vision = T.CLIPVisionConfig(**VISION) if 'Llava' in kind else None
    return getattr(T, kind)(getattr(T, config)(**({'vision_config': vision} if vision else {}) | values)).eval()


@pytest.mark.parametrize('kind', SEEING)
def test_models_that_also_see_are_read_from_their_folder(kind, tmp_path):
    model = multimodal(kind)
    model.save_pretrained(tmp_path)
    filed, live = HFModelContext(tmp_path, 'cpu'), HFModelContext(model)
    here, there = all_weights(filed), all_weights(live)
    assert here.keys() == there.keys() and (W.UNEMBEDDING, None) in here
    assert all(torch.equal(here[at], there[at]) for at in here)
    assert filed.module_path('attn_out', 1) == live.module_path('attn_out', 1)
    assert check_reassembly(filed).worst < 1e-4
    filed.get_or_create_model().get_submodule(filed.module_path('attn_out', 1))
    assert torch.allclose(
        filed.run([1, 2, 3], [A.LOGITS])[A.LOGITS], live.run([1, 2, 3], [A.LOGITS])[A.LOGITS], atol=1e-5
    )


def test_a_file_without_the_modules_prefix_is_checked(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: {k.removeprefix('transformer.'): v for k, v in tensors.items()})
    ctx = HFModelContext(tmp_path, 'cpu')
    assert check_reassembly(ctx).worst < 1e-5
    assert ctx.module_path('attn_out', 1) == 'transformer.h.1.attn.c_proj'
    assert ctx.prefix == ''


@pytest.mark.parametrize(
    'beside', ['consolidated.safetensors', 'adapter_model.safetensors', 'model.safetensors.index.json']
)
def test_model_safetensors_is_read_whatever_lies_beside_it(beside, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    if beside.endswith('json'):
        (tmp_path / beside).write_text('{"weight_map": {"x": "nowhere.safetensors"}}')
    else:
        save_file({'x': torch.zeros(3)}, tmp_path / beside)
    assert torch.equal(HFModelContext(tmp_path, 'cpu').get_weight(W.EMBEDDING), model.model.embed_tokens.weight)


def test_a_folder_with_an_adapter_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    (tmp_path / 'adapter_config.json').write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match='adapter_config.json.*merge it first'):
        HFModelContext(tmp_path, 'cpu')


# Quantised checkpoints


def quantised(folder: Path, change, **config) -> HFModelContext:
    "The context of a folder in which one projection was quantised."
    model = llama(intermediate_size=32)
    model.save_pretrained(folder)
    name = 'model.layers.0.mlp.up_proj.'
    change_tensors(
        folder,
        lambda t: (
            {k: v for k, v in t.items() if k != name + 'weight'}
            | {name + k: v for k, v in change(t[name + 'weight']).items()}
        ),
    )
    if config:
        change_config(folder, quantization_config=config)
    return HFModelContext(folder, 'cpu')


def int8(w):
    return (w * 100).to(torch.int8)


STORED = {  # What the file holds in place of the weight, and quantization_config
    'bitsandbytes 8 bit': (
        lambda w: dict(weight=int8(w), SCB=torch.ones(32)),
        dict(quant_method='bitsandbytes', load_in_8bit=True),
    ),
    'bitsandbytes 4 bit': (
        lambda w: {'weight': torch.zeros(512, 1, dtype=torch.uint8), 'weight.absmax': torch.ones(16)},
        dict(load_in_4bit=True),
    ),
    'gptq': (
        lambda w: dict(qweight=torch.zeros(4, 32, dtype=torch.int32), scales=torch.ones(1, 32)),
        dict(quant_method='gptq', bits=4),
    ),
    'awq': (
        lambda w: dict(qweight=torch.zeros(32, 4, dtype=torch.int32), qzeros=torch.zeros(1, 4, dtype=torch.int32)),
        dict(quant_method='awq'),
    ),
    'compressed-tensors': (
        lambda w: dict(weight_packed=torch.zeros(32, 4, dtype=torch.int32), weight_scale=torch.ones(32, 1)),
        dict(quant_method='compressed-tensors'),
    ),
    'compressed-tensors 8 bit': (
        lambda w: dict(weight=int8(w), weight_scale=torch.ones(32, 1)),
        dict(quant_method='compressed-tensors'),
    ),
    'compressed-tensors fp8': (
        lambda w: dict(weight=w.to(torch.float8_e4m3fn), weight_scale=torch.ones(32, 1)),
        dict(quant_method='compressed-tensors'),
    ),
    'mxfp4': (
        lambda w: dict(
            weight_blocks=torch.zeros(32, 1, 16, dtype=torch.uint8), weight_scales=torch.zeros(32, 1, dtype=torch.uint8)
        ),
        dict(quant_method='mxfp4'),
    ),
    'hqq': (lambda w: dict(W_q=torch.zeros(512, dtype=torch.uint8)), dict(quant_method='hqq')),
    'bitnet': (
        lambda w: dict(weight=torch.zeros(8, 32, dtype=torch.uint8), weight_scale=torch.ones(1)),
        dict(quant_method='bitnet'),
    ),
    'on loading': (lambda w: dict(weight=w), dict(quant_method='torchao', quant_type='int8_weight_only')),
    'fp8 without scales': (lambda w: dict(weight=w.to(torch.float8_e4m3fn)), dict(quant_method='fp8')),
    'fp8 without a word': (lambda w: dict(weight=w.to(torch.float8_e4m3fn)), {}),
    'int8 without a word': (lambda w: dict(weight=int8(w)), {}),
}


@pytest.mark.parametrize('method', STORED)
def test_quantised_weights_are_refused_by_name(method, tmp_path):
    change, config = STORED[method]
    ctx = quantised(tmp_path, change, **config)
    with pytest.raises(ValueError, match='quantization_config') as refused:
        ctx.get_weight(W.MLP_TO_UP, 0)
    said = str(refused.value)
    assert 'mlp.to_up' in said and 'checkpoint that it was quantised from' in said and 'damaged' not in said
    if 'quant_method' in config:
        assert config['quant_method'] in said
    assert torch.equal(
        ctx.get_weight(W.EMBEDDING), llama(intermediate_size=32).model.embed_tokens.weight
    )  # is never quantised
    assert ctx.get_weight(W.LAYER_NORM_GAIN_FINAL).shape == (32,)


def test_an_unembedding_that_is_left_as_it_is_is_given(tmp_path):
    change, config = STORED['awq']
    ctx = quantised(tmp_path, change, **config, modules_to_not_convert=['visual'])
    assert torch.equal(ctx.get_weight(W.UNEMBEDDING), llama(intermediate_size=32).lm_head.weight.T)
    change_config(tmp_path, quantization_config=dict(quant_method='fp8', modules_to_not_convert=['visual']))
    with pytest.raises(ValueError, match="unembedding .* is quantised .*quantization_config says 'fp8'"):
        HFModelContext(tmp_path, 'cpu').get_weight(W.UNEMBEDDING)


@pytest.mark.parametrize('block', [None, (16, 16), (128, 128), (12, 20)])
def test_float8_is_dequantised(block, tmp_path):
    rows, columns = block or (32, 32)
    n, k = -(-32 // rows), -(-32 // columns)
    scale = torch.rand(n, k) / 100 + 0.01
    whole = scale.repeat_interleave(rows, 0)[:32].repeat_interleave(columns, 1)[:, :32]
    change = lambda w: dict(weight=(w / whole).to(torch.float8_e4m3fn), weight_scale_inv=scale)
    ctx = quantised(
        tmp_path, change, quant_method='fp8', weight_block_size=block and list(block), modules_to_not_convert=['o_proj']
    )
    want = llama(intermediate_size=32).model.layers[0].mlp.up_proj.weight
    got = ctx.get_weight(W.MLP_TO_UP, 0).T
    assert got.dtype == torch.float32
    assert ((got - want).abs() <= want.abs() / 16 + whole * 2**-9).all()  # three bits of mantissa
    assert ctx.get_weight(W.ATTN_TO_RESIDUAL, 0).shape == (4, 8, 32)  # the configuration says that it is left as it is
    with pytest.raises(ValueError, match="quantization_config says 'fp8'"):
        ctx.get_weight(W.MLP_TO_GATE, 0)  # stored in float32: quantised on loading


def test_float8_is_what_transformers_makes_of_it(tmp_path):
    change = lambda w: dict(weight=(w * 1000).to(torch.float8_e4m3fn), weight_scale_inv=torch.tensor([[1e-3]]))
    ctx = quantised(
        tmp_path,
        change,
        quant_method='fp8',
        weight_block_size=[128, 128],
        modules_to_not_convert=[
            'q_proj',
            'k_proj',
            'v_proj',
            'o_proj',
            'gate_proj',
            'down_proj',
            'lm_head',
            'layers.1',
        ],
    )
    config = T.FineGrainedFP8Config(
        dequantize=True,
        modules_to_not_convert=[
            'q_proj',
            'k_proj',
            'v_proj',
            'o_proj',
            'gate_proj',
            'down_proj',
            'lm_head',
            'layers.1',
        ],
    )
    model = T.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    assert torch.allclose(ctx.get_weight(W.MLP_TO_UP, 0).T, model.model.layers[0].mlp.up_proj.weight, rtol=1e-6)


def test_pieces_that_are_integers_are_refused(tmp_path):
    folder = export_pieces(tiny_context('ours', torch.float32), tmp_path, enc='gpt2')
    piece = folder / 'model_pieces' / 'xf_layers.0.mlp.in_layer.weight.pt'
    torch.save(int8(torch.load(piece, weights_only=True)), piece)
    with pytest.raises(ValueError, match='in_layer.weight.pt .* is damaged, or not the file that manifest.json names'):
        StandardModelContext(folder, 'cpu').get_weight(W.MLP_TO_HIDDEN, 0)
    (folder / 'manifest.json').unlink()
    ctx = StandardModelContext(folder, 'cpu')
    with pytest.raises(ValueError, match='mlp.to_hidden of layer 0 is quantised .*torch.int8.*quantization_config'):
        ctx.get_weight(W.MLP_TO_HIDDEN, 0)
    assert ctx.get_weight(W.MLP_TO_HIDDEN, 1).dtype == torch.float32


# Modules that do more than multiply by their weight


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Outer(nn.Module):
    "Passes all names on to what it wraps."

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('inner'), name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) * 2


class Int8(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.register_buffer('weight', int8(base.weight.detach()))


class Half(nn.Module):
    def forward(self, w):
        return w / 2


def parametrised(layer):
    parametrize.register_parametrization(layer, 'weight', Half())
    return layer


def subclassed(layer):
    layer.__class__ = Subclass
    return layer


def patched(layer):
    old = layer.forward
    layer.forward = lambda x: old(x) + 1
    return layer


def pruned(layer):
    return prune.l1_unstructured(layer, 'weight', 0.5)


WRAPS = [
    Lora,
    subclassed,
    Outer,
    Int8,
    parametrised,
    patched,
    pruned,
    parametrizations.spectral_norm,
    parametrizations.weight_norm,
    parametrizations.orthogonal,
    nn.utils.weight_norm,
    nn.utils.spectral_norm,
]


@pytest.mark.parametrize('wrap', WRAPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    'role, location', [('self_attn.q_proj', W.ATTN_TO_QUERY), ('mlp.down_proj', W.MLP_TO_RESIDUAL)]
)
@pytest.mark.filterwarnings('ignore')
def test_modules_that_are_not_their_weight_are_refused_by_path(wrap, role, location):
    model = llama(num_key_value_heads=4, intermediate_size=32)
    parent = model.model.layers[1].get_submodule(role.split('.')[0])
    name = role.split('.')[1]
    setattr(parent, name, wrap(getattr(parent, name)))
    ctx = HFModelContext(model)
    with pytest.raises(ValueError, match=f'model.layers.1.{role} is a '):
        ctx.get_weight(location, 1)
    assert ctx.get_weight(location, 0) is not None
    assert ctx.get_weight(W.MLP_TO_UP, 1) is not None


@pytest.mark.parametrize(
    'path, location, at',
    [
        ('model.layers.1.mlp', W.MLP_TO_UP, 1),
        ('model.layers.1', W.MLP_TO_UP, 1),
        ('model.norm', W.LAYER_NORM_GAIN_FINAL, None),
        ('lm_head', W.UNEMBEDDING, None),
        ('model.layers.1.input_layernorm', W.LAYER_NORM_GAIN_PRE_ATTN, 1),
    ],
)
def test_wrappers_on_the_way_are_refused(path, location, at):
    model = llama()
    parent, _, name = path.rpartition('.')
    holder = model.get_submodule(parent)
    wrapped = Outer(holder._modules[name])
    ctx = HFModelContext(model)
    holder._modules[name] = wrapped
    with pytest.raises(ValueError, match=f'{path} is a .*Outer'):
        ctx.get_weight(location, at)


def test_a_wrapped_model_is_refused_and_a_compiled_one_is_read():
    model = llama()
    wrapper = Outer(model)
    with pytest.raises(ValueError, match='is not a model of transformers, but seems to wrap one'):
        HFModelContext(wrapper)
    compiled = HFModelContext(torch.compile(model))
    assert torch.equal(compiled.get_weight(W.MLP_TO_UP, 0), HFModelContext(model).get_weight(W.MLP_TO_UP, 0))


def test_a_linear_layer_turned_the_other_way_is_refused():
    model = gpt2()  # whose c_proj is square: a transposed weight would fit
    model.transformer.h[0].attn.c_proj = nn.Linear(32, 32)
    with pytest.raises(
        ValueError,
        match='transformer.h.0.attn.c_proj is a torch.nn.modules.linear.Linear, which multiplies by the transpose',
    ):
        HFModelContext(model).get_weight(W.ATTN_TO_RESIDUAL, 0)
    other = llama(num_key_value_heads=4)
    other.model.layers[0].self_attn.o_proj = T.pytorch_utils.Conv1D(32, 32)
    with pytest.raises(ValueError, match='which multiplies by the transpose'):
        HFModelContext(other).get_weight(W.ATTN_TO_RESIDUAL, 0)


def test_our_own_models_are_held_to_the_same():
    ctx = tiny_context('ours')
    block = ctx.get_or_create_model().blocks[0]
    block.sa.proj = Lora(block.sa.proj)
    with pytest.raises(ValueError, match='blocks.0.sa.proj is a .*Lora.*merge the adapter'):
        ctx.get_weight(W.ATTN_TO_RESIDUAL, 0)


@pytest.mark.parametrize('name', TINY_MODELS)
def test_every_weight_of_a_plain_model_is_still_given(name):
    ctx = tiny_context(name)
    assert len(all_weights(ctx)) > 10
    assert check_reassembly(ctx).worst < 1e-9


# Models that compute something else than their weights say: the error has the cause


def ids(n: int = 9) -> torch.Tensor:
    return torch.randint(61, (n,), generator=torch.Generator().manual_seed(1))


ASK = {
    'run': lambda ctx: ctx.run(ids(), [A.ATTN_QK_PROBS]),
    'check_reassembly': lambda ctx: check_reassembly(ctx, ids()[None]),
    'attribute_logit': lambda ctx: attribute_logit(ctx, ids(), 7),
    'head_sources': lambda ctx: head_sources(ctx, ids(), 1, 0, 7),
}


@pytest.mark.parametrize('ask', ASK)
def test_autocast_is_named(ask):
    ctx = HFModelContext(llama())
    ASK[ask](ctx)
    with (
        torch.autocast('cpu', torch.bfloat16),
        pytest.raises(ValueError, match='torch.autocast is on, so the model computes in bfloat16'),
    ):
        ASK[ask](ctx)
    with torch.autocast('cpu', torch.bfloat16):
        assert ctx.run(ids(), [A.LOGITS])[A.LOGITS].shape == (9, 61)  # the model's own, as it is


def double_softmax(module, query, key, value, attention_mask, scaling, dropout=0.0, **more):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query * 2, key, value, attention_mask, dropout, scaling, **more)


@pytest.mark.parametrize('ask', ['run', 'check_reassembly'])
def test_another_attention_implementation_is_named(ask):
    T.AttentionInterface.register('doubled', double_softmax)
    model = llama().double()
    model.set_attn_implementation('doubled')
    with pytest.raises(ValueError, match="its attention implementation is 'doubled'") as refused:
        ASK[ask](HFModelContext(model))
    assert 'hook' not in str(refused.value)


@pytest.mark.parametrize('ask', ['run', 'check_reassembly'])
def test_attention_that_looks_ahead_is_named(ask):
    model = llama().double()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(
        ValueError, match='is_causal is False in model.layers.0.self_attn, model.layers.1.self_attn'
    ) as refused:
        ASK[ask](HFModelContext(model))
    assert 'hook' not in str(refused.value)
    for other in (llama(), gpt2()):
        ctx = HFModelContext(other)
        other.config.is_causal = False  # after it was opened
        with pytest.raises(ValueError, match='is_causal is False in its config'):
            ASK[ask](ctx)
        with pytest.raises(ValueError, match='is_causal=False'):
            HFModelContext(other)


@pytest.mark.parametrize('ask', ['run', 'check_reassembly', 'attribute_logit'])
def test_hooks_are_named_by_their_modules(ask):
    model = llama().double()
    path = 'model.layers.1.mlp' if ask == 'attribute_logit' else 'model.layers.1.self_attn.v_proj'
    model.get_submodule(path).register_forward_hook(lambda m, args, out: out * 1.5)
    with pytest.raises(ValueError, match=f'there are hooks on {path}'):
        ASK[ask](HFModelContext(model))


def test_a_disagreement_without_a_cause_says_so():
    ctx = tiny_context('Llama')
    ctx.facts = replace(ctx.facts, attention_scales=(1.0,) * 3)
    with pytest.raises(ValueError, match="no hook, wrapper or setting was found that explains it"):
        check_reassembly(ctx)


def test_a_module_that_isnt_the_architectures_own_is_named():
    model = llama().double()
    layer = model.model.layers[0]
    layer.mlp = Outer(layer.mlp)
    ctx = HFModelContext(model)
    said = why_different(ctx)
    assert 'model.layers.0.mlp (Outer)' in said and 'merge or remove' in said
    assert why_different(HFModelContext(llama())).startswith('no hook, wrapper or setting')


@pytest.mark.parametrize('name', TINY_MODELS)
def test_nothing_is_found_in_a_plain_model(name):
    assert why_different(tiny_context(name)).startswith('no hook, wrapper or setting')


# What has no place in the registry


def test_cross_attention_is_refused():
    config = T.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, n_positions=40, vocab_size=61, add_cross_attention=True, **NO_TOKENS
    )
    with pytest.raises(ValueError, match='add_cross_attention'):
        HFModelContext(T.GPT2LMHeadModel(config))


# Names of tokens


def llama2_tokenizer():
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = [
        ('<unk>', 0.0),
        *((p, -1.0) for p in ('▁Paris', '▁is', '▁nice', 'Paris')),
        *((p, -5.0) for p in 'Parisnce▁'),
    ]
    made = Tokenizer(models.Unigram(pieces, 0, False))
    made.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    made.decoder = decoders.Sequence(
        [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
    )
    return made


def test_tokens_with_and_without_a_space_have_two_names():
    ctx = HFModelContext(llama(), encoding=llama2_tokenizer())
    tokens = ctx.encode('Paris is nice')
    assert ctx.decode(tokens) == 'Paris is nice'
    assert ctx.decode_token_list(tokens) == [' Paris', ' is', ' nice']
    assert ctx.decode_token_list([1, 4]) == [' Paris', 'Paris']
    assert ctx.encode_token_str_list([' Paris', 'Paris', ' is']) == [1, 4, 2]
    with pytest.raises(InvalidTokenException, match="'is' is no token of .*which is ' is'"):
        ctx.encode_token_str('is')
    with pytest.raises(InvalidTokenException, match='is 2 tokens'):
        ctx.encode_token_str('Paris is')
    found = attribute_logit(ctx, 'Paris is', ' nice', against='Paris')
    assert (found.token, found.against) == (' nice', 'Paris')


def test_a_slow_tokenizer_adds_nothing():
    tokenizer = T.ByT5Tokenizer()
    ctx = HFModelContext(llama(vocab_size=384), encoding=tokenizer)
    assert tokenizer.encode('hi')[-1] == 1
    assert ctx.encode('hi') == [107, 108]
    assert ctx.encode('hi</s>') == [107, 108, *(b + 3 for b in b'</s>')]
    assert ctx.encode('hi</s>', ['</s>']) == [107, 108, 1]
    assert ctx.encode_token_str('h') == 107


def test_another_architectures_norm_is_refused():
    "Gemma's norms multiply by one plus their weight, Llama's by the weight: the same names, and other gains."
    ctx = tiny_context('Gemma 2')
    model = ctx.get_or_create_model()
    model.model.norm = T.models.llama.modeling_llama.LlamaRMSNorm(32)
    with pytest.raises(ValueError, match='model.norm is a transformers.models.llama.modeling_llama.LlamaRMSNorm'):
        ctx.get_weight(W.LAYER_NORM_GAIN_FINAL)
    assert ctx.get_weight(W.LAYER_NORM_GAIN_PRE_ATTN, 0).shape == (32,)


def test_parametrised_experts_are_refused():
    ctx = tiny_context('Mixtral')
    parametrize.register_parametrization(
        ctx.get_or_create_model().model.layers[0].mlp.experts, 'gate_up_proj', Half(), unsafe=True
    )
    with pytest.raises(ValueError, match='model.layers.0.mlp.experts is a .*remove_parametrizations'):
        ctx.get_weight(W.EXPERT_TO_UP, 0)
    assert ctx.get_weight(W.EXPERT_TO_UP, 1) is not None
