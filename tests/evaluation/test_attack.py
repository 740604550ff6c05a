import math

import pytest
import reference_apgd
import torch
from support.attack_models import SHAPE, Recording, biased, convolutional, linear, pictures, predicted, run

from timm_sam.evaluation.attack import attack as attack_module
from timm_sam.evaluation.attack.attack import attack, cross_entropy, targeted_dlr
from timm_sam.evaluation.attack.ball import Ball, noise

# the losses

def test_losses_by_hand():
    z = torch.tensor([[3.0, 1, 2, 0, -5], [0.0, 1, 2, 3, 4]], dtype=torch.float64)
    labels, targets = torch.tensor([0, 0]), torch.tensor([1, 4])
    expected = torch.tensor([-(3 - 1) / (3 - (1 + 0) / 2), (4 - 0) / (4 - (2 + 1) / 2)], dtype=torch.float64)
    torch.testing.assert_close(targeted_dlr(z, labels, targets), expected)
    torch.testing.assert_close(cross_entropy(z, labels), torch.logsumexp(z, 1) - z[:, 0])
    for row, y, t in zip(z, labels, targets):
        assert float(targeted_dlr(row[None], y[None], t[None])) == pytest.approx(
            float(reference_apgd.targeted_dlr(row, y, t)))


# what is broken

@pytest.mark.full
@pytest.mark.parametrize('classes', [4, 7])
@pytest.mark.parametrize(('norm', 'dual'), [('linf', 1), ('l2', 2)])
def test_a_linear_model_breaks_where_theory_says(norm, dual, classes):
    model = linear(classes)
    images = pictures(6)
    labels = predicted(model, images)
    with torch.no_grad():
        logits, weight = model(images).double(), model[1].weight.double()
    for i, y in enumerate(labels.tolist()):
        others = [j for j in range(classes) if j != y]
        differences = {j: weight[y] - weight[j] for j in others}
        radius = min(float((logits[i, y] - logits[i, j]) / d.norm(dual)) for j, d in differences.items())
        largest = radius if norm == 'linf' else radius * max(
            float(d.abs().max() / d.norm()) for d in differences.values())
        assert 1e-3 < largest < 0.39, 'the box would interfere'
        for factor, stands in ((0.99, True), (1.01, False)):
            found = attack(model, images[i:i + 1], labels[i:i + 1], [i], norm, factor * radius)
            assert found.clean.tolist() == [True]
            assert found.robust.tolist() == [stands], f'sample {i}, {factor} of the theoretical radius'


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_a_constant_model_is_not_broken(norm):
    labels = torch.tensor([0, 1, 2, 0, 4])
    found = run(biased([0.5] * 5), pictures(5), labels, norm=norm)
    assert found.clean.tolist() == [True, False, False, True, False]  # argmax takes the first
    assert torch.equal(found.robust, found.clean)
    assert torch.equal(found.no_gradient, found.clean)
    assert not found.non_finite.any()


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_break_nothing(bad, norm):
    images = pictures(4)
    inner = biased([0.0, 1, 0, 0, 0])

    def model(x):
        off = (x - images).flatten(1).abs().amax(1, keepdim=True) > 1e-6 if len(x) == 4 else None
        z = inner(x)
        return torch.where(off & (torch.arange(5) == 3), bad, z)

    found = run(model, images, torch.ones(4, dtype=torch.int64), norm=norm)
    assert found.clean.all()
    assert found.robust.all()
    assert found.non_finite.all()


def test_nan_on_clean_images_is_a_mistake_and_reported():
    model = linear()
    found = run(lambda x: model(x) * math.nan, pictures(3), torch.zeros(3, dtype=torch.int64))
    assert not found.clean.any()
    assert not found.robust.any()
    assert found.non_finite.all()


def test_clean_mistakes_count_as_broken_and_are_not_attacked():
    model, images = linear(), pictures(6)
    labels = predicted(model, images)
    labels[[1, 4]] = (labels[[1, 4]] + 1) % 6
    sizes = []

    def recording(x):
        sizes.append(len(x))
        return model(x)

    found = run(recording, images, labels, radius=1e-6)
    assert found.clean.tolist() == found.robust.tolist() == [True, False, True, True, False, True]
    assert sizes == [6] + [4] * 21 * 6


def test_broken_samples_leave_the_batch():
    model, images = linear(), pictures(8)
    sizes = []

    def recording(x):
        sizes.append(len(x))
        return model(x)

    found = run(recording, images, predicted(model, images), radius=0.4)
    assert not found.robust.any()
    assert len(sizes) <= 1 + 4  # not the 21 evaluations of a stage, nor the other stages


@pytest.mark.full
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_a_sample_stands_if_no_image_that_was_tried_breaks_it_and_all_lie_in_the_ball(norm):
    model, images = convolutional(), pictures(16, spread=0.5)
    labels = predicted(model, images)
    radius = {'linf': 0.02, 'l2': 0.1}[norm]
    robust = []
    for i in range(16):
        recording = Recording(model)
        robust += run(recording, images[i:i + 1], labels[i:i + 1], norm=norm, radius=radius).robust.tolist()
        tried = torch.cat(recording.seen)
        assert robust[i] == (predicted(model, tried) == labels[i]).all()
        assert tried.min() >= 0 and tried.max() <= 1
        length = (tried - images[i]).flatten(1).norm(math.inf if norm == 'linf' else 2, dim=1)
        assert (length <= radius * (1 + 1e-5)).all()
    assert 0 < sum(robust) < 16


