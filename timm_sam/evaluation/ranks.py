"""How the processes of torchrun share an evaluation, such that its numbers are those of one process."""
import datetime
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..cli.errors import OptionError
from ..group import in_group

T = TypeVar("T")


class Ranks:
    """The processes that evaluate together; one process is a group of one.

    Ranks take whole batches in turns, and the batches are those that one process would make: so no sample is seen
    twice, none is left out, and every float is computed as it would be by one process.
    """

    def __init__(self) -> None:
        self.count, self.rank = 1, 0
        self._group: Any = None
        if in_group():
            self.count, self.rank = dist.get_world_size(), dist.get_rank()
            # objects travel by CPU; and a rank whose images are broken early waits long for the others
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))

    @property
    def primary(self) -> bool:
        return self.rank == 0

    def share(self, batches: Sequence[T]) -> list[T]:
        """The batches of this rank, in order."""
        return list(batches[self.rank::self.count])

    def gather(self, mine: Any) -> list[Any]:
        """What all ranks have, by rank; on every rank."""
        if self._group is None:
            return [mine]
        all_of_them: list[Any] = [None] * self.count
        dist.all_gather_object(all_of_them, mine, group=self._group)
        time.sleep(0.1)  # as processes.settle(): what follows may fork, and this group is gloo's on any device
        return all_of_them

    def run(self, work: Callable[[], T]) -> list[T]:
        """Does each rank's part of some work and gathers the results, by rank.

        An error that one rank meets is raised on all of them, so that they stay together: all report a mistake, and
        all try again if memory was short on one.

        Raises:
            OptionError, torch.OutOfMemoryError, RuntimeError: That of the first rank that has one.
        """
        mine: Any = None
        error: Exception | None = None
        kind: type[Exception] = RuntimeError
        try:
            mine = work()
        except OptionError as e:
            # a traceback keeps the loader's iterator, whose worker processes would be waited for in vain
            error, kind = e.with_traceback(None), OptionError
        except RuntimeError as e:
            error, kind = e, torch.OutOfMemoryError if isinstance(e, torch.OutOfMemoryError) else RuntimeError
        together = self.gather((mine, None if error is None else (kind, str(error))))
        try:
            for rank, (_, found) in enumerate(together):
                if found is not None:
                    if error is not None and rank == self.rank:
                        raise error
                    kind, message = found
                    raise kind(message)
        finally:
            error = None  # error -> traceback -> this frame -> error would keep the model, and all memory that it took
        return [part for part, _ in together]

    def each(self, work: Callable[[], T]) -> T:
        """Does some work on each rank, which keeps what comes of it.

        Raises:
            OptionError, torch.OutOfMemoryError, RuntimeError: As :meth:`run`, on all ranks.
        """
        kept: list[T] = []
        self.run(lambda: kept.append(work()))
        return kept[0]

    def total(self, mine: torch.Tensor) -> torch.Tensor:
        """The sum of what all ranks have, tensors of one shape; the same on every rank, on its device."""
        if self._group is None:
            return mine
        summed = mine.cpu()
        dist.all_reduce(summed, group=self._group)
        return summed.to(mine.device)

    def close(self) -> None:
        """Lets go of the group, so that it can be destroyed."""
        self._group = None


def batches_of(indices: Sequence[int], batch_size: int) -> list[list[int]]:
    """The batches that a loader makes of samples in order: all full, but for the last."""
    return [list(indices[i:i + batch_size]) for i in range(0, len(indices), batch_size)]
