"""Images of an evaluation set for timm's loaders, and subsets of them."""
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from PIL import Image, UnidentifiedImageError
from timm.data.transforms import MaybePILToTensor
from torch.utils.data import Dataset

from ...cli.errors import OptionError, WorkerError, one_line
from ...cli.image_files import eight_bits, is_deep, open_file

if TYPE_CHECKING:
    from .suites import Suite


class UnreadableImage(WorkerError):
    """An image file that cannot be decoded, or that nothing is left of once its border is cut off."""


class SuiteDataset(Dataset):
    """``(image, class)`` pairs of a suite for ``timm.data.create_loader``, which sets ``transform``.

    Args:
        suite: Of ``open_suite``. Its ``crop_border_pixels`` is for ``create_loader``: nothing is cut here.
        img_mode: PIL mode that images are converted to; None: as they are.
        indices: Positions in ``suite.samples``, in this order; None: all.
    """

    def __init__(self, suite: "Suite", img_mode: str | None = "RGB", indices: Sequence[int] | None = None):
        self.samples = suite.samples if indices is None else [suite.samples[i] for i in indices]
        self.img_mode = img_mode
        self.transform: Callable[[Image.Image], Any] | None = None
        self._flag = suite.flag

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Raises UnreadableImage where timm's data set would go on with the next sample."""
        path, target = self.samples[index]
        image = open_image(path, self.img_mode, self._flag, path)
        return image if self.transform is None else prepared(self.transform, image, self._flag, path), target


def open_image(file: str | BinaryIO, mode: str | None, flag: str, name: str) -> Image.Image:
    """Decodes an image.

    Args:
        file: Its path, or an open file.
        mode: PIL mode to convert to; None: as it is.
        flag: What errors begin with.
        name: What errors call the file.

    Raises:
        UnreadableImage: It cannot be decoded.
    """
    try:
        with warnings.catch_warnings(), open_file(file) if isinstance(file, str) else nullcontext(file) as stream:
            # of odd EXIF data and transparent palettes: their pixels are fine
            warnings.filterwarnings("ignore", category=UserWarning)
            image: Image.Image = Image.open(stream)
            image.load()
            if not mode:
                return image
            return (image if is_deep(mode) else eight_bits(image)).convert(mode)
    except MemoryError:
        raise
    except Exception as e:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise unreadable(e, flag, name) from None


def prepared(transform: Callable[[Image.Image], Any], image: Image.Image, flag: str, name: str) -> Any:
    """Brings an image to the model's size.

    Args:
        transform: Does it.
        image: The image.
        flag: What errors begin with.
        name: What errors call the file.

    Raises:
        UnreadableImage: Nothing is left of it, or nothing but the lowest bits.
    """
    # timm's way to the prefetcher keeps 8 bits of any number: 40,000 would be 64
    steps = getattr(transform, "transforms", ())
    if is_deep(image.mode) and any(isinstance(step, MaybePILToTensor) for step in steps):
        lowest, highest = cast(tuple[float, float], image.getextrema())  # of one channel
        if not (lowest >= 0 and highest < 256):
            raise UnreadableImage(f"{flag}: the image {name} holds numbers from {lowest:g} to {highest:g}, of which "
                                  f"prefetching keeps 8 bits; leave out --input-img-mode {image.mode}, or add "
                                  f"--no-prefetcher")
    try:
        return transform(image)
    except (ArithmeticError, ValueError) as e:
        width, height = image.size
        raise UnreadableImage(f"{flag}: nothing can be made of the image {name} of {width}x{height} pixels "
                              f"({one_line(e, 120)}); check --crop-border-pixels, --crop-pct and --img-size") from None


def unreadable(error: Exception, flag: str, name: str) -> UnreadableImage:
    """The error for an image that cannot be decoded.

    Args:
        error: Of the decoder.
        flag: What the message begins with.
        name: What the message calls the file.
    """
    # the texts of the first two repeat the file's name
    what = "no image" if isinstance(error, UnidentifiedImageError) else (
        getattr(error, "strerror", None) or one_line(error, 120))
    return UnreadableImage(f"{flag}: cannot read the image {name} ({what}); restore the file")


def class_balanced_subset(suite: "Suite", n: int, seed: int, flag: str = "--attack-num-samples") -> list[int]:
    """A subset in which the classes' counts differ by at most one, as far as their images go.

    Samples and classes are ranked by a hash of the seed, the class and the file's name; every class gives its first
    sample, then its second, and so on, and the last round goes to the first classes. So the choice depends on nothing
    else (not on the folder, the platform or a generator's version), and a smaller subset lies within a larger one.

    Args:
        suite: Of ``open_suite``.
        n: Number of samples.
        seed: Of the choice.
        flag: What errors begin with.

    Returns:
        ``n`` positions in ``suite.samples``, ascending.

    Raises:
        OptionError: ``n`` is below 1 or above the number of samples.
    """
    if not 1 <= n <= len(suite.samples):
        raise OptionError(f"{flag} {n}: {suite.name} has {len(suite.samples)} images; use 1 to {len(suite.samples)}")
    members: dict[int, list[int]] = {}
    for index, (_, target) in enumerate(suite.samples):
        members.setdefault(target, []).append(index)
    order = []
    for target, indices in members.items():
        indices.sort(key=lambda i: _rank(seed, target, os.path.basename(suite.samples[i][0])))
        place = _rank(seed, target)
        order += [(turn, place, index) for turn, index in enumerate(indices)]
    order.sort()
    return sorted(index for _, _, index in order[:n])


def shuffled(suite: "Suite", indices: Sequence[int], seed: int) -> list[int]:
    """Samples in an order that depends on their classes and files' names and the seed only, as the choice of
    :func:`class_balanced_subset` does: batches of it hold samples of many classes."""
    def place(index: int) -> tuple[bytes, int]:
        path, target = suite.samples[index]
        return _rank(seed, "order", target, os.path.basename(path)), index
    return sorted(indices, key=place)


def _rank(seed: int, *parts: int | str) -> bytes:
    text = "/".join(str(part) for part in (seed, *parts))
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()
