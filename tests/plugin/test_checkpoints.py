"""torch.utils.checkpoint inside a model, of both kinds: two full forwards, and the gradients of a model without it."""
import pytest
import timm
import torch
import torch.nn.functional as F
from reference import sam_gradients
from support.models import assert_identical, by_closure, by_primitives, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_sam import SAM

REASON = 'two full forwards per update: gradient checkpointing computes the forward again'
BOTH = pytest.mark.parametrize('reentrant', [True, False], ids=['reentrant', 'not reentrant'])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.2)

    def forward(self, x):
        return x + self.drop(F.gelu(self.norm(self.linear(x))))


class Net(nn.Module):
    """A stem, two blocks, a head; the blocks are checkpointed if it is said how."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.reentrant = reentrant
        self.calls = 0
        self.double()

    def forward(self, x):
        self.calls += 1
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Loss:
    def __init__(self, model, step=0):
        generator = torch.Generator().manual_seed(step)
        self.model = model
        self.x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, (6,), generator=generator)

    def __call__(self):
        return F.cross_entropy(self.model(self.x), self.y)


def by_minimize(sam, loss_fn):
    sam.minimize(loss_fn)


WAYS = {'minimize': by_minimize, 'closure': by_closure, 'primitives': by_primitives}


def trained(reentrant, way='minimize', updates=4, **options):
    """A network after some updates, and its SAM."""
    model = Net(reentrant)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, rho=0.5, **options)
    for step in range(updates):
        torch.manual_seed(step)
        WAYS[way](sam, Loss(model, step))
    return model, sam


@BOTH
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('params', ['onlynorm', 'all', 'nonorm'])
def test_weights_are_those_of_a_model_without_checkpoints(params, way, reentrant):
    model, sam = trained(reentrant, way, params=params)
    assert_identical(weights(model), weights(trained(None, way, params=params)[0]))
    assert model.calls == 8
    if way == 'minimize' and params == 'onlynorm':
        assert sam.sharing == REASON


@BOTH
def test_gradients_are_those_of_the_reference(reentrant):
    model, twin = Net(reentrant), Net()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5)
    names = [name for name, _ in sam.selected]
    for m in (model, twin):
        for block in m.blocks:
            block.drop.p = 0.0
    sam.backward(Loss(model))
    expected = sam_gradients(twin, Loss(twin), names, 'sam', 0.5).descent
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-12, atol=1e-14, msg=name)


@BOTH
def test_all_perturbed_layers_are_perturbed_though_the_layers_below_are_frozen_in_the_pass_at_w(reentrant):
    model = Net(reentrant)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5)
    at_w, loss_fn, moved = weights(model), Loss(model), {}

    def seen():
        moved.update({name: not torch.equal(w, at_w[name]) for name, w in weights(model).items()})
        return loss_fn()
    sam.minimize(seen)
    assert {name for name, changed in moved.items() if changed} == {name for name, _ in sam.selected}
    assert len(sam.selected) == 4


@BOTH
def test_checkpoints_that_are_switched_on_later_end_sharing(reentrant):
    model, twin = Net(), Net()
    sams = [SAM(torch.optim.SGD(m.parameters(), lr=0.1), m, rho=0.5, filter=r'blocks\.1\.') for m in (model, twin)]
    for step in range(6):
        model.reentrant = None if step < 4 else reentrant
        for m, sam in zip((model, twin), sams):
            torch.manual_seed(step)
            sam.minimize(Loss(m, step))
        assert sams[0].sharing.startswith('one forward' if step < 4 else REASON)
    assert sams[1].sharing.startswith('one forward')
    for (name, a), b in zip(weights(model).items(), weights(twin).values()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=name)


@BOTH
def test_a_checkpoint_inside_of_a_layer_that_could_be_shared_is_noticed(reentrant):
    class Stem(nn.Linear):
        def forward(self, x):
            # with one that requires a gradient, or plain training would have none of the stem either
            return checkpoint(super().forward, x + 0 * self.weight.sum(), use_reentrant=reentrant)
    model, twin = Net(), Net()
    torch.manual_seed(0)
    model.stem = Stem(4, 8).double()
    model.stem.load_state_dict(twin.stem.state_dict())
    for m in (model, twin):
        sam = SAM(torch.optim.SGD(m.parameters(), lr=0.1), m, rho=0.5)
        for step in range(3):
            torch.manual_seed(step)
            sam.minimize(Loss(m, step))
        assert sam.sharing.startswith(REASON if m is model else 'one forward')
    for (name, a), b in zip(weights(model).items(), weights(twin).values()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=name)


@BOTH
def test_the_users_own_checkpoints_are_as_before_afterwards(reentrant):
    before = vars(torch.utils.checkpoint).copy()
    model, _ = trained(reentrant, updates=1)
    with pytest.raises(ZeroDivisionError):
        SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5).minimize(lambda: 1 / 0)
    assert vars(torch.utils.checkpoint) == before


@pytest.mark.full
@BOTH
def test_timms_gradient_checkpointing_gives_the_weights_of_a_model_without_it(reentrant):
    results = []
    for on in (False, True):
        torch.manual_seed(0)
        model = timm.create_model('test_vit', img_size=32, num_classes=3).double()
        if on:
            model.set_grad_checkpointing()
            timm.layers.set_reentrant_ckpt(reentrant)
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5)
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for _ in range(2):
            sam.minimize(lambda m=model, x=x: m(x).square().mean())
        results.append(weights(model))
    timm.layers.set_reentrant_ckpt(False)
    assert_identical(*results)
