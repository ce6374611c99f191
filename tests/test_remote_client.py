"""The client against a server of its own: lost connections, refusals, interrupts and models without weights.

The walkthrough's remote cells give bitwise what they give in this process, random state included."""
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import httpx
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import transformer_experiments.tracing as nnsight
from remote_server import KEY, Served, cutting, same, served
from transformer_experiments.remote import RemoteError, endpoints, remote_jobs
from transformer_experiments.tracing import CONFIG, LanguageModel
from transformer_experiments.tracing.envoy import Envoy
from transformer_experiments.tracing.errors import TraceError

EIFFEL = 'The Eiffel Tower is in the city of'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A small Llama with the words of its tokenizer, as a folder."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ['<|end|>', '<|begin|>', '_', 'Hello', 'Paris', *EIFFEL.split(), 'Buckingham', 'Palace']
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token='_'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(2)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=0,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    )
    where = tmp_path_factory.mktemp('llama')
    llama.save_pretrained(where)
    PreTrainedTokenizerFast(
        tokenizer_object=t, bos_token='<|begin|>', eos_token='<|end|>', unk_token='_'
    ).save_pretrained(where)
    return str(where)


@pytest.fixture(scope='module')
def jobs(folder): return Served({'tinyshakespeare': LanguageModel('tinyshakespeare'), folder: LanguageModel(folder)})


@pytest.fixture(scope='module')
def host(jobs):
    with served(jobs) as host:
        yield host


@pytest.fixture(autouse=True)
def configured(host, monkeypatch, tmp_path):
    monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_HOME', str(tmp_path))
    monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_HOST', host)
    monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_API_KEY', KEY)


@pytest.fixture(scope='module')
def shakespeare(): return LanguageModel('tinyshakespeare')


@pytest.fixture(params=['tinyshakespeare', 'llama'])
def lm(request, shakespeare, folder):
    return shakespeare if request.param == 'tinyshakespeare' else LanguageModel(folder)


def both(write, *args):
    "What `write(remote, ...)` gives here and there, and that both leave the same random state behind."
    torch.manual_seed(5)
    here, state = write(False, *args), torch.get_rng_state()
    torch.manual_seed(5)
    there = write(True, *args)
    assert torch.equal(state, torch.get_rng_state()), 'another random state'
    assert same(here, there), (here, there)
    return there


def blocks(lm): return lm.blocks if lm._name == 'tinyshakespeare' else lm.model.layers


# The walkthrough's cells

def test_a_trace_gives_what_it_gives_here(lm):
    def write(remote):
        with lm.trace(EIFFEL, remote=remote):
            hidden_states = blocks(lm)[-1].output.save()
            output = lm.output.save()
        return hidden_states.value, output.value
    both(write)


def test_the_models_output_itself(lm):
    both(lambda remote: lm.trace(EIFFEL, trace=False, remote=remote))
    both(lambda remote: lm.generate('A', max_new_tokens=3, trace=False, remote=remote))


def test_values_flow_within_a_session(lm):
    def write(remote):
        with lm.session(remote=remote):
            with lm.trace(EIFFEL):
                hs = blocks(lm)[1].output[:, -1, :] # no .save()
                t1 = lm.lm_head.output.argmax(dim=-1).save()
            with lm.trace('Buckingham Palace is in the city of'):
                blocks(lm)[1].output[:, -1, :] = hs[:]
                t2 = lm.lm_head.output.argmax(dim=-1).save()
        return t1.value, t2.value
    both(write)


def test_a_session_that_ends_at_once(lm, capsys):
    with lm.session(remote=True) as session:
        session.log('-- Early Stop --')
        session.exit()
    said = capsys.readouterr().err
    for line in ('RECEIVED', 'QUEUED', 'RUNNING', 'LOG: -- Early Stop --', 'COMPLETED'):
        assert f'{session.job.id} - {line}' in said


def test_loops(lm):
    with lm.session(remote=True) as session:
        with session.iter([0, 1, 2]):
            with lm.trace('A'):
                pass
            with lm.trace('A'):
                pass

    def write(remote):
        with lm.session(remote=remote) as session:
            li = nnsight.list()
            [li.append([num]) for num in range(0, 3)]
            li2 = nnsight.list().save()
            with session.iter(li) as item:
                with session.iter(item) as item_2:
                    li2.append(item_2)
        return li2.value
    assert both(write) == [0, 1, 2]


