import contextlib
import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import reference_apgd
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_sam.evaluation import attack as attack_module
from timm_sam.evaluation.attack import Attacked, Ball, Normalized, attack, cross_entropy, noise, targeted_dlr

SHAPE = (3, 4, 4)


def pictures(count, shape=SHAPE, seed=0, spread=0.1):
    """Random images around grey: the sides of the box are far."""
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + spread * (2 * torch.rand(count, *shape, generator=generator) - 1)


def linear(classes=6, seed=0, scale=1.0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), classes))
    model[1].weight.data.mul_(scale)
    return model.eval()


def biased(logits):
    """The same logits for every image, although they depend on it formally."""
    model = linear(len(logits))
    model[1].weight.data.zero_()
    model[1].bias.data.copy_(torch.tensor(logits))
    return model


def convolutional(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                          nn.Flatten(), nn.Linear(32, 6)).eval()
    with torch.no_grad():  # every class gets its share of the images
        model[-1].bias -= model(pictures(64, seed=9, spread=0.5)).mean(0)
    return model


def predicted(model, images):
    with torch.no_grad():
        return model(images).argmax(1)


def run(model, images, labels=None, radius=0.05, norm='linf', **kwargs):
    labels = predicted(model, images) if labels is None else labels
    return attack(model, images, labels, range(len(images)), norm, radius, **{'steps': 20, **kwargs})


# the ball

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
    found = run(biased([0.5] * 5), pictures(5), labels, norm=norm, return_images=True)
    assert found.clean.tolist() == [True, False, False, True, False]  # argmax takes the first
    assert torch.equal(found.robust, found.clean)
    assert torch.equal(found.no_gradient, found.clean)
    assert not found.non_finite.any()
    assert torch.equal(found.images, pictures(5))


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


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_the_images_returned_are_the_ones_that_broke_it(norm):
    model, images = convolutional(), pictures(16, spread=0.5)
    labels = predicted(model, images)
    radius = {'linf': 0.02, 'l2': 0.1}[norm]
    found = run(model, images, labels, norm=norm, radius=radius, return_images=True)
    assert 0 < found.robust.sum() < 16
    assert torch.equal(found.images[found.robust], images[found.robust])
    assert (predicted(model, found.images) != labels).equal(~found.robust)
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    length = (found.images - images).flatten(1).norm(math.inf if norm == 'linf' else 2, dim=1)
    assert (length <= radius * (1 + 1e-5)).all()
    assert run(model, images, labels, norm=norm, radius=radius).images is None


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_the_rest_of_the_batch_does_not_matter(norm):
    model, images = convolutional(), pictures(8, spread=0.5)
    labels = predicted(model, images)
    indices = [5, 90, 7, 3, 1000, 2, 31, 4]
    radius = {'linf': 0.02, 'l2': 0.1}[norm]
    together = attack(model, images, labels, indices, norm, radius, steps=20, return_images=True)
    assert 0 < together.robust.sum() < 8
    for i in range(8):
        alone = attack(model, images[i:i + 1], labels[i:i + 1], indices[i:i + 1], norm, radius, steps=20,
                       return_images=True)
        assert alone.robust.item() == together.robust[i].item()
        torch.testing.assert_close(alone.images[0], together.images[i], rtol=0, atol=1e-4)
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


def test_the_seed_decides():
    model, images = convolutional(), pictures(8, spread=0.5)
    one, same, other = (run(model, images, radius=0.02, seed=s, return_images=True).images for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# Normalized

def test_normalized_is_the_model_on_normalized_images():
    inner, images = convolutional(), pictures(3)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    model = Normalized(inner, mean, std)
    expected = inner(torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], 1))
    torch.testing.assert_close(model(images), expected)
    assert torch.equal(model(images.half()), model(images.half().float()))
    assert not model.training
    assert Normalized(copy.deepcopy(inner).train(), mean, std).training


def test_normalized_reduces_to_a_label_space():
    inner, images = linear(8), pictures(5)
    groups = [[0, 3], [1], [2, 7, 5], [6]]
    model = Normalized(inner, (0, 0, 0), (1, 1, 1), lambda z: torch.stack([z[:, g].amax(1) for g in groups], 1))
    assert model(images).shape == (5, 4)
    found = run(model, images, radius=0.4)
    assert found.clean.all()
    assert not found.robust.any()


