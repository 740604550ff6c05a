"""How a rank of several ends, and how all of them stop together."""
import argparse

import pytest
import torch
from support.processes import run, torchrun

from timm_sam.cli.device import Process
from timm_sam.cli.errors import OptionError
from timm_sam.cli.processes import check_launcher
from timm_sam.training.preemption import Preemption

FAILING = '''
"""train.py or validate.py, of which one rank fails while the other waits for it."""
import signal
import sys
import time

import torch

from timm_sam import {script}
from timm_sam.cli.errors import OptionError


def fail_or_wait(*args):
    if torch.distributed.get_rank() == {rank}:
        raise {error}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # so that torchrun need not wait until it may kill
    time.sleep(10_000)


torch.distributed.destroy_process_group = lambda *args: time.sleep(10_000)  # as nccl's, which waits for the others
{script}.{function} = fail_or_wait
sys.exit({script}.main({arguments}))
'''


@pytest.mark.parametrize('script, function, rank, error, code', [
    ('train', 'fit', 1, 'RuntimeError("out of order")', 1),
    pytest.param('validate', 'one_or_bulk', 0, 'RuntimeError("out of order")', 1, marks=pytest.mark.slow),
    pytest.param('train', 'fit', 1, 'OptionError("--flag out of order")', 2, marks=pytest.mark.slow)])
def test_failing_rank_says_why_and_ends_without_waiting_for_the_others(
        script, function, rank, error, code, base, image_folder, tmp_path):
    arguments = base.split() if script == 'train' else [
        '--device', 'cpu', '--model', 'test_resnet', '--data-dir', str(image_folder)]
    path = tmp_path / 'failing.py'
    path.write_text(FAILING.format(
        script=script, function=function, rank=rank, error=error, arguments=arguments))
    done = run(torchrun(path), tmp_path)  # a rank that waits for the others never ends
    assert done.code == 1 and f'exitcode  : {code}' in done.err
    ours = done.err.split('torch/distributed/elastic')[0]  # torchrun has a traceback of its own
    if code == 1:
        assert 'Traceback' in ours and 'RuntimeError: out of order' in ours
    else:
        assert f'{script}.py: error (rank 1): --flag out of order' in ours and 'Traceback' not in ours


class Event:
    """What an accelerator's event does on rank 1: it waits until rank 0 has gone as far as rank 1 needs it."""

    def __init__(self, hosts):
        self.hosts = hosts

    def record(self):
        self.update = self.hosts.now[self.hosts.asking]

    def synchronize(self):
        if self.hosts.asking == 1:
            # rank 1's device has finished this update: so rank 0 has taken part in it, after the question before it
            self.hosts.catch_up(self.update - 1)


class Hosts:
    """Two ranks on accelerators; rank 1's host is as far ahead as it can be."""

    def __init__(self, monkeypatch, noticed_by, after):
        store = torch.distributed.HashStore()
        monkeypatch.setattr(torch.distributed.distributed_c10d, '_get_default_store', lambda: store)
        monkeypatch.setattr(torch, 'get_device_module', lambda device: argparse.Namespace(Event=lambda: Event(self)))
        self.ranks = [Preemption(Process(torch.device('cuda'), rank, rank, 2, True)) for rank in range(2)]
        self.now, self.asking, self.stopped = [0, 0], 1, [None, None]
        self.noticed_by, self.after = noticed_by, after

    def update(self, rank):
        self.now[rank] += 1
        before, self.asking = self.asking, rank
        if rank == self.noticed_by and self.now[rank] >= self.after:
            self.ranks[rank].noticed = True
        if self.ranks[rank].should_stop(self.now[rank]) and self.stopped[rank] is None:
            self.stopped[rank] = self.now[rank]
        self.asking = before

    def catch_up(self, update):
        while self.now[0] < update:
            self.update(0)

    def close(self):
        for rank in reversed(self.ranks):
            rank.close()


@pytest.mark.parametrize('noticed_by', [0, 1])
@pytest.mark.parametrize('after', [1, 2, 3, 7])
def test_ranks_stop_after_the_same_update_though_hosts_run_ahead_of_devices(monkeypatch, noticed_by, after):
    hosts = Hosts(monkeypatch, noticed_by, after)
    try:
        for _ in range(30):
            hosts.update(1)
            if hosts.stopped[1]:
                break
        hosts.catch_up(hosts.now[1])  # rank 0 cannot do more: its updates need rank 1
    finally:
        hosts.close()
    assert hosts.stopped[0] == hosts.stopped[1] is not None
    assert hosts.stopped[0] <= after + 8


# What launchers say

@pytest.mark.parametrize('said, words', [
    ({'SLURM_NTASKS': '4', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'},
     ['SLURM_NTASKS=4', '4 processes', 'MASTER_ADDR, MASTER_PORT are not set', 'srun']),
    ({'SLURM_NTASKS': '4', 'SLURM_PROCID': '1', 'MASTER_ADDR': 'node1'}, ['MASTER_PORT is not set']),
    ({'SLURM_NTASKS': '4', 'MASTER_ADDR': 'node1', 'MASTER_PORT': '29500'}, ['RANK, WORLD_SIZE are not set', 'unset']),
    ({'WORLD_SIZE': '2'}, ['WORLD_SIZE=2', 'MASTER_ADDR, MASTER_PORT, RANK are not set', 'torchrun']),
    ({'WORLD_SIZE': 'two'}, ['WORLD_SIZE=two', 'no number']),
    ({'WORLD_SIZE': '2', 'RANK': ''}, ['RANK=', 'no number']),
    ({'WORLD_SIZE': '2', 'RANK': '2', 'MASTER_ADDR': 'node1', 'MASTER_PORT': '29500'},
     ['RANK=2', 'no rank of 2 processes (WORLD_SIZE)', 'set it to 0 to 1']),
    ({'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': 'node1', 'MASTER_PORT': '0'}, ['MASTER_PORT=0', '1 to 65535']),
    ({'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': 'node1', 'MASTER_PORT': '99999'}, ['MASTER_PORT=99999']),
])
def test_launcher_that_leaves_something_out_is_one_line(said, words, run_in, tmp_path, monkeypatch):
    for name in ('MASTER_ADDR', 'MASTER_PORT', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', *said):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError) as error:
        check_launcher()
    assert [word for word in words if word not in str(error.value)] == []
    if 'SLURM_NTASKS' in said:  # of which the runs of these tests leave what is set
        done = run_in(tmp_path)
        assert done.code == 2 and 'SLURM_NTASKS=4' in done.last_line and 'Traceback' not in done.err
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('said', [
    {}, {'WORLD_SIZE': '1'}, {'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'},
    {'SLURM_NTASKS': '2', 'SLURM_PROCID': '0', 'MASTER_ADDR': 'node1', 'MASTER_PORT': '29500'},
    {'WORLD_SIZE': '2', 'RANK': '1', 'LOCAL_RANK': '1', 'MASTER_ADDR': 'node1', 'MASTER_PORT': '29500'}])
def test_launcher_that_says_enough_is_taken(said, monkeypatch):
    for name in ('MASTER_ADDR', 'MASTER_PORT', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'SLURM_NTASKS', 'SLURM_PROCID'):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    check_launcher()
