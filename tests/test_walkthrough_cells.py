"""The cells of the walkthrough that tracing was first described by, all that run on one machine.

Cells stand as they are there, but for `remote=True` and for the hub's models: random tiny ones and a tokenizer that is
made here stand for them. In transformers 5 a block hands its hidden states on as a tensor, so `.output[0][:, -1, :]` of
a block reads `.output[:, -1, :]`. What a cell gives is compared with plain hooks and plain torch."""
import traceback
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import transformer_experiments.tracing as nnsight
from transformer_experiments.tracing import LanguageModel
from transformer_experiments.tracing.envoy import Envoy

NNsight = nnsight.TracedModel
WORDS = ('The E iff el Tower is in located the city of Vatican Buckingham Palace Paris London Rome , and . _ Hello '
         'hello a big old river runs through it').split()


# What stands for the hub

def make_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    "Words, with three for Eiffel as in GPT-2; where `bos`, a beginning-of-text token as in Llama; no padding token."
    vocab = {w: i for i, w in enumerate(['<|end|>', '<|begin|>', '<|unk|>', *WORDS])}
    t = Tokenizer(models.WordLevel(vocab, unk_token='<|unk|>'))
    t.normalizer = normalizers.Replace('Eiffel', 'E iff el')
    t.pre_tokenizer, t.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix='##', cleanup=False)
    if bos:
        t.post_processor = processors.TemplateProcessing(single='<|begin|> $A', special_tokens=[('<|begin|>', 1)])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<|begin|>', eos_token='<|end|>', unk_token='<|unk|>')


SIZE = len(WORDS) + 3


def spread(model: nn.Module) -> nn.Module:
    "Weights large enough that predictions depend on the prompt."
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    return model.eval()


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(11) # a seed with which each prompt of this file gets another answer
    sizes = dict(n_positions=64, n_embd=32, n_layer=12, n_head=4)
    return spread(GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, **sizes, bos_token_id=1, eos_token_id=0)))


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(2)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    tokens = dict(bos_token_id=1, eos_token_id=0, max_position_embeddings=64)
    config = LlamaConfig(vocab_size=SIZE, num_key_value_heads=2, **sizes, **tokens)
    return spread(LlamaForCausalLM(config))


@pytest.fixture(scope='module')
def llm(): return LanguageModel(make_gpt2(), tokenizer=make_tokenizer(bos=False))


@pytest.fixture(scope='module')
def gpt2(): return make_gpt2()


@pytest.fixture(scope='module')
def llama(): return LanguageModel(make_llama(), tokenizer=make_tokenizer(bos=True))


@pytest.fixture(scope='module')
def plain_llama(): return make_llama()


@pytest.fixture(autouse=True)
def every_graph_is_data(monkeypatch):
    "What any cell has traced goes through JSON and comes back the same, unless it calls a function of this file."
    made, sessions = [], []
    places = (NNsight, 'trace', made), (LanguageModel, 'generate', made), (NNsight, 'session', sessions)
    for cls, name, kept in places:
        call = getattr(cls, name)

        def wrapped(self, *args, _call=call, _kept=kept, **kwargs):
            _kept.append(context := _call(self, *args, **kwargs))
            return context
        monkeypatch.setattr(cls, name, wrapped)
    yield
    for context in sessions or made: # a trace in a session is a part of the session's graph
        if not hasattr(context, 'graph'): continue # trace=False
        try:
            text = context.graph.to_json()
        except (TypeError, ValueError) as e:
            assert 'tensor_sum' in str(e) or 'DataLoader' in str(e), e
            continue
        again = nnsight.Graph.from_json(text)
        assert again == context.graph and hash(again) == hash(context.graph) and again.to_json() == text


input_size, hidden_dims, output_size = 5, 10, 2


@pytest.fixture
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(OrderedDict([('layer1', torch.nn.Linear(input_size, hidden_dims)),
                                            ('layer2', torch.nn.Linear(hidden_dims, output_size))])
                               ).requires_grad_(False)


@pytest.fixture
def tiny_model(net): return NNsight(net)


