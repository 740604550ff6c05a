"""The loader's worker processes, where SIGTERM is sent to each process: by Slurm, by systemd."""
import subprocess
import time

import pytest
import torch
from torch.utils.data import DataLoader

from timm_sam.training.workers import dismiss, shield


def told_to_end(seconds):
    """A loader of 8 batches that has given two, and whose worker was then sent SIGTERM, by a third process."""
    others = set(torch.multiprocessing.active_children())  # of runs that ended with an error
    loader = DataLoader(torch.arange(8), batch_size=1, num_workers=1, persistent_workers=True, prefetch_factor=1)
    shield(loader, seconds)
    batches = iter(loader)
    found = [next(batches), next(batches)]
    (worker,) = set(torch.multiprocessing.active_children()) - others
    subprocess.run(['kill', '-TERM', str(worker.pid)], check=True)
    return loader, worker, batches, found


def test_worker_makes_the_batches_that_are_left_and_ends_with_its_loader():
    loader, worker, batches, found = told_to_end(60)
    found += batches
    assert [int(batch) for batch in found] == list(range(8)) and worker.is_alive()
    began = time.monotonic()
    del batches
    dismiss([loader])
    worker.join(30)
    assert worker.exitcode == 0 and time.monotonic() - began < 20


def test_worker_that_nobody_ends_has_an_end_all_the_same():
    loader, worker, batches, _ = told_to_end(0.2)
    with pytest.raises(RuntimeError, match='killed by signal|exited unexpectedly'):
        time.sleep(20)  # the loader looks at its workers when one has ended
        list(batches)
    assert not worker.is_alive()
    del batches
    dismiss([loader])
