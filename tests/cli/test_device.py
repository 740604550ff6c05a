"""The device of a process, and how batches come to it."""
import pytest
import timm.layers
import torch
from support.processes import LAUNCHER

from timm_sam.cli.device import Process, set_up, to_device


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
