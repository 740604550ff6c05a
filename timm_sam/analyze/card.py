"""The flatness card: every analysis of a checkpoint, for no more than the price of an epoch of training.

Prices are counted in forward passes of one image: a gradient is ``GRADIENT`` of them, a product with the Hessian
``hessian.PRODUCT``, so an epoch over N images is ``GRADIENT`` N.
"""
import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..cli.errors import OptionError
from ..evaluation.subject import Subject
from ..evaluation.tables import Measure
from . import hessian_rows, line_rows, sharpness_rows
from .hessian_rows import Hessian
from .inputs import IMAGES
from .line_rows import Lines
from .norms import NORM_BIAS, NORM_WEIGHT, Tensors, edges, shares, summary, tensors_of
from .progress import GRADIENT
from .protocol import Opened
from .rank_rows import Rank
from .sharpness_rows import Sharpness

LOSS, RISE, NORMS = "loss", "rise", "norms"
STATISTICS = ("mean", "std", "mean_abs", "max_abs", "negative")  # of the values of a kind, see norms.summary
_DIGITS = 5


def per_image(args: argparse.Namespace) -> int:
    """What a card takes at most beside the feature rank, in forward passes of each image."""
    return (sharpness_rows.per_image(args, args.measure) + line_rows.per_image(args.line)
            + hessian_rows.per_image(args))


def images_for(there: int, spent: int, each: int, m: int) -> int:
    """How many images an epoch pays for: a multiple of m, at most ``IMAGES``; 0: not even one batch.

    Args:
        there: Images of an epoch.
        spent: Forward passes that are spent otherwise.
        each: Forward passes that each image takes.
        m: Images per batch.
    """
    return max(0, min(IMAGES, there, (GRADIENT * there - spent) // each)) // m * m


class Card:
    """Sharpness, the loss along SAM's direction, feature rank, curvature and norm layers of checkpoints.

    Args:
        opened: The options, and what is open.
        subject: The first checkpoint.

    Raises:
        OptionError: Nothing moves, there are not enough images, or an epoch does not pay for one batch.
    """

    def __init__(self, opened: Opened, subject: Subject) -> None:
        session, suite, args = opened.session, opened.suite, opened.session.args
        self.suite, there = suite, len(suite.samples)

        def of(images: int) -> Opened:
            return replace(opened, session=replace(
                session, args=argparse.Namespace(**{**vars(args), "num_images": images})))

        self.rank = Rank(of(min(IMAGES, there) if args.rank_images is None else args.rank_images), subject,
                         "--rank-images")
        spent, each = self.rank.passes * self.rank.n, per_image(args)
        images = images_for(there, spent, each, args.m) if args.num_images is None else args.num_images
        if images == 0:
            raise OptionError(
                f"--m {args.m}: with {each} passes over a batch and {spent:,} for the rank, a card takes more than an "
                f"epoch over the {there:,} images of {suite.name}, {GRADIENT * there:,} forward passes; say how many "
                f"images it may take by --num-images, or use a smaller --m, --steps, --iterations or --probes")
        few = of(images)
        self.sharpness, self.line, self.hessian = (
            Sharpness(few, subject), Lines(few, subject), Hessian(few, subject))
        self.forwards = images * each + spent
        self.said = (
            f"{opened.count} checkpoints; for each at most {self.forwards:,} forward passes of one image ({each} of "
            f"each of {images:,} images, {self.rank.passes} of each of {self.rank.n:,} for the rank), as many as "
            f"{self.forwards / (GRADIENT * there):.2f} epochs of training on the {there:,} images of {suite.name}, "
            f"which take {GRADIENT * there:,} each")
        self.protocol: dict[str, Any] = dict(
            analysis="card", forwards=self.forwards, epoch=GRADIENT * there, **{
                part.protocol["analysis"]: part.protocol
                for part in (self.sharpness, self.line, self.rank, self.hessian)})
        self._norm_rows = [measure.name for measure in self._norms(subject)]

    def rows(self) -> list[str]:
        """Names of the measures."""
        return [*self.sharpness.rows(), LOSS, *(f"{RISE} {line}" for line in self.line.lines), *self.rank.rows(),
                *self.hessian.rows(), *self._norm_rows]

    def measures(self, subject: Subject, number: int) -> list[Measure]:
        """The rows of one checkpoint, the ``number``-th from 0; all ranks together.

        Raises:
            OptionError: An image cannot be read, the journal cannot be written, or the search for the top eigenvalue
                does not end.
        """
        return [*self.sharpness.measures(subject, number), *_rises(self.line.measures(subject, number)),
                *self.rank.measures(subject, number), *self.hessian.measures(subject, number), *self._norms(subject)]

    def _norms(self, subject: Subject) -> list[Measure]:
        """Statistics of norm layers, with a histogram beside the first of each kind."""
        tensors = tensors_of(subject.model, "", "")
        return [measure for kind in (NORM_WEIGHT, NORM_BIAS) for measure in self._of_kind(tensors, kind)]

    def _of_kind(self, tensors: Tensors, kind: str) -> list[Measure]:
        values = tensors.of(kind)
        if not len(values):
            return []
        found, bins = summary(values), edges({"": values})
        histogram: dict[str, Any] = dict(
            kind=kind, edges=bins.tolist(), shares=np.asarray(shares({"": values}, bins)[""]).tolist(), **found)
        return [Measure(NORMS, self.suite.name, f"{kind} {name}", 0, (), [found[name]], [0], "", _DIGITS,
                        [histogram if name == STATISTICS[0] else {}]) for name in STATISTICS]


def _rises(measures: Sequence[Measure]) -> list[Measure]:
    """The loss at w, and how much it has risen at the end of each direction; with all losses on the way."""
    lines: dict[str, list[Measure]] = {}
    for measure in measures:
        lines.setdefault(measure.name.rpartition(" ")[0], []).append(measure)
    found: list[Measure] = []
    for line, along in lines.items():
        at = {measure.details[0]["t"]: measure for measure in along}
        start, end = at[0], at[1]
        if not found:
            found.append(replace(start, name=LOSS, details=[dict(batches=start.details[0]["batches"])]))
        losses = [[t, measure.values[0]] for t, measure in at.items()]
        found.append(replace(end, name=f"{RISE} {line}", values=[end.values[0] - start.values[0]],
                             non_finite=[max(start.broken[0], end.broken[0])],
                             details=[dict(losses=losses)]))
    return found
