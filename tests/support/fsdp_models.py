"""Networks that `fully_shard` or DDP wraps, their batches, and SAM built with them."""
import timm
import torch
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from support.models import OPTIMIZERS, TinyNet, batch, weights
from timm_sam import SAM

RHO = {'layerwise_l2': 0.02, 'elementwise_linf': 0.05}
WAY = {'onlynorm': False, 'all': True, 'nonorm': True}  # and sync


def network(net='tiny', dtype=torch.float64, size=32):
    torch.manual_seed(0)
    if net.startswith('vit'):
        model = timm.create_model('test_vit', img_size=size, num_classes=3).to(dtype)
        if net == 'vit checkpointing':
            model.set_grad_checkpointing()
        if net == 'vit compiled':
            for block in model.blocks:
                block.compile(backend='aot_eager')
        return model
    model = TinyNet().to(dtype)
    if net == 'tied':
        model.norm.weight, model.norm.bias = model.gn.weight, model.gn.bias
    if net == 'no batch norm':
        model.bn = nn.GroupNorm(2, 4).to(dtype)
    if net == 'unused norm':
        model.head.norm = nn.LayerNorm(3).to(dtype)
    if net == 'frozen':
        model.conv.requires_grad_(False)
        model.stem.requires_grad_(False)
    if net == 'checkpoint':
        inner, model.conv.forward = model.conv.forward, lambda x: checkpoint(inner, x, use_reentrant=False)
    return model


def data(net, step, rank, dtype=torch.float64, size=32):
    if not net.startswith('vit'):
        return batch(2 * step + rank, 4, dtype)
    generator = torch.Generator().manual_seed(2 * step + rank)
    return torch.randn(4, 3, size, size, generator=generator).to(dtype), torch.randint(3, (4,), generator=generator)


def shard(model, shape=(2,), parts=None, **options):
    """One unit per block, or two layers, one of them a norm layer; and the rest."""
    names = ('replicas', 'shards')[-len(shape):]
    mesh = init_device_mesh('cpu', shape, mesh_dim_names=names)
    for part in parts or (model.blocks if hasattr(model, 'blocks') else (model.conv, model.gn)):
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def norms_apart(model):
    return shard(model, parts=[model.stem, model.bn, model.conv, model.gn, model.norm])


def layers_together(model):
    return shard(model, parts=[[model.conv, model.gn], [model.stem, model.bn]])


def ddp(model):
    unused = hasattr(model, 'head') and hasattr(model.head, 'norm')
    return DistributedDataParallel(model, find_unused_parameters=unused)


WRAP = {
    'fsdp': shard, 'ddp': ddp, 'gathered after forward': lambda m: shard(m, reshard_after_forward=False),
    'replicas': lambda m: shard(m, (2, 1)), 'two dimensions': lambda m: shard(m, (1, 2)),
    'root only': lambda m: shard(m, parts=[m.head]), 'norms apart': norms_apart, 'layers together': layers_together,
}


def units(model):
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def whole(model):
    """The weights, gathered."""
    for unit in units(model):
        unit.reshard()
    return {name: p.full_tensor() if hasattr(p, 'full_tensor') else p for name, p in weights(model).items()}


def parts_of(model):
    return {name: p._local_tensor.clone() for name, p in model.named_parameters()}


def built(wrap, net='tiny', optimizer='sgd', dtype=torch.float64, **options):
    model = network(net, dtype)
    wrapped = WRAP[wrap](model)
    params = options.get('params', 'onlynorm')
    options = {'rho': RHO.get(options.get('variant'), 0.5), 'sync': WAY[params], **options}
    make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    return model, wrapped, SAM(make(model), wrapped, **options)
