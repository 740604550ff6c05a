"""Images of which posterizing keeps no bit: timm's policies ask for them, and Pillow 13.0 refuses them.

That is so in ``v0`` and wherever a magnitude reaches 10, so also, now and then, in ``rand-m9-mstd0.5-inc1``. Pillow
12.2 still made such an image black.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from timm.data import auto_augment

_OPS = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")


@contextmanager
def down_to_no_bit() -> Iterator[None]:
    """Inside, timm builds policies that posterize as they did with earlier versions of Pillow."""
    before = {name: auto_augment.NAME_TO_OP[name] for name in _OPS}
    auto_augment.NAME_TO_OP.update(dict.fromkeys(_OPS, _posterize))
    try:
        yield
    finally:
        auto_augment.NAME_TO_OP.update(before)


def _posterize(img: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    return auto_augment.posterize(img, bits_to_keep, **kwargs) if bits_to_keep > 0 else Image.new(img.mode, img.size)
