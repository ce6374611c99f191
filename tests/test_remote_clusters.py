"What an operator of a Ray cluster has left open is told, each thing once, and nothing of a cluster that is closed."
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_experiments.remote.clusters import (
    ClusterFacts,
    OpenCluster,
    RayProcess,
    effective_mode,
    find_faults,
    inspect_cluster,
    is_internal_address,
    warn_of_faults,
)

CLOSED = ClusterFacts(1, '/home/ray/ray', processes=(
    RayProcess('gcs_server', ('127.0.0.1', '::1')), RayProcess('raylet', ('127.0.0.1',)), RayProcess('dashboard', ())))
OPEN = {  # What is left open, and what is said of it
    'token': (lambda f: changed(f, token=False), 'no token is wanted by .*RAY_AUTH_MODE=token'),
    'unknown token': (lambda f: changed(f, token=None), "can't be seen whether .*RAY_AUTH_MODE=token"),
    'ports': (lambda f: changed(f, listens=('0.0.0.0',)), 'gcs_server at 0.0.0.0: .*RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'),
    'IPv6 ports': (lambda f: changed(f, listens=('::',)), 'gcs_server at ::: .*RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'),
    'unknown ports': (lambda f: changed(f, listens=None), "can't be seen at which addresses"),
    'umask': (lambda f: changed(f, umask=0o022), 'umask 022.*`umask 077`'),
    'folder': (lambda f: replace(f, mode=0o755), 'mode 755.*--temp-dir'),
    'unknown folder': (lambda f: replace(f, mode=None), "can't be looked at.*--temp-dir"),
    'owner': (lambda f: replace(f, owner=False), 'belongs to another user.*--temp-dir'),
}


def changed(facts: ClusterFacts, **how) -> ClusterFacts:
    first, *others = facts.processes
    return replace(facts, processes=(replace(first, **how), *others))


def test_nothing_is_said_of_a_closed_cluster():
    assert find_faults(CLOSED) == []
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warn_of_faults(CLOSED)


@pytest.mark.parametrize('what', OPEN)
def test_each_thing_that_is_open_is_told_with_what_closes_it(what):
    opened, said = OPEN[what]
    [fault] = find_faults(opened(CLOSED))
    assert re.search(said, fault, re.DOTALL), fault
    with pytest.warns(OpenCluster, match='started by somebody else'):
        warn_of_faults(opened(CLOSED))


@pytest.mark.parametrize('a, b', list(product(('token', 'ports', 'umask'), ('folder', 'owner'))))
def test_two_things_are_two_warnings(a, b):
    faults = find_faults(OPEN[b][0](OPEN[a][0](CLOSED)))
    assert len(faults) == 2 and all(any(re.search(OPEN[x][1], f) for f in faults) for x in (a, b))


def test_several_machines_need_a_firewall():
    [fault] = find_faults(replace(CLOSED, machines=3, processes=(RayProcess('raylet', ('::',)),)))
    assert 'firewall' in fault and 'OSX' not in fault


ADDRESSES = st.ip_addresses()


@settings(deadline=None, derandomize=True, database=None)
@given(ADDRESSES, st.integers(1, 5))
def test_a_public_address_is_open_and_the_loopback_is_closed(address, machines):
    found = getattr(address, 'ipv4_mapped', None) or address
    assert is_internal_address(str(address), machines) or not found.is_loopback
    private = machines > 1 and not found.is_global
    assert not is_internal_address(str(address), machines) or found.is_loopback or private
    assert not is_internal_address('0.0.0.0', machines) and not is_internal_address('::', machines)
    assert is_internal_address('::ffff:127.0.0.1', machines) and not is_internal_address('::ffff:8.8.8.8', machines)


@pytest.mark.skipif(sys.platform != 'linux', reason='umasks and sockets of processes are read from /proc')
@pytest.mark.parametrize('address, token, umask, n', [('127.0.0.1', 'token', 0o077, 0), ('0.0.0.0', '', 0o077, 2),
                                                      ('127.0.0.1', 'token', 0o027, 1)])
def test_a_process_is_seen_as_it_is(tmp_path, address, token, umask, n):
    os.chmod(tmp_path, 0o700)
    code = f"import socket, time; s = socket.create_server(('{address}', 0)); print(1, flush=True); time.sleep(60)"
    command = [sys.executable, '-c', code, f'--session={tmp_path}/session_1', 'raylet']
    env = {k: v for k, v in os.environ.items() if k != 'RAY_AUTH_MODE'} | ({'RAY_AUTH_MODE': token} if token else {})
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, umask=umask) as child:
        try:
            child.stdout.readline()
            facts = inspect_cluster(str(tmp_path), f'{tmp_path}/session_1')
        finally:
            child.kill()
    facts = replace(facts, mode=0o700)  # wherever pytest's folder is
    [found] = facts.processes
    assert (found.name, set(found.listens), found.token, found.umask) == ('raylet', {address}, bool(token), umask)
    assert len(find_faults(facts)) == n, find_faults(facts)
    assert inspect_cluster(str(tmp_path), f'{tmp_path}/session_2').processes == ()


def test_a_folder_is_as_open_as_what_is_above_it(tmp_path):
    "Ray opens the folder that it gets to everybody; that is harmless where nobody reaches it."
    inner = tmp_path/'above'/'files'
    inner.mkdir(parents=True)
    inner.chmod(0o777)
    base = effective_mode(tmp_path)
    for above, others, group in ((0o700, 0, 0), (0o750, 0, 0o070), (0o701, 0o007, 0), (0o755, 0o007, 0o070)):
        inner.parent.chmod(above)
        through = (0o007 if base & 0o001 else 0) | (0o070 if base & 0o010 else 0)
        assert effective_mode(inner) == 0o700 | (others | group) & through
