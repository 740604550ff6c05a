"""An analysis of many checkpoints: its files, the checkpoints in turn, and what the numbers depend on."""
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from ..evaluation import provenance, tables
from ..evaluation.journal import Journal
from ..evaluation.session import Session
from ..evaluation.sets.suites import Suite
from ..evaluation.subject import Subject
from ..evaluation.tables import Measure
from .inputs import check_finite, labels_of, prepare

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """What an analysis works with.

    Attributes:
        session: The options, and what is open.
        suite: The data set.
        journal: What is done.
        count: Number of checkpoints.
    """

    session: Session
    suite: Suite
    journal: Journal
    count: int


class Analysis(Protocol):
    """Something that is measured of one checkpoint after another.

    Attributes:
        said: What is going to be done, and what it costs, in words.
        protocol: What the numbers depend on beside the model and the data set.
    """

    said: str
    protocol: dict[str, Any]

    def rows(self) -> list[str]:
        """Names of the rows of the table."""
        ...

    def measures(self, subject: Subject, number: int) -> list[Measure]:
        """The rows of one checkpoint, the ``number``-th from 0; all ranks together."""
        ...


def analyze(session: Session, name: str, build: Callable[[Opened, Subject], Analysis], files: Mapping[str, str],
            others: Sequence[str]) -> tuple[list[Measure], list[str], dict[str, Any]]:
    """Analyses every checkpoint.

    Args:
        session: The options, and what is open.
        name: Of the analysis, and of its files.
        build: Makes the analysis; called once, with the first checkpoint.
        files: Where the table will go, by format; it is not written here.
        others: Further files that will be written.

    Returns:
        The measures, the checkpoints' short names, and the protocol: all that the numbers depend on.

    Raises:
        OptionError: The data set or a checkpoint is not what it should be, or results would be replaced.
    """
    args, ranks = session.args, session.ranks
    journal = Journal(os.path.join(args.out, name), ranks.rank, f"--out {args.out}")
    ranks.each(lambda: prepare(args, [*files.values(), *others, *journal.files()]))
    checkpoints = session.checkpoints()
    names = tables.short_names(checkpoints, args.model)
    labels = labels_of(args, names)
    per_checkpoint, described = [], []
    analysis: Analysis | None = None
    for number, checkpoint in enumerate(checkpoints):
        subject = session.subject(checkpoint)
        ranks.each(partial(check_finite, subject))
        if analysis is None:
            suite = session.suites(subject.num_classes)[0]
            analysis = ranks.each(partial(build, Opened(session, suite, journal, len(checkpoints)), subject))
            if args.skip_existing:
                rows = {(suite.name, row) for row in analysis.rows()}
                ranks.each(partial(session.check_kept, files, checkpoints, subject, rows,
                                   command=f"timm_sam.analyze {name}", out="--out"))
            journal.begin(ranks, args.skip_existing)  # the options are in order: from here on files change
            if session.primary:
                _logger.info(analysis.said)
        described.append(provenance.checkpoint(subject))
        per_checkpoint.append(analysis.measures(subject, number))
    assert analysis is not None
    return tables.merge(per_checkpoint), names, dict(
        provenance.protocol(args, subject, [suite], described, None), analysis=analysis.protocol, labels=labels)
