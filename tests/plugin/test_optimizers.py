"""SAM around every optimizer that timm's factory makes."""
import pytest
import timm.optim
import torch
from reference import sam_gradients, sam_step
from support.models import SELECTIONS, BatchLoss, TinyNet, batch
from timm.optim import create_optimizer_v2
from torch import nn

from timm_sam import SAM, methods

# bitsandbytes and apex are packages of their own that timm imports if they are there
NAMES = [n for n in timm.optim.list_optimizers() if not n.startswith(('bnb', 'fused'))]
SECOND_ORDER = 'adahessian'


def twins(opt: str) -> tuple[nn.Module, SAM, nn.Module, torch.optim.Optimizer]:
    model, twin = TinyNet().double(), TinyNet().double()
    make = {'opt': opt, 'lr': 0.01, 'weight_decay': 0.01}
    sam = SAM(create_optimizer_v2(model, **make), model, rho=0.5)
    return model, sam, twin, create_optimizer_v2(twin, **make)


def assert_same_weights(model: nn.Module, twin: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f'{name}: {m}')


@pytest.mark.filterwarnings('ignore:It is highly recommended to have .opt_einsum.:UserWarning')  # Kron
@pytest.mark.parametrize('opt', [n for n in NAMES if n != SECOND_ORDER])
def test_update_equals_the_reference_with_every_optimizer_of_timm(opt, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda function, **options: function)  # parts of Kron, for half a minute
    model, sam, twin, base = twins(opt)
    for step in range(3):
        torch.manual_seed(step)
        sam.minimize(BatchLoss(model, batch(step)))
        torch.manual_seed(step)
        sam_step(twin, base, BatchLoss(twin, batch(step)), SELECTIONS['onlynorm'], 'sam', 0.5)
        assert_same_weights(model, twin)


def test_the_list_of_optimizers_is_not_empty_by_accident():
    assert {'sgd', 'adamw', 'lion', 'lamb', 'muon', SECOND_ORDER} <= set(NAMES)


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 4, sparse=sparse)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self) -> torch.Tensor:
        return self.head(self.norm(self.words(torch.arange(6) % 4))).square().mean()


@pytest.mark.parametrize('options', [
    {}, {'variant': 'elementwise_linf'}, {'variant': 'fisher'}, {'method': methods.gsam(0.4, lr_max=0.1)},
    {'method': methods.random_mask(0.5)}, {'method': methods.looksam(2, 0.5)}, {'method': methods.ssam_fisher(0.5)},
], ids=['sam', 'linf', 'fisher', 'gsam', 'mask', 'looksam', 'ssam_fisher'])
def test_sparse_gradients_of_embeddings_are_as_dense_ones(options):
    model, twin = Words(sparse=True), Words(sparse=False)
    for m in (model, twin):
        sam = SAM(torch.optim.SGD(m.parameters(), lr=0.1), m, params='all', rho=0.5, **options)
        for update in range(2):
            sam.begin(0, update, lambda n, m=m: [m] * n)
            sam.minimize(m)
    assert not torch.equal(model.words.weight, Words(sparse=True).words.weight)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings('ignore:Using backward\\(\\) with create_graph=True:UserWarning')  # AdaHessian needs it
@pytest.mark.parametrize('bn_stats', ['clean', 'both'])
def test_second_order_optimizer_differentiates_at_the_perturbed_point(bn_stats):
    model, twin = TinyNet().double(), TinyNet().double()
    sam = SAM(create_optimizer_v2(model, opt=SECOND_ORDER, lr=0.01), model, rho=0.5, bn_stats=bn_stats)
    base = create_optimizer_v2(twin, opt=SECOND_ORDER, lr=0.01)
    for step in range(3):
        torch.manual_seed(step)
        sam.minimize(BatchLoss(model, batch(step)))

        eps = sam_gradients_at(twin, step).eps
        before = [p.detach().clone() for p in twin.parameters()]
        shifts = [eps.get(name, torch.zeros_like(p)) for name, p in twin.named_parameters()]
        add(twin, shifts)  # no weight decay: the step at w + eps moves by as much as the step at w
        torch.manual_seed(step)
        buffers = [b.clone() for b in twin.buffers()]
        base.zero_grad()
        BatchLoss(twin, batch(step))().backward(create_graph=True)
        base.step()
        with torch.no_grad():
            for p, w, shift in zip(twin.parameters(), before, shifts):
                p.copy_(w + (p - (w + shift)))
            for b, kept in zip(twin.buffers(), buffers):
                b.copy_(kept)
        base.zero_grad()
        assert_same_weights(model, twin)


def sam_gradients_at(model: nn.Module, step: int):
    torch.manual_seed(step)
    return sam_gradients(model, BatchLoss(model, batch(step)), SELECTIONS['onlynorm'], 'sam', 0.5)


def add(model: nn.Module, shifts: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for p, shift in zip(model.parameters(), shifts):
            p.add_(shift)
