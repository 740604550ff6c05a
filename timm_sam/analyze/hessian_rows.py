"""The rows of the table of curvature: which images, what it costs, and what the numbers depend on."""
import argparse
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from ..cli.errors import OptionError
from ..evaluation import provenance
from ..evaluation.journal import key_of
from ..evaluation.precision import full_precision
from ..evaluation.sets.loaders import suite_loader
from ..evaluation.subject import Subject
from ..evaluation.tables import Measure
from ..selection import share_of
from . import hessian
from .inputs import IMAGES, batches_sha256, loader_batches, placed, selected
from .objective import batch_loss
from .progress import Progress
from .protocol import Opened

TOP, TRACE, ERROR = "top eigenvalue", "trace", "standard error of the trace"
_DIGITS = 5


class Hessian:
    """Curvature of the mean loss over the images, of checkpoints.

    Args:
        opened: The options, and what is open.
        subject: The first checkpoint.

    Raises:
        OptionError: Nothing moves, or there are not enough images.
    """

    def __init__(self, opened: Opened, subject: Subject) -> None:
        session, suite, args = opened.session, opened.suite, opened.session.args
        self.session, self.suite, self.journal, self.count = session, suite, opened.journal, opened.count
        self.batches = loader_batches(args, suite, IMAGES)
        self.n = sum(map(len, self.batches))
        moving = selected(args, subject, args.params)
        share = share_of(list(moving.values()), subject.model)
        self.progress = Progress(session.primary)
        self._steps: list[int] = []  # of the searches that are done
        self.said = (f"{opened.count} checkpoints, of which {share} move; {self.n} images, over them at most "
                     f"{args.iterations} + {args.probes} passes forward and twice backward")
        self.protocol: dict[str, Any] = dict(
            analysis="hessian", logits="length 1" if args.logit_norm else "as they are", loss="cross entropy",
            mode="eval", images=self.n, subset_sha256=batches_sha256(self.batches), seed=args.seed,
            params=args.params, filter=args.filter, moving=share, names_sha256=key_of(names=list(moving)),
            tolerance=args.tolerance)

    def rows(self) -> list[str]:
        """Names of the measures."""
        return [TOP, TRACE, ERROR]

    def measures(self, subject: Subject, number: int) -> list[Measure]:
        """The rows of one checkpoint, the ``number``-th from 0; all ranks together.

        Raises:
            OptionError: An image cannot be read, the journal cannot be written, or the search does not end.
        """
        args = self.session.args
        identity = dict(provenance.identity(args, subject, self.suite), analysis=self.protocol)
        keys = {item: key_of(part="Hessian", item=item, **identity) for item in (TOP, *range(args.probes))}
        left = [item for item in keys if keys[item] not in self.journal.done]
        name = subject.called
        self.progress.begin("Hessian", name, number, self.count)
        if left:
            matrix = _Matrix(self, subject)
            cost = {item: args.iterations if item == TOP else 1 for item in keys}  # at most
            # the search mostly ends long before that, which is known after the first checkpoint
            top = statistics.fmean(self._steps) if self._steps else args.iterations
            later = (top + args.probes) * (self.count - number - 1)
            for place, item in enumerate(left):
                matrix.ahead = later + sum(cost[other] for other in left[place:])
                value = self._top(matrix, name) if item == TOP else {
                    "value": _rounded(hessian.trace(matrix, hessian.probe(matrix.size, args.seed, int(item)).to(
                        matrix.device, matrix.dtype)))}
                self._note(keys[item], value)
        top = self.journal.done[keys[TOP]]
        traces = [self.journal.done[keys[i]]["value"] for i in range(args.probes)]
        mean, error = hessian.mean_and_error(traces)
        return [self._measure(name, TOP, top["value"], top),
                self._measure(name, TRACE, mean, dict(standard_error=error, probes=traces)),
                self._measure(name, ERROR, error, dict(probes=args.probes))]

    def _top(self, matrix: "_Matrix", name: str) -> dict[str, Any]:
        args = self.session.args
        start = hessian.start_vector(matrix.size, args.seed).to(matrix.device, matrix.dtype)
        found = hessian.top_eigenvalue(matrix, start, args.tolerance, args.iterations)
        if not found.converged and math.isfinite(found.value):
            raise OptionError(
                f"--iterations {args.iterations}: the top eigenvalue of {name}, {found.value:.4g}, is not known to "
                f"{100 * args.tolerance:g} % (residual {found.residual:.2g}, last change {found.change:.2g}); use "
                f"more, or a larger --tolerance")
        self._steps.append(found.steps)
        return dict(value=_rounded(found.value), residual=_rounded(found.residual), steps=found.steps)

    def _note(self, key: str, value: dict[str, Any]) -> None:
        self.journal.note(key, value)
        self.progress.say()

    def _measure(self, name: str, row: str, value: float, details: dict[str, Any]) -> Measure:
        broken = 0 if math.isfinite(value) else self.n
        self.session.note_non_finite(f"{row} of {name}", broken, self.n)
        return Measure("hessian", self.suite.name, row, self.n, list(self.suite.flags), [value], [broken], "", _DIGITS,
                       [details])


def per_image(args: argparse.Namespace) -> int:
    """What all measures take together at most, in forward passes of each image."""
    return hessian.PRODUCT * (int(args.iterations) + int(args.probes))


def _rounded(value: float) -> float:
    """To nine digits: the last ones of a sum depend on how its numbers lie in memory."""
    return float(f"{value:.9g}")


class _Matrix:
    """v -> H v over all images, which the ranks share.

    Sums over batches are in float64, and then rounded to the type of the weights: so they do not depend on the order,
    that is on the number of ranks.
    """

    def __init__(self, of: Hessian, subject: Subject) -> None:
        self.of, self.subject, self.ahead = of, subject, 0.0
        moving = selected(of.session.args, subject, of.session.args.params)
        self.names, self.weights = list(moving), [p.detach() for p in moving.values()]
        self.device = subject.device
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64  # mps has no float64
        self.size = sum(w.numel() for w in self.weights)
        self._images: list[tuple[Tensor, Tensor]] | None = None
        self._passed = 0

    def __call__(self, vector: Tensor) -> Tensor:
        ranks = self.of.session.ranks
        mine = ranks.each(lambda: self._mine(vector))
        total = ranks.total(mine) / self.of.n
        self.ahead -= 1
        return total.to(self.weights[0].dtype).to(self.dtype)

    def _mine(self, vector: Tensor) -> Tensor:
        """The sum over this rank's images."""
        args, space, progress = self.of.session.args, self.of.suite.space, self.of.progress
        points = hessian.shaped(vector, self.weights)
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        batches = self._loaded()
        self._passed += 1
        progress.expect(self.ahead * len(batches) * hessian.PRODUCT, f"product {self._passed}")
        with full_precision():
            for images, labels in batches:
                images, labels = placed(args, self.subject, images), labels.to(self.device)
                loss = batch_loss(self.subject.model, self.names, images, labels, args.logit_norm, space.reduce)
                found = hessian.product(loss, self.weights, points)
                total += len(images) * hessian.flat(found, self.dtype)
                progress.tick(hessian.PRODUCT)
        return total

    def _loaded(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's images, read once: they are needed again for each product."""
        if self._images is None:
            of = self.of
            places = of.session.ranks.share(range(len(of.batches)))
            loaded = suite_loader(of.session.args, self.subject, of.suite, of.batches, places)
            self._images = [(images.cpu(), labels.cpu()) for images, labels in loaded]
        return self._images
