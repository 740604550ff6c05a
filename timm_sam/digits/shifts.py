"""Shifted copies of images: blur, noise, rotation, contrast, as out-of-distribution test sets of the digits.

Some of the kinds of corruption of Hendrycks & Dietterich, ICLR 2019, https://arxiv.org/abs/1903.12261, at strengths
with which people still read the digits.
"""
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter


def blur(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Gaussian blur with a standard deviation of 1/12 of the image's width."""
    return image.filter(ImageFilter.GaussianBlur(image.width / 12))


def noise(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Gaussian noise with a standard deviation of a quarter of the range, cut to the range."""
    return _noisy(image, generator, 64)


def rotation(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Rotation by 20 to 40 degrees, to either side."""
    angle = generator.uniform(20, 40) * generator.choice([-1, 1])
    return image.rotate(angle, resample=Image.Resampling.BICUBIC)


def contrast(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """60 % of the contrast around the image's mean grey."""
    return ImageEnhance.Contrast(image).enhance(0.6)


def pixelate(image: Image.Image, part: int) -> Image.Image:
    """Means of squares as large as the image divided by ``part``, each shown as one square."""
    small = image.resize((part, part), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def _turned(image: Image.Image, generator: np.random.Generator, least: float) -> Image.Image:
    angle = generator.uniform(least, least + 10) * generator.choice([-1, 1])
    return image.rotate(angle, resample=Image.Resampling.BICUBIC)


def _noisy(image: Image.Image, generator: np.random.Generator, deviation: float) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    noise = generator.normal(0, deviation, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).round().astype(np.uint8))


SEVERITIES = (1, 2, 3)
# five kinds in three severities, of which people still read the first two
CORRUPTIONS: dict[str, Callable[[Image.Image, np.random.Generator, int], Image.Image]] = {
    "blur": lambda image, _, severity: image.filter(ImageFilter.GaussianBlur(image.width * severity / 24)),
    "noise": lambda image, generator, severity: _noisy(image, generator, 32 * severity),
    "rotation": lambda image, generator, severity: _turned(image, generator, 15 * severity),
    "contrast": lambda image, _, severity: ImageEnhance.Contrast(image).enhance((0.7, 0.4, 0.2)[severity - 1]),
    "pixelate": lambda image, _, severity: pixelate(image, (7, 6, 5)[severity - 1]),
}

SHIFTS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "blur": blur, "noise": noise, "rotation": rotation, "contrast": contrast}
