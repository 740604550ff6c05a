"""Which updates are perturbed: SAM's clock."""
from .methods.stages import At


class When:
    """Counts updates and m-batches, and knows the epoch where it is told.

    Args:
        every: Perturb every so many updates, starting with the first.
        start: First epoch that is perturbed.
        end: First epoch that is not perturbed again; None: never.
        seed: Of a method's random draws.
        first: First update that is perturbed.

    Attributes:
        epoch: From 0; None: nobody has said.
        update: Of all updates, from 0.
        m_batch: Of the update's m-batches, from 0.
        by_epoch: Whether the epoch has to be known.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, every: int, start: int, end: int | None, seed: int, first: int = 0) -> None:
        for name, value, least in (("every", every, 1), ("start", start, 0), ("end", 0 if end is None else end, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer >= {least}")
        if end is not None and end <= start:
            raise ValueError(f"end={end} is not after start={start}: raise it, or leave it out")
        self.every, self.start, self.end, self.seed = every, start, end, seed
        self.first = first
        self.by_epoch = bool(start or end is not None)
        self.epoch: int | None = None
        self.update = 0
        self.m_batch = 0

    def begin(self, epoch: int, update: int) -> None:
        """An update begins."""
        self.epoch, self.update, self.m_batch = epoch, update, 0

    def end_of_update(self) -> None:
        """The base step is done."""
        self.update, self.m_batch = self.update + 1, 0

    @property
    def active(self) -> bool:
        """Whether training has come to where updates may be perturbed, and not beyond.

        Raises:
            ValueError: It depends on the epoch, which nobody has said.
        """
        if self.epoch is None and self.by_epoch:
            what = f"start={self.start}, end={self.end} are epochs" if self.start or self.end is not None else (
                "method: it needs the epoch")
            raise ValueError(f"{what}, which SAM does not know: call SAM.begin(epoch, update) before each update")
        epoch = self.epoch or 0
        return epoch >= self.start and (self.end is None or epoch < self.end) and self.update >= self.first

    @property
    def perturbs(self) -> bool:
        """Whether this update is perturbed, or plain; raises as :attr:`active`."""
        return self.active and self.update % self.every == 0

    def at(self, rank: int, ranks: int) -> At:
        return At(self.epoch or 0, self.update, self.m_batch, self.seed, rank, ranks)
