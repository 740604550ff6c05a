"""Where ranks of one machine wait for each other's connections."""
import json
import socket

import pytest
from support.listening import is_loopback, listening
from support.processes import RANKS, run, torchrun

from timm_sam.cli.processes import stay_on_machine


@pytest.mark.slow
def test_ranks_of_one_machine_listen_on_loopback_only(tmp_path):
    done = run(torchrun('-m', 'support.listening', tmp_path), tmp_path)
    assert done.code == 0, done.err[-3000:]
    for rank in range(RANKS):
        found = json.loads((tmp_path / f'{rank}.json').read_text())
        # two groups of gloo's, that of the processes and that of the evaluation
        assert found['seen'] == [0, 1] and found['total'] == 2 and len(found['during']) >= 2
        assert all(is_loopback(host) for host, port in found['during']), found
        # torchrun's own store waits on all addresses, as docs/guarantees.md says: if it does not any more, that goes
        assert any(not is_loopback(host) for host, port in found['launcher']), found


def test_sockets_that_listen_are_found():
    with socket.create_server(('127.0.0.1', 0)) as here, socket.create_server(('', 0)) as anywhere:
        found = listening()
        assert ('127.0.0.1', here.getsockname()[1]) in found
        assert ('0.0.0.0', anywhere.getsockname()[1]) in found
    assert not is_loopback('0.0.0.0') and not is_loopback('::') and is_loopback('::1')
    assert is_loopback('::ffff:127.0.0.1')


@pytest.mark.parametrize('environment, expected', [
    ({'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2'}, 'lo'),
    ({'WORLD_SIZE': '4', 'LOCAL_WORLD_SIZE': '2'}, None),  # several machines
    ({'WORLD_SIZE': '2'}, None),  # nobody says where the others are
    ({'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'GLOO_SOCKET_IFNAME': 'eth7'}, 'eth7'),
    ({}, None)])
def test_interface_is_set_for_one_machine_and_where_nobody_has_said_another(monkeypatch, environment, expected):
    import os
    monkeypatch.setattr(socket, 'if_nameindex', lambda: [(1, 'lo'), (2, 'eth0')])
    monkeypatch.setattr(os, 'environ', dict(environment))
    stay_on_machine()
    assert os.environ.get('GLOO_SOCKET_IFNAME') == expected
