"""Recipes: two updates of each."""
import shlex
import shutil

import numpy as np
import pytest
import timm
import torch
from support.images import write_image_folder
from support.paper import PAPER, SETTINGS
from support.recipes import path_of, rho_if_missing
from support.running import in_process, quiet_about_timm

from timm_sam import train


@pytest.fixture(scope='module')
def four_images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp('four'), splits={'train': 1})


@pytest.fixture(scope='module')
def weights_of_21k_classes(tmp_path_factory):
    """What stands in for the published weights of the ViT-S, which is out of reach here."""
    file = tmp_path_factory.mktemp('weights') / 'vit.pth'
    model = timm.create_model('vit_small_patch16_224.augreg_in21k')
    assert model.num_classes == 21843
    torch.save(model.state_dict(), file)
    yield file
    file.unlink()


SMALL = {  # sizes at which two updates take a moment
    'resnet50': '--img-size 64',
    'vit_small_patch32_224': '--img-size 64 --model-kwargs img_size=64',
    'vit_small_ft': '--img-size 32 --model-kwargs img_size=32',
}


SHOWN = {f'cifar/{name}/cifar10' for name in ('resnet18', 'resnet56', 'resnext29_32x4d', 'vgg13_bn', 'densenet100')}


def is_shown_by_others(folder, name):
    """Neither of ImageNet, nor of the smallest ViT, nor the one of its network: it differs from those by numbers."""
    shown = folder.startswith('imagenet') or folder == 'cifar/vit_tiny/cifar10'
    return not shown and not (folder in SHOWN and name == 'fisher_onlynorm')


@pytest.mark.parametrize(('folder', 'name'), [
    pytest.param(f, n, marks=pytest.mark.slow if is_shown_by_others(f, n) else ()) for f, n in PAPER])
def test_recipe_trains(folder, name, four_images, tmp_path, request):
    command = (f'-c {path_of(folder, name)} --data-dir {four_images} --device cpu -j 0 -b 2 --epochs 1 '
               f"--warmup-epochs 0 --cooldown-epochs 0 --val-split '' --log-interval 1 --output {tmp_path}/out "
               f'--experiment run {SMALL.get(folder.split("/")[1], "")}')
    if folder.endswith('_ft'):
        command += f' --pretrained-path {request.getfixturevalue("weights_of_21k_classes")}'
    with quiet_about_timm():
        done = in_process(train.main, [*shlex.split(command), *rho_if_missing(folder, name)], tmp_path)
    assert done.code == 0, done.err
    assert 'Training for 1 epochs of 2 updates' in done.err
    summary, = done.summary()
    checkpoint = done.checkpoint()
    shutil.rmtree(tmp_path / 'out')  # hundreds of megabytes
    assert all(torch.isfinite(p).all() for p in checkpoint['state_dict'].values())
    assert np.isfinite(float(summary['train_loss']))
    row = SETTINGS[folder].rows[name]
    assert ('train_sam_loss' in summary) == (row.variant is not None)
    if row.variant is not None:
        assert np.isfinite(float(summary['train_sam_loss']))
        assert float(summary['train_sam_eps_norm']) > 0
        assert float(summary['train_sam_nonfinite']) == 0
        if row.variant in ('sam', 'fisher') and row.rho and 'ssam' not in name:  # whose masks make eps shorter
            # the l2 norm of eps is rho for SAM, and near it where T is near 1
            near = 1e-3 if row.variant == 'sam' else 0.5
            assert float(summary['train_sam_eps_norm']) == pytest.approx(row.rho, rel=near)
