"""timm's policies where they keep no bit of an image."""
import random

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import AugmentOp

from timm_sam.training.posterize import down_to_no_bit


@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize('name, magnitude, bits', [
    ('Posterize', 0, 0), ('Posterize', 10, 4), ('PosterizeIncreasing', 10, 0), ('PosterizeIncreasing', 9, 1),
    ('PosterizeOriginal', 0, 4), ('PosterizeOriginal', 10, 8)])
def test_as_many_leading_bits_stay_as_the_policy_says(mode, name, magnitude, bits):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)).convert(mode)
    with down_to_no_bit():
        op = AugmentOp(name, 1.0, magnitude, {'img_mean': 0})
    assert np.array_equal(op(image), np.array(image) >> (8 - bits) << (8 - bits))


def test_timms_own_are_as_before_behind_it():
    before = dict(auto_augment.NAME_TO_OP)
    with down_to_no_bit():
        assert before != auto_augment.NAME_TO_OP
    assert before == auto_augment.NAME_TO_OP


@pytest.mark.full
def test_run_under_a_policy_with_such_images_gets_to_its_end(run_train):
    random.seed(0)
    for policy in ('v0', 'rand-m10-n4-inc1', 'augmix-m10-w3'):
        done = run_train(f'--aa {policy} --experiment {policy}')
        assert done.code == 0, done.err[-2000:]
