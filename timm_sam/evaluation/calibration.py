"""Calibration: whether a model is right as often as it is sure.

Expected calibration error with 15 bins of equal width (Guo et al., ICML 2017, https://arxiv.org/abs/1706.04599) and of
equal mass (Nixon et al., 2019, https://arxiv.org/abs/1904.01685), negative log likelihood, and the Brier score, the sum
over classes of squared differences (Brier, 1950): 0 to 2.
"""
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..multi_tensor import widest
from .sets.label_spaces import LabelSpace

BINS = 15
# name -> (unit, digits that tables show)
MEASURES = {"ece_width": ("%", 2), "ece_mass": ("%", 2), "nll": ("nats", 4), "brier": ("", 4)}

_COLUMNS = 4  # of what is kept per image: confidence, right, nll, brier


def certainties(outputs: Tensor, reduced: Tensor, targets: Tensor, space: LabelSpace) -> dict[str, Tensor]:
    """What calibration needs of a batch, in the label space and among all outputs.

    Args:
        outputs: (B, K), the model's logits.
        reduced: (B, C), the same in the label space.
        targets: (B,), int64, of the label space; where it has sets of classes, those of a set are one class.
        space: The label space.

    Returns:
        ``"space"`` and, where that is another number, ``"all"``: (B, 4), confidence, right, negative log likelihood in
        nats, Brier score. Among all outputs those of the target's group are one class: its probability is their sum,
        and the best output is right if it is one of them.
    """
    found = {"space": _certainty(reduced, space.accepted(reduced.shape[1], targets))}
    if space.differs:
        owners = space.owners(outputs.shape[1], outputs.device)
        found["all"] = _certainty(outputs, owners == targets[:, None])
    return found


def _certainty(logits: Tensor, own: Tensor) -> Tensor:
    log_p = logits.to(widest(logits.device)).log_softmax(dim=1)
    p = log_p.exp()
    # of equal outputs the same one is best as for timm.utils.accuracy with topk=(1, 5)
    best = logits.topk(min(5, logits.shape[1]), 1, True, True)[1][:, :1]
    nll = -log_p.masked_fill(~own, -torch.inf).logsumexp(dim=1)
    brier = (1 - (p * own).sum(dim=1)).square() + p.square().masked_fill(own, 0).sum(dim=1)
    return torch.stack([p.amax(dim=1), own.gather(1, best)[:, 0].to(p.dtype), nll, brier], dim=1)


def calibration(images: np.ndarray) -> dict[str, Any]:
    """The measures of a data set.

    Args:
        images: (N, 4), of :func:`certainties`. Images with values that are not finite are left out.

    Returns:
        ``MEASURES``, NaN if no image is left; ``images``, the number of those that are left; and ``bins``: for
        ``width`` and ``mass`` one triple per bin, number of images, mean confidence and share that is right.

    Raises:
        ValueError: The array has another shape.
    """
    if images.ndim != 2 or images.shape[1] != _COLUMNS:
        raise ValueError(f"images have shape {images.shape}: (N, {_COLUMNS}) is needed")
    images = images[np.isfinite(images).all(axis=1)].astype(np.float64)
    confidence, right = images[:, 0], images[:, 1]
    bins = {"width": _summed(confidence, right, equal_width(confidence)),
            "mass": _summed(confidence, right, equal_mass(confidence))}
    nll, brier = images[:, 2:].mean(axis=0).tolist() if len(images) else (float("nan"), float("nan"))
    return dict(ece_width=100 * ece(bins["width"]), ece_mass=100 * ece(bins["mass"]), nll=nll, brier=brier,
                images=len(images), bins=bins)


def equal_width(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """(N,): the bin of each confidence, 0 to ``bins`` - 1; bin i holds those in (i / bins, (i + 1) / bins]."""
    return (np.ceil(confidence * bins) - 1).clip(0, bins - 1).astype(np.int64)


def equal_mass(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """(N,): the bin of each confidence, such that all have as many images, or the first ones one more.

    Equal confidences are taken in the order of the data set.
    """
    places = np.empty(len(confidence), dtype=np.int64)
    for number, members in enumerate(np.array_split(np.argsort(confidence, kind="stable"), bins)):
        places[members] = number
    return places


def ece(bins: Sequence[Sequence[float]]) -> float:
    """Expected calibration error as a share: the mean distance of confidence and accuracy over all images.

    Args:
        bins: (number of images, mean confidence, share that is right) of each bin.

    Returns:
        0 to 1; NaN without images.
    """
    images = sum(count for count, _, _ in bins)
    if not images:
        return float("nan")
    return sum(count * abs(right - confidence) for count, confidence, right in bins) / images


def _summed(confidence: np.ndarray, right: np.ndarray, places: np.ndarray) -> list[list[float]]:
    """Of each bin: number of images, mean confidence, share that is right; zeros where it is empty."""
    summed = []
    for number in range(BINS):
        members = places == number
        count = int(members.sum())
        summed.append([count, float(confidence[members].mean()) if count else 0.0,
                       float(right[members].mean()) if count else 0.0])
    return summed


def names(outputs: int, differs: bool) -> dict[str, tuple[str, str]]:
    """The measures of a data set by their names in tables: -> (``"space"`` or ``"all"``, one of ``MEASURES``).

    Args:
        outputs: Of the model.
        differs: Whether the label space is not all of them.
    """
    found = {measure: ("space", measure) for measure in MEASURES}
    if differs:
        found.update({f"{measure}_{outputs}way": ("all", measure) for measure in MEASURES})
    return found


def bins_shown(summary: Mapping[str, Any], measure: str) -> Any:
    """What the JSON keeps beside a calibration error: its bins; None of other measures."""
    return summary["bins"][measure.removeprefix("ece_")] if measure.startswith("ece_") else None
