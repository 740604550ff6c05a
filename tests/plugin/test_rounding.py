"""Perturbations of half-precision weights: what is reported is what the weights took."""
import copy
import warnings

import pytest
import torch
from support.models import BatchLoss, TinyNet, batch, one_step, sam_on

WAYS = ['minimize', 'closure', 'backward']


def applied(sam, model, way, seed=0):
    """The norm of what the selected weights changed by, in float64."""
    before = [p.detach().double() for _, p in sam.selected]
    seen = []

    def look(loss):
        seen.append([p.detach().double() for _, p in sam.selected])
        return loss

    one_step(way, sam, model, seed, on_call={2: look})
    return torch.stack([(new - old).norm() for new, old in zip(seen[0], before)]).norm()


@pytest.mark.filterwarnings('ignore:the perturbation')
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('rho', [0.001, 0.01, 1.0])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('params', ['onlynorm', 'all'])
def test_reported_norm_is_that_of_the_change(params, dtype, rho, way):
    model = TinyNet().to(dtype)
    sam = sam_on(model, rho=rho, params=params)
    torch.testing.assert_close(sam_norm(sam, model, way), applied(sam, model, way), rtol=5e-3, atol=1e-6)


def sam_norm(sam, model, way):
    twin = copy.deepcopy(model)
    other = sam_on(twin, rho=sam.rho, params=sam.params)
    one_step(way, other, twin)
    return other.stats.eps_norm.double()


def test_float32_weights_report_eps_itself():
    model = TinyNet()
    sam = sam_on(model, rho=0.01)
    one_step('minimize', sam, model)
    torch.testing.assert_close(sam.stats.eps_norm.double(), torch.tensor(0.01, dtype=torch.float64))


def test_radius_that_is_rounded_away_is_said_once():
    model = TinyNet().bfloat16()
    sam = sam_on(model, rho=0.001)
    with pytest.warns(UserWarning, match=r"^the perturbation's norm is 0\.001, and .* bfloat16 weights") as warned:
        for seed in range(5):
            one_step('minimize', sam, model, seed)
    assert len(warned) == 1


def test_radius_that_the_weights_can_take_is_not():
    model = TinyNet().bfloat16()
    sam = sam_on(model, rho=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for seed in range(5):
            one_step('minimize', sam, model, seed)


def test_device_is_not_read_in_most_updates(monkeypatch):
    model = TinyNet().bfloat16()
    sam = sam_on(model, rho=1.0)
    reads, update = [], [0]
    monkeypatch.setattr('timm_sam.rounding.Rounding._compare', lambda *_: reads.append(update[0]))
    for seed in range(40):
        update[0] += 1
        sam.minimize(BatchLoss(model, batch(seed, dtype=torch.bfloat16)))
    assert reads == [2, 4, 8, 16, 32]