def test_a_loop_that_ends_early(lm, capsys):
    with lm.session(remote=True) as session:
        with session.iter([0, 1, 2, 3], return_context=True) as (item, iterator):
            iterator.log(item)
            with iterator.cond(item == 2):
                iterator.exit()
    said = capsys.readouterr().err
    assert [f'LOG: {i}\n' in said for i in range(4)] == [True, True, True, False]


class LORA(nn.Module):
    def __init__(self, module: Envoy, dim: int, r: int) -> None:
        super().__init__()
        self.r = r
        self.module = module
        self.WA = torch.nn.Parameter(torch.randn(dim, self.r), requires_grad=True).save()
        self.WB = torch.nn.Parameter(torch.zeros(self.r, dim), requires_grad=True).save()

    def __call__(self, alpha: float = 1.0):
        A_x = torch.matmul(self.module.input[0][0], self.WA)
        BA_x = torch.matmul(A_x, self.WB)
        h = BA_x + self.module.output
        self.module.output = h * alpha

    def parameters(self): return [self.WA, self.WB]


def test_training_a_lora(lm): train_lora(lm, lm.tokenizer.encode('P' if lm._name == 'tinyshakespeare' else 'Paris')[-1])


def test_a_language_model_that_knows_paris(jobs):
    lm = LanguageModel('smollm2') # jobs run on copies that share its weights
    jobs.add('smollm2', lm)

    def write(remote):
        with lm.trace(EIFFEL, remote=remote):
            hidden_states = lm.model.layers[-1].output.save()
            output = lm.output.save()
        with lm.session(remote=remote):
            with lm.trace(EIFFEL):
                hs = lm.model.layers[28].output[:, -1, :]
            with lm.trace('Buckingham Palace is in the city of'):
                lm.model.layers[28].output[:, -1, :] = hs[:]
                moved = lm.lm_head.output.argmax(dim=-1).save()
        return hidden_states.value, output['logits'], moved.value
    *_, moved = both(write)
    assert lm.tokenizer.decode(moved[0, -1]) == ' Paris'
    train_lora(lm, lm.tokenizer.encode(' Paris')[-1])
    del jobs.place['smollm2'], jobs.listed['smollm2']


def train_lora(lm, answer_token):
    "The walkthrough's training loop, and generation with what it has trained."
    module = blocks(lm)[-1].ffwd if lm._name == 'tinyshakespeare' else blocks(lm)[-1].mlp
    with lm.scan('A', remote=True):
        dim = module.output.shape[-1]

    def write(remote):
        with lm.session(remote=remote) as session:
            dataset = [['A', answer_token]] * 20
            dataloader = DataLoader(dataset, batch_size=10)
            lora = LORA(module, dim, 4)
            optimizer = torch.optim.AdamW(lora.parameters(), lr=3)
            with session.iter(dataloader, return_context=True) as (batch, iterator):
                prompt = batch[0]
                _ = batch[1]
                with lm.trace(prompt):
                    lora()
                    logits = lm.lm_head.output
                    loss = torch.nn.functional.cross_entropy(logits[:, -1], batch[1])
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                iterator.log(lora.WA)
            noise = torch.randn(3).save()
        with lm.generate('A', max_new_tokens=4, remote=remote):
            lora()
            out = lm.generator.output.save()
        with lm.generate('A', max_new_tokens=4, remote=remote):
            plain = lm.generator.output.save()
        return lora.WA.value, lora.WB.value, noise.value, out.value, plain.value
    wa, *_ = both(write)
    assert isinstance(wa, nn.Parameter) and wa.requires_grad


# What else goes along

def test_random_numbers_are_the_same(lm):
    def write(remote):
        with lm.trace('A', remote=remote):
            blocks(lm)[0].output += torch.randn_like(blocks(lm)[0].output)
            out = lm.lm_head.output.save()
        sampling = {'temperature': 1.} if lm._name == 'tinyshakespeare' else {'do_sample': True}
        with lm.generate('A', max_new_tokens=5, remote=remote, **sampling):
            text = lm.generator.output.save()
        return out.value, text.value
    both(write)


