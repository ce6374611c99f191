"""Recordings that are killed, meet a full disk, or are written twice at once; and what they hold of other models."""

import errno
import os
import random
import signal

import pytest
import torch
import transformers as T
from kills import contents, preload, random_kill, start

from transformer_experiments.accessors import ActivationLocationType as A
from transformer_experiments.accessors import HFModelContext, TinyShakespeareModelContext
from transformer_experiments.common.activation_store import MANIFEST, ActivationStore, StoreWriter
from transformer_experiments.experiments.recording import Recording, record
from transformer_experiments.models.moe_transformer import MoETransformerConfig
from transformer_experiments.moe import MoEConfig
from transformer_experiments.tracing import LanguageModel

KILLS = int(os.environ.get('KILLS', 6))
preload('transformer_experiments.experiments.recording', 'transformers.models.llama.modeling_llama')
NAMES = ['resid.post_mlp', 'attn.v_out', 'attn.qk_probs']



def llama():
    torch.manual_seed(0)
    return T.LlamaForCausalLM(T.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64)).eval()


def mixture():
    torch.manual_seed(0)
    moe = MoEConfig(24, 20, 4, capacity='switch', capacity_factor=.6, normalize=False, top_k=1, router='switch')
    return MoETransformerConfig(64, 24, 3, 3, 0., moe=moe, moe_layers=(0, 2)).build(60).eval()


def texts(n=200):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(60, (1 + i * 7 % 40,), generator=generator) for i in range(n)]


def run(folder): record(llama(), texts(), folder, NAMES, batch_tokens=128, shard_bytes=100_000, progress=False)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('recording') / 'whole'
    process = start(run, folder)
    process.join(300)
    assert process.exitcode == 0
    return contents(folder)


def test_a_killed_recording_ends_in_the_same_bytes(tmp_path, whole):
    "Killed while a random one of the missing files is written, and resumed."
    rng = random.Random(0)
    for _ in range(KILLS):
        process = start(run, tmp_path / 'a', kill=random_kill(rng, tmp_path / 'a', len(whole) - 1, MANIFEST))
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
    process = start(run, tmp_path / 'a')
    process.join(300)
    assert process.exitcode == 0
    assert contents(tmp_path / 'a') == whole


def test_a_full_disk_and_a_second_writer(tmp_path, whole):
    process = start(run, tmp_path / 'a', largest_file=50_000)
    process.join(120)
    assert process.exitcode == 1
    store = ActivationStore.open(tmp_path / 'a')
    with StoreWriter(store), pytest.raises(BlockingIOError) as refused:
        run(tmp_path / 'a')
    assert refused.value.errno == errno.EAGAIN
    run(tmp_path / 'a')
    assert contents(tmp_path / 'a') == whole
    Recording.open(tmp_path / 'a').store.verify()


def test_a_damaged_shard_is_named(tmp_path):
    recording = record(llama(), texts(20), tmp_path, progress=False)
    path = recording.store.path(0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match='shard-00000.safetensors is damaged'):
        Recording.open(tmp_path).site('resid.post_mlp', 1)[:]


def test_padding_takes_no_room_from_the_tokens_of_a_mixture(tmp_path):
    model, some = mixture(), texts(12)
    ctx = TinyShakespeareModelContext(model)
    names = ['router.weights', 'resid.post_mlp']
    recording = record(model, some, tmp_path, names, batch_tokens=300, progress=False)
    for i, text in enumerate(some):
        alone = ctx.run(text, names)
        for location, layer in recording.locations:
            torch.testing.assert_close(recording[location, layer, i], alone[location, layer], rtol=0, atol=1e-5)


def test_the_beginning_of_a_text(tmp_path):
    model = llama()
    some = texts(5)
    recording = record(model, some, tmp_path / 'a', prepend_bos=True, progress=False)
    bos = model.config.bos_token_id
    assert recording.tokens(3).tolist() == [bos, *some[3].tolist()]
    alone = HFModelContext(model).run([bos, *some[3].tolist()], ['resid.post_mlp'])
    for layer in range(3):
        stored = recording['resid.post_mlp', layer, 3]
        torch.testing.assert_close(stored, alone[A.RESID_POST_MLP, layer], rtol=0, atol=1e-5)
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match='leave out prepend_bos'):
        record(model, some, tmp_path / 'b', prepend_bos=True, progress=False)
    assert not (tmp_path / 'b').exists()


def test_texts_of_a_language_model(tmp_path):
    lm = LanguageModel('tinyshakespeare')
    given = ['O Romeo', 'My kingdom for a horse!']
    recording = record(lm, given, tmp_path, ['logits'], positions='last', progress=False)
    for i, text in enumerate(given):
        with torch.no_grad(), lm.trace(text):
            logits = lm.at('logits').output[0, -1].save()
        torch.testing.assert_close(recording['logits', i][0], logits.value, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match='text 1 has no tokens'):
        record(lm, ['O', ''], tmp_path / 'b', progress=False)
    with pytest.raises(ValueError, match='choose no token'):
        record(lm, ['O'], tmp_path / 'b', positions=[5], progress=False)