@pytest.fixture
def input():
    torch.manual_seed(3)
    return torch.rand((1, input_size))


@pytest.fixture
def l1(net, input): return input @ net.layer1.weight.T + net.layer1.bias


def l2(net, hidden): return hidden @ net.layer2.weight.T + net.layer2.bias


def ids(prompt: str, bos: bool = False) -> torch.Tensor:
    words = ['<|end|>', '<|begin|>', '<|unk|>', *WORDS]
    return torch.tensor([[1] * bos + [words.index(w) for w in prompt.replace('Eiffel', 'E iff el').split()]])


@torch.no_grad()
def hooked(model: nn.Module, hooks: dict, *args, **kwargs):
    "Run a plain model with hooks: `{path: f(output) -> None, or what takes its place}`."
    handles = [model.get_submodule(path).register_forward_hook(lambda m, a, o, f=f: f(o)) for path, f in hooks.items()]
    try:
        return model(*args, **kwargs)
    finally:
        for h in handles:
            h.remove()


def close(a, b):
    "The tolerance is for float32 sums in another order."
    torch.testing.assert_close(getattr(a, 'value', a), b, rtol=1e-5, atol=1e-6)


def tensors(x) -> list:
    "Every tensor in nested lists, tuples and dicts."
    if isinstance(x, torch.Tensor): return [x]
    if hasattr(x, 'items'):
        x = list(x.values())
    return [t for item in x for t in tensors(item)] if isinstance(x, (list, tuple)) else []


# 1: small

def test_04_prints_as_the_module_tree(tiny_model, net):
    assert str(tiny_model).splitlines() == [
        'Sequential(', '  (layer1): Linear(in_features=5, out_features=10, bias=True)',
        '  (layer2): Linear(in_features=10, out_features=2, bias=True)', ')']
    assert repr(tiny_model) == repr(net)


def test_05_06_not_saved(tiny_model, input):
    with tiny_model.trace(input) as tracer:
        pass

    with tiny_model.trace(input) as tracer: # noqa: F841
        output = tiny_model.output

    with pytest.raises(ValueError, match='save'):
        print(output.value)


def test_07_save(tiny_model, net, input, l1, capsys):
    with tiny_model.trace(input) as tracer: # noqa: F841
        output = tiny_model.output.save()

    print(output.value)
    print(output)
    close(output, l2(net, l1))
    assert capsys.readouterr().out.strip().splitlines() == [str(output.value)] * 2

    output = tiny_model.trace(input, trace=False)
    assert torch.equal(output, net(input))


def test_09_10_outputs_and_inputs(tiny_model, net, input, l1):
    with tiny_model.trace(input) as tracer: # noqa: F841
        l1_output = tiny_model.layer1.output.save()
    close(l1_output, l1)

    with tiny_model.trace(input):
        l2_input = tiny_model.layer2.input.save()
    close(l2_input, l1)

    with tiny_model.trace(input):
        l2_inputs = tiny_model.layer2.inputs.save()
    args, kwargs = l2_inputs.value
    assert isinstance(args, tuple) and kwargs == {}
    close(args[0], l1)


def test_11_log(tiny_model, input, net, capsys):
    with tiny_model.trace(input) as tracer:
        tracer.log("Layer 1 - out: ", tiny_model.layer1.output)
    said = capsys.readouterr().out
    assert said.startswith('Layer 1 - out: ') and str(net.layer1(input)) in said


def test_12_13_functions_methods_operators(tiny_model, net, input, l1):
    with tiny_model.trace(input):
        # Note we don't need to call .save() on the output,
        # as we're only using its value within the tracing context.
        l1_output = tiny_model.layer1.output
        # We do need to save the argmax tensor however,
        # as we're using it outside the tracing context.
        l1_amax = torch.argmax(l1_output, dim=1).save()
    assert int(l1_amax[0]) == l1[0].tolist().index(max(l1[0].tolist()))
    assert str(l1_amax[0]) == f'tensor({int(l1_amax[0])})'
    with pytest.raises(ValueError):
        _ = l1_output.value

    with tiny_model.trace(input):
        value = (tiny_model.layer1.output.sum() + tiny_model.layer2.output.sum()).save()
    close(value, l1.sum() + l2(net, l1).sum())
    close(value * 2 + 1, (l1.sum() + l2(net, l1).sum()) * 2 + 1)


