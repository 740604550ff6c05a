"""What the tests of SAM share: a tiny network, its batches, base optimizers, and the ways to do one SAM update.

One thread: more only wait for each other on tensors this small.
"""
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference import plain_step
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_sam import SAM
from timm_sam.split import WHOLE_GRAPHS_WORK

torch.set_num_threads(1)

whole_graphs = pytest.mark.skipif(not WHOLE_GRAPHS_WORK, reason='this torch gets SAM with a whole graph wrong')

ALL = [
    'cls_token', 'gamma',
    'stem.weight', 'bn.weight', 'bn.bias',
    'conv.weight', 'conv.bias', 'gn.weight', 'gn.bias',
    'norm.weight', 'norm.bias',
    'head.weight', 'head.bias',
]
ONLYNORM = ['bn.weight', 'bn.bias', 'gn.weight', 'gn.bias', 'norm.weight', 'norm.bias']
NONORM = ['cls_token', 'gamma', 'stem.weight', 'conv.weight', 'conv.bias', 'head.weight', 'head.bias']
SELECTIONS = {'onlynorm': ONLYNORM, 'all': ALL, 'nonorm': NONORM}


class TinyNet(nn.Module):
    """A residual block and a class token: three kinds of norm layer, dropout, drop path, two bare parameters."""

    def __init__(self, seed: int = 0, width: int = 4):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.gamma = nn.Parameter(torch.empty(width, 1, 1))
        self.stem = nn.Conv2d(3, width, 3, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.gn = nn.GroupNorm(2, width)
        self.drop_path = DropPath(0.4)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(width, 3)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn(self.stem(x)))
        x = x + self.drop_path(self.gamma * F.gelu(self.gn(self.conv(x))))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        return self.head(self.drop(self.norm(x)).mean(dim=1))


def batch(seed: int, size: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (size,), generator=generator)


OPTIMIZERS = {
    'sgd': lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    'adamw': lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05),
    'lion': lambda model: create_optimizer_v2(model, opt='lion', lr=0.01, weight_decay=0.05),
}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def assert_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in actual if not torch.equal(actual[name], expected[name])]
    assert not different


class BatchLoss:
    """The mean loss of a model on one batch, as a function without arguments.

    `weights_seen` and `storage_seen` hold the parameters and their addresses at each call; `on_call[k]` replaces the
    loss of the k-th call, counted from 1, and may raise.
    """

    def __init__(
            self,
            model: nn.Module,
            data: tuple[Tensor, Tensor],
            on_call: dict[int, Callable[[Tensor], Tensor]] | None = None,
    ):
        self.model = model
        self.x, self.y = data
        self.on_call = on_call or {}
        self.weights_seen = []
        self.storage_seen = []

    def __call__(self) -> Tensor:
        self.weights_seen.append(weights(self.model))
        self.storage_seen.append(storage(self.model))
        loss = F.cross_entropy(self.model(self.x), self.y)
        return self.on_call.get(len(self.weights_seen), lambda loss: loss)(loss)


def storage(model: nn.Module) -> list[int]:
    return [p.data_ptr() for p in model.parameters()]


def by_minimize(sam: SAM, loss_fn: BatchLoss) -> Tensor:
    return sam.minimize(loss_fn)


def by_closure(sam: SAM, loss_fn: BatchLoss) -> Tensor:
    def closure():
        sam.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    return sam.step(closure)


def by_backward(sam: SAM, loss_fn: BatchLoss) -> Tensor:
    sam.zero_grad()
    loss = sam.backward(loss_fn)
    sam.step()
    return loss


def by_primitives(sam: SAM, loss_fn: BatchLoss) -> Tensor:
    sam.zero_grad()
    with sam.ascent():
        loss = loss_fn()
        loss.backward()
    with sam.perturbed():
        loss_fn().backward()
    sam.optimizer.step()
    return loss.detach()


def by_owner(sam: SAM, loss_fn: BatchLoss) -> Tensor:
    sam.zero_grad()
    loss = sam.backward(loss_fn, backward_fn=lambda loss: loss.backward())
    sam.step()
    return loss


WAYS = {'minimize': by_minimize, 'closure': by_closure, 'backward': by_backward, 'primitives': by_primitives}


def one_step(way: str, sam: SAM, model: nn.Module, seed: int = 0, **loss_options) -> BatchLoss:
    """One SAM update on the batch of a seed; returns its loss function, which remembers the weights of both passes."""
    loss_fn = BatchLoss(model, batch(seed, dtype=model.head.weight.dtype), **loss_options)
    torch.manual_seed(seed)
    WAYS[way](sam, loss_fn)
    return loss_fn


def sam_on(model: nn.Module, optimizer: str = 'sgd', rho: float = 0.5, **options) -> SAM:
    return SAM(OPTIMIZERS[optimizer](model), model, rho=rho, **options)


def one_plain_step(model: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    plain_step(model, OPTIMIZERS['sgd'](model), BatchLoss(model, batch(seed, dtype=model.head.weight.dtype)))


def flops(function: Callable[[], object]) -> int:
    """Of linear layers and convolutions; attention's products on a CPU count for some versions of torch only."""
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts()['Global']
    return sum(count for operation, count in counts.items() if 'attention' not in str(operation))


class KeptForBackward:
    """As a context manager: what autograd keeps of the forwards inside."""

    class Box:
        def __init__(self, tensor: Tensor):
            self.tensor = tensor

    def __init__(self):
        self.boxes = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.tensor)

    def pack(self, tensor: Tensor) -> 'KeptForBackward.Box':
        box = self.Box(tensor)
        self.boxes.append(weakref.ref(box))
        return box

    @property
    def alive(self) -> int:
        """How many tensors a graph still holds; those of `len(boxes)` in all."""
        return sum(box() is not None for box in self.boxes)

    def __enter__(self) -> 'KeptForBackward':
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.hooks.__exit__(*exception)
