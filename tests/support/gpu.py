"""What the tests on a CUDA device share; they have the mark `gpu`."""
import contextlib
import warnings

import torch

from support.models import TinyNet, batch

DEVICE = 'cuda'


def net(dtype=torch.float64, seed=0):
    return TinyNet(seed).to(DEVICE, dtype)


def data(seed, dtype=torch.float64, size=6):
    return tuple(t.to(DEVICE) for t in batch(seed, size, dtype))


@contextlib.contextmanager
def no_waiting():
    """Whatever makes the host wait for the device is an error, copies of single numbers to the device included."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Synchronization debug mode is a prototype')
        torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


@contextlib.contextmanager
def repeatable():
    """The same numbers from the same commands."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.backends.cudnn.flags(enabled=False):  # it would choose among algorithms by their speed
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
