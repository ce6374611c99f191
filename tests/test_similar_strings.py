"""Similar strings: a second implementation with numpy, searches that are killed, other models, and bad input."""

import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch
import transformers as T
from kills import contents, die_at, random_kill

from transformer_experiments.accessors import HFModelContext, TinyShakespeareModelContext
from transformer_experiments.common.activation_store import MANIFEST
from transformer_experiments.datasets.tinyshakespeare import TinyShakespeareDataSet
from transformer_experiments.experiments.block_predictions import FLOOR, BlockMixture, approximate, ask, fit_mixture
from transformer_experiments.experiments.similar_strings import Vectors, matched_counts, nearest, nearest_stored
from transformer_experiments.experiments.string_counts import (count_strings, dense_counts, sample_strings,
                                                               strings_of)
from transformer_experiments.experiments.string_states import (RecordedStrings, matching_strings, nearest_strings,
                                                               record_strings)
from transformer_experiments.trained_models import create_model_and_tokenizer

KILLS = int(os.environ.get('KILLS', 4))
context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['transformer_experiments.experiments.similar_strings'])


def cosines(queries, vectors):
    "All of them, by numpy in float64, rounded to float32."
    a, b = (np.asarray(x, np.float64) for x in (queries, vectors))
    lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    return (a @ b.T / np.maximum(lengths, 1e-300)).astype(np.float32)


def clustered(n, d=24, seed=0):
    "Vectors with many near neighbours, some equal, some without a direction."
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n // 20, d, generator=generator)
    x = centres[torch.randint(len(centres), (n,), generator=generator)]
    x = x + .1 * torch.randn(n, d, generator=generator)
    x[n // 2:n // 2 + 30] = x[:30]
    x[7] = 0
    return x


@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
@pytest.mark.parametrize('seed', range(3))
def test_neighbours_are_those_of_a_sort_of_everything(metric, seed):
    vectors = clustered(1500, seed=seed)
    queries = torch.cat([vectors[:60], clustered(60, seed=seed + 10)])
    if metric == 'cosine':
        near = cosines(queries, vectors)
    else:
        a, b = queries.double().numpy(), vectors.double().numpy()
        near = -np.linalg.norm(a[:, None] - b, axis=-1).astype(np.float32)
    k = 25
    rows = np.lexsort((np.broadcast_to(np.arange(len(vectors)), near.shape), -near))[:, :k]
    last = np.take_along_axis(near, rows, 1)[:, -1:]
    for block_rows in (37, 512, 10_000):
        found = nearest(queries, vectors, k, metric, block_rows)
        assert (found.rows.numpy() == rows).all()
        values = found.values.numpy() if metric == 'cosine' else -found.values.numpy()
        assert (values == np.take_along_axis(near, rows, 1)).all()
        assert (found.ties.numpy() == (near >= last).sum(1) - k).all()


def test_counts_of_strings_are_those_of_a_loop():
    rng = random.Random(0)
    for _ in range(60):
        n_vocab, length = rng.choice([1, 2, 7, 60_000]), rng.randint(1, 7)
        text = [rng.randrange(n_vocab) for _ in range(rng.randint(length, 200))]
        table = count_strings(text, length, n_vocab)
        for wanted in range(1, length + 1):
            expected: dict = {}
            for i in range(len(text) - wanted + 1):
                row = expected.setdefault(tuple(text[i:i + wanted]), {})
                for v in text[i + wanted:i + wanted + 1]:
                    row[v] = row.get(v, 0) + 1
            counts = strings_of(table, wanted)
            assert [tuple(s) for s in counts.strings.tolist()] == sorted(expected)
            for i, s in enumerate(sorted(expected)):
                a, b = counts.starts[i:i + 2]
                assert dict(zip(counts.follows[a:b].tolist(), counts.counts[a:b].tolist(), strict=True)) == expected[s]


@pytest.fixture(scope='module')
def shakespeare(tmp_path_factory):
    m, tokenizer = create_model_and_tokenizer()
    text = TinyShakespeareDataSet().text[:150_000]
    counts = sample_strings(strings_of(count_strings(tokenizer.encode(text), 10, tokenizer.vocab_size)), 1500)
    ctx = TinyShakespeareModelContext(m, tokenizer)
    folder = tmp_path_factory.mktemp('strings')
    return RecordedStrings(ctx, counts, record_strings(ctx, counts, folder, progress=False))


def test_the_approximation_of_500_queries_is_the_one_of_numpy(shakespeare, tmp_path):
    every = strings_of(count_strings(shakespeare.ctx.encode(TinyShakespeareDataSet().text[-30_000:]), 10, 65))
    queries = torch.as_tensor(sample_strings(every, 500).strings.astype(int))
    asked = ask(shakespeare, queries)
    mixture = BlockMixture(tuple(range(6)), (.95, .9, .7, .5, .6, .8), (.01, .01, .1, 1.5, 6., .01))
    p, occurrences = approximate(tmp_path/'sums', shakespeare, asked, mixture, batch_rows=128, progress=False)
    N = dense_counts(shakespeare.counts, np.arange(len(shakespeare.counts)))
    u = (N.sum(0) + 1 / 65) / (N.sum() + 1)
    expected = FLOOR * sum(mixture.weights) * u
    for b in range(6):
        near = cosines(asked.states[b], shakespeare.recording.site('resid.delta_mlp', b)[:])
        sums = (near > np.float32(mixture.thresholds[b])) @ N
        assert (occurrences[b].numpy() == sums.sum(1)).all() # the same strings
        expected = expected + mixture.weights[b] * sums
    np.testing.assert_allclose(p, expected / expected.sum(1, keepdims=True), rtol=1e-5, atol=1e-9)
    assert (p.argmax(1).numpy() == expected.argmax(1)).mean() > .998 # ties of float32


def test_answers_depend_neither_on_blocks_nor_on_threads():
    vectors = clustered(3000, d=192)
    counts = strings_of(count_strings(np.random.default_rng(0).integers(40, size=3010), 5))
    counts = sample_strings(counts, 3000)
    vectors, limits, answers = vectors[:len(counts)], [.2, .9, .99], []
    threads = torch.get_num_threads()
    for n, block_rows in ((1, 4096), (2, 700)):
        torch.set_num_threads(n)
        found = matched_counts(vectors[:700], vectors, counts, limits, block_rows=block_rows)
        answers.append((found.sums, found.n, *vars(nearest(vectors[:700], vectors, 9, block_rows=block_rows)).values()))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def search(folder, kill: tuple | None = None):
    if kill:
        die_at(*kill)
    torch.set_num_threads(1)
    vectors = clustered(20_000, d=64)
    nearest_stored(folder, vectors[:2000], vectors, dict(model='none'), k=4, batch_rows=50, progress=False)


def test_a_killed_search_ends_in_the_same_bytes(tmp_path):
    search(tmp_path/'whole')
    whole, rng = contents(tmp_path/'whole'), random.Random(1)
    for i in range(KILLS + 1):
        kill = random_kill(rng, tmp_path/'killed', len(whole) - 1, MANIFEST) if i < KILLS else None
        process = context.Process(target=search, args=(str(tmp_path/'killed'), kill))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill else 0)
    assert contents(tmp_path/'killed') == whole


