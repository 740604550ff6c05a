"""What each of two ranks does for `test_fsdp.py`: updates of sharded models, and the same under DDP.

    torchrun --standalone --nproc-per-node 2 -m support.fsdp_ranks FOLDER always|others

Those that are always run take half a minute; all others take many, and only slow tests need them.
"""
import sys
from collections import Counter
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from support import fsdp_pitfalls as pitfalls
from support.fsdp_models import WAY, built, data, network, shard, whole
from support.models import OPTIMIZERS, WAYS, by_owner
from support.ranks import collectives
from support.scenarios import main
from timm_sam import SAM, VARIANTS, methods

UPDATES = 5
FSDP_WAYS = {**WAYS, 'backward_fn': by_owner}
UNITS = ['gathered after forward', 'replicas', 'two dimensions', 'root only', 'norms apart', 'layers together']


def train(rank, wrap, net='tiny', optimizer='sgd', updates=UPDATES, way='minimize', between=None, dtype=torch.float64,
          **options):
    """Updates; `between(model, step)` is called before each. `seen` is what a norm layer has in the last forwards."""
    model, wrapped, sam = built(wrap, net, optimizer, dtype, **options)
    seen, norms = [], []
    layer = model.gn if hasattr(model, 'gn') else model.norm if net == 'vit compiled' else model.blocks[-1].norm1
    layer.register_forward_pre_hook(lambda m, args: seen.append(m.weight.detach().clone()))
    for step in range(updates):
        if between is not None:
            between(wrapped, step)
            seen.clear()
        x, y = data(net, step, rank, dtype)
        torch.manual_seed(1000 + 10 * step + rank)

        def loss_fn(rows=None, x=x, y=y):
            if not sam.chooses_samples:
                return F.cross_entropy(wrapped(x), y)
            losses = F.cross_entropy(wrapped(x), y, reduction='none')
            return losses if rows is None else losses[rows]

        FSDP_WAYS[way](sam, loss_fn)
        if sam.stats.eps_norm is not None:
            norms.append((float(sam.stats.grad_norm), float(sam.stats.eps_norm)))
    return dict(weights=whole(model), seen=torch.stack(seen), norms=norms, sharing=sam.sharing)


def half(rank, wrap):
    """bfloat16 weights: what they took of a perturbation.

    The rate is a power of two: torch rounds `w + alpha * g` once or twice, by where in a tensor, or a part, w stands.
    """
    return train(rank, wrap, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.125), params='all',
                 dtype=torch.bfloat16, updates=3)


def counted(rank, wrap, keeps, options, size=64):
    """The collectives of the second update, elements and calls, and how often the device was read."""
    model = network('vit', torch.float32, size)
    wrapped = DistributedDataParallel(model) if wrap == 'ddp' else shard(
        model, **({'reshard_after_forward': False} if keeps == 'gathered' else {}))
    optimizer = OPTIMIZERS['sgd'](model)
    sam = None if options is None else SAM(optimizer, wrapped, rho=0.5, **options)
    counts = Counter()
    for step in range(2):
        x, y = data('vit', step, rank, torch.float32, size)

        def loss_fn(x=x, y=y):
            return F.cross_entropy(wrapped(x), y)

        with collectives(counts, 'aten::_local_scalar_dense') if step else nullcontext() as found:
            if sam is None:
                optimizer.zero_grad()
                loss_fn().backward()
                optimizer.step()
            else:
                sam.minimize(loss_fn)
    reads = found['aten::_local_scalar_dense']
    return dict(counts=counts, reads=reads)


COUNTED = {'plain': None, 'whole': {}, 'whole, sync': dict(sync=True),
           'shards': dict(params='all', sync=True), 'shards, layerwise_l2': dict(
               params='all', sync=True, variant='layerwise_l2')}


class SecondOrder(torch.optim.SGD):
    is_second_order = True


def messages(rank):
    """What is refused when SAM is built with a sharded model."""
    def refused(wrap=shard, optimizer=torch.optim.SGD, **options):
        model = network()
        wrap(model)
        base = optimizer(model.parameters(), lr=0.1, momentum=0.9)
        return pitfalls.said(lambda: SAM(base, model, rho=0.5, **options))

    def part(model):
        fully_shard(model.conv, mesh=init_device_mesh('cpu', (2,)))

    def meshes(model):
        fully_shard(model.conv, mesh=init_device_mesh('cpu', (1, 2), mesh_dim_names=('replicas', 'shards')))
        fully_shard(model, mesh=init_device_mesh('cpu', (2,)))

    both = dict(params='all', sync=True)
    return {
        'all, not sync': refused(params='all'), 'nonorm, not sync': refused(params='nonorm'),
        'second order': refused(optimizer=SecondOrder), 'norms outside': refused(part), 'some outside': refused(
            part, **both), 'meshes': refused(meshes),
        'offloaded': refused(lambda m: shard(m, offload_policy=CPUOffloadPolicy(pin_memory=False))),
        **{f'{name} {params}': refused(**(both if params == 'all' else {}), method=method)
           for name, method in REFUSED.items() for params in ('onlynorm', 'all')},
        **{f'{name} all': refused(**both, method=METHODS[name][0](**METHODS[name][1]))
           for name in METHODS if name not in SHARDS_TAKE},
    }


