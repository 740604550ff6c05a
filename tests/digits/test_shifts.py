"""Shifted copies of the digits."""
import numpy as np
import pytest
from PIL import Image

from timm_sam.digits.__main__ import export
from timm_sam.digits.shifts import CORRUPTIONS, SEVERITIES, SHIFTS, pixelate


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


# Corruptions

@pytest.mark.parametrize('kind', CORRUPTIONS)
def test_corruption_keeps_size_and_mode_and_grows_with_its_severity(kind, image):
    distances = []
    for severity in SEVERITIES:
        several = [[CORRUPTIONS[kind](image, np.random.default_rng(seed), severity) for seed in range(10)]
                   for _ in range(2)]
        for first, again in zip(*several):
            assert (first.size, first.mode) == (image.size, image.mode)
            assert np.array_equal(pixels(first), pixels(again))
        distances.append(np.mean([np.abs(pixels(one) - pixels(image)).mean() for one in several[0]]))
    assert 0 < distances[0] < distances[1] < distances[2]


def test_pixelated_image_has_so_many_squares_of_the_mean(image):
    found = pixels(pixelate(image, 4))
    assert found.shape == (32, 32)
    squares = pixels(image).reshape(4, 8, 4, 8).mean(axis=(1, 3))
    np.testing.assert_allclose(found, np.kron(squares, np.ones((8, 8))), atol=0.6)


@pytest.mark.full
def test_corruptions_are_written_if_asked_for_and_change_nothing_else(tmp_path):
    pytest.importorskip('sklearn')
    plain, more = tmp_path / 'plain', tmp_path / 'more'
    export(str(plain), size=8)
    export(str(more), size=8, corruptions=True)
    files = {path.relative_to(plain): path.read_bytes() for path in plain.rglob('*.png')}
    others = {path.relative_to(more): path.read_bytes() for path in more.rglob('*.png')}
    assert {path: others[path] for path in files} == files
    added = {path.parts[:3] for path in others.keys() - files.keys()}
    assert added == {('corrupted', kind, str(severity)) for kind in CORRUPTIONS for severity in SEVERITIES}
    clean = {path.relative_to(plain / 'validation') for path in (plain / 'validation').rglob('*.png')}
    for kind, severity in ((kind, severity) for kind in CORRUPTIONS for severity in SEVERITIES):
        top = more / 'corrupted' / kind / str(severity)
        assert {path.relative_to(top) for path in top.rglob('*.png')} == clean and len(clean) == 360
