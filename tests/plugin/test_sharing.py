"""The forward below the first perturbed layer, computed once for both passes."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from support.models import BatchLoss, TinyNet, assert_identical, batch, weights
from support.sharing import DATA, Counted, late, loss_of
from torch import Tensor, nn

from timm_sam import SAM, passes, recording
from timm_sam.random_state import RandomState

# family -> model, filter, constructor options, image size
ARCHITECTURES = {
    'resnet': ('resnet18', 'layer4', {'drop_path_rate': 0.2}, 64),
    'vit': ('vit_tiny_patch16_224', r'blocks\.(8|9|10|11)\.',
            {'img_size': 64, 'drop_path_rate': 0.2, 'proj_drop_rate': 0.1}, 64),
    'convnext': ('convnext_atto', r'stages\.3', {'drop_path_rate': 0.2}, 64),
    'efficientnet': ('efficientnet_b0', r'blocks\.6', {'drop_path_rate': 0.2}, 64),
    'regnet': ('regnetx_002', 's4', {}, 64),
    'densenet': ('densenet121', 'denseblock4', {}, 64),
    'mobilenetv3': ('mobilenetv3_small_050', r'blocks\.5', {'drop_rate': 0.2}, 64),
    'swin': ('swin_tiny_patch4_window7_224', r'layers\.3', {'img_size': 112}, 112),
    'resnetv2': ('resnetv2_50', r'stages\.3', {}, 64),
    'xcit': ('xcit_nano_12_p16_224', r'blocks\.11', {}, 64),
    'cait': ('cait_xxs24_224', r'blocks\.23', {'img_size': 64}, 64),
    'poolformer': ('poolformer_s12', r'stages\.3', {}, 64),
    'mobilevit': ('mobilevit_xxs', r'stages\.4', {}, 64),
    'dla': ('dla34', 'level5', {}, 64),
    'vgg': ('vgg11_bn', r'features\.2', {'mlp_ratio': 0.02}, 64),
}


def train(name: str, filter: str, options: dict, size: int, autocast: bool = False, **sam_options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).train()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), model, rho=0.5, filter=filter, **sam_options)
    torch.manual_seed(1)
    measured = []
    for _ in range(3):
        x, y = torch.randn(2, 3, size, size), torch.randint(7, (2,))

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                return F.cross_entropy(model(x), y)

        sam.minimize(loss)
        measured.append([float(v) for v in sam.stats])
    return model.state_dict(), measured, torch.get_rng_state(), sam.sharing


@pytest.mark.parametrize('family', [
    pytest.param(family, marks=() if family in ('resnet', 'vit') else pytest.mark.full) for family in ARCHITECTURES])
def test_shared_forward_equals_two_forwards_bit_for_bit(family):
    state, measured, rng, sharing = train(*ARCHITECTURES[family])
    expected, expected_measured, expected_rng, off = train(*ARCHITECTURES[family], share_forward=False)
    assert sharing.startswith('one forward for both passes')
    assert off == 'two full forwards per update: sharing is off'
    assert measured == expected_measured
    assert torch.equal(rng, expected_rng)
    assert_identical(state, expected)


@pytest.mark.full
@pytest.mark.parametrize('family', ['resnet', 'vit'])
def test_shared_forward_equals_two_forwards_bit_for_bit_under_autocast(family):
    state, measured, _, sharing = train(*ARCHITECTURES[family], autocast=True)
    expected, expected_measured, _, _ = train(*ARCHITECTURES[family], autocast=True, share_forward=False)
    assert sharing.startswith('one forward for both passes')
    assert measured == expected_measured
    assert_identical(state, expected)


def test_modules_below_the_first_perturbed_one_run_once_per_update():
    model = Counted()
    sam = late(model)
    sam.minimize(lambda: loss_of(model))  # the first update checks
    model.calls[:] = [0] * len(model)
    sam.minimize(lambda: loss_of(model))
    assert model.calls == [1, 1, 1, 1, 1, 2, 2]
    assert sam.sharing == 'one forward for both passes through 5 modules, 128 of 171 parameters'


def test_first_update_runs_the_loss_function_twice_and_no_more():
    model, calls = Counted(), []
    late(model).minimize(lambda: calls.append(1) or loss_of(model))
    assert len(calls) == 2


def test_shared_modules_get_their_gradients_and_their_statistics_once():
    model = Counted()
    before = weights(model)
    late(model).minimize(lambda: loss_of(model))
    # a bias before batch normalization has no gradient
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if n not in ('0.bias', '4.bias'))
    assert int(model[1].num_batches_tracked) == 1


def test_forward_methods_are_as_before_after_an_update():
    model = TinyNet()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5, filter='norm')
    sam.minimize(BatchLoss(model, batch(0, dtype=torch.float32)))
    assert sam.sharing.startswith('one forward')
    assert not any('forward' in m.__dict__ for m in model.modules())


@pytest.mark.parametrize('call', [1, 2])
def test_nothing_survives_an_exception_between_the_passes(call):
    def fail(loss: Tensor) -> Tensor:
        raise RuntimeError('batch is broken')

    model, twin = Counted(), Counted()
    twin.load_state_dict(model.state_dict())
    sam, expected = late(model), late(twin, share_forward=False)
    for m, s in ((model, sam), (twin, expected)):
        torch.manual_seed(2)
        s.minimize(lambda m=m: loss_of(m))
    calls = []

    def broken() -> Tensor:
        calls.append(1)
        loss = F.cross_entropy(model(DATA[0] * 7), DATA[1])
        return fail(loss) if len(calls) == call else loss

    statistics = [b.clone() for b in model.buffers()]
    with pytest.raises(RuntimeError, match='batch is broken'):
        sam.minimize(broken)
    with torch.no_grad():
        for b, kept in zip(model.buffers(), statistics):
            b.copy_(kept)
    for m, s in ((model, sam), (twin, expected)):
        torch.manual_seed(3)
        s.minimize(lambda m=m: loss_of(m))
    assert_identical(weights(model), weights(twin))


def test_evaluation_between_the_passes_sees_no_kept_outputs():
    model = Counted()
    sam = late(model)
    sam.minimize(lambda: loss_of(model))
    other = torch.randn(5, 4)
    model.eval()
    expected = model(other)
    model.train()
    seen = []

    def loss() -> Tensor:
        result = loss_of(model)
        model.eval()
        with torch.no_grad():
            seen.append(model(other))
        model.train()
        return result

    sam.minimize(loss)
    assert not torch.equal(seen[0], expected)  # statistics moved in the pass at w
    model.eval()
    assert seen[0].shape == expected.shape


def test_evaluation_after_an_update_is_that_of_the_new_weights():
    model, twin = Counted(), Counted()
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    late(model).minimize(lambda: loss_of(model))
    torch.manual_seed(0)
    late(twin, share_forward=False).minimize(lambda: loss_of(twin))
    assert torch.equal(model.eval()(DATA[0]), twin.eval()(DATA[0]))


def test_check_is_made_three_times_where_nothing_is_perturbed():
    model = Counted()
    sam, calls = late(model), []
    sam.rho = 0.0
    for _ in range(5):
        model.calls[:] = [0] * len(model)
        sam.minimize(lambda: loss_of(model))
        calls.append(model.calls[0])
    assert calls == [2, 2, 2, 1, 1]


def test_random_state_is_that_of_all_devices_where_the_model_is_by_now(monkeypatch):
    """Trainers move a model after SAM was built, and may leave parts of it elsewhere."""
    seen = []

    class Seen(RandomState):
        def __init__(self, devices: set[torch.device]) -> None:
            seen.append(devices)
            super().__init__(devices)

    for module in (passes, recording):
        monkeypatch.setattr(module, 'RandomState', Seen)
    model = Counted()
    model.far = nn.Parameter(torch.ones(2))
    sam = late(model)
    torch.utils.swap_tensors(model.far, nn.Parameter(torch.ones(2, device='meta')))
    sam.minimize(lambda: loss_of(model))
    assert sam.sharing.startswith('one forward') and len(seen) > 3
    assert all(devices == {torch.device('cpu'), torch.device('meta')} for devices in seen)


class Reading(nn.Module):
    """Works on a parameter of a layer that is another module's."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norms = [norm]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.norms[0].weight


