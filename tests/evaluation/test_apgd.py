import math

import numpy as np
import pytest
import reference_apgd
import torch

from timm_sam.evaluation.attack.apgd import apgd, checkpoints
from timm_sam.evaluation.attack.attack import cross_entropy, targeted_dlr
from timm_sam.evaluation.attack.ball import Ball

SHARPNESS_SCHEDULE = (5, 9, 12, 15, 16, 18, 19, 20)


class Everything:
    """All of R^n, one number a sample; keeps the step sizes that it was asked to scale."""

    def __init__(self):
        self.sizes = []

    def project(self, points):
        return points

    def direction(self, grads):
        return [g.sign() for g in grads]

    def per_sample(self, values):
        if values.is_floating_point():
            self.sizes.append(values.tolist())
        return [values]


class Interval(Everything):
    def project(self, points):
        return [p.clamp(-1, 1) for p in points]


class WeightBall:
    """delta = 0 and around it, in the l2 norm over several tensors together: one sample."""

    def __init__(self, rho):
        self.rho = rho

    @staticmethod
    def length(points):
        return math.sqrt(sum(float((p ** 2).sum()) for p in points))

    def project(self, points):
        scale = min(1.0, self.rho / max(self.length(points), 1e-300))
        return [scale * p for p in points]

    def direction(self, grads):
        length = self.length(grads)
        return [g / length if length else torch.zeros_like(g) for g in grads]

    def per_sample(self, values):
        return [values.view(()), values.view(())]


@pytest.mark.parametrize(('steps', 'expected'), [
    (100, (22, 41, 57, 70, 80, 87, 93, 99)),
    (200, (44, 82, 114, 140, 160, 174, 186, 198)),
    (50, (11, 21, 30, 38, 45)),
    (33, (7, 13, 18, 22, 25, 27, 28, 29, 30, 31, 32, 33)),
    (20, (4, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20)),
    (3, (1, 2, 3)),
    (1, (1,)),
])
def test_checkpoints(steps, expected):
    assert checkpoints(steps) == expected


def test_checkpoints_are_those_of_the_authors_code():
    assert all(checkpoints(steps) == reference_apgd.checkpoints(steps) for steps in range(1, 400))


@pytest.mark.parametrize('steps', [0, -1, 2.5])
def test_steps_must_be_a_positive_integer(steps):
    with pytest.raises(ValueError, match='steps=.* must be an integer >= 1'):
        checkpoints(steps)
    with pytest.raises(ValueError, match='steps=.* must be an integer >= 1'):
        apgd(lambda p: None, Everything(), [torch.zeros(1)], 1.0, steps)


@pytest.mark.parametrize('schedule', [(0,), (3, 11)])
def test_checkpoints_must_be_steps(schedule):
    with pytest.raises(ValueError, match='checkpoints must be integers from 1 to steps=10'):
        apgd(lambda p: None, Everything(), [torch.zeros(1)], 1.0, 10, schedule)


def test_three_steps_by_hand():
    seen = []

    def objective(points):
        seen.append(points[0].item())
        return -(points[0] - 0.3).abs(), [torch.sign(0.3 - points[0])]

    best = apgd(objective, Interval(), [torch.zeros(1, dtype=torch.float64)], 2.0, 3, schedule=(2,))
    # x1 = P(2); x2 = 1 + 0.75 (-1 - 1) + 0.25 (1 - 0); one rise in two steps: s = 1, back to 0, still the best;
    # x3 = 0 + 0.75 (1 - 0) + 0.25 (0 - 1)
    assert seen == pytest.approx([0, 1, -0.25, 0.5], abs=1e-15)
    assert best.points[0].item() == pytest.approx(0.5)
    assert best.loss.item() == pytest.approx(-0.2)


@pytest.mark.parametrize(('losses', 'schedule', 'sizes'), [
    # no rise; rise, just halved; rise, the best unchanged and not halved before: halve; rise, just halved
    ([0, 1, -5, -4, -3, -2, -1], (1, 2, 3, 4, 5), [8, 8, 4, 4, 2, 2]),
    # the first checkpoint does not ask for a better best; the second does
    ([0, -10, -9, -8, -7, -6, -5, -4], (5, 6), [8, 8, 8, 8, 8, 8, 4]),
    # 3 of 4 are too few, 4 of 5 are enough
    ([0, 1, 2, 3, 1, 1], (4,), [8, 8, 8, 8, 4]),
    ([0, 1, 2, 3, 4, 1, 1], (5,), [8, 8, 8, 8, 8, 8]),
])
def test_when_the_step_is_halved(losses, schedule, sizes):
    script = iter(losses)
    space = Everything()

    def objective(points):
        return torch.tensor([float(next(script))]), [torch.ones(1)]

    best = apgd(objective, space, [torch.zeros(1)], 8.0, len(losses) - 1, schedule)
    assert space.sizes == [[float(s)] for s in sizes]
    assert best.loss.item() == max(losses)


