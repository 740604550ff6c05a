"""Recipes: the optimizer, the schedule, the images and the networks that timm makes of them."""
import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.recipes import QUIET, parse, path_of
from timm.data import create_transform

from timm_sam.training.cifar_policy import add_cifar10_policy
from timm_sam.training.data import augmentation
from timm_sam.training.factory import build_model, create_optimizer
from timm_sam.training.schedule import create_schedule


def test_resnet50_trains_for_a_hundred_epochs_the_last_ten_of_them_at_the_lowest_rate(tmp_path):
    args = parse(path_of('imagenet/resnet50', 'sgd'), tmp_path)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    schedule, epochs = create_schedule(args, optimizer, updates_per_epoch=2502, decreasing_metric=False)
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        schedule.step(epoch + 1)
    assert epochs == 100
    assert rates[0] == 1e-4  # warm-up starts
    assert max(rates) == rates[3] == pytest.approx(0.2, rel=0.01)
    assert rates[3:90] == sorted(rates[3:90], reverse=True)
    assert rates[89] > 1e-6
    assert rates[90:] == [1e-6] * 10


@pytest.mark.parametrize(('folder', 'name', 'kind', 'nesterov', 'decays_all'), [
    ('imagenet/resnet50', 'sgd', torch.optim.SGD, True, False),
    ('imagenet/vit_small_patch32_224', 'adamw', torch.optim.AdamW, None, False),
    ('imagenet/vit_small_patch32_224', 'lion', timm.optim.Lion, None, False),
    ('cifar/resnet18/cifar10', 'sgd', torch.optim.SGD, False, True),
    ('cifar/vit_tiny/cifar10', 'adamw', torch.optim.AdamW, None, True),
])
def test_optimizer_is_the_one_meant(folder, name, kind, nesterov, decays_all, tmp_path):
    args = parse(path_of(folder, name), tmp_path)
    model = build_model(args, QUIET)
    optimizer = create_optimizer(args, QUIET, model, args.lr or args.lr_base)
    assert type(optimizer) is kind
    assert optimizer.defaults.get('nesterov') is nesterov
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    exempt = model.no_weight_decay() if hasattr(model, 'no_weight_decay') and not decays_all else ()
    for parameter_name, p in model.named_parameters():
        one_d = p.ndim == 1 or parameter_name.endswith('.bias')
        plain = parameter_name not in exempt and (decays_all or not one_d)
        assert decay[id(p)] == (args.weight_decay if plain else 0), parameter_name


def training_transform(args):
    """The loader's transform, as an image that it returns."""
    config = dict(mean=args.mean, std=args.std, interpolation=args.interpolation)
    options = augmentation(args, config)
    keys = ('is_training', 'no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter',
            'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'auto_augment', 'interpolation', 're_prob')
    chosen = {k: options[k] for k in keys if k in options}
    size = (3, args.img_size, args.img_size)
    transform = create_transform(size, mean=args.mean, std=args.std, use_prefetcher=True, **chosen)
    if args.aa == 'cifar10':
        add_cifar10_policy(SimpleNamespace(dataset=SimpleNamespace(transform=transform)))
    return transform


def test_cifar_crop_is_a_window_of_the_padded_image_at_every_offset(tmp_path):
    args = parse(path_of('cifar/vit_tiny/cifar10', 'adamw'), tmp_path, '--hflip', '0')
    args.aa = None  # comes after the crop
    transform = training_transform(args)
    row, column = np.mgrid[:40, :40]
    padded = np.stack([row, column, np.zeros_like(row)], -1).astype(np.uint8)  # each pixel knows its place
    seen = Counter()
    for _ in range(2000):
        window = np.asarray(transform(Image.fromarray(padded)))
        top, left = int(window[0, 0, 0]), int(window[1, 0, 0])
        assert (window.transpose(1, 2, 0) == padded[top:top + 32, left:left + 32]).all()
        seen[top, left] += 1
    assert set(seen) == set(itertools.product(range(9), range(9)))
    assert max(seen.values()) < 60  # 25 on average


@pytest.mark.parametrize(('folder', 'name', 'expected'), [
    ('imagenet/resnet50', 'sgd', []),
    ('cifar/resnet18/cifar10', 'sgd', []),
    ('cifar/vit_tiny/cifar10', 'adamw', ['AutoAugment']),
    ('cifar/wrn28_10/cifar100', 'sam_all', []),
])
def test_augmentation_is_crop_and_flip_and_autoaugment_where_asked(folder, name, expected, tmp_path):
    args = parse(path_of(folder, name), tmp_path)
    args.mean, args.std = args.mean or (0.5,) * 3, args.std or (0.5,) * 3
    steps = training_transform(args).transforms
    # with color jitter 0 timm still adds the transform; it then leaves images as they are
    names = [type(t).__name__ for t in steps if type(t).__name__ != 'ColorJitter']
    assert names == ['RandomResizedCropAndInterpolation', 'RandomHorizontalFlip', *expected, 'MaybePILToTensor']
    for jitter in (t for t in steps if type(t).__name__ == 'ColorJitter'):
        assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (None,) * 4


@pytest.mark.full
def test_network_is_the_one_of_the_table(tmp_path):
    """The registered networks are looked at in tests/models; here: which of them, and its head."""
    for folder, count in (('cifar/resnet18/cifar10', 11_173_962), ('cifar/resnet56/cifar100', 861_620),
                          ('cifar/vgg13_bn/cifar10', 9_416_010), ('cifar/densenet100/cifar100', 800_032)):
        args = parse(path_of(folder, 'sgd'), tmp_path)
        model = build_model(args, QUIET)
        assert sum(p.numel() for p in model.parameters()) == count
        assert not any((m.weight == 0).any() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
        stages = model.forward_intermediates(torch.zeros(2, 3, args.img_size, args.img_size), intermediates_only=True)
        assert stages[0].shape[-1] == 32
