"""The rows of the table of losses along SAM's directions."""
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..evaluation.journal import key_of
from ..evaluation.subject import Subject
from ..evaluation.tables import Measure
from ..selection import share_of
from .inputs import batches_sha256, chosen_batches, selected
from .line import TIMES, Line, measure_line
from .objective import batch_loss
from .progress import GRADIENT
from .protocol import Opened
from .work import Work

_DIGITS = 5


class Lines:
    """The loss of checkpoints along SAM's directions.

    Args:
        opened: The options, and what is open.
        subject: The first checkpoint.

    Raises:
        OptionError: Nothing moves, or there are not enough images.
    """

    def __init__(self, opened: Opened, subject: Subject) -> None:
        session, suite, args = opened.session, opened.suite, opened.session.args
        self.session, self.suite, self.lines = session, suite, list(args.line)
        batches = chosen_batches(args, suite, session.primary)
        self.work = Work("Line", session, suite, batches, opened.journal, opened.count)
        moving = self._moving(subject)
        shares = {params: share_of(list(found.values()), subject.model) for params, found in moving.items()}
        said = "; ".join(f"{params}: {share}" for params, share in shares.items())
        self.said = (f"{opened.count} checkpoints ({said}); {len(batches)} batches of {args.m} images, over each of "
                     f"them 1 forward and backward, {len(TIMES) * len(self.lines)} forward passes")
        self.protocol: dict[str, Any] = dict(
            analysis="line", logits="as they are", loss="cross entropy", mode="eval", images=args.m * len(batches),
            m=args.m, batches_sha256=batches_sha256(batches), seed=args.seed, filter=args.filter, moving=shares,
            names_sha256=key_of(names={params: list(found) for params, found in moving.items()}))

    def _moving(self, subject: Subject) -> dict[str, dict[str, nn.Parameter]]:
        """Selection -> the parameters that it perturbs, by name."""
        return {params: selected(self.session.args, subject, params)
                for params in dict.fromkeys(line.params for line in self.lines)}

    def rows(self) -> list[str]:
        """Names of the measures."""
        return [_row(line, t) for line in self.lines for t in TIMES]

    def measures(self, subject: Subject, number: int) -> list[Measure]:
        """The rows of one checkpoint, the ``number``-th from 0; all ranks together.

        Raises:
            OptionError: An image cannot be read, or the journal cannot be written.
        """
        moving = self._moving(subject)
        together = {name: p for found in moving.values() for name, p in found.items()}
        names, weights = list(together), [p.detach() for p in together.values()]
        chosen = {params: set(found) for params, found in moving.items()}

        def of_batch(place: int, images: Tensor, labels: Tensor, pending: Sequence[Line]) -> Mapping[Line, Any]:
            loss = batch_loss(subject.model, names, images, labels, False, self.suite.space.reduce)
            return measure_line(self.work.progress.counting(loss), weights, names, pending, chosen)

        found = self.work.measured(subject, number, self.protocol, self.lines, per_image, of_batch)
        return [measure for line in self.lines for measure in self._measures(subject, line, found[line])]

    def _measures(self, subject: Subject, line: Line, batches: Sequence[Mapping[str, Any]]) -> list[Measure]:
        """21 rows of the table."""
        args, m = self.session.args, self.session.args.m
        flags = list(self.suite.flags)
        still = sum(not 0 < batch["grad_norm"] < math.inf for batch in batches)
        if still:
            flags.append(f"{still} of {len(batches)} batches without a direction")
        where = f"{line} of {subject.called}"
        self.session.note_non_finite(where, m * sum(bool(batch["non_finite"]) for batch in batches), m * len(batches))
        measures = []
        for i, t in enumerate(TIMES):
            losses = [batch["losses"][i] for batch in batches]
            broken = m * sum(not math.isfinite(loss) for loss in losses)
            measures.append(Measure(
                "line", self.suite.name, _row(line, t), args.m * len(batches), flags, [statistics.fmean(losses)],
                [broken], "", _DIGITS, [dict(variant=line.variant, params=line.params, rho=line.rho, eta=line.eta, t=t,
                                             batches=losses)]))
        return measures


def per_image(lines: Sequence[Line]) -> int:
    """What some directions take together, in forward passes of each image."""
    return GRADIENT + len(TIMES) * len(lines)


def _row(line: Line, t: float) -> str:
    return f"{line} t={t:g}"
