"""What each of two ranks does for `test_method_ranks.py`: every scenario in one process group, results in one file.

    torchrun --standalone --nproc-per-node 2 -m support.method_ranks FOLDER

A scenario that raises has its traceback as the result.
"""
from collections import Counter
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from support.models import OPTIMIZERS, buffers, weights
from support.ranks import RANKS, RHO, SIZE, Engine, collectives, network, samples, seed_rank
from support.row_loss import RowLoss
from support.scenarios import main
from support.slots import Noting, Residual
from timm_sam import SAM, compile_split, methods
from timm_sam.methods import Method

ALPHA, RHO_MIN = 0.4, 0.1
UPDATES = 6
MICRO_BATCHES = 3


def gsam():
    return methods.gsam(alpha=ALPHA, rho_min=RHO_MIN)


def build(net, compiled=False, ddp=None, **options):
    model = network(net)
    if compiled:
        compile_split(model, backend='aot_eager')
    ddp = DistributedDataParallel(model, **ddp or {})
    return model, ddp, SAM(OPTIMIZERS['sgd'](model), ddp, **{'rho': RHO, 'method': gsam(), **options})


def loss_of(ddp, data, overflow=False):
    x, y = data
    return lambda: F.cross_entropy(ddp(x), y) * (torch.inf if overflow else 1)


def closure_of(sam, loss_fn, set_to_none=True):
    """A closure as users write it."""
    def closure():
        sam.zero_grad(set_to_none=set_to_none)
        loss = loss_fn()
        loss.backward()
        return loss
    return closure


def train(rank, net, way='minimize', overflow=(), **options):
    """Updates of one batch for each rank."""
    model, ddp, sam = build(net, **options)
    counts = Counter()
    with collectives(counts):
        for step in range(UPDATES):
            loss_fn = loss_of(ddp, samples(net, step, rank))
            seed_rank(step, rank)
            if (step, rank) in overflow:
                calls = iter((True, False))  # at w only
                finite = loss_fn
                loss_fn = lambda finite=finite, calls=calls: finite() * (torch.inf if next(calls) else 1)  # noqa: E731
            if way == 'closure':
                sam.step(closure_of(sam, loss_fn))
            else:
                sam.minimize(loss_fn)
    return dict(weights=weights(model), buffers=buffers(model), counts=counts, nonfinite=int(sam.nonfinite))


def accumulated(rank, way):
    """`MICRO_BATCHES` to an update: told by `last`, by `ddp.no_sync()`, or by train.py's loop."""
    model, ddp, sam = build('groupnorm')
    loop = Engine(ddp, sam.optimizer, sam, world_size=RANKS)
    counts = [Counter() for _ in range(MICRO_BATCHES)]
    for step in range(UPDATES):
        for k in range(MICRO_BATCHES):
            data = samples('groupnorm', step, RANKS * k + rank)
            last = k == MICRO_BATCHES - 1
            weigh = lambda loss: loss / MICRO_BATCHES  # noqa: E731
            with collectives(counts[k]):
                if way == 'engine':
                    loop.accumulate(data, MICRO_BATCHES, last)
                elif way == 'last':
                    sam.backward(loss_of(ddp, data), weigh=weigh, last=last)
                else:
                    with nullcontext() if last else ddp.no_sync():
                        sam.backward(loss_of(ddp, data), weigh=weigh)
        loop.step()
    return dict(weights=weights(model), counts=counts)


CHUNKED = {  # name -> the method, as each rank and the process in chunks makes its own
    'usam': lambda: methods.usam(lam=0.5), 'friendly': lambda: methods.friendly(), 'stable': lambda: methods.stable(),
    'looksam': lambda: methods.looksam(k=2, alpha=0.7), 'msam': lambda: methods.msam(),
    'random_mask': lambda: methods.random_mask(0.5, every=2),
    'ssam_dynamic': lambda: methods.ssam_dynamic(0.5, total_epochs=3),
    'esam draws': lambda: methods.esam(beta=0.5, gamma=1), 'esam chooses': lambda: methods.esam(beta=0.6, gamma=0.5),
    'ssam_fisher': lambda: methods.ssam_fisher(0.5, samples=RANKS * SIZE), 'late': lambda: methods.late(1, ramp=False),
}
UPDATES_PER_EPOCH = 2


def single_samples(model, batches):
    """Losses of all samples of some batches, one by one."""
    def loss(x, y):
        return F.cross_entropy(model(x[None]), y[None])

    return lambda n: [partial(loss, x, y) for data in batches for x, y in zip(*data)]


def by_epochs(rank, name):
    """Epochs of `UPDATES_PER_EPOCH` updates; SAM is told of them."""
    model, ddp, sam = build('groupnorm', method=CHUNKED[name](), params='all')
    for step in range(UPDATES):
        data = samples('groupnorm', step, rank)
        sam.begin(step // UPDATES_PER_EPOCH, step, single_samples(model, [data]))
        sam.minimize(RowLoss(ddp, data) if sam.chooses_samples else loss_of(ddp, data))
    return dict(weights=weights(model), state=sam.method_state_dict())


class TwoHeads(nn.Module):
    """A head that some ranks use, and one that nobody does."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.Linear(6, 4), nn.LayerNorm(4)
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x, head):
        return self.heads[head](self.norm(self.body(x)))


def unused(rank):
    torch.manual_seed(0)
    model = TwoHeads().double()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), ddp, rho=RHO, method=gsam())
    torch.manual_seed(rank)
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.randint(3, (5,))
    sam.backward(lambda: F.cross_entropy(ddp(x, rank), y))
    return dict(has_gradient=[head.weight.grad is not None for head in model.heads],
                gradients={name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def observed(rank, zeroed=False, **options):
    """Two slots that note what they are given; with `zeroed` by closures that zero gradients in place."""
    model, ddp, _ = build('groupnorm', ddp=options)
    direction, correct = Residual(), Noting()
    sam = SAM(OPTIMIZERS['sgd'](model), ddp, rho=RHO, every=1 if zeroed else 2, method=[
        Method(name='residual', direction=direction), Method(name='noting', correct=correct)])
    for step in range(4):
        loss_fn = loss_of(ddp, samples('groupnorm', step, rank))
        if zeroed:
            sam.step(closure_of(sam, loss_fn, set_to_none=False))
        else:
            sam.minimize(loss_fn)
    return dict(mean=direction.m, last=correct.last, calls=correct.calls, weights=weights(model))


def scenarios():
    for params in ('onlynorm', 'all'):
        yield f'gsam {params}', train, ['groupnorm'], dict(params=params)
    yield 'batchnorm', train, ['batchnorm'], {}
    yield 'closure', train, ['groupnorm', 'closure'], {}
    yield 'compiled', train, ['groupnorm'], dict(compiled=True)
    yield 'sync', train, ['groupnorm'], dict(sync=True)
    yield 'overflow', train, ['groupnorm'], dict(overflow=[(2, 1)])
    for way in ('last', 'no_sync', 'engine'):
        yield f'accumulated {way}', accumulated, [way], {}
    for name in CHUNKED:
        yield f'method {name}', by_epochs, [name], {}
    yield 'unused', unused, [], {}
    yield 'observed', observed, [], {}
    for bucket_view in (False, True):
        yield f'observed, buckets={bucket_view}', observed, [], dict(zeroed=True, gradient_as_bucket_view=bucket_view)


if __name__ == '__main__':
    main(scenarios)
