"""What each of two ranks does for `test_distributed.py`: every scenario in one process group, the results in one file.

    torchrun --standalone --nproc-per-node 2 -m support.ranks FOLDER

A scenario that raises has its traceback as the result. The tests import networks and batches from here as well.
"""
import argparse
import itertools
import math
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import timm
import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from timm.task import ClassificationTask
from torch import nn
from torch.autograd.profiler import profile
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from support.loop import run_around
from support.models import OPTIMIZERS, TinyNet, batch, buffers, weights
from support.scenarios import main
from support.sync_batchnorm import synchronized_on_cpu
from timm_sam import SAM, compile_split
from timm_sam import train as train_script
from timm_sam.cli.device import Process
from timm_sam.training import engine
from timm_sam.training.batches import Weigher
from timm_sam.training.data import Data
from timm_sam.training.meters import Meters
from timm_sam.training.options import parse_args

RANKS = 2
SIZE = 4  # samples of a rank's batch
RHO = 0.5
LATE = r'^layer[34]\.'  # of the network 'resnet'
LAST = r'^layer4\.0\.bn2'  # most of its parameters lie below

DDP = {
    'default': {},
    'no_buffer_broadcast': dict(broadcast_buffers=False),
    'bucket_view': dict(gradient_as_bucket_view=True),
    'small_buckets': dict(bucket_cap_mb=0.0005),
    'find_unused': dict(find_unused_parameters=True),
}
COMPILED = {'default': {}, 'several_buckets': dict(bucket_cap_mb=1), 'find_unused': dict(find_unused_parameters=True)}
CHUNKED = [(net, variant, params) for net in ('batchnorm', 'vit') for variant in ('sam', 'layerwise_l2')
           for params in ('onlynorm', 'all')]
MICRO_BATCHES = 3
BATCHES = 5

OVERFLOWS = {  # where the loss of the third update is infinite: (rank, passes)
    'ascent': (0, ['ascent']),
    'descent': (1, ['descent']),
    'both': (1, ['ascent', 'descent']),
}


def network(name, dtype=torch.float64):
    torch.manual_seed(0)
    if name == 'resnet without drop':
        return timm.create_model('test_resnet', num_classes=3).to(dtype)
    if name == 'resnet':
        return timm.create_model('test_resnet', num_classes=3, drop_rate=0.1, drop_path_rate=0.1).to(dtype)
    if name == 'vit':
        return timm.create_model('test_vit', img_size=32, num_classes=3).to(dtype)
    net = TinyNet()
    if name != 'dropout':
        net.drop_path.drop_prob = net.drop.p = 0.0
    if name == 'groupnorm':
        net.bn = nn.GroupNorm(2, 4)
    return net.to(dtype)


def samples(net, step, rank, size=SIZE, dtype=torch.float64):
    """The batch of one rank for one update."""
    seed = 10 * step + rank
    if not net.startswith(('vit', 'resnet')):
        return batch(seed, size, dtype)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 32, 32, generator=generator, dtype=dtype)
    return x, torch.randint(3, (size,), generator=generator)


def joined(batches):
    """One batch of all samples."""
    return tuple(torch.cat(parts) for parts in zip(*batches))


def seed_rank(step, rank):
    torch.manual_seed(1000 + 10 * step + rank)


@contextmanager
def collectives(counts, *others):
    """Adds what gloo does inside, also for DDP's own code, to `counts`: `{(collective, elements): calls}`.

    `torch.profiler.profile(...).events()` says the same in ten times the time. What the context manager gives counts
    the events of other names, afterwards.
    """
    found = Counter()
    with profile(record_shapes=True) as recorded:
        yield found
    for event in recorded.kineto_results.events():
        if event.name().startswith('gloo:'):
            (shape,) = event.shapes()
            counts[event.name().removeprefix('gloo:'), math.prod(shape)] += 1
        elif event.name() in others:
            found[event.name()] += 1


def create(net, ddp, options, dtype=torch.float64, compiled=False, synchronized=False):
    model = network(net, dtype)
    if compiled:
        compile_split(model, backend='aot_eager')
    wrapped = DistributedDataParallel(model, **ddp)
    if synchronized:
        convert_sync_batchnorm(model)  # DDP itself has a look at the device
    optimizer = OPTIMIZERS['sgd'](model)
    sam = None if options is None else SAM(optimizer, wrapped, **{'rho': RHO, **options})
    return model, wrapped, optimizer, sam