def test_a_copy_knows_its_own_parameters():
    norm = nn.LayerNorm(8)
    model = nn.Sequential(nn.Linear(4, 8), Reading(norm), norm, nn.Linear(8, 3))
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=1e-6)  # no output tells
    for m, s in (copy.deepcopy((model, sam)), (model, sam)):
        s.minimize(lambda m=m: loss_of(m))
        assert s.sharing.endswith('perturbed parameters are used below the module that owns them')


class Below(nn.Module):
    """Returns its features in a list of a dictionary, as encoders do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        return {'features': [self.conv(x)]}


class Taking(nn.Module):
    """Changes the containers that a module gave it."""

    def __init__(self, what: str):
        super().__init__()
        self.what, self.below, self.relu = what, Below(), nn.ReLU(inplace=True)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = self.below(x)
        features = found.pop('features') if self.what == 'takes out' else found['features']
        self.relu(features[0])
        features.append(self.norm(features[0]) * len(features))
        return self.head(sum(features).mean((2, 3)))


@pytest.mark.parametrize('what', ['takes out', 'puts in'])
def test_containers_that_are_changed_above_are_whole_in_the_second_pass(what):
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 6, 6), torch.randint(5, (8,))
    model = Taking(what)
    shared, apart = copy.deepcopy(model), copy.deepcopy(model)
    for m, share in ((shared, True), (apart, False)):
        sam = SAM(torch.optim.SGD(m.parameters(), lr=0.1), m, rho=0.5, share_forward=share)
        for _ in range(5):
            sam.minimize(lambda m=m: F.cross_entropy(m(x), y))
        assert sam.sharing.startswith('one forward for both passes') == share
    torch.testing.assert_close(shared.state_dict(), apart.state_dict(), rtol=1e-5, atol=1e-6)
