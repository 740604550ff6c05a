"""Sharpness of many checkpoints: which images, which batches are done, and what the numbers depend on."""
import argparse
import hashlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..cli.errors import OptionError, one_line
from ..evaluation import provenance, tables
from ..evaluation.journal import Journal, key_of
from ..evaluation.precision import full_precision
from ..evaluation.ranks import batches_of
from ..evaluation.session import Session
from ..evaluation.sets.images import class_balanced_subset, shuffled
from ..evaluation.sets.loaders import suite_loader
from ..evaluation.sets.suites import Suite
from ..evaluation.subject import Subject
from ..evaluation.tables import Measure
from ..selection import select_parameters, share_of
from .inputs import check_finite, labels_of, prepare
from .objective import batch_loss, loss_range
from .options import IMAGES
from .sharpness import Measured, batch_sharpness, summary

_logger = logging.getLogger(__name__)
_DIGITS = 5


def analyze_sharpness(session: Session, files: Mapping[str, str],
                      others: Sequence[str]) -> tuple[list[Measure], list[str], dict[str, Any]]:
    """Sharpness of every checkpoint by every measure.

    Args:
        session: The options, and what is open.
        files: Where the table will go, by format; it is not written here.
        others: Further files that will be written.

    Returns:
        The measures, the checkpoints' short names, and the protocol: all that the numbers depend on.

    Raises:
        OptionError: The data set or a checkpoint is not what it should be, or results would be replaced.
    """
    args, ranks = session.args, session.ranks
    journal = Journal(os.path.join(args.out, "sharpness"), ranks.rank, f"--out {args.out}")
    written = [*files.values(), *others]
    ranks.each(lambda: prepare(args, [*written, *journal.files()]))
    checkpoints = session.checkpoints()
    names = tables.short_names(checkpoints, args.model)
    labels = labels_of(args, names)
    per_checkpoint, described = [], []
    work: Work | None = None
    for number, checkpoint in enumerate(checkpoints):
        subject = session.subject(checkpoint)
        selected = ranks.each(partial(_selected, args, subject))
        moving = share_of(list(selected.values()), subject.model)
        if work is None:
            suite = session.suites(subject.num_classes)[0]
            work = Work(session, suite, ranks.each(partial(_batches, args, suite, session.primary)), journal,
                        len(checkpoints))
            journal.begin(ranks, args.skip_existing)  # the options are in order: from here on files change
            if session.primary:
                _logger.info(f"{len(checkpoints)} checkpoints, of which {moving} move; {len(work.batches)} batches of "
                             f"{args.m} images, over each of them {_cost(args)} passes")
        described.append(provenance.checkpoint(subject))
        protocol = _protocol(args, work.batches, moving, list(selected))
        per_checkpoint.append(work.measures(subject, selected, protocol, number))
    assert work is not None
    return tables.merge(per_checkpoint), names, dict(
        provenance.protocol(args, subject, [work.suite], described, None), analysis=protocol, labels=labels)


class Work:
    """The batches of all checkpoints, of which each rank takes its share.

    Args:
        session: The options, and what is open.
        suite: The data set.
        batches: Positions in its samples.
        journal: What is done.
        count: Number of checkpoints.
    """

    def __init__(self, session: Session, suite: Suite, batches: list[list[int]], journal: Journal, count: int) -> None:
        self.session, self.suite, self.batches, self.journal, self.count = session, suite, batches, journal, count
        self._started, self._done = time.time(), 0

    def measures(self, subject: Subject, selected: Mapping[str, torch.nn.Parameter], protocol: Mapping[str, Any],
                 number: int) -> list[Measure]:
        """The rows of the table for one checkpoint, the ``number``-th from 0; all ranks together.

        Raises:
            OptionError: An image cannot be read, or the journal cannot be written.
        """
        args, ranks, journal = self.session.args, self.session.ranks, self.journal
        identity = dict(provenance.identity(args, subject, self.suite), analysis=protocol)
        places = range(len(self.batches))
        keys = {(place, measure): key_of(part="sharpness", place=place, measure=measure.family, radius=measure.radius,
                                         **identity) for place in places for measure in args.measure}
        pending = [place for place in places if any(keys[place, m] not in journal.done for m in args.measure)]
        for part in ranks.run(lambda: self._share(subject, selected, ranks.share(pending), keys, number)):
            journal.done.update(part)
        return [_measure(self.session, subject, self.suite, measure,
                         [journal.done[keys[place, measure]] for place in places]) for measure in args.measure]

    def _share(self, subject: Subject, selected: Mapping[str, torch.nn.Parameter], places: list[int],
               keys: Mapping[tuple[int, Measured], str], number: int) -> dict[str, Any]:
        """This rank's batches, with every measure that is not done; returns what it has added to the journal."""
        args, done = self.session.args, {}
        weights = [p.detach() for p in selected.values()]
        loaded = suite_loader(args, subject, self.suite, self.batches, places)
        with full_precision():
            for count, (place, (images, labels)) in enumerate(zip(loaded.places, loaded), 1):
                images, labels = images.to(subject.device), labels.to(subject.device)
                if args.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                loss = batch_loss(subject.model, list(selected), images, labels, not args.no_logit_norm,
                                  self.suite.space.reduce)
                pending = [measure for measure in args.measure if keys[place, measure] not in self.journal.done]
                found = batch_sharpness(loss, weights, pending, place, steps=args.steps, draws=args.draws,
                                        seed=args.seed, protocol=args.protocol)
                for measure, value in found.items():
                    done[keys[place, measure]] = value
                    self.journal.add(keys[place, measure], value)
                self._done += 1
                self._note(subject, count, len(places), number)
        return done

    def _note(self, subject: Subject, count: int, total: int, number: int) -> None:
        if self.session.primary:
            ahead = total - count + (self.count - number - 1) * len(self.session.ranks.share(self.batches))
            left = (time.time() - self._started) / self._done * ahead
            _logger.info(f"Sharpness: {subject.checkpoint or subject.name} ({number + 1} of {self.count})  "
                         f"[{count:>4d}/{total}]  Left: {left:.0f}s")