def test_14_apply(tiny_model, input, l1):
    # Take a tensor and return the sum of its elements
    def tensor_sum(tensor):
        flat = tensor.flatten()
        total = 0
        for element in flat:
            total += element.item()
        return torch.tensor(total)

    with tiny_model.trace(input) as tracer: # noqa: F841
        # Specify the function name and its arguments (in a coma-separated form) to add to the intervention graph
        custom_sum = nnsight.apply(tensor_sum, tiny_model.layer1.output).save()
        sum = tiny_model.layer1.output.sum()
        sum.save()

    close(custom_sum, l1.sum())
    close(sum, l1.sum())


def test_15_setting(tiny_model, net, input, l1):
    with tiny_model.trace(input):
        # Save the output before the edit to compare.
        # Notice we apply .clone() before saving as the setting operation is in-place.
        l1_output_before = tiny_model.layer1.output.clone().save()
        # Access the 0th index of the hidden state dimension and set it to 0.
        tiny_model.layer1.output[:, 0] = 0
        # Save the output after to see our edit.
        l1_output_after = tiny_model.layer1.output.save()
        out = tiny_model.output.save()

    edited = l1 * (torch.arange(hidden_dims) != 0)
    close(l1_output_before, l1)
    close(l1_output_after, edited)
    close(out, l2(net, edited))


def test_16_an_index_out_of_bounds_when_it_runs(tiny_model, net, input, l1):
    with pytest.raises(IndexError) as e:
        with tiny_model.trace(input):
            l1_output_before = tiny_model.layer1.output.clone().save() # noqa: F841
            tiny_model.layer1.output[:, hidden_dims] = 0
            wrong_line = here() - 1
            l1_output_after = tiny_model.layer1.output.save() # noqa: F841
    said = str(e.value)
    assert 'layer1' in said and '10' in said and f'{Path(__file__).name}' in said and str(wrong_line) in said
    assert len(traceback.extract_tb(e.value.__traceback__)) < 12 # short: this test, the context's end, and little else
    close(net(input), l2(net, l1)) # nothing stays behind


def here() -> int: return traceback.extract_stack()[-2].lineno


def test_17_18_19_scan_and_validate(tiny_model, net, input, l1, capsys):
    # turn on scan and validate
    with pytest.raises(IndexError) as e:
        with tiny_model.trace(input, scan=True, validate=True):
            l1_output_before = tiny_model.layer1.output.clone().save()
            # the error is happening here
            wrong_line = here() + 1
            tiny_model.layer1.output[:, hidden_dims] = 0
            reached = True
            l1_output_after = tiny_model.layer1.output.save()
    assert 'reached' not in locals() # it was raised at the line itself
    assert wrong_line in [f.lineno for f in traceback.extract_tb(e.value.__traceback__) if f.filename == __file__]

    with tiny_model.trace(input):
        # Save the output before the edit to compare.
        # Notice we apply .clone() before saving as the setting operation is in-place.
        l1_output_before = tiny_model.layer1.output.clone().save()
        print(f"Layer 1 output shape: {tiny_model.layer1.output.shape}")
        # Access the last index of the hidden state dimension and set it to 0.
        tiny_model.layer1.output[:, hidden_dims - 1] = 0
        # Save the output after to see our edit.
        l1_output_after = tiny_model.layer1.output.save()
        out = tiny_model.output.save()

    # the scan above is remembered, as in the walkthrough
    assert 'Layer 1 output shape: torch.Size([1, 10])' in capsys.readouterr().out
    edited = l1 * (torch.arange(hidden_dims) != hidden_dims - 1)
    close(l1_output_before, l1)
    close(l1_output_after, edited)
    close(out, l2(net, edited))

    with tiny_model.trace(input):
        # Save the output before the edit to compare.
        # Notice we apply .clone() before saving as the setting operation is in-place.
        l1_output_before = tiny_model.layer1.output.clone().save()
        # Create random noise with variance of .001
        noise = (0.001**0.5) * torch.randn(l1_output_before.shape)
        # Add to original value and replace.
        tiny_model.layer1.output = l1_output_before + noise
        # Save the output after to see our edit.
        l1_output_after = tiny_model.layer1.output.save()
        out = tiny_model.output.save()

    close(l1_output_before, l1)
    added = l1_output_after.value - l1
    assert 0.001 < added.abs().max() < 0.001**0.5 * 6 # six standard deviations
    close(out, l2(net, l1_output_after.value))


