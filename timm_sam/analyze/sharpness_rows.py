"""The rows of the table of sharpness: which images, what it costs, and what the numbers depend on."""
import argparse
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..evaluation.journal import key_of
from ..evaluation.subject import Subject
from ..evaluation.tables import Measure
from ..selection import share_of
from .inputs import batches_sha256, chosen_batches, selected
from .objective import batch_loss, loss_range
from .progress import GRADIENT
from .protocol import Opened
from .sharpness import Measured, batch_sharpness, summary
from .work import Work

_logger = logging.getLogger(__name__)
_DIGITS = 5


class Sharpness:
    """Sharpness of checkpoints, by every measure.

    Args:
        opened: The options, and what is open.
        subject: The first checkpoint.

    Raises:
        OptionError: Nothing moves, or there are not enough images.
    """

    def __init__(self, opened: Opened, subject: Subject) -> None:
        session, suite, args = opened.session, opened.suite, opened.session.args
        self.session, self.suite = session, suite
        batches = chosen_batches(args, suite, session.primary)
        moving = selected(args, subject, args.params)
        self.work = Work("Sharpness", session, suite, batches, opened.journal, opened.count)
        share = share_of(list(moving.values()), subject.model)
        self.said = (f"{opened.count} checkpoints, of which {share} move; {len(batches)} batches of {args.m} images, "
                     f"over each of them {_passes(args, args.measure)} passes")
        self.protocol = dict(
            analysis="sharpness", search=args.protocol, logits="as they are" if args.no_logit_norm else "length 1",
            loss="cross entropy", mode="eval", images=args.m * len(batches), m=args.m,
            batches_sha256=batches_sha256(batches), seed=args.seed, steps=args.steps, draws=args.draws,
            params=args.params, filter=args.filter, moving=share, names_sha256=key_of(names=list(moving)))

    def rows(self) -> list[str]:
        """Names of the measures."""
        return [str(measure) for measure in self.session.args.measure]

    def measures(self, subject: Subject, number: int) -> list[Measure]:
        """The rows of one checkpoint, the ``number``-th from 0; all ranks together.

        Raises:
            OptionError: An image cannot be read, or the journal cannot be written.
        """
        args = self.session.args
        moving = selected(args, subject, args.params)
        weights = [p.detach() for p in moving.values()]

        def of_batch(place: int, images: Tensor, labels: Tensor,
                     pending: Sequence[Measured]) -> Mapping[Measured, dict[str, Any]]:
            loss = batch_loss(subject.model, list(moving), images, labels, not args.no_logit_norm,
                              self.suite.space.reduce)
            return batch_sharpness(self.work.progress.counting(loss), weights, pending, place, steps=args.steps,
                                   draws=args.draws, seed=args.seed, protocol=args.protocol)

        found = self.work.measured(subject, number, self.protocol, args.measure, partial(per_image, args), of_batch)
        return [self._measure(subject, measure, found[measure]) for measure in args.measure]

    def _measure(self, subject: Subject, measure: Measured, batches: Sequence[Mapping[str, Any]]) -> Measure:
        """A row of the table, for one checkpoint; what makes it less than it seems stands in its flags."""
        args, session, suite = self.session.args, self.session, self.suite
        classes = suite.space.num_classes(subject.num_classes)
        largest = None if args.no_logit_norm or classes < 2 else loss_range(classes)
        found = summary(batches, largest)
        flags = list(suite.flags)
        if found["no_gradient"]:
            flags.append(f"{found['no_gradient']} of {len(batches)} batches without a gradient")
        if found["non_finite"]:
            flags.append(f"{found['non_finite']} losses not finite")
        if found["saturated"]:
            flags.append(f"{100 * found['saturated']:.0f} % of batches saturated")
        where = f"{measure} of {subject.called}"
        broken = sum(not torch.tensor(batch["sharpness"]).isfinite() for batch in batches) * args.m
        session.note_non_finite(where, broken, args.m * len(batches))
        if session.primary and found["saturated"]:
            _logger.warning(f"{where}: {100 * found['saturated']:.0f} % of batches lie above 90 % of the largest value "
                            f"that there is, where models cannot be told apart; use a smaller radius")
        return Measure("sharpness", suite.name, str(measure), args.m * len(batches), flags, [found["mean"]], [broken],
                       "", _DIGITS, [found])


def per_image(args: argparse.Namespace, measures: Sequence[Measured]) -> int:
    """What some measures take together, in forward passes of each image."""
    gradients, forwards = _counts(args, measures)
    return GRADIENT * gradients + forwards


def _counts(args: argparse.Namespace, measures: Sequence[Measured]) -> tuple[int, int]:
    """Forward and backward passes over a batch, and forward passes alone."""
    steps = {"worst": args.steps, "step": 1, "average": 0}
    return (1 + sum(steps[measure.kind] for measure in measures),
            args.draws * sum(measure.kind == "average" for measure in measures))


def _passes(args: argparse.Namespace, measures: Sequence[Measured]) -> str:
    gradients, forwards = _counts(args, measures)
    return f"{gradients} forward and backward" + (f", {forwards} forward" if forwards else "")