def train(rank, net, options, ddp, updates=20, counted=True, compiled=False, synchronized=False):
    """Updates by the DDP module; `options` are those of SAM, None is plain training."""
    model, wrapped, optimizer, sam = create(net, ddp, options, compiled=compiled, synchronized=synchronized)
    names = [name for name, _ in sam.selected] if sam else []
    seen, counts = [], Counter()
    recorded = collectives(counts) if counted else nullcontext()
    with recorded, synchronized_on_cpu() if synchronized else nullcontext():
        for step in range(updates):
            x, y = samples(net, step, rank)

            def loss_fn(x=x, y=y):
                seen.append({name: model.get_parameter(name).detach().clone() for name in names})
                return F.cross_entropy(wrapped(x), y)

            seed_rank(step, rank)
            if sam is None:
                optimizer.zero_grad()
                loss_fn().backward()
                optimizer.step()
            else:
                sam.minimize(loss_fn)
    return dict(weights=weights(model), buffers=buffers(model), counts=counts, sharing=sam and sam.sharing,
                at_w=seen[0::2], at_eps=seen[1::2])


class Engine:
    """Accumulation as train.py does it."""

    def __init__(self, model, optimizer, sam, sam_m=None, world_size=1):
        args = argparse.Namespace(sam_m=sam_m, aug_splits=0, sam_ascent_fraction=1.0)
        process = Process(torch.device('cpu'), world_size=world_size, distributed=world_size > 1)
        task = ClassificationTask(model, criterion=F.cross_entropy, verbose=False)
        self.run = run_around(
            args, task, SimpleNamespace(loss_scale='none', naflex=False), optimizer, sam, process=process)
        self.updates, self.begins = 0, True

    def accumulate(self, data, accum_steps=1, last=True, epoch=0):
        weigh = Weigher(self.run.data, self.run.process, len(data[1]), accum_steps)
        if self.begins:
            self.run.update.begin(epoch, self.updates)
        self.begins = last
        engine.accumulate(self.run, data, weigh, last, Meters('loss', *self.run.measures))

    def step(self):
        self.run.optimizer.step()
        self.run.optimizer.zero_grad()
        self.updates += 1


def accumulated(rank, way, updates=10):
    """`MICRO_BATCHES` to an update: by `SAM.backward`, by the engine's accumulation, or as chunks of one batch."""
    model, wrapped, optimizer, sam = create('groupnorm', {}, {})
    loop = Engine(wrapped, optimizer, sam, SIZE if way == 'sam_m' else None, RANKS)
    counts = [Counter() for _ in range(MICRO_BATCHES)]
    norms = []
    for step in range(updates):
        parts = [samples('groupnorm', step, RANKS * k + rank) for k in range(MICRO_BATCHES)]
        if way == 'sam_m':
            with collectives(counts[-1]):
                loop.accumulate(joined(parts))
        else:
            for k, (x, y) in enumerate(parts):
                last = k == MICRO_BATCHES - 1
                with collectives(counts[k]):
                    if way == 'engine':
                        loop.accumulate((x, y), MICRO_BATCHES, last)
                    else:
                        with nullcontext() if last else wrapped.no_sync():
                            sam.backward(lambda x=x, y=y: F.cross_entropy(wrapped(x), y),
                                         weigh=lambda loss: loss / MICRO_BATCHES)
                norms.append(sam.stats.grad_norm)
        loop.step()
    return dict(weights=weights(model), counts=counts, norms=norms)


def short_group(rank):
    """An epoch of `BATCHES` micro-batches, of which the last update has fewer."""
    model, wrapped, optimizer, sam = create('groupnorm', {}, {})
    args = parse_args(train_script.build_parser(), [
        '--device', 'cpu', '--data-dir', '.', '--grad-accum-steps', str(MICRO_BATCHES), '--sam-variant', 'sam',
        '--sam-rho', str(RHO)])
    args.no_prefetcher = True
    data = TensorDataset(*joined(samples('groupnorm', 0, RANKS * k + rank) for k in range(BATCHES)))
    run = run_around(
        args, ClassificationTask(wrapped, criterion=F.cross_entropy, verbose=False),
        Data(DataLoader(data, batch_size=SIZE), None, None, SIZE, 'none', False), optimizer, sam,
        process=Process(torch.device('cpu'), rank, rank, RANKS, True), model_dtype=torch.float64, total_updates=2)
    counts = Counter()
    with collectives(counts):
        engine.train_one_epoch(run, 0)
    return dict(weights=weights(model), counts=counts)


def with_scaler(rank, overflow, options=None, updates=6):
    """Updates in float32 with a GradScaler and an overflow on one rank."""
    model, wrapped, optimizer, sam = create('batchnorm', {}, options or {}, torch.float32)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 8)
    bad_rank, passes = OVERFLOWS[overflow]
    result = dict(weights=[weights(model)], scales=[], nonfinite=[])
    for step in range(updates):
        x, y = samples('batchnorm', step, rank, dtype=torch.float32)
        factors = [float('inf') if step == 2 and rank == bad_rank and name in passes else 1.0
                   for name in ('ascent', 'descent')]
        sam.zero_grad()
        sam.backward(lambda x=x, y=y, f=factors: F.cross_entropy(wrapped(x), y) * f.pop(0), scaler=scaler)
        result['weights'].append(weights(model))
        scaler.step(optimizer)
        scaler.update()
        result['weights'].append(weights(model))
        result['scales'].append(scaler.get_scale())
        result['nonfinite'].append(int(sam.nonfinite))
    return result