def test_20_scan(tiny_model, input):
    ran = []
    handle = tiny_model._module.layer2.register_forward_hook(lambda m, a, o: ran.append(type(o)))
    with tiny_model.scan(input):
        dim = tiny_model.layer1.output.shape[-1]
    handle.remove()
    assert dim == 10 and isinstance(dim, int)
    assert torch.Tensor not in ran # if anything ran, it was on fake tensors


def test_21_gradients(tiny_model, net, input):
    with tiny_model.trace(input):
        # We need to explicitly have the tensor require grad
        # as the model we defined earlier turned off requiring grad.
        tiny_model.layer1.output.requires_grad = True
        # We call .grad on a tensor Proxy to communicate we want to store its gradient.
        # We need to call .save() since .grad is its own Proxy.
        layer1_output_grad = tiny_model.layer1.output.grad.save()
        layer2_output_grad = tiny_model.layer2.output.grad.save()
        # Need a loss to propagate through the later modules in order to have a grad.
        loss = tiny_model.output.sum()
        loss.backward()

    close(layer1_output_grad, net.layer2.weight.sum(0)[None]) # by hand: d sum(W h + b) / dh
    close(layer2_output_grad, torch.ones(1, output_size))


def test_22_edited_gradients(tiny_model, net, input):
    with tiny_model.trace(input):
        # We need to explicitly have the tensor require grad
        # as the model we defined earlier turned off requiring grad.
        tiny_model.layer1.output.requires_grad = True
        tiny_model.layer1.output.grad[:] = 0
        tiny_model.layer2.output.grad = tiny_model.layer2.output.grad * 2
        layer1_output_grad = tiny_model.layer1.output.grad.save()
        layer2_output_grad = tiny_model.layer2.output.grad.save()
        # Need a loss to propagate through the later modules in order to have a grad.
        loss = tiny_model.output.sum()
        loss.backward()

    assert torch.equal(layer1_output_grad.value, torch.zeros(1, hidden_dims))
    close(layer2_output_grad, torch.full((1, output_size), 2.))

    with tiny_model.trace(input): # what is set above goes down
        tiny_model.layer1.output.requires_grad = True
        tiny_model.layer2.output.grad = tiny_model.layer2.output.grad * 2
        layer1_output_grad = tiny_model.layer1.output.grad.save()
        tiny_model.output.sum().backward()
    close(layer1_output_grad, 2 * net.layer2.weight.sum(0)[None])


def test_23_24_early_stopping(tiny_model, net, input, l1):
    ran = []
    handle = net.layer2.register_forward_hook(lambda m, a, o: ran.append(1))
    with tiny_model.trace(input):
        l1_out = tiny_model.layer1.output.save()
        tiny_model.layer1.output.stop()
    close(l1_out, l1)
    assert not ran

    with tiny_model.trace(input):
        l2_out = tiny_model.layer2.output.save()
        tiny_model.layer1.output.stop()
    handle.remove()
    assert not ran
    with pytest.raises(ValueError, match='stop'):
        print("L2 - Output: ", l2_out)