def test_a_loader_with_a_generator(lm):
    def write(remote):
        loader = DataLoader(list(range(8)), shuffle=True, batch_size=2, generator=torch.Generator().manual_seed(1))
        with lm.session(remote=remote) as session:
            seen = nnsight.list().save()
            with session.iter(loader) as batch:
                seen.append(batch)
            noise = torch.randn(2).save()
        return seen.value, noise.value
    both(write)


def test_several_prompts_edits_conditions_and_gradients(lm):
    with lm.edit() as edited:
        blocks(lm)[0].output[:, 0] = 0

    def write(remote):
        with edited.trace(remote=remote) as tracer:
            with tracer.invoke('A'):
                one = edited.lm_head.output.save()
            with tracer.invoke(EIFFEL):
                h = blocks(edited)[1].output
                h.requires_grad_()
                two = edited.lm_head.output.save()
            with tracer.cond(one.sum() > 1e9):
                never = two.sum().save()
            grad = h.grad.save()
            two.sum().backward()
        with pytest.raises(ValueError, match='condition was false'):
            _ = never.value
        with pytest.raises(ValueError, match="wasn't saved"):
            _ = h.value
        return one.value.detach(), two.value.detach(), grad.value
    both(write)


def test_two_models_in_a_session(shakespeare, folder):
    llama = LanguageModel(folder)

    def write(remote):
        with shakespeare.session(remote=remote):
            with shakespeare.trace('A'):
                n = shakespeare.lm_head.output[0, -1].argmax().save()
            with llama.trace('Hello'):
                llama.model.layers[0].output *= n
                logits = llama.lm_head.output.save()
        return n.value, logits.value
    both(write)


def test_a_model_and_its_edited_copy_in_a_session(lm):
    with lm.edit() as edited:
        blocks(lm)[1].output[:] = 0

    def write(remote):
        with lm.session(remote=remote):
            with lm.trace('A'):
                one = lm.lm_head.output.save()
            with edited.trace('A'):
                two = edited.lm_head.output.save()
        return one.value, two.value
    one, two = both(write)
    assert not torch.equal(one, two)


def test_modules_of_ones_own():
    lm = LanguageModel('tinyshakespeare')
    torch.manual_seed(0)
    lm.blocks[1].probe = nn.Sequential(nn.Linear(192, 4), nn.ReLU())

    def write(remote):
        with lm.trace('A', remote=remote):
            return lm.blocks[1].probe(lm.blocks[1].output).save()
    both(lambda remote: write(remote).value)

    class Mine(nn.Module):
        def forward(self, x): return x
    lm.blocks[0].mine = Mine()
    both(lambda remote: write(remote).value) # it isn't named
    def f():
        with lm.trace('A', remote=True):
            lm.blocks[0].mine(lm.blocks[0].output).save()
    raised(f, ValueError, 'Mine', 'register_module')


def test_reports(lm):
    def write(remote):
        with lm.trace(EIFFEL, remote=remote) as tracer:
            blocks(lm)[1].output[:, 1:3] = 0
            lm.lm_head.output.save()
        return [tuple(vars(r).values()) for r in tracer.report]
    assert len(both(write)) == 2


def test_text_of_an_own_tokenizer_is_made_into_tokens_here(shakespeare, jobs):
    class Upper:
        def __init__(self, of): self.of = of
        def encode(self, text): return self.of.encode(text.upper())
        def decode(self, ids): return self.of.decode(ids)
    mine = LanguageModel('tinyshakespeare', tokenizer=Upper(shakespeare.tokenizer))

    def write(remote):
        with mine.trace('abc', remote=remote):
            return mine.lm_head.output.save()
    both(lambda remote: write(remote).value)


