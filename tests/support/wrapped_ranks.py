"""What each of two ranks does for `test_wrapped.py`: models that are wrapped or sharded in ways that SAM must notice.

A scenario returns the message of the error that SAM raised, or an empty string, and the weights afterwards.
"""
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from support.models import OPTIMIZERS, TinyNet, batch, weights
from support.scenarios import main
from timm_sam import SAM


def tiny():
    net = TinyNet().double()
    net.drop.p = net.drop_path.drop_prob = 0.0
    return net


def sam_of(model):
    return SAM(OPTIMIZERS['sgd'](model), model, rho=0.5)


def said(function):
    try:
        function()
    except ValueError as e:
        return str(e)
    return ''


def at_construction(rank, wrap):
    model = tiny()
    wrapped = wrap(model)
    return dict(said=said(lambda: sam_of(model if wrapped is None else wrapped)))


def fsdp1(model):
    return FullyShardedDataParallel(model, device_id=torch.device('cpu'))


def fsdp1_with_parameters(model):
    return FullyShardedDataParallel(model, device_id=torch.device('cpu'), use_orig_params=True)


def inside_of_fsdp1(model):
    fsdp1_with_parameters(model)


def fsdp2(model):
    fully_shard(model, mesh=init_device_mesh('cpu', (2,)))


def tensor_parallel(model, placement=Shard):
    mesh = init_device_mesh('cpu', (2,))
    model.conv.weight = nn.Parameter(distribute_tensor(model.conv.weight.detach(), mesh, [placement(0)]))


def replicated_tensors(model):
    tensor_parallel(model, placement=lambda _: Replicate())


def tensor_parallel_in_fsdp2(model):
    mesh = init_device_mesh('cpu', (1, 2), mesh_dim_names=('data', 'tensor'))
    model.conv.weight = nn.Parameter(distribute_tensor(model.conv.weight.detach(), mesh['tensor'], [Shard(0)]))
    fully_shard(model, mesh=mesh['data'])


SHARDED = {f.__name__: f for f in (fsdp1, fsdp1_with_parameters, inside_of_fsdp1, tensor_parallel, replicated_tensors,
                                   tensor_parallel_in_fsdp2)}


def late(rank, wrap, way, **options):
    """The model is wrapped after SAM was built."""
    model = tiny()
    sam = sam_of(model)
    wrapped = wrap(model) or model
    before = weights(model)
    x, y = batch(rank)

    def closure():
        sam.zero_grad()
        loss = F.cross_entropy(wrapped(x), y)
        loss.backward()
        return loss

    update = {'minimize': lambda: sam.minimize(lambda: F.cross_entropy(wrapped(x), y)),
              'closure': lambda: sam.step(closure)}[way]
    message = said(update)
    return dict(said=message, same=all(torch.equal(w, before[n]) for n, w in weights(model).items()))


def ddp(model):
    return DistributedDataParallel(model)


def ddp_find_unused(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def replicated(model):
    return replicate(model)


LATE = {f.__name__: f for f in (ddp, ddp_find_unused, replicated)}


def late_fsdp2(rank):
    model = tiny()
    sam = sam_of(model)
    fsdp2(model)
    x, y = batch(rank)
    return dict(said=said(lambda: sam.minimize(lambda: F.cross_entropy(model(x), y))))


def others(rank):
    """A wrapped model beside the one that is trained, and a wrapper that is gone."""
    model, other = tiny(), tiny()
    beside = ddp(other)
    ddp(model)
    sam = sam_of(model)
    x, y = batch(rank)
    message = said(lambda: sam.minimize(lambda: F.cross_entropy(model(x), y)))
    return dict(said=message, kept=beside is not None)


def in_a_trainer(rank):
    """The wrapper is inside of what SAM is given, as in Fabric's module."""
    class Holder(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    results = []
    for wrap in (lambda m: DistributedDataParallel(m), lambda m: Holder(DistributedDataParallel(m))):
        model = tiny()
        wrapped = wrap(model)
        sam = sam_of(wrapped)
        for step in range(3):
            x, y = batch(2 * step + rank)
            sam.minimize(lambda m=wrapped, x=x, y=y: F.cross_entropy(m(x), y))
        results.append(weights(model))
    return dict(bare=results[0], held=results[1])


def around_the_wrapper(rank):
    """The loss calls the wrapper, or the module inside of it; or that, and a backward of the trainer's own follows."""
    found = {}
    for name, inside, options in (('wrapper', False, {}), ('inside', True, {}),
                                  ('own', True, {'backward_fn': lambda loss: loss.backward()})):
        model = tiny()
        wrapped = ddp(model)
        called = model if inside else wrapped
        sam = sam_of(wrapped)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for step in range(2):
                x, y = batch(2 * step + rank)
                sam.backward(lambda m=called, x=x, y=y: F.cross_entropy(m(x), y), **options)
        found[name] = [str(w.message) for w in caught if 'averages gradients' in str(w.message)]
    return found


def scenarios():
    for name, wrap in SHARDED.items():
        yield name, at_construction, (wrap,), {}
    for name, wrap in LATE.items():
        for way in ('minimize', 'closure'):
            yield f'late {name} {way}', late, (wrap, way), {}
    yield 'late fsdp2', late_fsdp2, (), {}
    yield 'others', others, (), {}
    yield 'in a trainer', in_a_trainer, (), {}
    yield 'around', around_the_wrapper, (), {}


if __name__ == '__main__':
    main(scenarios)