def _selected(args: argparse.Namespace, subject: Subject) -> dict[str, torch.nn.Parameter]:
    """The parameters that move, by name; all of the model's numbers are finite.

    Raises:
        OptionError: None does, or a number is not.
    """
    check_finite(subject)
    try:
        return dict(select_parameters(subject.model, args.params, args.filter))
    except ValueError as e:
        words = f"--params {args.params}" + ("" if args.filter is None else f" --filter {args.filter}")
        raise OptionError(f"{words}: {one_line(e)}") from None


def _batches(args: argparse.Namespace, suite: Suite, verbose: bool) -> list[list[int]]:
    """The batches, as positions in the suite's samples."""
    n, there = args.num_images, len(suite.samples)
    if n is None:
        n = min(IMAGES, there) // args.m * args.m
        if n == 0:
            raise OptionError(f"--m {args.m}: {suite.name} has {there} images; use 1 to {there}")
        if n != IMAGES and verbose:
            _logger.info(f"{n} images of {suite.name}: all full batches of --m {args.m}, at most {IMAGES} images")
    chosen = class_balanced_subset(suite, n, args.seed, "--num-images")
    return batches_of(shuffled(suite, chosen, args.seed), args.m)


def _cost(args: argparse.Namespace) -> str:
    """What one batch of one checkpoint costs, in words."""
    steps = {"worst": args.steps, "step": 1, "average": 0}
    gradients = 1 + sum(steps[measure.kind] for measure in args.measure)
    forwards = args.draws * sum(measure.kind == "average" for measure in args.measure)
    return f"{gradients} forward and backward" + (f", {forwards} forward" if forwards else "")


def _protocol(args: argparse.Namespace, batches: Sequence[Sequence[int]], moving: str,
              names: Sequence[str]) -> dict[str, Any]:
    """What sharpness depends on beside the model and the data set."""
    digest = hashlib.sha256(repr(batches).encode()).hexdigest()
    return dict(
        analysis="sharpness", search=args.protocol, logits="as they are" if args.no_logit_norm else "length 1",
        loss="cross entropy", mode="eval", images=args.m * len(batches), m=args.m, batches_sha256=digest,
        seed=args.seed, steps=args.steps, draws=args.draws, params=args.params, filter=args.filter, moving=moving,
        names_sha256=key_of(names=names))


def _measure(session: Session, subject: Subject, suite: Suite, measure: Measured,
             batches: Sequence[Mapping[str, Any]]) -> Measure:
    """A row of the table, for one checkpoint; what makes it less than it seems stands in its flags."""
    args = session.args
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
    where = f"{measure} of {subject.checkpoint or subject.name}"
    broken = sum(not torch.tensor(batch["sharpness"]).isfinite() for batch in batches) * args.m
    session.note_non_finite(where, broken, args.m * len(batches))
    if session.primary and found["saturated"]:
        _logger.warning(f"{where}: {100 * found['saturated']:.0f} % of batches lie above 90 % of the largest value "
                        f"that there is, where models cannot be told apart; use a smaller radius")
    return Measure("sharpness", suite.name, str(measure), args.m * len(batches), flags, [found["mean"]], [broken], "",
                   _DIGITS, [found])
