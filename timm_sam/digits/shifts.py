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
    pixels = np.asarray(image, dtype=np.float64)
    return Image.fromarray((pixels + generator.normal(0, 64, pixels.shape)).clip(0, 255).round().astype(np.uint8))


def rotation(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Rotation by 20 to 40 degrees, to either side."""
    angle = generator.uniform(20, 40) * generator.choice([-1, 1])
    return image.rotate(angle, resample=Image.Resampling.BICUBIC)


def contrast(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """60 % of the contrast around the image's mean grey."""
    return ImageEnhance.Contrast(image).enhance(0.6)


SHIFTS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "blur": blur, "noise": noise, "rotation": rotation, "contrast": contrast}
