"""Data sets that are downloaded by several ranks."""
import threading

import pytest
import torch
from support.processes import run, torchrun

from timm_sam.cli.device import Process
from timm_sam.training.downloads import one_at_first

CPU = torch.device('cpu')


def ranks(*places):
    """Processes of several machines, by their places on these."""
    return [Process(CPU, rank, place, len(places), True) for rank, place in enumerate(places)]


class Turns:
    """Threads in the place of ranks, each on a machine of its own name."""

    def __init__(self, monkeypatch):
        store, self.order, self.threads = torch.distributed.HashStore(), [], []
        monkeypatch.setattr(torch.distributed.distributed_c10d, '_get_default_store', lambda: store)
        monkeypatch.setattr('socket.gethostname', lambda: threading.current_thread().name)

    def start(self, process, machine, fails=False):
        def go():
            try:
                with one_at_first(process, True):
                    self.order.append(process.rank)
                    if fails:
                        raise OSError('no network')
            except OSError:
                pass

        self.threads.append(threading.Thread(target=go, name=machine, daemon=True))
        self.threads[-1].start()
        self.threads[-1].join(0.2)

    def end(self):
        for thread in self.threads:
            thread.join(30)
        return self.order


@pytest.mark.parametrize('fails', [False, True])
def test_one_process_goes_first_then_one_of_each_machine_then_the_others(monkeypatch, fails):
    turns = Turns(monkeypatch)
    first, second, third, fourth = ranks(0, 1, 0, 1)
    turns.start(fourth, 'b')
    turns.start(second, 'a')
    turns.start(third, 'b')
    assert turns.order == []
    turns.start(first, 'a', fails)
    order = turns.end()
    assert order[0] == 0 and sorted(order) == [0, 1, 2, 3] and order.index(2) < order.index(3)


def test_without_downloads_and_alone_nobody_waits():
    for process, downloads in ((ranks(0, 1)[1], False), (Process(CPU), True)):
        with one_at_first(process, downloads):
            pass


SCRIPT = '''
import sys
import time
from pathlib import Path

import numpy
from PIL import Image
from timm.data import dataset_factory

from timm_sam import train


class Downloaded:
    """A data set that takes its time to come, and finds files that others are writing corrupt."""

    transform = None

    def __init__(self, root, train, download, target_transform):
        self.target_transform = target_transform
        part, whole = Path(root, 'part'), Path(root, 'whole')
        if not whole.exists():
            if part.exists():
                raise RuntimeError('File not found or corrupted.')
            part.touch()
            time.sleep(2)
            whole.touch()

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return self.transform(Image.fromarray(numpy.zeros((32, 32, 3), numpy.uint8))), self.target_transform(index % 10)


dataset_factory._TORCH_BASIC_DS['cifar10'] = Downloaded
sys.exit(train.main(sys.argv[1:]))
'''


@pytest.mark.slow
def test_two_ranks_start_with_a_data_set_that_is_not_there_yet(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    options = ('--device cpu --dataset torch/cifar10 --dataset-download --data-dir . --val-split test --num-classes 10 '
               '--model test_resnet --img-size 32 -b 4 -j 0 --epochs 1 --warmup-epochs 0 --output out')
    done = run(torchrun(tmp_path / 'script.py', *options.split()), tmp_path)
    assert done.code == 0, done.err[-3000:]
