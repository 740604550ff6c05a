"""Models and losses whose forwards cannot be shared: two forwards, the reason why, and the same update."""

import pytest
import timm
import torch
import torch.nn.functional as F
from support.models import KeptForBackward, assert_identical, weights, whole_graphs
from support.sharing import DATA, Counted, late, loss_of
from torch import Tensor, nn

from timm_sam import SAM


class Functional(nn.Module):
    """Uses the parameters of its norm layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.layer_norm(self.stem(x), (8,), self.norm.weight, self.norm.bias))


class InPlace(nn.Module):
    """Changes what lies below the perturbed layer after that layer has run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x.detach().clone())
        x += 1
        return self.head(x + y)


class InPlaceBetween(InPlace):
    """Changes what the layer below gave before the perturbed layer takes it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x += 1
        x.mul_(3)
        return self.head(self.norm(x))


class Unsteady(nn.Module):
    """Its first layer gives something else at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Drifting(4, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)))


class Drifting(nn.Linear):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) * self.count


@pytest.mark.parametrize('kind, reason', [
    (Functional, 'used without calling the module that owns them'),
    (InPlace, 'changed in place above it'),
    (InPlaceBetween, 'changed in place between two modules'),
    (Unsteady, 'Drifting does not repeat its output'),
])
def test_models_that_cannot_share_make_two_forwards_and_say_why(kind, reason):
    torch.manual_seed(0)
    model = kind()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5)
    calls = []
    model.head.register_forward_pre_hook(lambda m, args: calls.append(1))
    sam.minimize(lambda: loss_of(model))
    assert sam.sharing == f'two full forwards per update: {sam.sharing.split(": ")[1]}'
    assert reason in sam.sharing
    calls.clear()
    sam.minimize(lambda: loss_of(model))
    assert len(calls) == 2


@pytest.mark.parametrize('kind', [Functional, InPlace])
def test_models_that_cannot_share_get_the_same_update(kind):
    torch.manual_seed(0)
    model, twin = kind(), kind()
    twin.load_state_dict(model.state_dict())
    for m, options in ((model, {}), (twin, {'share_forward': False})):
        sam = SAM(torch.optim.SGD(m.parameters(), lr=0.1), m, rho=0.5, **options)
        for _ in range(2):
            sam.minimize(lambda m=m: loss_of(m))
    assert_identical(weights(model), weights(twin))


@pytest.mark.parametrize('kind', [Functional, InPlace, InPlaceBetween])
def test_models_that_cannot_share_free_the_graph_of_the_first_pass_before_the_second(kind):
    model, alive = kind(), []
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5)
    with KeptForBackward() as kept:
        model.register_forward_pre_hook(lambda m, args: alive.append(kept.alive))
        for _ in range(2):
            sam.minimize(lambda: loss_of(model))
    assert sam.sharing.startswith('two full forwards') and kept.boxes
    assert alive == [0] * 4


def test_gradient_checkpointing_makes_two_forwards_and_says_why():
    model = timm.create_model('test_vit', img_size=32)
    model.set_grad_checkpointing()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5, filter=r'blocks\.1')
    assert sam.sharing == 'two full forwards per update: gradient checkpointing computes the forward again'
    sam.minimize(lambda: model(torch.zeros(2, 3, 32, 32)).square().mean())


@pytest.mark.parametrize('sam', [False, True])
def test_gradient_checkpointing_updates_running_statistics_twice_with_or_without_sam(sam):
    model = timm.create_model('test_resnet')
    model.set_grad_checkpointing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    if sam:
        SAM(optimizer, model, rho=0.5).minimize(lambda: model(x).square().mean())
    else:
        model(x).square().mean().backward()
    assert model.layer1[0].bn1.num_batches_tracked == 2
    assert model.bn1.num_batches_tracked == 1  # the stem is not checkpointed


class Position(nn.Module):
    """Keeps what its first forward made, which in an evaluation is a tensor of inference mode."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(-1, 1, 8)
        return self.table[None]


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = Position()
        self.stem = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        position = self.position(x)
        return self.head(self.norm(self.stem(x) + position))


def test_tensors_that_an_evaluation_in_inference_mode_left_are_not_shared():
    torch.manual_seed(0)
    model, twin = Positioned(), Positioned()
    twin.load_state_dict(model.state_dict())
    with torch.inference_mode():
        model(DATA[0])
    for m in (model, twin):
        sam = SAM(torch.optim.SGD(m.parameters(), lr=0.1), m, rho=0.5)
        for _ in range(2):
            sam.minimize(lambda m=m: loss_of(m))
        assert sam.sharing.startswith('one forward') == (m is twin)
        assert m is twin or sam.sharing.endswith('a module gives tensors of inference mode')
    assert_identical(weights(model), weights(twin))


def test_data_parallel_on_several_devices_makes_two_forwards_and_says_why():
    """Its copies of a module would run what stands for the forward of the module itself, with its weights."""
    model = nn.DataParallel(Counted())
    assert late(model).sharing is None
    model.device_ids = [0, 1]
    assert late(model).sharing == 'two full forwards per update: DataParallel runs copies of its modules'


def test_statistics_of_both_passes_need_both_forwards():
    sam = late(Counted(), bn_stats='both')
    assert sam.sharing == 'two full forwards per update: both passes update running statistics'


def test_ascent_on_a_part_of_the_batch_shares_nothing_and_equals_the_gradient_of_that_part():
    model, twin = Counted(), Counted()
    twin.load_state_dict(model.state_dict())
    for m in (model, twin):
        m[3].p = 0.0
    x, y = DATA
    sam, by_hand = late(model), late(twin, share_forward=False)
    sam.minimize(lambda: F.cross_entropy(model(x), y), ascent_fn=lambda: F.cross_entropy(model(x[:3]), y[:3]))
    by_hand.zero_grad()
    with by_hand.ascent():
        F.cross_entropy(twin(x[:3]), y[:3]).backward()
    with by_hand.perturbed():
        F.cross_entropy(twin(x), y).backward()
    by_hand.optimizer.step()
    assert_identical(weights(model), weights(twin))


class Auxiliary(nn.Module):
    """Its first layer keeps something for the loss, in a list or an attribute."""

    def __init__(self, append: bool) -> None:
        super().__init__()
        self.stem = Keeping(append)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)))


class Keeping(nn.Linear):
    def __init__(self, append: bool) -> None:
        super().__init__(4, 8)
        self.append, self.kept, self.last = append, [], torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.append:
            self.kept.append(x.square().mean())
        else:
            self.last = x.square().mean()
        return x


def with_auxiliary_loss(model: Auxiliary, x: Tensor) -> Tensor:
    model.stem.kept.clear()
    loss = model(x).square().mean()
    return loss + sum(model.stem.kept) + (0 if model.stem.append else model.stem.last)


class Inner(nn.Module):
    """The layer with a hook is inside of the one that is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)))