def test_25_26_conditions(tiny_model, input, capsys):
    for seed in range(4):
        torch.manual_seed(seed)
        expected = int(torch.randint(low=-10, high=10, size=(1,)))
        torch.manual_seed(seed)
        with tiny_model.trace(input) as tracer:
            rand_int = torch.randint(low=-10, high=10, size=(1,))
            with tracer.cond(rand_int % 2 == 0):
                tracer.log("Random Integer ", rand_int, " is Even")
            with tracer.cond(rand_int % 2 == 1):
                tracer.log("Random Integer ", rand_int, " is Odd")
        said = capsys.readouterr().out
        assert f'tensor([{expected}])' in said
        assert ('is Even' in said, 'is Odd' in said) == (expected % 2 == 0, expected % 2 == 1)

    with tiny_model.trace(input) as tracer:
        non_rand_int = 8
        with tracer.cond(non_rand_int > 0):
            with tracer.cond(non_rand_int % 2 == 0):
                tracer.log("Rand Int ", non_rand_int, " is Positive and Even")
    said = capsys.readouterr().out
    assert 'Rand Int' in said and '8' in said and 'is Positive and Even' in said

    with tiny_model.trace(input) as tracer: # a condition that the model's values decide, true and false
        total = tiny_model.layer1.output.sum()
        with tracer.cond(total > 1e6):
            never = (total * 1).save()
        with tracer.cond(total < 1e6):
            always = (total * 1).save()
    close(always, tiny_model._module.layer1(input).sum())
    with pytest.raises(ValueError, match='condition'):
        _ = never.value


# 2: bigger

PROMPT = "The Eiffel Tower is in the city of"


def test_27_prints_the_model(llm, gpt2):
    printed = str(llm).splitlines()
    assert printed[0] == 'GPT2LMHeadModel(' and any('(generator)' in line for line in printed)
    assert set(str(gpt2).splitlines()) <= set(printed)


def test_28_ablation(llm, gpt2):
    with llm.trace("The Eiffel Tower is in the city of"):
        # Access the last layer using h[-1] as it's a ModuleList
        # Access the first index of .output as that's where the hidden states are.
        llm.transformer.h[-1].mlp.output[0][:] = 0
        # Logits come out of model.lm_head and we apply argmax to get the predicted token ids.
        token_ids = llm.lm_head.output.argmax(dim=-1).save()

    want = hooked(gpt2, {'transformer.h.11.mlp': torch.zeros_like}, ids(PROMPT)).logits.argmax(-1)
    plain = gpt2(ids(PROMPT)).logits.argmax(-1)
    assert token_ids.shape == (1, 10) and torch.equal(token_ids.value, want) and not torch.equal(want, plain)
    # Apply the tokenizer to decode the ids into words after the tracing context.
    assert llm.tokenizer.decode(token_ids[0][-1]) in WORDS + ['<|end|>', '<|begin|>', '<|unk|>']


def test_the_invoker(llm):
    with llm.trace("hello", invoker_args={"max_length": 10}) as tracer:
        invoker = tracer.invoker
    one = invoker.inputs

    with llm.trace() as tracer:
        with tracer.invoke("hello", max_length=10) as invoker:
            invoker = invoker
    for inputs in (one, invoker.inputs):
        assert any(torch.equal(t, ids('hello')) for t in tensors(inputs))

    with llm.trace(PROMPT, invoker_args={"max_length": 4, "truncation": True}) as tracer:
        logits = llm.lm_head.output.save()
    assert logits.shape == (1, 4, SIZE)


def test_29_batching(llm, gpt2):
    with llm.trace() as tracer:
        with tracer.invoke("The Eiffel Tower is in the city of"):
            # Ablate the last MLP for only this batch.
            llm.transformer.h[-1].mlp.output[0][:] = 0
            # Get the output for only the intervened on batch.
            token_ids_intervention = llm.lm_head.output.argmax(dim=-1).save()
        with tracer.invoke("The Eiffel Tower is in the city of"):
            # Get the output for only the original batch.
            token_ids_original = llm.lm_head.output.argmax(dim=-1).save()

    assert torch.equal(token_ids_original.value, gpt2(ids(PROMPT)).logits.argmax(-1))
    want = hooked(gpt2, {'transformer.h.11.mlp': torch.zeros_like}, ids(PROMPT))
    assert torch.equal(token_ids_intervention.value, want.logits.argmax(-1))
    assert not torch.equal(token_ids_original.value, token_ids_intervention.value)


