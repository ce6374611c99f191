"""A cluster of two nodes, here on one machine.

The server is started on it from outside, and by `serve deploy` with the file that the command writes. The replicas, a
CPU each, have to be on both nodes."""
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from ray.cluster_utils import Cluster

from transformer_experiments.remote.keys import Keys
from transformer_experiments.remote.serving import free_port
from transformer_experiments.tracing import LanguageModel

COMMAND = [
    sys.executable,
    '-c',
    'from transformer_experiments.cli import main; main()',
    'serve',
    '-m',
    'tinyshakespeare',
    '--replicas',
    '2',
    '--cpus',
    '1',
    '--threads',
    str(torch.get_num_threads()),
]


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    "Two nodes with a CPU each."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('TRANSFORMER_EXPERIMENTS_HOME', str(tmp_path_factory.mktemp('home')))
        m.setenv('RAY_USAGE_STATS_ENABLED', '0')
        m.setenv('OMP_WAIT_POLICY', 'PASSIVE')
        dashboard = free_port()
        cluster = Cluster(
            initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=True, dashboard_port=dashboard)
        )
        try:
            cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            cluster.dashboard = f'http://127.0.0.1:{dashboard}'
            yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture(scope='module')
def key(cluster): return Keys().add('somebody')


def until(what, seconds: float = 120):
    "Its value, as soon as that is true."
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f'not within {seconds} s'
        time.sleep(0.2)
    return found


def answers(host: str) -> bool:
    try:
        return httpx.get(host + '/health').status_code == 200
    except httpx.HTTPError:
        return False


def replicas(cluster) -> list[psutil.Process]:
    "Of this cluster: other programs of the machine may have a Ray, too."
    found = [(p, p.info['cmdline'] or []) for p in psutil.process_iter(['cmdline', 'ppid'])]
    nodes = {p.pid for p, command in found if f'--gcs-address={cluster.address}' in command}
    title = 'ray::ServeReplica:transformer-experiments:model'
    return [p for p, command in found if p.info['ppid'] in nodes and ' '.join(command).startswith(title)]


def check(cluster, host: str, key: str, monkeypatch):
    "Both replicas, each under a node of its own, answer what this machine does."
    monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_HOST', host)
    monkeypatch.setenv('TRANSFORMER_EXPERIMENTS_API_KEY', key)
    lm = LanguageModel('tinyshakespeare')
    def written(**where):
        with lm.trace('To be', **where):
            lm.blocks[1].output[:, -1] = 0
            out = lm.lm_head.output.save()
        return out.value
    assert all(torch.equal(written(remote=True), written()) for _ in range(4))
    assert len({p.info['ppid'] for p in replicas(cluster)}) == 2


def refused(cluster, port: int) -> str:
    "What the command says that doesn't start a server."
    found = subprocess.run(
        [*COMMAND, '--ray-address', cluster.address, '--port', str(port)], capture_output=True, text=True, timeout=120
    )
    assert found.returncode and 'Traceback' not in found.stderr, found.stderr
    return found.stderr


def test_a_server_on_a_cluster_started_from_outside(cluster, key, monkeypatch):
    port = free_port()
    words = [*COMMAND, '--ray-address', cluster.address, '--port', str(port)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as command:
        try:
            said = []
            while not any('tinyshakespeare at' in line for line in said):
                said.append(command.stdout.readline())
                assert said[-1], ''.join(said)
            host = re.search(r'at (http://[\d.]+:\d+)', said[-1])[1]
            warned = ''.join(line for line in said if 'OpenCluster' in line) # Ray's own defaults leave much open
            assert all(what in warned for what in ('is open to other users', 'umask')), said
            check(cluster, host, key, monkeypatch)
            assert 'runs on this cluster already' in refused(
                cluster, port
            )  # a second one, which must leave the first as it is
            check(cluster, host, key, monkeypatch)
            command.send_signal(
                signal.SIGTERM
            )  # not SIGINT: a shell that starts tests in the background has that ignored
            assert command.wait(60) == 0, command.stdout.read()
        finally:
            command.kill()
    until(lambda: not replicas(cluster) and not answers(host))
    assert f'Serve runs on this cluster already, at 127.0.0.1:{port}' in refused(cluster, free_port())
    assert (
        len([n for n in cluster.list_all_nodes() if n.remaining_processes_alive()]) == 2
    )  # the cluster is somebody else's


def test_serve_deploy_takes_the_file_that_the_command_writes(cluster, key, monkeypatch, tmp_path):
    port, file = free_port(), tmp_path/'server.yaml'
    subprocess.run([*COMMAND, '--port', str(port), '--write-config', str(file)], check=True, capture_output=True)
    ray = Path(sys.executable).parent/'serve'
    subprocess.run(
        [ray, 'shutdown', '-y', '-a', cluster.dashboard], check=True, capture_output=True, timeout=120
    )  # Serve's proxies are at another port
    try:
        subprocess.run(
            [ray, 'deploy', file, '-a', cluster.dashboard], check=True, capture_output=True, text=True, timeout=120
        )
        until(lambda: answers(f'http://127.0.0.1:{port}'))
        check(cluster, f'http://127.0.0.1:{port}', key, monkeypatch)
    finally:
        subprocess.run([ray, 'shutdown', '-y', '-a', cluster.dashboard], capture_output=True, timeout=120)
    until(lambda: not replicas(cluster))
