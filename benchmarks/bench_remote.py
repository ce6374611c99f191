"""What `remote=True` costs on this machine, over loopback.

The server is a real one (Ray Serve, in processes of its own) with the shipped model and SmolLM2.

1. One small trace: remote minus local, in turn; the median over many pairs. Goal: at most 20 ms.
2. Eight clients, each a process of its own, that send at once; the same traces back to back in this process, before
   and after. Goal: at least 80% of the local rate.
3. A result of 64 MB: from the moment the job is done until its tensor is there. Goal: at least 300 MB/s.
4. A hundred clients with keys of their own, 20 jobs each, and the replica killed in the middle. Goal: each job ends
   once, with the local result, and nobody else sees it.

    python benchmarks/bench_remote.py
"""
import argparse
import collections
import itertools
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

TEXT = ('In the beginning the universe was created. This has made a lot of people very angry, and has been widely '
        'regarded as a bad move. Many races believe that it was created by some sort of god, and others that there is '
        'nothing to it but a great number of numbers.')


@contextmanager
def server():
    "A server with a key, both only for as long as the block runs. Gives the keys."
    from transformer_experiments.remote.keys import Keys
    from transformer_experiments.remote.serve_config import ServeConfig, parse_place
    from transformer_experiments.remote.serving import free_port, serving
    with tempfile.TemporaryDirectory() as home:
        keys = Path(home)/'keys.json'
        store = Keys(keys)
        os.environ['TRANSFORMER_EXPERIMENTS_API_KEY'] = store.add('bench')
        threads = os.cpu_count()
        places = [parse_place(name, threads=threads) for name in ('tinyshakespeare', 'smollm2')]
        with serving(ServeConfig(places=places, keys=str(keys), port=free_port())) as address:
            os.environ['TRANSFORMER_EXPERIMENTS_HOST'] = address
            yield store


def small(model, **where):
    with model.trace('To be, or not to b', **where):
        out = model.blocks[3].output[:, -1].save()
    return out.value


def overhead(pairs: int):
    from transformer_experiments.tracing import LanguageModel
    model = LanguageModel('tinyshakespeare')
    for _ in range(10):
        small(model)
        small(model, remote=True)
    here, there = [], []
    for _ in range(pairs):
        for times, where in ((here, {}), (there, {'remote': True})):
            before = time.perf_counter()
            value = small(model, **where)
            times.append(time.perf_counter() - before)
    assert value.shape == (1, 192)
    over = statistics.median(b - a for a, b in zip(here, there, strict=True))
    local, remote = statistics.median(here) * 1e3, statistics.median(there) * 1e3
    slow = sorted(there)[int(0.95 * pairs)] * 1e3
    print(f'one small trace: local {local:.1f} ms, remote {remote:.1f} ms (95%: {slow:.1f}); '
          f'over local {over * 1e3:.1f} ms (at most 20) {"ok" if over <= 0.02 else "OVER"}', flush=True)


def large(model, **where):
    with model.trace(TEXT, **where):
        hidden = model.model.layers[15].output[:, -1].save()
        best = model.lm_head.output[:, -1].argmax(-1).save()
    return hidden.value, best.value


def client(folder: str, n: int, ready, go, done):
    "A process: a model without weights, and so many traces."
    import torch
    torch.set_num_threads(1)
    logging.getLogger('transformer_experiments.remote').setLevel('WARNING')
    from transformer_experiments.tracing import LanguageModel
    model = LanguageModel(folder, name='smollm2')
    large(model, remote=True)
    ready.release()
    go.wait()
    for _ in range(n):
        found = large(model, remote=True)
    done.put([t.tolist() for t in found])


def throughput(clients: int, each: int):
    from transformer_experiments.tracing import LanguageModel
    from transformer_experiments.trained_models.smollm2 import smollm2_folder
    model, folder = LanguageModel('smollm2', dispatch=True), str(smollm2_folder())
    context = multiprocessing.get_context('spawn')
    ready, go, done = context.Semaphore(0), context.Event(), context.Queue()
    args = folder, each, ready, go, done
    processes = [context.Process(target=client, args=args, daemon=True) for _ in range(clients)]
    for p in processes:
        p.start()
    for _ in processes:
        ready.acquire(timeout=120)

    def local() -> tuple: # Seconds a trace, and what it gives
        before = time.perf_counter()
        for _ in range(each):
            found = large(model)
        return (time.perf_counter() - before) / each, found
    first, found = local()
    before = time.perf_counter()
    go.set()
    answers = [done.get(timeout=600) for _ in processes]
    remote = (time.perf_counter() - before) / (clients * each)
    second, _ = local()
    for p in processes:
        p.join(30)
    assert all(a == [t.tolist() for t in found] for a in answers), "a remote trace gave other numbers than a local one"
    share, n_tokens = (first + second) / 2 / remote, len(model.tokenizer(TEXT)["input_ids"])
    print(f'{clients} clients at once, SmolLM2, {n_tokens} tokens: {1 / remote:.2f} traces a second, '
          f'back to back here {2 / (first + second):.2f}: '
          f'{share:.0%} (at least 80%) {"ok" if share >= 0.8 else "UNDER"}', flush=True)