METHODS = {
    'usam': (methods.usam, dict(lam=0.5)), 'friendly': (methods.friendly, {}),
    'random_mask': (methods.random_mask, dict(sparsity=0.5)), 'gsam': (methods.gsam, dict(alpha=0.0)),
    'esam': (methods.esam, dict(beta=0.6, gamma=0.5)),
}
SHARDS_TAKE = ['usam', 'gsam']
REFUSED = {
    'gsam with alpha': methods.gsam(alpha=0.4), 'stable': methods.stable(), 'looksam': methods.looksam(2, 0.7),
    'msam': methods.msam(), 'ssam_fisher': methods.ssam_fisher(0.5),
}
MATRIX = [(net, optimizer, variant, params) for net in ('tiny', 'vit') for optimizer in ('sgd', 'adamw')
          for variant in VARIANTS for params in ('onlynorm', 'all')]
NETS = ['unused norm', 'frozen', 'checkpoint', 'vit checkpointing', 'vit compiled']
BREAKS = [f'{where} {what}' for where in ('at w', 'at eps') for what in ('forward', 'loss', 'backward')]
CORE = {
    'tiny sgd sam onlynorm', 'tiny sgd sam all', 'tiny sgd layerwise_l2 all',
    'keeps_gathered all', 'by a method onlynorm', 'frozen later onlynorm',
    'frozen first onlynorm False', 'frozen first onlynorm True',
    'broken off at eps loss onlynorm', 'broken off at eps forward all', 'closure onlynorm',
    'backward_fn onlynorm', 'backward_fn all',
    'counted whole default', 'counted shards default', 'messages',
}
REFERENCES = {f'reference {params}' for params in WAY}  # what slow tests compare with, too


def scenarios():
    """Name, function, arguments, options; where it is done by both, the name begins with `fsdp` or `ddp`."""
    def of_both(name, function, arguments=(), options=None, wrap='fsdp'):
        for how in (wrap, 'ddp'):
            kind = 'ddp' if how == 'ddp' else 'fsdp'
            yield f'{kind} {name}', function, (how, *arguments), options() if callable(options) else options or {}

    for params in WAY:
        yield f'ddp reference {params}', train, ('ddp',), dict(params=params, updates=3)
    for case in MATRIX:
        net, optimizer, variant, params = case
        yield from of_both(' '.join(case), train, (net, optimizer), dict(variant=variant, params=params))
    for params in ('onlynorm', 'all'):
        for wrap in UNITS:
            yield f'fsdp {wrap} {params}', train, (wrap,), dict(params=params, updates=3)
        for way in FSDP_WAYS:
            yield f'fsdp {way} {params}', train, ('fsdp',), dict(params=params, way=way, updates=3)
        for name, between in pitfalls.BETWEEN.items():
            yield f'fsdp {name} {params}', train, ('fsdp',), dict(params=params, between=between, updates=3)
        yield f'fsdp after a forward {params}', pitfalls.after_a_forward, (params,), {}
        yield f'fsdp by a method {params}', pitfalls.by_a_method, (params,), {}
        yield from of_both(f'frozen later {params}', train, ('unused norm',), dict(
            params=params, updates=3, between=pitfalls.freezes))
        yield from of_both(f'tied {params}', train, ('tied',), dict(params=params, updates=3), 'root only')
        for net in NETS:
            yield from of_both(f'{net} {params}', train, (net,), dict(params=params, updates=3))
        for how in ('last', 'by hand'):
            if (how, params) != ('by hand', 'all'):
                yield f'fsdp accumulated {how} {params}', pitfalls.accumulated, ('fsdp', params, how), {}
        yield f'ddp accumulated last {params}', pitfalls.accumulated, ('ddp', params, 'last'), {}
        for overflow in ('at w', 'at eps'):
            yield from of_both(f'overflow {overflow} {params}', pitfalls.with_scaler, (params, overflow))
        for before in (False, True):
            yield f'frozen first {params} {before}', pitfalls.frozen_first, (params, before), {}
        for where in ('never', *BREAKS):
            yield f'broken off {where} {params}', pitfalls.broken_off, (params, where), {}
        yield f'closures {params}', pitfalls.closures, (params,), {}
    yield 'fsdp nonorm', train, ('fsdp',), dict(params='nonorm', updates=3)
    for wrap in ('fsdp', 'replicas'):
        yield f'fsdp {wrap} sync', train, (wrap,), dict(sync=True, updates=3)
    yield 'ddp sync', train, ('ddp',), dict(sync=True, updates=3)
    yield from of_both('every', train, (), dict(every=2))
    yield from of_both('half', half)
    for name, (method, arguments) in METHODS.items():  # each with a method of its own, which may keep something
        yield from of_both(f'method {name} onlynorm', train, (), lambda m=method, a=arguments: dict(method=m(**a)))
    for name in SHARDS_TAKE:
        yield from of_both(f'method {name} all', train, (), lambda m=METHODS[name][0], a=METHODS[name][1]: dict(
            method=m(**a), params='all'))
    yield 'unsynced', pitfalls.unsynced, (), {}
    yield 'norms outside', pitfalls.norms_outside, (), {}
    yield 'state', pitfalls.made_state, (), {}
    yield 'messages', messages, (), {}
    for name, options in COUNTED.items():
        for keeps in ('default', 'gathered'):
            yield f'counted {name} {keeps}', counted, ('fsdp', keeps, options), {}
    for name in ('plain', 'whole'):
        yield f'counted {name} ddp', counted, ('ddp', None, COUNTED[name]), {}


def is_always(name):
    """Whether a scenario is run with the tests that are not slow."""
    return (name.removeprefix('fsdp ').removeprefix('ddp ') in CORE | REFERENCES
            or name.startswith('broken off never'))


if __name__ == '__main__':
    main(lambda: (s for s in scenarios() if is_always(s[0]) == (sys.argv[2] == 'always')))