@pytest.mark.parametrize(('mean', 'std'), [((0, 0), (1, 1, 1)), ((0, 0, 0), (1, 0, 1))])
def test_normalized_refuses_a_bad_mean_or_std(mean, std):
    with pytest.raises(ValueError, match='one number per channel each, std > 0'):
        Normalized(linear(), mean, std)


# refusals

def wrap_in_ddp(model):
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    return DistributedDataParallel(model).eval()


def test_models_that_cannot_be_attacked_are_refused():
    images, labels = pictures(2), torch.zeros(2, dtype=torch.int64)
    partly = convolutional()
    partly[1].train()
    with pytest.raises(ValueError, match=r'^1 of the model \(BatchNorm2d\) is in training mode: call model.eval\(\)'):
        run(partly, images, labels)
    with pytest.raises(ValueError, match=r'model.1 of the model \(BatchNorm2d\) is in training mode'):
        run(Normalized(partly, (0, 0, 0), (1, 1, 1)), images, labels)
    with pytest.raises(ValueError, match=r'the model \(Sequential\) is in training mode'):
        run(linear().train(), images, labels)
    with pytest.raises(ValueError, match='1.weight of the model is torch.bfloat16: call model.float'):
        run(linear().bfloat16(), images, labels)
    with pytest.raises(ValueError, match='torch.bfloat16 logits'):
        run(lambda x: x.flatten(1).bfloat16(), images, labels)
    with pytest.raises(ValueError, match=r'gives \(2, 3, 4, 4\) for 2 images'):
        run(lambda x: x, images, labels)
    with pytest.raises(ValueError, match='gives 3 logits: targeted DLR needs 4 or more'):
        run(linear(3), images, labels)


def test_ddp_is_refused():
    try:
        model = wrap_in_ddp(linear())
        with pytest.raises(ValueError, match='DistributedDataParallel'):
            run(model, pictures(2), torch.zeros(2, dtype=torch.int64))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('forward', [
    lambda model: torch.no_grad()(model.forward),
    lambda model: lambda x: model(x.detach()),
])
def test_logits_without_a_graph_are_refused(forward):
    model = linear()
    with pytest.raises(ValueError, match='the logits do not depend on the images'):
        run(forward(model), pictures(2), predicted(model, pictures(2)))


def test_autocast_is_refused():
    model, images = linear(), pictures(2)
    with torch.autocast('cpu', torch.bfloat16), pytest.raises(ValueError, match='autocast is on for cpu'):
        run(model, images, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(('change', 'message'), [
    ({'images': pictures(2).double()}, 'images are torch.float64'),
    ({'images': pictures(2)[0]}, r'float32 \(B, C, H, W\)'),
    ({'images': pictures(2)[:0]}, 'B > 0'),
    ({'images': pictures(2) + 0.5}, r'they must lie in \[0, 1\]'),
    ({'images': pictures(2) - 0.5}, r'they must lie in \[0, 1\]'),
    ({'images': pictures(2) * math.nan}, r'they must lie in \[0, 1\]'),
    ({'labels': torch.tensor([0, 1], dtype=torch.int32)}, 'int64'),
    ({'labels': torch.tensor([0])}, 'one int64 label and one index for each of the 2 images'),
    ({'labels': torch.tensor([0, 6])}, r'labels lie outside 0\.\.5'),
    ({'labels': torch.tensor([-1, 0])}, r'labels lie outside 0\.\.5'),
    ({'indices': [1]}, 'one index for each of the 2 images'),
    ({'indices': [-1, 2]}, 'indices hold -1'),
    ({'norm': 'l1'}, "norm='l1' is unknown: use one of linf, l2"),
    ({'radius': 0.0}, 'radius=0.0 must be a finite number > 0'),
    ({'radius': math.nan}, 'radius=nan'),
    ({'steps': 0}, 'steps=0 must be an integer >= 1'),
    ({'n_targets': 0}, 'n_targets=0 must be >= 1'),
    ({'seed': -1}, 'seed=-1'),
])
def test_bad_arguments_are_refused_in_one_line(change, message):
    model = linear()
    arguments = {'images': pictures(2), 'labels': predicted(model, pictures(2)), 'indices': [0, 1], 'norm': 'linf',
                 'radius': 0.01, 'steps': 2}
    with pytest.raises(ValueError, match=message) as error:
        attack(model, **{**arguments, **change})
    assert '\n' not in str(error.value)


# what is left behind

def test_the_model_and_the_random_state_are_left_alone():
    model = convolutional()
    model[0].weight.requires_grad_(False)
    model[3].bias.grad = torch.ones_like(model[3].bias)
    before = copy.deepcopy(model.state_dict())
    images = pictures(4)
    labels, copies = predicted(model, images), images.clone()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    run(model, images, labels)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ['0.weight']
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ['3.bias']
    assert torch.equal(model[3].bias.grad, torch.ones_like(model[3].bias))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert torch.equal(images, copies) and not images.requires_grad


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_gradients_flow_wherever_it_is_called(mode):
    model = linear()
    expected = run(model, pictures(4), radius=0.05)
    with mode():
        images = pictures(4)
        found = run(model, images, predicted(model, images), radius=0.05)
    assert torch.equal(found.robust, expected.robust)
    assert not found.no_gradient.any()
    assert isinstance(found, Attacked)


@pytest.mark.parametrize('fails', [False, True])
def test_tf32_is_off_inside_and_back_after(fails):
    model, inside = linear(), []

    def looking(x):
        inside.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
                       torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()))
        if fails:
            raise KeyError
        return model(x)

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision('medium')
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
        with pytest.raises(KeyError) if fails else contextlib.nullcontext():
            run(looking, pictures(2), predicted(model, pictures(2)))
        assert set(inside) == {(False, False, False, 'highest')}
        assert torch.get_float32_matmul_precision() == 'medium'
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = False
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


