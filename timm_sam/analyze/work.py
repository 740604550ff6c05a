"""Batches of many checkpoints, of which each rank takes its share, and what is done of them."""
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..evaluation import provenance
from ..evaluation.journal import Journal, key_of
from ..evaluation.precision import full_precision
from ..evaluation.session import Session
from ..evaluation.sets.loaders import suite_loader
from ..evaluation.sets.suites import Suite
from ..evaluation.subject import Subject
from .inputs import placed
from .progress import Progress

Item = TypeVar("Item", bound=Hashable)


class Work:
    """Something that is measured of each batch by itself, for one checkpoint after another.

    Args:
        title: Of the log lines, and part of what results are known by in the journal.
        session: The options, and what is open.
        suite: The data set.
        batches: Positions in its samples.
        journal: What is done.
        count: Number of checkpoints.
    """

    def __init__(self, title: str, session: Session, suite: Suite, batches: Sequence[Sequence[int]], journal: Journal,
                 count: int) -> None:
        self.title, self.session, self.suite, self.journal, self.count = title, session, suite, journal, count
        self.batches = batches
        self.progress = Progress(session.primary)

    def measured(self, subject: Subject, number: int, protocol: Mapping[str, Any], items: Sequence[Item],
                 cost: Callable[[Sequence[Item]], float],
                 of_batch: Callable[[int, Tensor, Tensor, list[Item]], Mapping[Item, Any]]) -> dict[Item, list[Any]]:
        """What is measured of one checkpoint; all ranks together. What the journal has is not measured again.

        Args:
            subject: The checkpoint.
            number: Its place, from 0.
            protocol: What the numbers depend on beside the model and the data set.
            items: What is measured; their ``repr`` says all of them.
            cost: Some items -> passes over a batch that they take together, in forward passes.
            of_batch: Measures some items of one batch, of its place, images (B, C, H, W) and labels (B,).

        Returns:
            For each item one value per batch, in order.

        Raises:
            OptionError: An image cannot be read, or the journal cannot be written.
        """
        identity = dict(provenance.identity(self.session.args, subject, self.suite), analysis=protocol)
        places = range(len(self.batches))
        keys = {(place, item): key_of(part=self.title, place=place, item=repr(item), **identity)
                for place in places for item in items}

        def left(place: int) -> list[Item]:
            return [item for item in items if keys[place, item] not in self.journal.done]

        ranks = self.session.ranks
        pending = ranks.share([place for place in places if left(place)])
        self.progress.begin(self.title, subject.called, number, self.count)
        later = cost(items) * len(ranks.share(places)) * (self.count - number - 1)

        def share() -> dict[str, Any]:
            done = {}
            loaded = suite_loader(self.session.args, subject, self.suite, self.batches, pending)
            with full_precision():
                for count, (place, (images, labels)) in enumerate(zip(pending, loaded)):
                    ahead = sum(cost(left(other)) for other in pending[count:])
                    self.progress.expect(ahead + later, f"[{count:>4d}/{len(pending)}]")
                    images = placed(self.session.args, subject, images)
                    for item, value in of_batch(place, images, labels.to(subject.device), left(place)).items():
                        done[keys[place, item]] = value
                        self.journal.add(keys[place, item], value)
                    self.progress.expect(sum(cost(left(other)) for other in pending[count + 1:]) + later,
                                         f"[{count + 1:>4d}/{len(pending)}]")
                    self.progress.say()
            return done

        for part in ranks.run(share):
            self.journal.done.update(part)
        return {item: [self.journal.done[keys[place, item]] for place in places] for item in items}
