"""What goes wrong around sharded models, each on one of two ranks: for `fsdp_ranks.py`."""
import types
import warnings
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from support.fsdp_models import WAY, built, data, ddp, network, parts_of, shard, whole
from support.models import OPTIMIZERS
from support.ranks import collectives
from timm_sam import SAM
from timm_sam.store import version_of

PARTS = 3  # micro-batches of an update


def keeps_gathered(model, step):
    if step == 0 and isinstance(model, FSDPModule):
        model.set_reshard_after_backward(False)


def evaluates(model, step):
    model.eval()
    with torch.no_grad():
        model(data('tiny', 90 + step, 0)[0])
    model.train()


def forward_alone(model, step):
    """A forward with a graph that nobody uses, at every place that may keep what it gathers."""
    model.eval()
    model(data('tiny', 90 + step, 0)[0])
    model.train()


BETWEEN = {f.__name__: f for f in (keeps_gathered, evaluates, forward_alone)}


def after_a_forward(rank, params):
    """SAM is built when the root has its parameters gathered."""
    model = network()
    shard(model)
    optimizer = OPTIMIZERS['sgd'](model)
    forward_alone(model, 0)
    sam = SAM(optimizer, model, rho=0.5, params=params, sync=WAY[params])
    for step in range(3):
        x, y = data('tiny', step, rank)
        torch.manual_seed(1000 + 10 * step + rank)
        sam.minimize(lambda x=x, y=y: F.cross_entropy(model(x), y))
    return dict(weights=whole(model))


def freezes(model, step):
    """A norm layer that is a unit, and one of the root, are frozen for one update."""
    model = getattr(model, 'module', model)
    for layer in (model.gn, model.norm):
        layer.requires_grad_(step != 1)


def by_a_method(rank, params):
    """The loss calls a method that is not the forward, and that torch was told to gather the parameters for."""
    model = network()
    model.features = types.MethodType(type(model).forward, model)
    shard(model, reshard_after_forward=True)
    register_fsdp_forward_method(model, 'features')
    sam = SAM(OPTIMIZERS['sgd'](model), model, rho=0.5, params=params, sync=WAY[params])
    norms = []
    for step in range(3):
        x, y = data('tiny', step, rank)
        torch.manual_seed(1000 + 10 * step + rank)
        sam.minimize(lambda x=x, y=y: F.cross_entropy(model.features(x), y))
        norms.append((float(sam.stats.grad_norm), float(sam.stats.eps_norm)))
    return dict(weights=whole(model), norms=norms)


def accumulated(rank, wrap, params, how):
    """Updates of some micro-batches; returns also how often gradients were sent in each micro-batch."""
    model, wrapped, sam = built(wrap, params=params)
    counts = [Counter() for _ in range(PARTS)]
    for step in range(3):
        for k in range(PARTS):
            x, y = data('tiny', PARTS * step + k, rank)
            last = k == PARTS - 1
            if how == 'by hand' and wrap == 'fsdp':
                wrapped.set_requires_gradient_sync(last)
            torch.manual_seed(k)
            with collectives(counts[k]):
                sam.backward(lambda x=x, y=y: F.cross_entropy(wrapped(x), y), weigh=lambda loss: loss / PARTS,
                             last=last or how == 'by hand')
        sam.step()
        sam.zero_grad()
    # gloo makes a reduce-scatter of an all-reduce; three numbers are norms
    sent = [sum(n for (name, size), n in found.items() if name == 'all_reduce' and size > 3) for found in counts]
    return dict(weights=whole(model), sent=sent)


def unsynced(rank):
    """Micro-batches that do not send gradients, where g is taken of those."""
    model, wrapped, sam = built('fsdp', params='all')
    wrapped.set_requires_gradient_sync(False)
    x, y = data('tiny', 0, rank)
    before = parts_of(model)
    found = said(lambda: sam.backward(lambda: F.cross_entropy(wrapped(x), y)))
    same = all(torch.equal(part, before[name]) for name, part in parts_of(model).items())
    wrapped.set_requires_gradient_sync(True)
    sam.minimize(lambda: F.cross_entropy(wrapped(x), y))
    return dict(found, same=same, moved=not torch.equal(parts_of(model)['conv.weight'], before['conv.weight']))


def with_scaler(rank, wrap, params, overflow):
    """Updates in float32 with a GradScaler, an overflow on rank 1 in the third, and clipping."""
    model, wrapped, sam = built(wrap, params=params, dtype=torch.float32)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 8)
    scales, clipped = [], []
    for step in range(5):
        x, y = data('tiny', step, rank, torch.float32)
        factors = [float('inf') if step == 2 and rank == 1 and name == overflow else 1.0 for name in ('at w', 'at eps')]
        sam.zero_grad()
        torch.manual_seed(step)
        sam.backward(lambda x=x, y=y, f=factors: F.cross_entropy(wrapped(x), y) * f.pop(0), scaler=scaler)
        scaler.unscale_(sam)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        clipped.append(float(norm.full_tensor() if hasattr(norm, 'full_tensor') else norm))
        scaler.step(sam)
        scaler.update()
        scales.append(scaler.get_scale())
    return dict(weights=whole(model), scales=scales, clipped=clipped, nonfinite=int(sam.nonfinite))