@pytest.mark.full
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_the_rest_of_the_batch_does_not_matter(norm):
    model, images = convolutional(), pictures(8, spread=0.5)
    labels = predicted(model, images)
    indices = [5, 90, 7, 3, 1000, 2, 31, 4]
    radius = {'linf': 0.02, 'l2': 0.1}[norm]
    recording = Recording(model)
    together = attack(recording, images, labels, indices, norm, radius, steps=20)
    assert 0 < together.robust.sum() < 8
    for i in range(8):
        mine = Recording(model)
        alone = attack(mine, images[i:i + 1], labels[i:i + 1], indices[i:i + 1], norm, radius, steps=20)
        assert alone.robust.item() == together.robust[i].item()
        torch.testing.assert_close(mine.seen[1][0], recording.seen[1][i], rtol=0, atol=1e-4)  # where it starts
    order = torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])
    shuffled = attack(model, images[order], labels[order], torch.tensor(indices)[order], norm, radius, steps=20)
    assert torch.equal(shuffled.robust, together.robust[order])


# the pipeline

def stages(monkeypatch, model, images, labels, **kwargs):
    """The stages that ran, and the targets of each."""
    seen, targets = [], []
    real_noise, real_dlr = attack_module.noise, attack_module.targeted_dlr

    def recording_noise(norm, shape, seed, indices, stage):
        seen.append(stage)
        return real_noise(norm, shape, seed, indices, stage)

    def recording_dlr(logits, labels, t):
        if len(targets) < len(seen) - 1:
            targets.append(t.tolist())
        return real_dlr(logits, labels, t)

    monkeypatch.setattr(attack_module, 'noise', recording_noise)
    monkeypatch.setattr(attack_module, 'targeted_dlr', recording_dlr)
    run(model, images, labels, steps=3, **kwargs)
    return seen, targets


@pytest.mark.parametrize(('classes', 'n_targets', 'expected'), [(4, 9, 3), (10, 9, 9), (25, 9, 9), (25, 2, 2)])
def test_number_of_targets(monkeypatch, classes, n_targets, expected):
    model = biased([1.0] + [0.0] * (classes - 1))
    labels = torch.zeros(2, dtype=torch.int64)
    seen, targets = stages(monkeypatch, model, pictures(2), labels, n_targets=n_targets)
    assert seen == list(range(1 + expected))
    assert len(targets) == expected


def test_targets_are_the_classes_ranked_next_by_the_clean_logits(monkeypatch):
    seen, targets = stages(monkeypatch, biased([5.0, 1, 4, 2, 3]), pictures(2), torch.zeros(2, dtype=torch.int64))
    assert seen == [0, 1, 2, 3, 4]
    assert targets == [[2, 2], [4, 4], [3, 3], [1, 1]]


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_stages_start_on_the_surface_with_a_step_of_twice_the_radius(monkeypatch, norm):
    calls = []
    real = attack_module.apgd

    def recording(objective, space, start, step, steps, **kwargs):
        calls.append((start[0], step, steps))
        return real(objective, space, start, step, steps, **kwargs)

    monkeypatch.setattr(attack_module, 'apgd', recording)
    images = pictures(2)
    attack(biased([1.0, 0, 0, 0]), images, torch.zeros(2, dtype=torch.int64), [70, 8], norm, 0.03, steps=7, seed=5)
    assert len(calls) == 4
    for stage, (start, step, steps) in enumerate(calls):
        assert (step, steps) == (0.06, 7)
        expected, = Ball(images, norm, 0.03).surface(noise(norm, SHAPE, 5, [70, 8], stage))
        assert torch.equal(start, expected)


def test_a_stage_gets_only_what_still_stands(monkeypatch):
    model, images = convolutional(), pictures(16, spread=0.5)
    sizes = []
    real = attack_module.noise

    def recording(norm, shape, seed, indices, stage):
        sizes.append(list(indices))
        return real(norm, shape, seed, indices, stage)

    monkeypatch.setattr(attack_module, 'noise', recording)
    found = run(model, images, radius=0.02)
    assert sizes[0] == list(range(16))
    assert all(set(later) <= set(earlier) for earlier, later in zip(sizes, sizes[1:]))
    assert len(sizes[1]) < 16
    assert set(found.robust.nonzero().flatten().tolist()) <= set(sizes[-1])


def test_targeted_attacks_find_what_cross_entropy_cannot():
    """Logits so large that the gradient of CE is exactly zero in float32; DLR does not depend on their scale."""
    model = linear(scale=1e5)
    images = pictures(4)
    labels = predicted(model, images)
    with torch.no_grad():
        z = model(images)
        margin = (z.topk(2).values @ torch.tensor([1.0, -1.0])).min()
    assert margin > 200
    found = run(model, images, labels, radius=0.3)
    assert found.clean.all()
    assert not found.robust.any()


@pytest.mark.full
def test_the_seed_decides():
    model, images = convolutional(), pictures(8, spread=0.5)
    one, same, other = (Recording(model) for _ in range(3))
    for recording, seed in ((one, 1), (same, 1), (other, 2)):
        run(recording, images, predicted(model, images), radius=0.02, seed=seed)
    assert all(map(torch.equal, one.seen, same.seen)) and len(one.seen) == len(same.seen)
    assert not torch.equal(one.seen[1], other.seen[1])