def test_30_values_cross_invokes(llm, gpt2):
    with llm.trace() as tracer:
        with tracer.invoke("The Eiffel Tower is in the city of"):
            embeddings = llm.transformer.wte.output
        with tracer.invoke("_ _ _ _ _ _ _ _ _ _"):
            llm.transformer.wte.output = embeddings
            token_ids_intervention = llm.lm_head.output.argmax(dim=-1).save()
        with tracer.invoke("_ _ _ _ _ _ _ _ _ _"):
            token_ids_original = llm.lm_head.output.argmax(dim=-1).save()

    assert torch.equal(token_ids_original.value, gpt2(ids('_ ' * 10)).logits.argmax(-1))
    assert torch.equal(token_ids_intervention.value, gpt2(ids(PROMPT)).logits.argmax(-1))
    assert llm.tokenizer.decode(token_ids_original[0][-1]) != llm.tokenizer.decode(token_ids_intervention[0][-1])


@torch.no_grad()
def greedy(model, tokens: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens


def test_31_next(llm, gpt2):
    with llm.generate("The Eiffel Tower is in the city of", max_new_tokens=3):
        token_ids_1 = llm.lm_head.output.argmax(dim=-1).save()
        token_ids_2 = llm.lm_head.next().output.argmax(dim=-1).save()
        token_ids_3 = llm.lm_head.next().output.argmax(dim=-1).save()
        output = llm.generator.output.save()

    want = greedy(gpt2, ids(PROMPT), 3)
    assert want[0, 10:].min() > 0, 'this model ends early: another seed is needed'
    assert torch.equal(output.value, want)
    assert [int(t[0][-1]) for t in (token_ids_1, token_ids_2, token_ids_3)] == want[0, 10:].tolist()
    words = ['<|end|>', '<|begin|>', '<|unk|>', *WORDS]
    assert llm.tokenizer.batch_decode(output.value) == [' '.join(words[i] for i in want[0].tolist())]


def test_32_33_34_editing(llm, gpt2):
    # we take the hidden states with the expected output "Paris"
    with llm.trace("The Eiffel Tower is located in the city of") as tracer: # noqa: F841
        hs11 = llm.transformer.h[11].output[:, -1, :].save()

    # the edited model will now always predict "Paris" as the next token
    with llm.edit() as llm_edited:
        llm.transformer.h[11].output[:, -1, :] = hs11

    # we demonstrate this by comparing the output of an unmodified model...
    with llm.trace("Vatican is located in the city of") as tracer: # noqa: F841
        original_tokens = llm.lm_head.output.argmax(dim=-1).save()

    # ...with the output of the edited model
    with llm_edited.trace("Vatican is located in the city of") as tracer: # noqa: F841
        modified_tokens = llm.lm_head.output.argmax(dim=-1).save()

    paris = gpt2(ids("The Eiffel Tower is located in the city of")).logits[0, -1].argmax()
    rome = gpt2(ids("Vatican is located in the city of")).logits.argmax(-1)
    assert paris != rome[0, -1]
    want = torch.cat([rome[:, :-1], paris[None, None]], 1)
    assert torch.equal(original_tokens.value, rome) and torch.equal(modified_tokens.value, want)

    # we use the hidden state we saved above (hs11)
    with llm.edit(inplace=True) as llm_edited:
        llm.transformer.h[11].output[:, -1, :] = hs11

    # we demonstrate this by comparing the output of an unmodified model...
    with llm.trace("Vatican is located in the city of") as tracer: # noqa: F841
        modified_tokens = llm.lm_head.output.argmax(dim=-1).save()
    assert torch.equal(modified_tokens.value, want)

    llm.clear_edits()
    with llm.trace("Vatican is located in the city of"):
        modified_tokens = llm.lm_head.output.argmax(dim=-1).save()
    assert torch.equal(modified_tokens.value, rome)
    assert torch.equal(llm._module(ids("Vatican is located in the city of")).logits.argmax(-1), rome)


# 3: sessions, on one machine

def test_38_session(llama, plain_llama):
    with llama.session() as session: # noqa: F841
        with llama.trace("The Eiffel Tower is in the city of") as t1: # noqa: F841
            # capture the hidden state from layer 11 at the last token
            hs_79 = llama.model.layers[2].output[:, -1, :] # no .save()
            t1_tokens_out = llama.lm_head.output.argmax(dim=-1).save()
        with llama.trace("Buckingham Palace is in the city of") as t2: # noqa: F841
            llama.model.layers[1].output[:, -1, :] = hs_79[:]
            t2_tokens_out = llama.lm_head.output.argmax(dim=-1).save()

    kept = {}
    first = hooked(plain_llama, {'model.layers.2': lambda o: kept.update(hidden=o[:, -1])}, ids(PROMPT, True)).logits
    second = hooked(plain_llama, {'model.layers.1': lambda o: torch.cat([o[:, :-1], kept['hidden'][:, None]], 1)},
                    ids("Buckingham Palace is in the city of", True)).logits
    assert torch.equal(t1_tokens_out.value, first.argmax(-1)) and torch.equal(t2_tokens_out.value, second.argmax(-1))
    with pytest.raises(ValueError):
        _ = hs_79.value # it was there for the session alone


def test_39_session_log_and_exit(llama, capsys):
    with llama.session() as session:
        session.log("-- Early Stop --")
        session.exit()
        session.log("never")
    assert '-- Early Stop --' in (said := capsys.readouterr().out) and 'never' not in said


def test_40_looping(llama):
    ran = []
    handle = llama._module.register_forward_hook(lambda m, a, o: ran.append(1))
    with llama.session() as session:
        with session.iter([0, 1, 2]) as item: # noqa: F841
            # define intervention body here ...
            with llama.trace("_"):
                # define interventions here ...
                pass
            with llama.trace("_"):
                # define interventions here ...
                pass
    handle.remove()
    assert len(ran) == 6


def test_41_nested_loops_and_built_ins(llama):
    with llama.session() as session:
        li = nnsight.list()
        [li.append([num]) for num in range(0, 3)] # adding [0], [1], [2] to the list
        li2 = nnsight.list().save()
        # You can create nested Iterator contexts
        with session.iter(li) as item:
            with session.iter(item) as item_2:
                li2.append(item_2)
    assert li2.value == [0, 1, 2] and str(li2) == '[0, 1, 2]'

    with llama.session() as session: # every built-in of the list
        made = {name: getattr(nnsight, name)(*args).save() for name, args in dict(
            bool=[1], bytes=[b'ab'], int=['7'], float=['1.5'], str=[12], complex=[1, 2], bytearray=[b'cd'],
            tuple=[[1, 2]], list=[(3, 4)],
            set=[[5, 5]], dict=[[('a', 6)]]).items()}
    want = dict(bool=True, bytes=b'ab', int=7, float=1.5, str='12', complex=1 + 2j, bytearray=bytearray(b'cd'))
    want |= dict(tuple=(1, 2), list=[3, 4], set={5}, dict={'a': 6})
    assert {k: (type(v.value), v.value) for k, v in made.items()} == {k: (type(v), v) for k, v in want.items()}


def test_42_leaving_a_loop(llama, capsys):
    with llama.session() as session:
        with session.iter([0, 1, 2, 3], return_context=True) as (item, iterator):
            iterator.log(item)
            with iterator.cond(item == 2):
                iterator.exit()
    assert capsys.readouterr().out.split() == ['0', '1', '2']


# We will define a LORA class.
# The LORA class call method operations are simply traced like you would normally do in a .trace.
class LORA(nn.Module):
    def __init__(self, module: Envoy, dim: int, r: int) -> None:
        super().__init__()
        self.r = r
        self.module = module
        self.WA = torch.nn.Parameter(torch.randn(dim, self.r), requires_grad=True).save()
        self.WB = torch.nn.Parameter(torch.zeros(self.r, dim), requires_grad=True).save()

    # The Call method defines how to actually apply the LORA.
    def __call__(self, alpha: float = 1.0):
        # We apply WA to the first positional arg (the hidden states)
        A_x = torch.matmul(self.module.input[0][0], self.WA)
        BA_x = torch.matmul(A_x, self.WB)
        # LORA is additive
        h = BA_x + self.module.output
        # Replace the output with our new one * alpha
        # Could also have been self.module.output[:] = h * alpha, for in-place
        self.module.output = h * alpha

    def parameters(self):
        # Some way to get all the parameters.
        return [self.WA, self.WB]


def lora_by_hand(model, dim: int, r: int, answer: int, seed: int, steps: int, rows: int) -> tuple:
    "The same training in plain torch."
    torch.manual_seed(seed)
    WA, WB = nn.Parameter(torch.randn(dim, r)), nn.Parameter(torch.zeros(r, dim))
    def add(m, args, out): return out + args[0][0][0] @ WA @ WB
    optimizer = torch.optim.AdamW([WA, WB], lr=3)
    for _ in range(steps):
        handle = model.model.layers[-1].mlp.register_forward_hook(add)
        logits = model(ids('_', True).expand(rows, -1)).logits
        handle.remove()
        torch.nn.functional.cross_entropy(logits[:, -1], torch.full((rows,), answer)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return WA.detach(), WB.detach()


def test_43_to_49_a_lora_trains_in_a_session(llama, plain_llama, capsys):
    # We need the token id of the correct answer.
    answer = " Paris"
    answer_token = llama.tokenizer.encode(answer)[1]
    assert answer_token == ids('Paris').item()
    # Inner LORA dimension
    lora_dim = 4
    # Module to train LORA on
    module = llama.model.layers[-1].mlp

    with llama.scan(" "):
        dim = module.output.shape[-1]
    assert dim == 32

    torch.manual_seed(7)
    with llama.session() as session:
        # Create dataset of 100 pairs of a blank prompt and the " Paris " id
        dataset = [["_", answer_token]] * 100
        # Create a dataloader from it.
        dataloader = DataLoader(dataset, batch_size=10)
        # Create our LORA on the last mlp
        lora = LORA(module, dim, lora_dim)
        # Create an optimizer. Use the parameters from LORA
        optimizer = torch.optim.AdamW(lora.parameters(), lr=3)
        # Iterate over dataloader using .iter.
        with session.iter(dataloader, return_context=True) as (batch, iterator):
            prompt = batch[0]
            correct_token = batch[1] # noqa: F841
            # Run .trace with prompt
            with llama.trace(prompt) as tracer: # noqa: F841
                # Apply LORA to intervention graph just by calling it with .trace
                lora()
                # Get logits
                logits = llama.lm_head.output
                # Do cross entropy on last predicted token and correct_token
                loss = torch.nn.functional.cross_entropy(logits[:, -1], batch[1])
                # Call backward
                loss.backward()
            # Methods of the optimizer: graphs that aren't traces (the session's and the iterator's) run in order.
            optimizer.step()
            optimizer.zero_grad()
            iterator.log(lora.WA)

    assert capsys.readouterr().out.count('Parameter containing') == 10
    WA, WB = lora_by_hand(plain_llama, dim, lora_dim, answer_token, 7, 10, 10)
    trained = [getattr(p, 'value', p) for p in lora.parameters()]
    assert WB.abs().max() > 1 # it was trained
    # ten steps of an optimizer that divides by the gradient's size: differences of float32 sums grow
    for got, want in zip(trained, (WA, WB), strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=1e-3, atol=1e-3)

    # With lora. Should produce "Hello Paris"
    with llama.generate("Hello", max_new_tokens=1) as generator: # noqa: F841
        lora()
        out = llama.generator.output.save()
    assert llama.tokenizer.batch_decode(out.value)[0].endswith('Hello Paris')

    # Then without. Should produce "Hello,"
    with llama.generate("Hello", max_new_tokens=1) as generator: # noqa: F841
        out = llama.generator.output.save()
    assert torch.equal(out.value, greedy(plain_llama, ids('Hello', True), 1))
    assert not llama.tokenizer.batch_decode(out.value)[0].endswith('Paris')