def frozen_first(rank, params, before):
    """Mixed precision, where the first forward is one with most parameters frozen, or is not."""
    model = network('no batch norm', torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mp_policy=policy)
    if before:
        F.cross_entropy(model(data('tiny', 99, rank, torch.float32)[0]), torch.zeros(4, dtype=torch.long)).backward()
        model.zero_grad()
    sam = SAM(OPTIMIZERS['sgd'](model), model, rho=0.5, params=params, sync=WAY[params])
    types = set()
    for step in range(3):
        x, y = data('tiny', step, rank, torch.float32)
        torch.manual_seed(step)
        sam.minimize(lambda x=x, y=y: F.cross_entropy(model(x).float(), y))
        types |= {str(p.grad.dtype) for p in model.parameters()}
    return dict(weights=whole(model), types=types)


def broken_off(rank, params, where):
    """Updates of which the second breaks off in the pass at w or at w + eps; its batch comes once more."""
    model, wrapped, sam = built('fsdp', params=params)
    before, versions, same, touched, trainable = None, None, [], [], True

    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    for step in (0, 1, 2) if where == 'never' else (0, 1, 1, 2):
        x, y = data('tiny', step, rank)
        breaks, calls = before is None and step == 1 and where != 'never', []

        def loss_fn(x=x, y=y, breaks=breaks, calls=calls):
            calls.append(None)
            now = breaks and len(calls) == (1 if 'at w' in where else 2)
            handle = model.norm.register_forward_pre_hook(stop) if now and 'forward' in where else None
            try:
                loss = F.cross_entropy(wrapped(x), y)
            finally:
                if handle is not None:
                    handle.remove()
            if now and 'loss' in where:
                raise Stop
            if now and 'backward' in where:
                loss.register_hook(stop)
            return loss

        torch.manual_seed(step)
        if breaks:
            before = parts_of(model)
            versions = {name: version_of(p) for name, p in model.named_parameters()}
        try:
            sam.minimize(loss_fn)
        except Stop:
            same = [name for name, part in parts_of(model).items() if torch.equal(part, before[name])]
            touched = [name for name, p in model.named_parameters() if version_of(p) != versions[name]]
            trainable = all(p.requires_grad for p in model.parameters())
    return dict(weights=whole(model), same=same, touched=touched, trainable=trainable)


def closures(rank, params):
    """What closures may do wrong: forget to zero gradients; and what they may do: leave a batch out."""
    model, wrapped, sam = built('fsdp', params=params)

    def closure(zeroes, step=0, leaves_out=False, way=True):
        def call():
            if zeroes:
                sam.zero_grad(set_to_none=way)
            if leaves_out:
                return None
            loss = F.cross_entropy(wrapped(data('tiny', step, rank)[0]), data('tiny', step, rank)[1])
            loss.backward()
            return loss
        return call

    result = {}
    sam.step(closure(True))
    sam.step(closure(True, 1, way=False))
    before = whole(model)
    try:
        sam.step(closure(False, 2))
    except ValueError as e:
        result['forgets'] = str(e)
    result['same after it'] = all(torch.equal(w, before[name]) for name, w in whole(model).items())
    result['left out'] = sam.step(closure(True, leaves_out=True)) is None
    result['same after that'] = all(torch.equal(w, before[name]) for name, w in whole(model).items())
    sam.step(closure(True, 3))
    result['moved'] = not all(torch.equal(w, before[name]) for name, w in whole(model).items())
    return result


def made_state(rank):
    """torch.distributed.checkpoint has the optimizer make its state before the first step."""
    model, wrapped, sam = built('fsdp', optimizer='adamw')
    before = whole(model)
    state = get_optimizer_state_dict(model, sam)
    return dict(state=sorted(state['state']), names=sorted(before),
                same=all(torch.equal(w, before[name]) for name, w in whole(model).items()))


def said(function):
    """The message of an error, and of a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try:
            function()
            error = ''
        except ValueError as e:
            error = str(e)
    return dict(error=error, warnings=[str(w.message) for w in caught if issubclass(w.category, UserWarning)])


def norms_outside(rank):
    """Only other layers are sharded; the loop averages the gradients of the rest."""
    results = []
    for wrap in (True, False):
        model = network()
        if wrap:
            fully_shard(model.conv, mesh=init_device_mesh('cpu', (2,)))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            wrapped = model if wrap else ddp(model)
            sam = SAM(OPTIMIZERS['sgd'](model), wrapped, rho=0.5)
        for step in range(3):
            x, y = data('tiny', step, rank)
            torch.manual_seed(1000 + 10 * step + rank)
            sam.zero_grad()
            sam.backward(lambda x=x, y=y, w=wrapped: F.cross_entropy(w(x), y))
            for p in model.parameters() if wrap else ():
                if not hasattr(p, 'full_tensor'):
                    torch.distributed.all_reduce(p.grad)
                    p.grad /= 2
            sam.step()
        results.append(whole(model))
    return dict(sharded=results[0], ddp=results[1])
