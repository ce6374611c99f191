"""A server for tests of the client: the app in a thread of this process, which runs one job at a time, and a proxy that
cuts connections."""
import socket
import threading
import time
from contextlib import contextmanager

import torch
import uvicorn

from transformer_experiments.remote.limits import Limits
from transformer_experiments.remote.running import run_job
from transformer_experiments.remote.messages import tree_hash
from transformer_experiments.remote.queue import JobTable
from transformer_experiments.remote.runners import ThreadRunner
from transformer_experiments.remote.server import ServedModel, make_app

KEY = 'te-0123456789abcdef'


class Keys:
    "One key."
    def name_of(self, key: str) -> str | None: return 'tester' if key == KEY else None


class Served:
    "An ASGI app: the server, with all models in one place. While `hold` is cleared, jobs wait before they run."
    def __init__(self, models: dict, **limits):
        self.models, self.asked, self.hold, limits = {}, [], threading.Event(), Limits(**limits)
        self.hold.set()
        self.place, self.listed = {}, {}
        for name, model in models.items():
            self.add(name, model)
        self.table = JobTable(ThreadRunner({'here': self.place}, limits, run=self._run), limits)
        self.app = make_app(self.table, Keys(), self.listed, limits)

    def add(self, name: str, model):
        self.place[name], self.listed[name] = model, ServedModel(name, 'here', tree_hash(model._root))

    @property
    def jobs(self) -> dict: return self.table.jobs

    def _run(self, models, message, limits, say, stop):
        while not self.hold.wait(0.02):
            if stop.is_set(): break
        return run_job(models, message, limits, say, stop)

    async def __call__(self, scope, receive, send):
        if scope['type'] == 'http':
            self.asked.append((scope['method'], scope['path'], dict(scope['headers']).get(b'range', b'').decode()))
        await self.app(scope, receive, send)


@contextmanager
def served(app):
    "Its address."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen(64)
        server = uvicorn.Server(uvicorn.Config(app, log_level='warning', lifespan='off'))
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[s]), daemon=True)
        thread.start()
        end = time.monotonic() + 20
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        try:
            yield f'http://127.0.0.1:{s.getsockname()[1]}'
        finally:
            server.should_exit = True
            thread.join(10)


@contextmanager
def cutting(host: str, after: list):
    """A proxy before a server, which cuts each connection after so many bytes of answers.

    None stands for never, and so do connections beyond the list."""
    port, made, ends, over = int(host.rpartition(':')[2]), [], [], threading.Event()

    def pump(source, target, allowance):
        left = allowance
        try:
            while data := source.recv(65536):
                if left is not None:
                    data, left = data[:left], left - len(data[:left])
                target.sendall(data)
                if left == 0: break
        except OSError:
            pass
        for s in (source, target):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def serve(listener):
        while not over.is_set():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            allowance = after[len(made)] if len(made) < len(after) else None
            made.append(allowance)
            server = socket.create_connection(('127.0.0.1', port))
            ends.extend([client, server])
            threading.Thread(target=pump, args=(client, server, None), daemon=True).start()
            threading.Thread(target=pump, args=(server, client, allowance), daemon=True).start()

    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen(64)
        listener.settimeout(0.05)
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield f'http://127.0.0.1:{listener.getsockname()[1]}', made
        finally:
            over.set()
            thread.join()
            for s in ends:
                s.close()


def same(a: object, b: object) -> bool:
    "Bit for bit, at any depth."
    a, b = getattr(a, 'value', a), getattr(b, 'value', b)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) and type(a) is type(b)
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if type(a).__name__ == 'DynamicCache':
        return type(a) is type(b) and all(
            same([x.keys, x.values], [y.keys, y.values]) for x, y in zip(a.layers, b.layers, strict=True)
        )
    if hasattr(a, 'keys'):
        return type(a) is type(b) and list(a.keys()) == list(b.keys()) and all(same(a[k], b[k]) for k in a.keys())
    return type(a) is type(b) and a == b
