"""Log lines within a batch that takes long."""
import logging

import pytest
import torch

from timm_sam.analyze import progress
from timm_sam.analyze.progress import GRADIENT, Progress


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(progress, 'time', found)
    return found


def test_time_left_is_said_within_a_batch_now_and_then(clock, caplog):
    caplog.set_level(logging.INFO)
    found = Progress(verbose=True)
    found.title = 'Sharpness: a.pth'

    def slow(weights):
        clock.now += 4 if torch.is_grad_enabled() else 2
        return weights

    loss = found.counting(slow)
    found.expect(100, '[   0/2]')
    for _ in range(5):  # 15 of 100 in 20 seconds
        assert loss('w') == 'w'
    assert GRADIENT == 3
    assert [record.getMessage() for record in caplog.records] == ['Sharpness: a.pth  [   0/2]   12 %  Left: 117s']
    with torch.no_grad():
        for _ in range(10):
            loss('w')
    assert [record.getMessage() for record in caplog.records][1:] == ['Sharpness: a.pth  [   0/2]   21 %  Left: 120s']
    found.expect(0, '[   2/2]')
    found.say()
    assert caplog.records[-1].getMessage() == 'Sharpness: a.pth  [   2/2]  100 %  Left: 0s'


def test_other_ranks_say_nothing(clock, caplog):
    caplog.set_level(logging.INFO)
    found = Progress(verbose=False)
    found.expect(10, '')
    clock.now = 100
    found.tick()
    found.say()
    assert not caplog.records
