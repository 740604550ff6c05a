import math

import numpy as np
import pytest
import reference_apgd
import torch
from support.attack_models import SHAPE

from timm_sam.evaluation.attack.ball import Ball, noise


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_projection_is_the_written_out_one(norm):
    radius = {'linf': 0.1, 'l2': 0.5}[norm]
    generator = torch.Generator().manual_seed(0)
    center = torch.rand(5, *SHAPE, generator=generator, dtype=torch.float64)
    center[0, 0], center[0, 1] = 0, 1  # on the sides of the box
    points = center + torch.randn(center.shape, generator=generator, dtype=torch.float64)  # most leave ball and box
    points[1] = center[1]
    points[2] = center[2] + (points[2] - center[2]) * 1e-3  # inside
    points[3] = 5.0
    got, = Ball(center, norm, radius).project([points])
    for i in range(5):
        expected = reference_apgd.into_ball_and_box(
            norm, radius, center[i].flatten().numpy(), points[i].flatten().numpy())
        np.testing.assert_allclose(got[i].flatten().numpy(), expected, rtol=0, atol=1e-15)
    assert torch.equal(got[1], center[1])
    assert got.min() >= 0
    assert got.max() <= 1
    length = (got - center).flatten(1).norm(float('inf') if norm == 'linf' else 2, dim=1)
    assert (length <= radius * (1 + 1e-12)).all()
    # the far away points end on the surface, up to what the box cuts off
    assert length[4] == pytest.approx(radius, rel=1e-12) if norm == 'linf' else length[4] > 0.5 * radius


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_direction_has_length_one_or_is_zero(norm):
    grads = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    grads[1] = 0
    grads[2] *= 1e-36  # squares underflow
    grads[3] *= 1e+30  # squares overflow
    grads[4, 0, 0, 0] = math.nan
    grads[5, 0, 0, 0] = -math.inf
    got, = Ball(torch.full_like(grads, 0.5), norm, 0.1).direction([grads])
    order = math.inf if norm == 'linf' else 2
    length = got.flatten(1).norm(order, dim=1)
    torch.testing.assert_close(length, torch.tensor([1.0, 0, 1, 1, 1, 1]))
    expected = grads[[0, 2, 3]].double()
    expected = expected.sign() if norm == 'linf' else expected / expected.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(got[[0, 2, 3]].double(), expected, rtol=1e-5, atol=1e-6)
    assert got[4, 0, 0, 0] == 0
    assert got[5, 0, 0, 0] == -1


@pytest.mark.parametrize(('norm', 'order'), [('linf', math.inf), ('l2', 2)])
def test_starts_lie_on_the_surface_and_belong_to_the_sample(norm, order):
    both = noise(norm, SHAPE, seed=3, indices=[11, 40_000], stage=2)
    assert both.dtype == torch.float32
    assert torch.equal(both[1:], noise(norm, SHAPE, 3, [40_000], 2))
    for other in (noise(norm, SHAPE, 4, [11], 2), noise(norm, SHAPE, 3, [12], 2), noise(norm, SHAPE, 3, [11], 3)):
        assert (both[0] != other[0]).float().mean() > 0.9
    many = noise(norm, SHAPE, 0, range(200), 0)
    assert abs(many.mean()) < 0.02
    assert many.std() == pytest.approx({'linf': 3 ** -0.5, 'l2': 1.0}[norm], abs=0.02)
    assert norm == 'l2' or many.abs().max() <= 1
    start, = Ball(torch.full_like(both, 0.5), norm, 0.25).surface(both)
    torch.testing.assert_close((start - 0.5).flatten(1).norm(order, dim=1), torch.full((2,), 0.25))
    torch.testing.assert_close((start - 0.5) * both.flatten(1).norm(order, dim=1).view(-1, 1, 1, 1) / 0.25, both)
