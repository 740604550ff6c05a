"""The loops of `examples/` on two ranks, for `test_example_loops.py`: each under its trainer's DDP, or sharded."""
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel

from support.example_loops import RANKS_ONLY, batches, by_hand, by_lightning, load, missing, network, run
from support.fsdp_models import whole
from support.models import weights
from support.scenarios import main
from timm_sam import SAM

ON_RANKS = ['lightning_module', 'lightning_accumulation', 'fabric_loop', 'accelerate_loop', *RANKS_ONLY]


def loop(rank, name):
    return whole(run(name, batches(rank), ranks=torch.distributed.get_world_size()))


def hand(rank, parts):
    return weights(by_hand(batches(rank), parts, wrap=DistributedDataParallel))


def too_late(rank):
    """Lightning wraps a module whose SAM was built without the wrapper."""
    module = load('lightning_module')

    class Late(module.Classifier):
        def configure_optimizers(self):
            return SAM(torch.optim.SGD(self.parameters(), lr=0.1), self, rho=0.5)

    net = network()
    before = weights(net)
    try:
        by_lightning(SimpleNamespace(Classifier=Late), net, batches(rank), torch.distributed.get_world_size())
    except ValueError as e:
        return dict(said=str(e), same=all(torch.equal(w, before[name]) for name, w in weights(net).items()))
    return dict(said='', same=False)


def scenarios():
    for parts in (1, 2):
        yield f'by hand {parts}', hand, (parts,), {}
    for name in ON_RANKS:
        if not missing(name):
            yield name, loop, (name,), {}
    if not missing('lightning_module'):
        yield 'too late', too_late, (), {}


if __name__ == '__main__':
    main(scenarios)
