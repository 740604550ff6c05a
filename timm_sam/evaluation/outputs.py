"""What a model says of each image, kept beside the results: one file per checkpoint and data set.

A file is NumPy's npz without pickles: ``names`` (N,), the images' paths below the data set's folder; ``targets``,
``predictions`` (N,), int32, classes of the label space; ``right`` (N,), whether they are the same (of several
labels of an image ``targets`` has the first, and any is right); ``logits`` (N, K),
float16, all outputs of the model, where they were asked for, what lies beyond float16 cut to its range; and ``key``, of
what all of it depends on.
"""
import contextlib
import os
import urllib.parse
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..cli.errors import OptionError
from ..runs import files
from .per_image import Kept
from .sets.label_spaces import LabelSpace
from .sets.suites import Suite

KINDS = ("predictions", "logits")


@dataclass(frozen=True)
class Outputs:
    """Where outputs are kept, and which.

    Attributes:
        results: The results' files without extension; the folder is ``<results>.outputs``.
        kind: One of ``KINDS``; None: nothing is kept.
    """

    results: str
    kind: str | None

    @property
    def folder(self) -> str:
        return f"{self.results}.outputs"

    def path(self, sha256: str | None, suite: Suite) -> str:
        """The file of a checkpoint, by its hash, and a data set."""
        # names of data sets may hold anything that a command line does
        name = urllib.parse.quote(suite.name, safe=" ", errors="surrogateescape")
        return os.path.join(self.folder, f"{str(sha256)[:12]}-{name}.npz")

    def shown(self, path: str) -> str:
        """The path as the JSON says it: from its own folder on."""
        return "/".join((os.path.basename(self.folder), os.path.basename(path)))

    def holds(self, path: str, key: str) -> bool:
        """Whether a file is there, whole, and holds what depends on the same things."""
        try:
            found = _load(path, "key", *(["logits"] if self.kind == "logits" else []))
        except ValueError:
            return False
        return str(found["key"]) == key

    def look(self, outputs: Tensor, reduced: Tensor, targets: Tensor, space: LabelSpace) -> dict[str, Tensor]:
        """What is kept of a batch: outputs (B, K), these in the label space (B, C), targets (B,)."""
        # of equal outputs the same one is best as for timm.utils.accuracy with topk=(1, 5)
        best = reduced.topk(min(5, reduced.shape[1]), 1, True, True)[1][:, 0]
        right = space.accepted(reduced.shape[1], targets).gather(1, best[:, None])[:, 0]
        kept = dict(targets=space.label_of(targets).int(), predictions=best.int(), right=right)
        if self.kind == "logits":
            most = torch.finfo(torch.float16).max
            cut = outputs.clamp(-most, most)
            kept["logits"] = torch.where(outputs.isfinite(), cut, outputs).half()
        return kept

    def write(self, path: str, suite: Suite, key: str, kept: Kept) -> None:
        """Writes a file in one piece.

        Raises:
            OptionError: It cannot be written.
        """
        names = np.array([os.path.relpath(image, suite.root) for image, _ in suite.samples])
        part = f"{path}.part"
        try:
            os.makedirs(self.folder, exist_ok=True)
            with open(part, "wb") as f:
                np.savez(f, allow_pickle=False, names=names, key=np.array(key), **kept)
                files.write_through(f)
            files.rename(part, path)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise OptionError(f"--save-outputs: {path} cannot be written ({e.strerror}); make room, or name another "
                              f"--results-file") from None


@dataclass(frozen=True)
class Saved:
    """What a file holds of images: ``names`` and ``right``, both (N,)."""

    names: Sequence[str]
    right: np.ndarray


def read(path: str) -> Saved:
    """Reads which images were right.

    Raises:
        ValueError: The file is missing, torn, or none of ours; the message says which.
    """
    found = _load(path, "names", "right")
    names, right = found["names"], found["right"]
    if names.dtype.kind != "U" or right.dtype != bool or names.ndim != 1 or names.shape != right.shape:
        raise ValueError(f"{path} holds no names and hits of images")
    return Saved(names.tolist(), right)


def _load(path: str, *wanted: str) -> Kept:
    """Some of the arrays in a file.

    Raises:
        ValueError: It is missing or torn, or lacks one.
    """
    try:
        # of a torn file that it has opened itself NumPy forgets to close it
        with open(path, "rb") as f, zipfile.ZipFile(f):
            f.seek(0)
            content = np.load(f, allow_pickle=False)
            return {name: content[name] for name in wanted}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(f"{path} cannot be read as outputs of --save-outputs ({type(e).__name__})") from None
