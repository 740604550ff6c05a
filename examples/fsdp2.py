#!/usr/bin/env python3
"""SAM of a model under `fully_shard` (FSDP2): `torchrun --nproc-per-node 2 examples/fsdp2.py`.

Each rank perturbs the norm layers by its own batch, as under DistributedDataParallel. To perturb everything, by the
gradient of all ranks: `SAM(..., params="all", sync=True)`.
"""
import os
from collections.abc import Iterable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard

from timm_sam import SAM


def train(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """One update per batch. First the model is sharded, then the optimizer is built, then SAM."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.get_world_size(),))
    for layer in model.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, rho=0.5)
    for x, y in batches:
        sam.minimize(lambda x=x, y=y: F.cross_entropy(model(x), y))


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    net = timm.create_model("test_vit", img_size=64, num_classes=10).to(device)
    torch.manual_seed(distributed.get_rank())
    train(net, [(torch.randn(8, 3, 64, 64, device=device), torch.randint(10, (8,), device=device)) for _ in range(4)])
    distributed.destroy_process_group()