def download(times: int):
    import torch
    from transformer_experiments.tracing import LanguageModel
    model, speeds, mb = LanguageModel('tinyshakespeare'), [], 64
    for _ in range(times):
        with model.trace('ROMEO:', remote=True, blocking=False) as tracer:
            out = model.blocks[0].output[0, -1, 0].expand(mb << 18).clone().save() # float32
        while tracer.job.status() not in ('COMPLETED', 'ERROR'):
            time.sleep(0.02)
        before = time.perf_counter()
        tracer.job.result()
        speeds.append(mb * 2**20 / 1e6 / (time.perf_counter() - before))
        assert out.value.shape == (mb << 18,) and torch.equal(out.value[:1], out.value[-1:])
    speed = statistics.median(speeds)
    print(f'a result of {mb} MB: {speed:.0f} MB/s, {min(speeds):.0f} to {max(speeds):.0f} '
          f'(at least 300) {"ok" if speed >= 300 else "UNDER"}', flush=True)


def kill_replica():
    "Kill the process that computes."
    import psutil
    def command(p):
        try:
            return ' '.join(p.cmdline() or [p.name()])
        except psutil.Error:
            return ''  # children of hosts come and go
    children = psutil.Process().children(recursive=True)
    replica, = (p for p in children if ':model tinyshakespeare' in command(p))
    replica.kill()


def status(id: str, key: str) -> int:
    "The HTTP status that the owner of `key` gets for a job."
    import httpx
    url = f'{os.environ["TRANSFORMER_EXPERIMENTS_HOST"]}/jobs/{id}'
    return httpx.get(url, headers={'Authorization': f'Bearer {key}'}).status_code


def jobs_of_all(store, clients: int, each: int) -> tuple[list, float]:
    """Run all clients' jobs, and kill the replica at half. Gives the jobs and the seconds.

    For each job: how it ended, its number or the error's text, its id, its owner's key."""
    import torch
    from transformer_experiments.tracing import CONFIG, LanguageModel
    model, mine, ended = LanguageModel('tinyshakespeare'), threading.local(), itertools.count(1)

    def trace(k: int, **where):
        with model.trace(f'{"abcdefghijklmnopqrst"[k % 20]} is here', **where) as tracer:
            out = model.blocks[2].output[:, -1].save()
        return tracer, out.value

    def one(i: int) -> list:
        mine.key, found = store.add(f'client{i}'), []
        for k in range(i, i + each):
            try:
                tracer, value = trace(k, remote=True)
            except RuntimeError as e:
                found.append(('failed', str(e), None))
            else:
                found.append(('right' if torch.equal(value, here[k % 20]) else 'wrong', k, tracer.job.id))
            if next(ended) == clients * each // 2:
                kill_replica()
        return [(*f, mine.key) for f in found]

    here, before = [trace(k)[1] for k in range(20)], time.perf_counter()
    own_key = mock.patch.object(type(CONFIG), 'api_key', property(lambda self: mine.key))
    with own_key, ThreadPoolExecutor(clients) as pool:
        found = [f for each in pool.map(one, range(clients)) for f in each]
    return found, time.perf_counter() - before


def crowd(store, clients: int, each: int):
    found, seconds = jobs_of_all(store, clients, each)
    jobs = [(id, key) for _, _, id, key in found if id]
    assert status(*jobs[0]) == 200
    some = jobs[::each]
    seen = sum(status(id, key) != 404 for (id, _), (_, key) in zip(some, [*some[1:], some[0]], strict=True))
    counts = collections.Counter(kind for kind, *_ in found)
    complete = len(found) == clients * each == counts['right'] + counts['failed']
    good = complete and len(set(jobs)) == len(jobs) and not seen
    print(f'{clients} clients with {each} jobs each, the replica killed at half: {counts["right"]} right, '
          f'{counts["failed"]} failed with a reason, {counts["wrong"]} wrong, {seen} seen by others, '
          f'{clients * each / seconds:.0f} jobs a second {"ok" if good else "NOT ALL"}', flush=True)
    for text in {text for kind, text, *_ in found if kind == 'failed'}:
        print(f'  failed: {text}')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='a few rounds, to see that it runs')
    quick = parser.parse_args().quick
    logging.getLogger('transformer_experiments.remote').setLevel('WARNING')
    with server() as store:
        overhead(20 if quick else 300)
        throughput(8, 2 if quick else 12)
        download(3 if quick else 15)
        crowd(store, 10 if quick else 100, 20)


if __name__ == '__main__':
    sys.exit(main())
