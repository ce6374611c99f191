"""What tests of the client talk to: a small server of their own in a thread of this process, and a proxy that cuts connections."""
import asyncio
import base64
import hashlib
import json
import socket
import threading
import time
import traceback
from contextlib import contextmanager
from uuid import uuid4

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from transformer_experiments.remote.jobs import JobError, run_job
from transformer_experiments.remote.messages import Job, tree_hash, unpack

KEY = 'te-0123456789abcdef'


class Jobs:
    "Jobs run one after the other in a thread, as on a replica."
    def __init__(self, models: dict, small: int = 64_000, most: int = 1 << 30):
        self.models, self.small, self.most, self.jobs, self.numbers, self.posts = models, small, most, {}, {}, 0
        self.lock, self.hold, self.trees = threading.Lock(), threading.Event(), {}
        self.hold.set()  # cleared: jobs wait before they run

    def say(self, job: dict, status: str, **more):
        job['events'].append(dict(n=len(job['events']) + 1, status=status, time=time.time(), **more))

    def submit(self, data: bytes, number: str) -> dict:
        if number not in self.numbers:
            job = self.numbers[number] = self._new()
            threading.Thread(target=self.run, args=(job, data), daemon=True).start()
        return self.numbers[number]

    def _new(self) -> dict:
        job = dict(id=uuid4().hex, events=[], cancelled=False)
        self.jobs[job['id']] = job
        self.say(job, 'RECEIVED')
        self.say(job, 'QUEUED', position=1)
        return job

    def run(self, job: dict, data: bytes):
        while not self.hold.wait(0.02):
            if job['cancelled']: return self.say(job, 'CANCELLED')
        with self.lock:
            self.say(job, 'RUNNING')
            try: result = run_job(self.models, data, emit=lambda status, text: self.say(job, status, text=text))
            except JobError as e: return self.say(job, 'ERROR', text=str(e), type=e.kind)
            except Exception as e:
                traceback.print_exc()
                return self.say(job, 'ERROR', text=f'{type(e).__name__}: {e}')
        job['result'] = result
        small = dict(data=base64.b64encode(result).decode()) if len(result) <= self.small else {}
        self.say(job, 'COMPLETED', size=len(result), **small)

    def refuse(self, data: bytes):
        job, _ = unpack(data, Job)
        for m in job.models:
            if m.name not in self.models: return 404, f"no model {m.name!r} is served here; these are: {', '.join(self.models)}"
            if m.tree != tree_hash(self.models[m.name]._root): return 409, f"the model {m.name!r} of this server is built otherwise than yours"


def over(job: dict) -> bool: return job['events'][-1]['status'] in ('COMPLETED', 'ERROR', 'CANCELLED')


async def stream(job: dict, after: int):
    while True:
        new = [e for e in job['events'] if e['n'] > after]
        for e in new: yield f"id: {e['n']}\ndata: {json.dumps(e)}\n\n"
        after = max([after, *(e['n'] for e in new)])
        if over(job) and after == len(job['events']): return
        await asyncio.sleep(0.002)


def make_app(jobs: Jobs) -> FastAPI:
    app = FastAPI()

    @app.middleware('http')
    async def auth(request: Request, go_on):
        if request.headers.get('Authorization') != f'Bearer {KEY}': return JSONResponse({'error': "this key isn't known here, or was revoked"}, 401)
        return await go_on(request)

    def state(job: dict, after: int = 0) -> dict:
        return dict(id=job['id'], status=job['events'][-1]['status'], events=[e for e in job['events'] if e['n'] > after])

    @app.post('/jobs')
    async def post(request: Request):
        if int(request.headers['Content-Length']) > jobs.most: return JSONResponse({'error': f"a job of at most {jobs.most:,} bytes is taken here"}, 413)
        data = await request.body()
        jobs.posts += 1
        try: refused = jobs.refuse(data)
        except ValueError as e: refused = 400, str(e)
        if refused: return JSONResponse({'error': refused[1]}, refused[0])
        job = jobs.submit(data, request.headers['Idempotency-Key'])
        if 'respond-async' in request.headers.get('Prefer', ''): return JSONResponse(state(job), 202, {'X-Job-Id': job['id']})
        return StreamingResponse(stream(job, 0), media_type='text/event-stream', headers={'X-Job-Id': job['id']})

    @app.get('/jobs/{id}/events')
    async def events(id: str, after: int = 0): return StreamingResponse(stream(jobs.jobs[id], after), media_type='text/event-stream')

    @app.get('/jobs/{id}')
    async def status(id: str, after: int = 0): return state(jobs.jobs[id], after)

    @app.delete('/jobs/{id}')
    async def cancel(id: str):
        jobs.jobs[id]['cancelled'] = True
        return state(jobs.jobs[id])

    @app.get('/jobs/{id}/result')
    async def result(id: str, request: Request):
        data = jobs.jobs[id]['result']
        tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        start = int(request.headers.get('Range', 'bytes=0-').removeprefix('bytes=').rstrip('-'))
        jobs.jobs[id].setdefault('fetched', []).append(start)
        return Response(data[start:], 206 if start else 200, {'ETag': tag}, 'application/octet-stream')

    return app


@contextmanager
def served(app: FastAPI):
    "Its address."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen(64)
        server = uvicorn.Server(uvicorn.Config(app, log_level='warning', lifespan='off'))
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[s]), daemon=True)
        thread.start()
        end = time.monotonic() + 20
        while not server.started and time.monotonic() < end: time.sleep(0.01)
        try: yield f'http://127.0.0.1:{s.getsockname()[1]}'
        finally:
            server.should_exit = True
            thread.join(10)


@contextmanager
def cutting(host: str, after: list):
    "A proxy before a server. Each connection is cut when so many bytes of answers have gone through it; None, and all that come later: never."
    port, made, over = int(host.rpartition(':')[2]), [], threading.Event()

    def pump(source, target, allowance):
        left = allowance
        try:
            while data := source.recv(65536):
                if left is not None:
                    data, left = data[:left], left - len(data[:left])
                target.sendall(data)
                if left == 0: break
        except OSError: pass
        for s in (source, target):
            try: s.shutdown(socket.SHUT_RDWR)
            except OSError: pass

    def serve(listener):
        while not over.is_set():
            try: client, _ = listener.accept()
            except OSError: return
            allowance = after[len(made)] if len(made) < len(after) else None
            made.append(allowance)
            server = socket.create_connection(('127.0.0.1', port))
            threading.Thread(target=pump, args=(client, server, None), daemon=True).start()
            threading.Thread(target=pump, args=(server, client, allowance), daemon=True).start()

    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen(64)
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        try: yield f'http://127.0.0.1:{listener.getsockname()[1]}', made
        finally: over.set()


def same(a: object, b: object) -> bool:
    "Bit for bit, at any depth."
    a, b = getattr(a, 'value', a), getattr(b, 'value', b)
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) and type(a) is type(b)
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if type(a).__name__ == 'DynamicCache': return type(a) is type(b) and all(same([x.keys, x.values], [y.keys, y.values]) for x, y in zip(a.layers, b.layers, strict=True))
    if hasattr(a, 'keys'): return type(a) is type(b) and list(a.keys()) == list(b.keys()) and all(same(a[k], b[k]) for k in a.keys())
    return type(a) is type(b) and a == b
