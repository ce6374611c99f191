"""A server on Ray, on this machine: jobs, replicas that die, endless jobs, keys, turns, the page, and no leftovers."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from transformer_experiments.remote.keys import Keys
from transformer_experiments.remote.clusters import (
    ClusterFacts,
    effective_mode,
    find_faults,
    is_internal_address,
    ray_processes,
)
from transformer_experiments.remote.serving import free_port
from transformer_experiments.tracing import LanguageModel

SECONDS = 4 # that a job may run


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('home')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('TRANSFORMER_EXPERIMENTS_HOME', str(home))
        yield home


@pytest.fixture(scope='module')
def keys(home): return Keys()


@pytest.fixture(scope='module')
def command(home):
    "The server, started as people do. Whatever is left of it at the end is killed."
    from_here = [
        sys.executable,
        '-c',
        'from transformer_experiments.cli import main; main()',
        'serve',
        '-m',
        'tinyshakespeare',
        '--port',
        str(free_port()),
    ]
    command = subprocess.Popen(
        [*from_here, '--threads', str(torch.get_num_threads()), '--limit', f'seconds={SECONDS}'],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    family = []
    try:
        said = []
        while not any('tinyshakespeare at' in line for line in said):
            said.append(command.stdout.readline())
            assert said[-1], ''.join(said)
        command.host = re.search(r'at (http://127.0.0.1:\d+)', said[-1])[1]
        yield command
        family = psutil.Process(command.pid).children(recursive=True) if command.poll() is None else []
    finally:
        command.kill()
        for p in family:
            if p.is_running():
                p.kill()


@pytest.fixture(scope='module')
def host(command): return command.host


@pytest.fixture(scope='module')
def lm(): return LanguageModel('tinyshakespeare')


@pytest.fixture
def key(keys, host, monkeypatch, request):
    "A key of the test's own, which the client uses."
    name = request.node.name
    key = keys.add(name)
    monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_HOST', host)
    monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_API_KEY', key)
    yield key
    if name in {h.name for h in keys.holders().values()}:
        keys.revoke(name)


def process(name: str) -> psutil.Process:
    "The process of a deployment, among our own."
    def command(p):
        try:
            return ' '.join(p.cmdline() or [p.name()])
        except psutil.NoSuchProcess:
            return ''  # children of hosts come and go
    found = [p for p in psutil.Process().children(recursive=True) if f':{name}' in command(p)]
    assert len(found) == 1, found
    return found[0]


def until(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, 'it did not come'
        time.sleep(0.05)
    return found


def short(lm, **options):
    with lm.trace('To be or not', **options) as tracer:
        saved = lm.blocks[3].output[0, -1].save()
    return tracer, saved


def long(lm, n: int = 250, **options): # about two seconds, a step at a time
    with lm.generate('To be or not', max_new_tokens=n, **options) as tracer:
        saved = lm.generator.output.save()
    return tracer, saved


def endless(lm, **options): # one call into C, which gives nobody a turn
    with lm.trace('To be or not', **options) as tracer:
        saved = torch.linalg.svdvals(lm.blocks[0].output.new_ones(6000, 6000)).save()
    return tracer, saved


def test_a_job_gives_what_it_gives_here(lm, key):
    _, here = short(lm)
    _, there = short(lm, remote=True)
    assert torch.equal(here.value, there.value)


def test_a_replica_that_is_killed(lm, key):
    "Its job is run once more, by another, with the same random numbers; of those who waited nobody notices."
    def ask(letter, **options):
        with lm.trace(f'{letter} is here', **options) as tracer:
            saved = lm.blocks[2].output.sum().save()
        return tracer, saved
    torch.manual_seed(1)
    tracer, there = long(lm, remote=True, blocking=False)
    old = until(lambda: tracer.job.status() == 'RUNNING' and process('model tinyshakespeare'))
    others = {letter: ask(letter, remote=True, blocking=False) for letter in 'abcdefgh'}
    old.kill()
    for job in (tracer.job, *(t.job for t, _ in others.values())):
        job.result(timeout=120)
    assert [e['status'] for e in tracer.job.events] == [
        'RECEIVED',
        'QUEUED',
        'RUNNING',
        'QUEUED',
        'RUNNING',
        'COMPLETED',
    ] and process('model tinyshakespeare').pid != old.pid
    torch.manual_seed(1)
    assert torch.equal(long(lm)[1].value, there.value)
    for letter, (_, saved) in others.items():
        assert torch.equal(ask(letter)[1].value, saved.value), letter


def test_a_job_over_its_time(lm, key):
    "It is ended, whatever it is doing, and the next one runs."
    begin = time.monotonic()
    tracer, _ = endless(lm, remote=True, blocking=False)
    after, there = short(lm, remote=True, blocking=False)
    with pytest.raises(TimeoutError, match=f'ran for more than {SECONDS} s'):
        tracer.job.result(timeout=120)
    assert time.monotonic() - begin < SECONDS + 60 # it would never end
    after.job.result(timeout=120)
    assert torch.equal(there.value, short(lm)[1].value)


def test_cancelling_frees_the_replica(lm, key):
    tracer, _ = long(lm, 400, remote=True, blocking=False)
    until(lambda: tracer.job.status() == 'RUNNING')
    tracer.job.cancel()
    begin = time.monotonic()
    short(lm, remote=True)
    assert time.monotonic() - begin < 60 and tracer.job.status() == 'CANCELLED'


def test_a_revoked_key(lm, key, keys, request):
    short(lm, remote=True)
    keys.revoke(request.node.name)
    with pytest.raises(PermissionError, match='revoked'):
        short(lm, remote=True)


def test_keys_take_turns(lm, key, keys, host, monkeypatch):
    first = [long(lm, 60, remote=True, blocking=False)[0].job for _ in range(6)]
    monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_API_KEY', keys.add('another'))
    second = short(lm, remote=True, blocking=False)[0].job
    second.result(timeout=120)
    over = second.events[-1]['time']
    for job in first:
        job.result(timeout=120)
    assert sum(job.events[-1]['time'] > over for job in first) >= 3, 'it waited for all of them'


def test_clients_at_once(lm, key):
    "Each has its own result."
    def ask(i, **options):
        with lm.trace(f'{"abcdefghijklmnopqrst"[i % 20]} is here', **options):
            saved = lm.blocks[0].output.sum().save()
        return saved.value
    with ThreadPoolExecutor(20) as pool:
        there = list(pool.map(lambda i: ask(i, remote=True), range(60)))
    here = [ask(i) for i in range(20)]
    for i, value in enumerate(there):
        assert torch.equal(here[i % 20], value), i


def test_a_large_result(lm, key):
    def large(**options):
        with lm.trace('To be', **options) as tracer:
            saved = (lm.blocks[0].output.sum() + torch.arange(4_000_000.)).save()
        return tracer, saved
    tracer, there = large(remote=True)
    assert torch.equal(there.value, large()[1].value) and tracer.job.events[-1]['size'] > 16_000_000


@contextmanager
def browser(profile):
    options = webdriver.ChromeOptions()
    binary = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if binary:
        options.binary_location = binary
    flags = ('--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking '
             f'--disable-dev-shm-usage --window-size=1200,900 --user-data-dir={profile}')
    for flag in flags.split():
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    chrome = webdriver.Chrome(options=options, service=Service(shutil.which('chromedriver')))
    try:
        yield chrome
    finally:
        chrome.quit()


def test_the_page(lm, key, keys, host, tmp_path):
    "Asks for a key, shows models and one's own jobs, and says when the key isn't good any more."
    tracer, _ = short(lm, remote=True)
    with browser(tmp_path/'profile') as chrome:
        body = lambda: chrome.find_element(By.TAG_NAME, 'body').text
        chrome.get(host)
        field = WebDriverWait(chrome, 10).until(lambda b: b.find_element(By.ID, 'key'))
        field.send_keys(key + '\n')
        WebDriverWait(chrome, 10).until(lambda b: tracer.job.id[:8] in body())
        assert 'tinyshakespeare' in body() and 'COMPLETED' in body() and '2.8 M parameters' in body()
        # longer than the page's pause
        running, waiting = [long(lm, 2000, remote=True, blocking=False)[0] for _ in range(2)]
        WebDriverWait(chrome, 10).until(lambda b: waiting.job.id[:8] in body() and 'RUNNING' in body())
        chrome.find_element(By.XPATH, f'//tr[td/code[text()="{waiting.job.id[:8]}"]]//button[text()="cancel"]').click()
        WebDriverWait(chrome, 10).until(lambda b: 'CANCELLED' in body())
        if where := os.environ.get('SCREENSHOT'):
            chrome.save_screenshot(where)
        assert [e for e in chrome.get_log('browser') if e['level'] == 'SEVERE'] == []
        keys.revoke('test_the_page')
        WebDriverWait(chrome, 10).until(
            lambda b: 'was revoked' in body() and b.find_element(By.ID, 'key').is_displayed()
        )


def test_a_server_process_that_is_killed(lm, key, host):
    "It is back at the same address, and has what it had: results, and jobs that wait."
    tracer, saved = short(lm, remote=True)
    running, _ = long(lm, 400, remote=True, blocking=False)
    waiting, later = short(lm, remote=True, blocking=False)
    until(lambda: running.job.status() == 'RUNNING')
    process('server').kill()
    def back():
        try:
            return httpx.get(f'{host}/health', timeout=1).status_code == 200
        except httpx.TransportError:
            return False
    until(back, 30)
    found = httpx.get(f'{host}/jobs/{tracer.job.id}', headers={'Authorization': f'Bearer {key}'})
    assert found.status_code == 200 and found.json()['status'] == 'COMPLETED'
    waiting.job.result(timeout=120)
    assert torch.equal(later.value, saved.value)
    assert torch.equal(short(lm, remote=True)[1].value, saved.value)


def test_nobody_else_reaches_it(command, host):
    "All ports are on the loopback, a token is wanted, and others get at no file: what is told of a foreign cluster."
    family = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
    words = [word for p in family for word in p.cmdline()]
    session = next(Path(w.partition('=')[2]) for w in words if w.startswith('--session-dir='))
    found, folder = ray_processes(str(session)), session.parent
    assert {'gcs_server', 'raylet', 'worker'} <= {p.name for p in found}
    assert find_faults(ClusterFacts(1, str(folder), effective_mode(folder), True, found)) == []
    listening = {c.laddr.ip for p in family for c in p.net_connections('inet') if c.status == psutil.CONN_LISTEN}
    assert listening and all(is_internal_address(address, 1) for address in listening), listening


def test_no_process_is_left(command, host):
    "SIGTERM ends the server with all of its processes. The last test of this file."
    family = psutil.Process(command.pid).children(recursive=True)
    assert len(family) > 4
    command.send_signal(signal.SIGTERM)
    assert command.wait(30) == 0
    left = psutil.wait_procs(family, timeout=15)[1]
    for p in left:
        p.kill()
    assert left == []
    with pytest.raises(httpx.TransportError):
        httpx.get(f'{host}/health')