def test_a_model_without_weights_stays_without(folder):
    llama = LanguageModel(folder)
    assert all(p.is_meta for p in llama._module.parameters())
    with llama.trace(EIFFEL, remote=True):
        there = llama.lm_head.output.save()
    with llama.scan(EIFFEL, remote=True):
        shape = llama.lm_head.output.shape
    with llama.generate('Hello', max_new_tokens=2, remote=True):
        llama.generator.output.save()
    with llama.session(remote=True):
        with llama.trace('Hello'):
            llama.lm_head.output.save()
    assert all(p.is_meta for p in llama._module.parameters()) and tuple(shape) == tuple(there.shape)
    with llama.trace(EIFFEL):
        here = llama.lm_head.output.save()
    assert same(here, there)


# Jobs that nobody waits for

def test_not_blocking(shakespeare, jobs):
    state = torch.get_rng_state()
    jobs.hold.clear()
    try:
        with shakespeare.trace('A', remote=True, blocking=False) as tracer:
            logits = shakespeare.lm_head.output.save('logits')
        job = tracer.job
        assert job.status() in ('QUEUED', 'RUNNING') and [e['status'] for e in job.events][:2] == ['RECEIVED', 'QUEUED']
        with pytest.raises(ValueError, match='job.result'):
            _ = logits.value
        with pytest.raises(TimeoutError, match='it goes on'):
            job.result(timeout=0.3)
    finally:
        jobs.hold.set()
    found = job.result(timeout=120)
    assert (
        job.status() == 'COMPLETED'
        and list(found) == ['logits']
        and found['logits'] is logits.value
        and job.result() is found
    )
    assert torch.equal(state, torch.get_rng_state())
    with shakespeare.trace('A'):
        here = shakespeare.lm_head.output.save()
    assert same(here, logits)


def test_a_session_that_nobody_waits_for(shakespeare):
    with shakespeare.session(remote=True, blocking=False) as session:
        with shakespeare.trace('A'):
            shakespeare.lm_head.output.save('logits')
    assert list(session.job.result(timeout=120)) == ['logits']


def test_cancelled(shakespeare, jobs):
    jobs.hold.clear()
    try:
        with shakespeare.trace('A', remote=True, blocking=False) as tracer:
            logits = shakespeare.lm_head.output.save()
        tracer.job.cancel()
        with pytest.raises(RemoteError, match='was cancelled'):
            tracer.job.result(timeout=120)
    finally:
        jobs.hold.set()
    with pytest.raises(ValueError, match='ended with an error'):
        _ = logits.value


INTERRUPTED = '''
import signal
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell has tests in the background ignore it
from transformer_experiments.tracing import LanguageModel
model = LanguageModel('tinyshakespeare')
print('ready', flush=True)
with model.trace('A', remote=True): model.lm_head.output.save()
'''