NEW_INTERFACE = '''
import torch
from timm_sam.evaluation.precision import full_precision
b = torch.backends
owners = [b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv]
for owner in (b.cudnn.conv, b.cuda.matmul, b):
    owner.fp32_precision = 'tf32'
    before = [o.fp32_precision for o in owners]
    assert 'tf32' in before
    with full_precision():
        assert {o.fp32_precision for o in owners} <= {'ieee', 'none'}
        assert not b.cuda.matmul.allow_tf32
    assert [o.fp32_precision for o in owners] == before
'''


@pytest.mark.skipif(not hasattr(torch.backends, 'fp32_precision'), reason='this PyTorch has the old interface only')
def test_tf32_set_by_the_new_interface_is_off_too():
    # in a process of its own: settings made by one interface make the other unreadable
    subprocess.run([sys.executable, '-c', NEW_INTERFACE], check=True, timeout=120)


# the same attack by others

def digits_network():
    """A small network, seconds of training, and 512 images that it has not seen."""
    datasets = pytest.importorskip('sklearn.datasets')
    data = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.tensor(data.images[order] / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target[order], dtype=torch.int64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
                          nn.Flatten(), nn.Linear(32 * 9, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    train = len(labels) - 512
    for _ in range(15):
        for rows in torch.randperm(train).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval(), images[train:], labels[train:]


@pytest.mark.slow
@pytest.mark.parametrize(('norm', 'radius'), [('linf', 0.1), ('l2', 0.6)])
def test_robust_accuracy_is_that_of_the_autoattack_package(norm, radius, record_property):
    package = pytest.importorskip('pyautoattack')
    model, images, labels = digits_network()
    found = attack(model, images, labels, range(512), norm, radius)
    theirs = package.AutoAttack(model, norm={'linf': 'Linf', 'l2': 'L2'}[norm], eps=radius, version='custom',
                                attacks=['apgd-ce', 'apgd-t'], seed=0)
    adversarial = theirs.run_standard_evaluation(images, labels, batch_size=512)
    adversarial = adversarial[0] if isinstance(adversarial, tuple) else adversarial
    their_robust = predicted(model, adversarial) == labels
    ours, others = (100 * r.float().mean().item() for r in (found.robust, their_robust))
    record_property('robust accuracy', (ours, others))
    print(f'{norm} {radius}: clean {100 * found.clean.float().mean():.2f}, ours {ours:.2f}, pyautoattack {others:.2f}, '
          f'{int((found.robust != their_robust).sum())} samples differ')
    assert 30 <= others <= 70
    assert abs(ours - others) <= 0.5