def with_half_precision(rank, updates=40):
    """Updates under float16 autocast from a loss scale that is far too large."""
    model, wrapped, optimizer, sam = create('batchnorm', {}, {}, torch.float32)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 30)
    result = dict(weights=[], scales=[], nonfinite=[])
    for step in range(updates):
        x, y = samples('batchnorm', step, rank, dtype=torch.float32)

        def loss_fn(x=x, y=y):
            with torch.autocast('cpu', torch.float16):
                return F.cross_entropy(wrapped(x), y)

        sam.zero_grad()
        sam.backward(loss_fn, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        result['weights'].append(weights(model))
        result['scales'].append(scaler.get_scale())
        result['nonfinite'].append(int(sam.nonfinite))
    return result


def unsteady(rank, synchronized):
    """On one rank, a layer below the perturbed ones never gives the same output."""
    model, wrapped, _, sam = create('resnet without drop', {}, dict(filter=LATE), synchronized=synchronized)
    if rank == 1:
        forward, calls = model.layer1.forward, itertools.count(1)
        model.layer1.forward = lambda x: forward(x) * next(calls)
    counts = Counter()
    with collectives(counts), synchronized_on_cpu() if synchronized else nullcontext():
        for step in range(5):
            x, y = samples('resnet', step, rank)
            sam.minimize(lambda x=x, y=y: F.cross_entropy(wrapped(x), y))
    return dict(weights=weights(model), sharing=sam.sharing, counts=counts)


def unperturbed(rank):
    """The first gradient of one rank is not finite: it has no perturbation to check the shared forward with."""
    model, wrapped, optimizer, sam = create('resnet without drop', {}, dict(filter=LAST), torch.float32,
                                            synchronized=True)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 8)
    with synchronized_on_cpu():
        for step in range(4):
            x, y = samples('resnet', step, rank, dtype=torch.float32)
            factors = [float('inf') if step == 0 and rank == 1 else 1.0, 1.0]
            sam.zero_grad()
            sam.backward(lambda x=x, y=y, f=factors: F.cross_entropy(wrapped(x), y) * f.pop(0), scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
    return dict(weights=weights(model), sharing=sam.sharing, nonfinite=int(sam.nonfinite))


def refused(rank):
    try:
        create('dropout', dict(static_graph=True), {})
    except ValueError as e:
        return [str(e)]
    return []


def scenarios():
    for name, ddp in DDP.items():
        yield f'sam {name}', train, ('dropout', {}, ddp)
        yield f'plain {name}', train, ('dropout', None, ddp)
        yield f'shared {name}', train, ('resnet', dict(filter=LATE), ddp, 5)
    for name in ('default', 'no_buffer_broadcast'):
        yield f'unshared {name}', train, ('resnet', dict(filter=LATE, share_forward=False), DDP[name], 5)
    for name, ddp in COMPILED.items():
        yield f'compiled {name}', train, ('resnet', dict(filter=LAST), ddp, 5, True, True)
    yield 'not compiled', train, ('resnet', dict(filter=LAST, share_forward=False), {}, 5)
    yield 'plain resnet', train, ('resnet', None, {}, 5)
    for net, variant, params in CHUNKED:
        yield f'{net} {variant} {params}', train, (net, dict(variant=variant, params=params, rho=0.1), {}, 10, False)
    for params in ('onlynorm', 'all'):
        for sync in (False, True):
            yield f'sync={sync} {params}', train, ('groupnorm', dict(params=params, sync=sync), {})
        yield f'syncbn {params}', train, (
            'batchnorm', dict(params=params, sync=True), {}, 10, False, False, True)
    for share in (False, True):
        yield f'syncbn late share={share}', train, (
            'resnet without drop', dict(filter=LATE, sync=True, share_forward=share), {}, 5, True, False, True)
    yield 'syncbn plain', train, ('resnet without drop', None, {}, 5, True, False, True)
    yield 'syncbn unsteady', unsteady, (True,)
    yield 'unsteady', unsteady, (False,)
    yield 'unperturbed', unperturbed, ()
    yield 'plain groupnorm', train, ('groupnorm', None, {})
    for way in ('backward', 'engine', 'sam_m'):
        yield f'accumulated {way}', accumulated, (way,)
    yield 'short group', short_group, ()
    for overflow in OVERFLOWS:
        yield f'overflow {overflow}', with_scaler, (overflow,)
    yield 'overflow sync', with_scaler, ('ascent', dict(sync=True))
    yield 'half precision', with_half_precision, ()
    yield 'static graph', refused, ()


def with_no_options():
    return ((name, function, arguments, {}) for name, function, arguments in scenarios())


if __name__ == '__main__':
    main(with_no_options)