def test_interrupted_while_waiting(jobs, shakespeare):
    jobs.hold.clear()
    try:
        p = subprocess.Popen(
            [sys.executable, '-c', INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        known = set(jobs.jobs)
        end = time.monotonic() + 60
        while not (new := set(jobs.jobs) - known) and time.monotonic() < end:
            time.sleep(0.05)
        while 'RUNNING' not in (line := p.stderr.readline()): # it follows its job now
            assert line, 'it ended'
        p.send_signal(signal.SIGINT)
        _, said = p.communicate(timeout=120)
        end = time.monotonic() + 10
        while jobs.jobs[[*new][0]].status != 'CANCELLED' and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        jobs.hold.set()
    assert jobs.jobs[[*new][0]].status == 'CANCELLED'
    assert 'KeyboardInterrupt' in said and 'you have interrupted it' in said


# Connections that break

def statuses(job): return [e['status'] for e in job.events]


@pytest.mark.parametrize('after', [[1], [200], [330], [420], [200, 1, 300], [600, 0, 0, 0]])
def test_lost_in_the_middle_of_events(after, host, jobs, shakespeare, monkeypatch):
    with cutting(host, after) as (proxy, made):
        monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_HOST', proxy)
        before = len(jobs.jobs)
        with shakespeare.session(remote=True) as session:
            with session.iter([1, 2, 3, 4, 5], return_context=True) as (item, loop):
                loop.log(item)
            with shakespeare.trace('A'):
                there = shakespeare.lm_head.output.save()
    assert statuses(session.job) == ['RECEIVED', 'QUEUED', 'RUNNING', *['LOG'] * 5, 'COMPLETED'] and [
        e['n'] for e in session.job.events
    ] == list(range(1, 10))
    assert len(jobs.jobs) == before + 1 and len(made) > len(after)
    with shakespeare.trace('A'):
        here = shakespeare.lm_head.output.save()
    assert same(here, there)


@pytest.mark.parametrize('after', [[None, 100_000], [None, 1, 500_000, 0, 200_000]])
def test_lost_in_the_middle_of_a_download(after, host, jobs, shakespeare, monkeypatch):
    monkeypatch.setattr(endpoints, '_pools', {})
    with cutting(host, after) as (proxy, made):
        monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_HOST', proxy)
        limits = httpx.Limits(max_keepalive_connections=0)
        endpoints._pools[os.getpid(), proxy] = httpx.Client(
            base_url=proxy, limits=limits
        )  # a connection for each request, so that the cuts are where the test wants them
        with shakespeare.trace('A', remote=True) as tracer:
            big = (shakespeare.lm_head.output[0, 0, 0].long() * 0 + torch.arange(1_000_000)).save()
    fetched = [
        int(wanted.removeprefix('bytes=').rstrip('-') or 0)
        for method, path, wanted in jobs.asked
        if path == f'/jobs/{tracer.job.id}/result'
    ]
    assert (
        torch.equal(big.value, torch.arange(1_000_000))
        and fetched[0] == 0
        and fetched == sorted(fetched)
        and fetched[-1] > 0
    )


def large(shakespeare):
    "A finished job whose result is downloaded, and the proxies of two tensors in it."
    with shakespeare.trace('A', remote=True, blocking=False) as tracer:
        ones = (shakespeare.lm_head.output[0, 0, 0] * 0 + 1).expand(100_000).clone().save()
        logits = shakespeare.lm_head.output.expand(100, -1, -1).save()
    while tracer.job.status() != 'COMPLETED':
        time.sleep(0.01)
    return tracer.job, ones, logits


def test_large_results_are_the_users_own(shakespeare, monkeypatch, tmp_path):
    "They come through a file: what is done with one changes no other, and no file is left."
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    job, ones, logits = large(shakespeare)
    job.result()
    with shakespeare.trace('A'):
        here = shakespeare.lm_head.output.save()
    assert torch.equal(logits.value, here.value.expand(100, -1, -1)) and not any(
        'result' in p.name for p in tmp_path.rglob('*')
    )
    before = logits.value.clone()
    ones.value.mul_(3)
    assert torch.equal(ones.value, torch.full((100_000,), 3.)) and torch.equal(logits.value, before)
    assert [t.value.untyped_storage().nbytes() for t in (ones, logits)] == [
        400_000,
        before.nbytes,
    ]  # what torch.save of it would write


@pytest.mark.parametrize('at, data', [(0, bytes(8)), (4, b'\xff'), (9, b'\xff'), (-200_000, None)])
def test_a_large_result_that_is_broken(at, data, jobs, shakespeare):
    job, ones, logits = large(shakespeare)
    kept = jobs.jobs[job.id].result
    if data is None: # the end is missing, and the header doesn't know
        kept.file.truncate(kept.size + at)
        kept.size += at
        job.events[-1]['size'] = kept.size
    else:
        kept.file.seek(at)
        kept.file.write(data)
    with pytest.raises(RemoteError, match=f"the result that .* gives for the job {job.id} can't be read"):
        job.result()
    with pytest.raises(ValueError, match="hasn't been asked for its result"):
        _ = ones.value


def test_streams_that_dont_come_through(host, shakespeare, monkeypatch):
    "Something on the way keeps the stream back for longer than the client waits."
    monkeypatch.setattr(endpoints, 'READ_TIMEOUT', 0.5)
    monkeypatch.setattr(endpoints, '_pools', {})
    asked = []
    real = endpoints.Endpoint.ask

    def ask(self, method, path, headers=None, **options):
        asked.append(path.rpartition('/')[2])
        is_stream = path.endswith('/events') or path == '/jobs' and not (headers or {}).get('Prefer')
        if is_stream: return held_back(self.host)
        return real(self, method, path, headers, **options)

    def held_back(host):
        raise httpx.ReadTimeout('nothing came')
    monkeypatch.setattr(endpoints.Endpoint, 'ask', ask)
    with shakespeare.trace('A', remote=True):
        logits = shakespeare.lm_head.output.save()
    assert logits.value.shape[-1] == 65 and asked.count('events') <= 1


def test_the_server_goes_away_for_good(host, jobs, shakespeare, monkeypatch):
    monkeypatch.setattr(endpoints.Reconnect, 'seconds', 1.)
    jobs.hold.clear()
    try:
        with cutting(host, []) as (proxy, _):
            monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_HOST', proxy)
            with shakespeare.trace('A', remote=True, blocking=False) as tracer:
                logits = shakespeare.lm_head.output.save()
        monkeypatch.setattr(endpoints, '_pools', {})
        with pytest.raises(ConnectionError, match=f'{tracer.job.id} may go on'):
            tracer.job.result()
    finally:
        jobs.hold.set()
    tracer.job.server.host = host # it is back
    tracer.job.result(timeout=120)
    assert logits.value.shape[-1] == 65


# What is refused, and what is said

def raised(f, kind, *said):
    "The error, which must be told at the line of this file that wrote it."
    with pytest.raises(kind) as e:
        f()
    for text in said:
        assert text in str(e.value), str(e.value)
    frames = [f.name for f in traceback.extract_tb(e.value.__traceback__) if 'site-packages' not in f.filename]
    assert not any(n in ('send', 'submit', 'ask', 'result', 'follow') for n in frames), frames
    return e.value


def read(model, remote=True):
    with model.trace('A', remote=remote):
        return model.lm_head.output.save()


def test_no_server(shakespeare, monkeypatch):
    monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_HOST', 'http://127.0.0.1:9')
    raised(
        lambda: read(shakespeare),
        ConnectionError,
        'http://127.0.0.1:9',
        'transformer-experiments serve',
        'set_default_host',
    )


def test_something_else_answers(shakespeare, monkeypatch):
    from fastapi import FastAPI
    from fastapi.responses import HTMLResponse, RedirectResponse
    app = FastAPI()
    app.post('/page/jobs')(lambda: HTMLResponse('<h1>Hello</h1>'))
    app.post('/moved/jobs')(lambda: RedirectResponse('https://models.example.org/jobs'))
    with served(app) as other:
        for place, kind, said in (
                ('', ValueError, '404 Not Found. Is that a server'), ('/page', RemoteError, 'not as a server'),
                ('/moved', ValueError, 'to https://models.example.org')):
            monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_HOST', other + place)
            raised(lambda: read(shakespeare), kind, said)


def test_keys(shakespeare, monkeypatch):
    monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_API_KEY', 'te-wrong-wrong-wrong')
    error = raised(lambda: read(shakespeare), PermissionError, 'te-w...', 'keys add', 'set_default_api_key')
    assert 'wrong-wrong' not in str(error)
    monkeypatch.delenv('TRANSFORMER_EXPERIMENTS_API_KEY')
    raised(lambda: read(shakespeare), PermissionError, 'needs an API key', 'set_default_api_key')
    CONFIG.set_default_api_key(KEY)
    read(shakespeare)


def test_unknown_model(shakespeare):
    other = LanguageModel(shakespeare._module, shakespeare.tokenizer, name='llama-9000b')
    raised(lambda: read(other), ValueError, "'llama-9000b'", 'tinyshakespeare')
    raised(lambda: read(LanguageModel(shakespeare._module, shakespeare.tokenizer)), ValueError, 'name=')
    read(LanguageModel(shakespeare._module, shakespeare.tokenizer, name='tinyshakespeare'))


def test_another_architecture(folder):
    other = LanguageModel(
        LlamaForCausalLM(
            LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        ),
        LanguageModel(folder).tokenizer,
        name=folder,
    )
    raised(lambda: read(other), ValueError, 'differently')


def test_another_version(shakespeare, monkeypatch):
    from transformer_experiments.remote import messages
    real = messages.Job.model_dump_json
    monkeypatch.setattr(messages.Job, 'model_dump_json', lambda self: real(self).replace('"version":1', '"version":7'))
    raised(lambda: read(shakespeare), ValueError, 'version 7', 'version 1')


def test_too_large(shakespeare, monkeypatch):
    def much():
        with shakespeare.trace('A', remote=True):
            (shakespeare.lm_head.output.sum() + torch.zeros(1_000_000)).save()

    def much_comes_back():
        with shakespeare.trace('A', remote=True):
            shakespeare.lm_head.output.sum().repeat(1_000_000).save()
    with served(Served({'tinyshakespeare': shakespeare}, bytes_in=100_000, bytes_out=100_000)) as other:
        monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_HOST', other)
        raised(much, ValueError, '100,000 bytes')
        raised(much_comes_back, ValueError, '100,000')


def test_an_error_of_the_graph(lm):
    def write(remote):
        with lm.trace('A', remote=remote):
            blocks(lm)[0].output[:, 99] = 0
    here, there = (
        raised(lambda: write(False), IndexError),
        raised(lambda: write(True), IndexError, 'blocks(lm)[0].output[:, 99] = 0'),
    )
    assert str(here) == str(there)

    def late(remote):
        with lm.session(remote=remote):
            with lm.trace('A'):
                _ = (blocks(lm)[0].output @ torch.ones(3, 3)).save()
    assert str(raised(lambda: late(False), RuntimeError)) == str(raised(lambda: late(True), RuntimeError))


def test_a_function_is_refused_where_it_is_written(shakespeare, jobs):
    before, lines = len(jobs.asked), []

    def my_function(x): return x
    def f():
        with shakespeare.trace('A', remote=True) as tracer:
            tracer.apply(my_function, shakespeare.lm_head.output)
            lines.append('never')
    error = raised(f, TraceError, 'my_function', "torch or einops", 'save()')
    assert traceback.extract_tb(error.__traceback__)[-1].line.startswith('tracer.apply(my_function')

    def g():
        with shakespeare.trace('A', remote=True) as tracer:
            tracer.cache(['lm_head'], to=type('Store', (), {'put': lambda self, *a: None})())
    raised(g, TraceError, 'lambda')
    assert not lines and len(jobs.asked) == before


def test_contexts_that_dont_fit(shakespeare):
    def f():
        with shakespeare.session():
            with shakespeare.trace('A', remote=True):
                pass
    raised(f, ValueError, 'session(remote=True)')
    with shakespeare.session(remote=True):
        with shakespeare.trace('A', remote=True):
            logits = shakespeare.lm_head.output.save() # the flag may stand there, too
    assert logits.value.shape[-1] == 65
    raised(lambda: shakespeare.trace('A', blocking=False), ValueError, 'remote=True')
    raised(lambda: shakespeare.session(blocking=False), ValueError, 'remote=True')


def test_progress_bars(shakespeare, monkeypatch, capsys):
    from tqdm import tqdm
    monkeypatch.setattr(
        remote_jobs, 'bar', lambda total, what: tqdm(total=total, unit='B', unit_scale=True, desc=what, delay=0)
    )
    with shakespeare.trace('A', remote=True):
        (torch.zeros(500_000) + shakespeare.lm_head.output[0, 0, 0]).save()
    said = capsys.readouterr().err
    assert 'Uploading: 100%' in said and 'Downloading: 100%' in said


def test_a_local_trace_needs_none_of_this():
    code = (
        "import sys, transformer_experiments.tracing as t; m = t.LanguageModel('tinyshakespeare')\n"
        "with m.trace('A'): x = m.lm_head.output.save()\n"
        "remote = {'transformer_experiments.remote', 'transformer_experiments.remote.sending'}\n"
        "print(sorted((remote | {'httpx', 'pydantic', 'fastapi', 'ray'}) & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    )


def test_nothing_is_kept(shakespeare):
    import weakref
    with shakespeare.trace('A', remote=True) as tracer:
        x = shakespeare.lm_head.output.save()
    ref = weakref.ref(x.value)
    del tracer, x
    gc.collect()
    assert ref() is None