def updated(make, loss_fn, steps: int = 3, **options) -> tuple[nn.Module, SAM]:
    torch.manual_seed(0)
    model = make()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5, filter='norm', **options)
    for step in range(steps):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        sam.minimize(lambda x=x, step=step: loss_fn(model, x, step))
    return model, sam


def assert_as_two_forwards(make, loss_fn, reason: str) -> None:
    shared, sam = updated(make, loss_fn)
    full, _ = updated(make, loss_fn, share_forward=False)
    assert reason in sam.sharing
    assert_identical(weights(shared), weights(full))


@pytest.mark.parametrize('append', [True, False])
def test_layer_that_keeps_something_for_the_loss_is_not_shared(append):
    assert_as_two_forwards(
        lambda: Auxiliary(append), lambda model, x, step: with_auxiliary_loss(model, x),
        'Keeping changes its attributes')


def test_layers_with_hooks_inside_are_not_shared():
    def make() -> nn.Module:
        model = Inner()
        model.seen = []
        model.stem[1].register_forward_hook(lambda m, args, output: model.seen.append(output.square().mean()))
        return model

    def loss_fn(model: nn.Module, x: Tensor, step: int) -> Tensor:
        model.seen.clear()
        return model(x).square().mean() + sum(model.seen)

    assert_as_two_forwards(make, loss_fn, 'a module below the first perturbed layer has hooks')


def test_call_without_gradients_of_a_part_is_computed_anew_in_both_passes():
    def loss_fn(model: nn.Module, x: Tensor, step: int) -> Tensor:
        target = 0.0
        if step:  # from the second update on: the first one is checked
            with torch.no_grad():
                target = model.stem(x.flip(1)).mean()
        return (model(x).square() - target).mean()

    assert_as_two_forwards(Inner, loss_fn, 'one forward for both passes')


@pytest.mark.parametrize('leaf', [True, False])
def test_loss_with_gradients_of_inputs_makes_two_forwards(leaf):
    def loss_fn(model: nn.Module, x: Tensor, step: int) -> Tensor:
        shift = torch.zeros_like(x, requires_grad=True) if not leaf else x.clone().requires_grad_()
        gradient, = torch.autograd.grad(model(shift if leaf else x + shift).square().mean(), shift)
        return model(x + 0.1 * gradient.sign()).square().mean()

    assert_as_two_forwards(Inner, loss_fn, 'what the model is given requires gradients')


class FirstByHand(Inner):
    """Uses the bias of its norm layer before it calls it: without a perturbation, no output shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.stem(x) + self.norm.bias)))


def test_parameter_that_is_used_below_its_layer_is_noticed_without_a_perturbation():
    def train(**options) -> tuple[nn.Module, SAM]:
        torch.manual_seed(0)
        model = FirstByHand()
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.0, **options)
        for step in range(3):
            sam.rho = 0.5 * step
            sam.minimize(lambda: loss_of(model))
        return model, sam

    shared, sam = train()
    full, _ = train(share_forward=False)
    assert sam.sharing == (
        'two full forwards per update: perturbed parameters are used below the module that owns them')
    assert_identical(weights(shared), weights(full))


def test_checkpointing_that_is_switched_on_later_ends_sharing():
    model = timm.create_model('test_vit', img_size=32)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5, filter=r'blocks\.1')
    sam.minimize(lambda: model(torch.zeros(2, 3, 32, 32)).square().mean())
    assert sam.sharing.startswith('one forward')
    model.set_grad_checkpointing()
    sam.minimize(lambda: model(torch.zeros(2, 3, 32, 32)).square().mean())
    assert sam.sharing == 'two full forwards per update: gradient checkpointing computes the forward again'


@pytest.mark.full
@whole_graphs
@pytest.mark.parametrize('way', ['before', 'after'])
def test_compiled_wrapper_of_the_model_that_sam_has_makes_two_forwards(way):
    torch.compiler.reset()
    results = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = called = Inner()
        if compiled and way == 'before':
            called = torch.compile(model, backend='aot_eager')
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5)
        if compiled and way == 'after':
            called = torch.compile(model, backend='aot_eager')
        for _ in range(3):
            sam.minimize(lambda called=called: loss_of(called))
        results.append(weights(model))
        assert sam.sharing.startswith('two full forwards' if compiled else 'one forward')
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=1e-5, atol=1e-6)
