"""The device of a process, and how batches come to it."""
import argparse
import socket

import pytest
import timm.layers
import torch
from support.processes import LAUNCHER

from timm_sam.cli.device import Process, set_up, to_device
from timm_sam.cli.errors import OptionError, report
from timm_sam.cli.rules import apply, device_is_there


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_the_only_one():
    place = set_up('cpu')
    assert place == Process(torch.device('cpu'), rank=0, local_rank=0, world_size=1, distributed=False)
    assert place.primary and not Process(torch.device('cpu'), rank=1, world_size=2, distributed=True).primary


def test_fast_norm_is_for_the_process():
    before = timm.layers.is_fast_norm()
    try:
        timm.layers.set_fast_norm(False)
        set_up('cpu')
        assert not timm.layers.is_fast_norm()
        set_up('cpu', fast_norm=True)
        assert timm.layers.is_fast_norm()
    finally:
        timm.layers.set_fast_norm(before)


def test_floats_of_a_batch_take_the_type_and_nothing_else_does():
    batch = {'patches': torch.zeros(2, 3), 'valid': torch.ones(2, dtype=torch.bool), 'seq_len': 7}
    moved = to_device(batch, torch.device('meta'), torch.float16)
    assert (moved['patches'].dtype, moved['valid'].dtype, moved['seq_len']) == (torch.float16, torch.bool, 7)
    assert moved['patches'].device.type == moved['valid'].device.type == 'meta'
    assert to_device(batch['patches'], torch.device('cpu')).dtype == torch.float32


# Several processes

def launched(monkeypatch, **said):
    for name, value in said.items():
        monkeypatch.setenv(name, str(value))


def test_port_that_is_taken_is_one_line(monkeypatch):
    with socket.create_server(('', 0)) as other:
        port = other.getsockname()[1]
        launched(monkeypatch, RANK=0, WORLD_SIZE=2, MASTER_ADDR='localhost', MASTER_PORT=port)
        with pytest.raises(OptionError, match=f'MASTER_PORT={port} in the environment: .*a port that is free'):
            set_up('cpu')


@pytest.mark.parametrize('said, words', [
    (dict(RANK=2, WORLD_SIZE=4, LOCAL_RANK=2, MASTER_ADDR='node1', MASTER_PORT=29500), 'a process number 2 from 0'),
    # the first one says it too: no other one speaks where the group is not there yet
    (dict(RANK=0, WORLD_SIZE=3, LOCAL_RANK=0, LOCAL_WORLD_SIZE=3, MASTER_ADDR='node1', MASTER_PORT=29500),
     'a process number 2 from 0'),
    (dict(SLURM_NTASKS=4, SLURM_PROCID=3, SLURM_LOCALID=3, MASTER_ADDR='node1', MASTER_PORT=29500), 'number 3 from 0'),
    (dict(WORLD_SIZE='two'), 'WORLD_SIZE=two in the environment is no number'),
])
def test_more_processes_than_devices_are_one_line(monkeypatch, said, words):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    launched(monkeypatch, **said)
    with pytest.raises(OptionError, match=words):
        apply(argparse.Namespace(device='cuda'), device_is_there)


def test_each_process_has_the_device_of_its_place_whatever_index_is_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    launched(monkeypatch, RANK=3, WORLD_SIZE=4, LOCAL_RANK=1, MASTER_ADDR='node1', MASTER_PORT=29500)
    apply(argparse.Namespace(device='cuda:5'), device_is_there)


@pytest.mark.parametrize('place', [0, 1])
def test_mistake_is_told_where_the_first_rank_has_gone_with_the_store(monkeypatch, capsys, place):
    class Gone:
        def check(self, keys):
            raise torch.distributed.DistNetworkError('Connection reset by peer')

        def set(self, key, value):
            raise torch.distributed.DistNetworkError('Connection reset by peer')

    monkeypatch.setattr('timm_sam.cli.errors.in_group', lambda: True)
    monkeypatch.setattr('timm_sam.cli.errors.time.sleep', lambda seconds: None)
    monkeypatch.setattr(torch.distributed.distributed_c10d, '_get_default_store', Gone)
    launched(monkeypatch, RANK=place + 2, LOCAL_RANK=place)
    report('train.py', '--lr 7 is no good')
    assert capsys.readouterr().err == f"train.py: error{' (rank 3)' * place}: --lr 7 is no good\n"