@pytest.mark.parametrize('location', ['attn.v_out', 'resid.post_mlp', ('resid.delta_attn', 'resid.delta_mlp')])
def test_any_model_and_any_site(location, tmp_path):
    torch.manual_seed(0)
    model = T.GPT2LMHeadModel(T.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=4)).eval()
    counts = strings_of(count_strings(np.random.default_rng(0).integers(30, size=300), 5, n_vocab=30))
    names = [location] if isinstance(location, str) else list(location)
    recorded = RecordedStrings(model, counts, record_strings(model, counts, tmp_path/'s', names, progress=False))
    tokens = torch.as_tensor(counts.strings.astype(int))
    with torch.no_grad():
        run = HFModelContext(model).run(tokens, names)
    by_hand = sum(run[name, 1][:, -1].flatten(1) for name in names)
    assert torch.allclose(recorded.vectors(location, 1).block(0, len(counts)), by_hand, atol=1e-5)
    assert torch.allclose(recorded.states(tokens[:9], location, 1), by_hand[:9], atol=1e-5)
    assert torch.equal(nearest(by_hand[:9], by_hand, 1).rows[:, 0], torch.arange(9))


def test_sums_of_sites_need_one_length():
    with pytest.raises(ValueError, match='one length'):
        Vectors(torch.zeros(3, 2), torch.zeros(4, 2))


def test_a_zero_vector_is_similar_to_nothing():
    vectors = torch.eye(3)
    vectors[1] = 0
    assert nearest(vectors[1:2], vectors, 3).values.abs().max() == 0
    counts = strings_of(count_strings([0, 1, 2, 0], 1))
    assert matched_counts(vectors[1:2], vectors, counts, [0.]).n.item() == 0


def small_gpt2(seed=0):
    torch.manual_seed(seed)
    return T.GPT2LMHeadModel(T.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=4, n_positions=6)).eval()


def test_what_cannot_be_asked_says_why(tmp_path):
    model = small_gpt2()
    counts = strings_of(count_strings(np.random.default_rng(0).integers(30, size=90), 5, n_vocab=30))
    recording = record_strings(model, counts, tmp_path/'s', progress=False)
    recorded = RecordedStrings(model, counts, recording)
    query = counts.strings[:1].tolist()
    for wrong, said in (([[1] * 7], 'has 7 tokens, and'), ([[1] * 6], 'compared with strings of 5'),
                        ([[30] * 5], 'token ids 30 to 30'), ([], 'no queries')):
        with pytest.raises(ValueError, match=said):
            nearest_strings(recorded, wrong, 1)
    with pytest.raises(ValueError, match=r'in block 1 no string is above 1\.5, the best cosine is 1\.0000'):
        matching_strings(recorded, query, 1, 1.5)
    with pytest.raises(ValueError, match='holds activations of'):
        RecordedStrings(small_gpt2(1), counts, recording)
    with pytest.raises(ValueError, match="isn't a recording of the last tokens"):
        RecordedStrings(model, sample_strings(counts, 20), recording)
    with pytest.raises(ValueError, match="holds another run's results"):
        record_strings(model, sample_strings(counts, 20), tmp_path/'s', progress=False)
    with pytest.raises(KeyError, match="resid.post_mlp.1 isn't recorded"):
        nearest_strings(recorded, query, 1, location='resid.post_mlp')


def test_weights_do_not_depend_on_a_vocabulary_that_is_never_used():
    generator = torch.Generator().manual_seed(0)
    sums = torch.randint(0, 5, (2, 40, 3, 12), generator=generator).double()
    target = torch.rand(40, 12, generator=generator).softmax(-1)
    grids = {0: torch.tensor([.1, .2, .3]), 1: torch.tensor([.4, .5, .6])}
    small = fit_mixture(sums, target, grids, np.arange(1., 13))
    wide = torch.nn.functional.pad
    large = fit_mixture(wide(sums, (0, 500)), wide(target, (0, 500)), grids, np.pad(np.arange(1., 13), (0, 500)))
    assert small == large