def network(classes=6, pixels=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w1 = 2 * torch.randn(16, pixels, generator=generator, dtype=torch.float64)
    w2 = torch.randn(classes, 16, generator=generator, dtype=torch.float64)
    return lambda x: torch.sin((x.flatten(1) - 0.5) @ w1.T) @ w2.T


def problem(norm, loss, samples=6):
    """A network, a ball around random images, and the loss per sample of a batch and of one flat image."""
    radius = {'linf': 0.2, 'l2': 0.6}[norm]
    model = network()
    generator = torch.Generator().manual_seed(1)
    center = torch.rand(samples, 3, 2, 2, generator=generator, dtype=torch.float64)
    order = model(center).argsort(1, descending=True)
    labels, targets = order[:, 0], order[:, 2]
    ball = Ball(center, norm, radius)
    start, = ball.surface(2 * torch.rand(center.shape, generator=generator, dtype=torch.float64) - 1)

    def objective(points):
        x = points[0].clone().requires_grad_()
        with torch.enable_grad():
            z = model(x)
            losses = cross_entropy(z, labels) if loss == 'ce' else targeted_dlr(z, labels, targets)
            return losses.detach(), list(torch.autograd.grad(losses.sum(), x))

    def of_sample(i):
        def loss_and_grad(flat):
            x = torch.tensor(flat, dtype=torch.float64, requires_grad=True)
            z = model(x[None])[0]
            y, t = int(labels[i]), int(targets[i])
            value = reference_apgd.cross_entropy(z, y) if loss == 'ce' else reference_apgd.targeted_dlr(z, y, t)
            value.backward()
            return float(value.detach()), x.grad.numpy()
        return loss_and_grad

    return ball, start, objective, of_sample


@pytest.mark.parametrize('loss', ['ce', 'dlr'])
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_every_iterate_is_that_of_the_slow_transcription(norm, loss):
    steps, schedule = 40, checkpoints(40)
    ball, start, objective, of_sample = problem(norm, loss)
    seen = []

    def recording(points):
        losses, grads = objective(points)
        seen.append((points[0], losses))
        return losses, grads

    best = apgd(recording, ball, [start], 2 * ball.radius, steps)
    patterns = set()
    for i in range(len(start)):
        points, losses, sizes, best_point, best_loss = reference_apgd.apgd(
            of_sample(i), norm, ball.radius, ball.center[i].flatten().numpy(), start[i].flatten().numpy(), steps,
            schedule)
        ours = np.stack([x[i].flatten().numpy() for x, _ in seen])
        np.testing.assert_allclose(ours, np.stack(points), rtol=0, atol=1e-9)
        np.testing.assert_allclose([float(y[i]) for _, y in seen], losses, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(best.points[0][i].flatten().numpy(), best_point, rtol=0, atol=1e-9)
        assert float(best.loss[i]) == pytest.approx(best_loss, rel=1e-9)
        patterns.add(tuple(sizes))
    assert len(patterns) > 1, 'all samples were halved together: the comparison would miss sample-wise mistakes'


@pytest.mark.parametrize('loss', ['ce', 'dlr'])
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_the_best_loss_never_falls_and_is_the_loss_at_the_best_point(norm, loss):
    ball, start, objective, _ = problem(norm, loss)
    before = torch.full((len(start),), -torch.inf, dtype=torch.float64)
    for steps in range(0, 41, 5):
        left = iter(range(steps))
        best = apgd(objective, ball, [start], 2 * ball.radius, 40, stop=lambda left=left: next(left, None) is None)
        assert (best.loss >= before).all()
        assert torch.equal(objective(best.points)[0], best.loss)
        before = best.loss
    assert (best.loss > objective([start])[0]).all()


def test_weights_are_one_sample_of_several_tensors():
    rho = 0.5
    generator = torch.Generator().manual_seed(0)
    target = [torch.randn(4, 3, generator=generator, dtype=torch.float64),
              torch.randn(3, generator=generator, dtype=torch.float64)]
    seen = []

    def objective(points):
        seen.append(WeightBall.length(points))
        value = -sum(((p - t) ** 2).sum() for p, t in zip(points, target))
        return value.view(1), [2 * (t - p) for p, t in zip(points, target)]

    start = [torch.zeros_like(t) for t in target]
    best = apgd(objective, WeightBall(rho), start, 2 * rho, 20, SHARPNESS_SCHEDULE)
    length = WeightBall.length(target)
    assert length > 1
    for point, t, zero in zip(best.points, target, start):
        torch.testing.assert_close(point, rho * t / length, rtol=1e-6, atol=1e-8)
        assert not zero.any(), 'the start was changed'
    assert best.loss.item() == pytest.approx(-(length - rho) ** 2)
    assert len(seen) == 21
    assert max(seen) <= rho * (1 + 1e-12)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(value):
    def objective(points):
        x = points[0]
        return torch.where(x > 0.5, value, x), [torch.ones_like(x)]

    best = apgd(objective, Interval(), [torch.tensor([0.0, 0.9])], 2.0, 10)
    assert best.loss[0] <= 0.5
    assert best.points[0][0] <= 0.5
    assert torch.isfinite(best.points[0]).all()


def test_without_any_finite_loss_the_start_is_the_best():
    best = apgd(lambda p: (p[0] * math.nan, [p[0] * 0]), Interval(), [torch.tensor([0.25])], 2.0, 5)
    assert best.loss.tolist() == [-math.inf]
    assert best.points[0].tolist() == [0.25]
