"""The loops of `examples/` on two ranks, for `test_example_loops.py`: each under its trainer's DDP."""
import torch
from torch.nn.parallel import DistributedDataParallel

from support.example_loops import batches, by_hand, missing, run
from support.models import weights
from support.scenarios import main

ON_RANKS = ['lightning_module', 'lightning_accumulation', 'fabric_loop', 'accelerate_loop']


def loop(rank, name):
    return weights(run(name, batches(rank), ranks=torch.distributed.get_world_size()))


def hand(rank, parts):
    return weights(by_hand(batches(rank), parts, wrap=DistributedDataParallel))


def scenarios():
    for parts in (1, 2):
        yield f'by hand {parts}', hand, (parts,), {}
    for name in ON_RANKS:
        if not missing(name):
            yield name, loop, (name,), {}


if __name__ == '__main__':
    main(scenarios)
