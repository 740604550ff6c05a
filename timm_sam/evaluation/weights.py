"""Files of weights: each is hashed once, and what a model does not take of it is not read."""
import hashlib
import os
import warnings
from collections.abc import Collection, Mapping, Sequence

import torch
from timm.models import load_checkpoint, load_state_dict
from torch import Tensor, nn

from ..cli.errors import OptionError
from ..runs.checkpoints import AVERAGED, weights_of, why_unreadable

_OF_JAX = (".npz", ".npy")  # only the model knows how to read these


class Hashes:
    """SHA-256 of files, computed when it is first asked for.

    It is kept for the file, not for its name: the hard links that timm's saver makes (last, best and a numbered
    checkpoint) are read once, and a name that stands for another file meanwhile is read again.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], str] = {}

    def of_file(self, path: str) -> str:
        """64 hexadecimal digits.

        Raises:
            OptionError: The file cannot be read.
        """
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as f:
                stat = os.fstat(f.fileno())
                key = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
                if key not in self._known:
                    while chunk := f.read(1 << 20):
                        digest.update(chunk)
                    self._known[key] = digest.hexdigest()
        except OSError as e:
            raise OptionError(f"--checkpoint {path} cannot be read ({e.strerror}); check its permissions") from None
        return self._known[key]

    def distinct(self, paths: Sequence[str], in_folders: Collection[str]) -> tuple[list[str], list[str]]:
        """Tells copies apart: last, best and a numbered checkpoint are often the same weights, which must count once.

        Args:
            paths: Of the files.
            in_folders: Those of them that were found in folders; what is named is wanted, whatever it holds.

        Returns:
            The files, and those of ``in_folders`` that are copies of one before them.

        Raises:
            OptionError: A file cannot be read, or is there twice.
        """
        kept: list[str] = []
        copies: list[str] = []
        seen: dict[str, str] = {}
        for path in paths:
            first = seen.setdefault(self.of_file(path), path) if path in in_folders else path
            (kept if first == path else copies).append(path)
        normal = [os.path.normpath(path) for path in kept]
        twice = {path for path in normal if normal.count(path) > 1}
        if twice:
            raise OptionError(f"--checkpoint {', '.join(sorted(twice))} is given twice: leave one out")
        return kept, copies


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of the weights themselves, their names, types and shapes: for those that are in no file of the user's."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(model: nn.Module, name: str, path: str, use_ema: bool, must_be_averaged: bool = False) -> str:
    """Loads a file's weights into a model.

    Args:
        model: Takes them.
        name: Of the model, for errors.
        path: Of the file, in any of the formats that timm loads.
        use_ema: Whether to take averaged weights, if there are some.
        must_be_averaged: Whether it is an error if ``use_ema`` finds none.

    Returns:
        The key of the weights in the file; empty: it is nothing but weights.

    Raises:
        OptionError: They cannot be read, do not fit, or are not averaged.
    """
    if not os.path.isfile(path):
        raise OptionError(f"--checkpoint {path} is not a file: give the path of a checkpoint")
    key = ""
    try:
        if os.path.splitext(path)[1].lower() in _OF_JAX:
            load_checkpoint(model, path)
        else:
            state, key = _read(path, use_ema)
            model.load_state_dict(state)
    except Exception as e:  # unpickling a torn or foreign file raises almost anything
        remedy = "add --use-ema" if "averaged weights only" in str(e) else (
            "give a checkpoint of this model, or mend --model and --num-classes")
        raise OptionError(f"--checkpoint {path} cannot be loaded into {name} with {model.num_classes} outputs: "
                          f"{why_unreadable(e)}; {remedy}") from e
    if use_ema and must_be_averaged and key not in AVERAGED:
        raise OptionError(f"--use-ema: {path} has no averaged weights; leave it out, or give checkpoints with them")
    return key


def check_weights(model: nn.Module, name: str, paths: Sequence[str], use_ema: bool,
                  must_be_averaged: bool = False) -> None:
    """Looks whether each file's weights fit a model, by names and shapes; what they are is not read.

    Args:
        model: Is brought to the meta device, and holds no weights afterwards.
        name, use_ema, must_be_averaged: As of :func:`load_weights`.
        paths: Of the files.

    Raises:
        OptionError: Those of one cannot be loaded.
    """
    model.to("meta")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter", category=UserWarning)
        for path in paths:
            load_weights(model, name, path, use_ema, must_be_averaged)


def _read(path: str, use_ema: bool) -> tuple[Mapping[str, Tensor], str]:
    """The weights in a file, mapped into memory where its format allows, and their key in it."""
    if path.endswith(".safetensors"):
        return load_state_dict(path, use_ema), ""
    return weights_of(path, use_ema)
