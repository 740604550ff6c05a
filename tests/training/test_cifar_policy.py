"""--aa cifar10: AutoAugment's policy for CIFAR, wherever a loader keeps its transforms."""
import shlex

import pytest
import torch
from PIL import Image
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from timm_sam import train
from timm_sam.cli.device import Process
from timm_sam.training.data import create_data
from timm_sam.training.options import parse_args

pytestmark = pytest.mark.full
CROP = ['RandomResizedCropAndInterpolation', 'RandomHorizontalFlip']
AA, LAST = ['AutoAugment'], ['MaybePILToTensor']


def loader(image_folder, options, channels=3):
    args = parse_args(train.build_parser(), shlex.split(
        f"--data-dir {image_folder} --device cpu -j 0 -b 4 --val-split '' --model test_vit --img-size 32 {options}"))
    half = (0.5,) * channels
    config = dict(input_size=(channels, 32, 32), mean=half, std=half, interpolation='bicubic', crop_pct=1.0,
                  crop_mode='center')
    process = Process(torch.device('cpu'), rank=1)
    return create_data(args, process, config, 4, (4, 4), None).train


def names(transform):
    return [type(step).__name__ for step in transform.transforms]


@pytest.mark.parametrize(('options', 'expected'), [
    ('', [*CROP, *AA, *LAST]),
    ('--hflip 0', [*CROP[:1], *AA, *LAST]),
    ('--vflip 0.5', [*CROP, 'RandomVerticalFlip', *AA, *LAST]),
    ('--train-crop-mode rkrc --hflip 0', ['ResizeKeepRatio', 'CenterCropOrPad', *AA, *LAST]),
    ('--grayscale-prob 0.1 --color-jitter 0.3', [*CROP, *AA, 'RandomGrayscale', *LAST]),  # no jitter under a policy
    ('--no-prefetcher', [*CROP, *AA, 'MaybeToTensor', 'Normalize']),
])
def test_policy_comes_behind_crop_and_flip(options, expected, image_folder):
    found = loader(image_folder, f'--aa cifar10 {options}')
    assert names(found.dataset.transform) == expected
    policy = next(step for step in found.dataset.transform.transforms if isinstance(step, AutoAugment))
    assert policy.policy == AutoAugmentPolicy.CIFAR10
    assert policy.fill == 128


def test_every_size_of_a_schedule_has_it(image_folder):
    found = loader(image_folder, '--aa cifar10 --train-img-sizes 16 32')
    assert [names(t) for t in found.dataset.transforms] == [[*CROP, *AA, *LAST]] * 2


def test_every_length_of_naflex_has_it(image_folder):
    found = loader(image_folder, '--aa cifar10 --naflex-loader --naflex-train-seq-lens 16 64')
    dataset = getattr(found, 'loader', found).dataset
    assert [names(t)[2] for t in dataset.transforms.values()] == [*AA] * len(dataset.transforms)
    assert len(dataset.transforms) > 1


def test_first_of_several_views_is_clean(image_folder):
    found = loader(image_folder, '--aa cifar10 --aug-splits 2')
    assert names(found.dataset.augmentation) == AA
    assert names(found.dataset.transform) == CROP


@pytest.mark.parametrize('options', ['--aa cifar10 --no-aug', ''])
def test_nothing_has_it_where_it_is_not_asked_for(options, image_folder):
    assert AA[0] not in names(loader(image_folder, options).dataset.transform)


@pytest.mark.parametrize(('mode', 'channels'), [('RGB', 3), ('L', 1)])
def test_what_is_moved_in_is_grey(mode, channels, image_folder):
    transform = loader(image_folder, f'--aa cifar10 --in-chans {channels}', channels).dataset.transform
    policy, = (step for step in transform.transforms if isinstance(step, AutoAugment))
    image = Image.new(mode, (32, 32), 0 if channels == 1 else (0, 0, 0))
    torch.manual_seed(0)
    seen = {value for _ in range(200) for value in torch.tensor(list(policy(image).tobytes())).unique().tolist()}
    assert 128 in seen  # black stays, is inverted, or is moved away


def test_its_policies_are_the_twenty_five_of_the_paper_of_autoaugment():
    policies = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    assert len(policies) == 25
    assert policies[0] == (('Invert', 0.1, None), ('Contrast', 0.2, 6))
    assert policies[-1] == (('TranslateY', 0.7, 9), ('AutoContrast', 0.9, None))


def test_run_trains_with_it(run_in, tmp_path):
    losses = []
    for folder, options in (('with', '--aa cifar10'), ('without', '')):
        (tmp_path / folder).mkdir()
        done = run_in(tmp_path / folder, options)
        assert done.code == 0, done.err
        losses.append(done.summary()[0]['train_loss'])
    assert losses[0] != losses[1]
