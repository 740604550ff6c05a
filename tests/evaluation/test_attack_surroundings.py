"""What an attack asks of the model and its arguments, and what it leaves behind."""
import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from support.attack_models import convolutional, linear, pictures, predicted, run
from support.processes import python
from support.processes import run as run_process
from torch.nn.parallel import DistributedDataParallel

from timm_sam.evaluation.attack.attack import Attacked, Normalized, attack

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
                       torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(),
                       torch.backends.cudnn.deterministic))
        if fails:
            raise KeyError
        return model(x)

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision('medium')
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
        with pytest.raises(KeyError) if fails else contextlib.nullcontext():
            run(looking, pictures(2), predicted(model, pictures(2)))
        assert set(inside) == {(False, False, False, 'highest', True)}
        assert torch.get_float32_matmul_precision() == 'medium'
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic
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


@pytest.mark.full
@pytest.mark.skipif(not hasattr(torch.backends, 'fp32_precision'), reason='this PyTorch has the old interface only')
def test_tf32_set_by_the_new_interface_is_off_too(tmp_path):
    # in a process of its own: settings made by one interface make the other unreadable
    done = run_process(python('-c', NEW_INTERFACE), tmp_path)
    assert done.code == 0, done.err
