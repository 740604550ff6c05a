"""Shifted copies of the digits."""
import numpy as np
import pytest
from PIL import Image

from timm_sam.digits.shifts import SHIFTS


@pytest.fixture
def image():
    rows, columns = np.mgrid[:32, :32]
    return Image.fromarray((255 * ((rows - 10) ** 2 + (columns - 18) ** 2 < 40)).astype(np.uint8))


def pixels(image):
    return np.asarray(image, dtype=np.float64)


def shifted(name, image, seed=0):
    return SHIFTS[name](image, np.random.default_rng(seed))


@pytest.mark.parametrize('name', SHIFTS)
def test_shift_keeps_size_and_mode_and_is_a_function_of_image_and_generator(name, image):
    first, again = shifted(name, image), shifted(name, image)
    assert (first.size, first.mode) == (image.size, image.mode)
    assert np.array_equal(pixels(first), pixels(again)) and not np.array_equal(pixels(first), pixels(image))


def test_blur_spreads_the_ink_and_keeps_it(image):
    blurred = pixels(shifted('blur', image))
    assert blurred.sum() == pytest.approx(pixels(image).sum(), rel=0.05)
    assert (blurred > 20).sum() > 1.3 * (pixels(image) > 20).sum()


def test_noise_has_the_standard_deviation_it_says():
    grey = Image.new('L', (64, 64), 128)
    difference = pixels(shifted('noise', grey)) - 128
    # of a normal variable with deviation 64 that is cut at two of its deviations
    assert difference.std() == pytest.approx(64 * 0.9594, rel=0.05)
    assert difference.mean() == pytest.approx(0, abs=3)


def test_rotation_moves_the_ink_around_the_centre_by_20_to_40_degrees(image):
    def angle(picture):
        ink = pixels(picture)
        rows, columns = np.mgrid[:32, :32] - 15.5
        return np.degrees(np.arctan2((ink * rows).sum(), (ink * columns).sum()))

    turns = [(angle(shifted('rotation', image, seed)) - angle(image) + 180) % 360 - 180 for seed in range(20)]
    assert all(18 < abs(turn) < 42 for turn in turns)
    assert min(turns) < 0 < max(turns)


def test_contrast_keeps_the_mean_and_shrinks_deviations_to_60_percent(image):
    before, after = pixels(image), pixels(shifted('contrast', image))
    assert after.mean() == pytest.approx(before.mean(), abs=1)
    assert after.std() == pytest.approx(0.6 * before.std(), rel=0.02)
