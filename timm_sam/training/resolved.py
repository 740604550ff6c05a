"""What a run found out about its options; the options themselves stay as they were given."""
import argparse
from dataclasses import dataclass

from ..cli.device import Process


@dataclass(frozen=True)
class Resolved:
    """What options came to.

    Attributes:
        process: Device and rank.
        resume: The checkpoint that is gone on with; empty: none.
        num_classes: Number of the model's outputs.
        lr: Highest learning rate of the schedule.
    """

    process: Process
    resume: str
    num_classes: int
    lr: float

    def namespace(self, args: argparse.Namespace) -> argparse.Namespace:
        """The options as timm's script has them once it runs, for its saver and for loggers."""
        process = self.process
        return argparse.Namespace(**{
            **vars(args), "device": str(process.device), "rank": process.rank, "local_rank": process.local_rank,
            "world_size": process.world_size, "distributed": process.distributed, "resume": self.resume,
            "num_classes": self.num_classes, "lr": self.lr, "prefetcher": not args.no_prefetcher})
