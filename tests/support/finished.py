"""What is left of a command that is over, in this process or in one of its own."""
from dataclasses import dataclass
from pathlib import Path

import torch

from support.states import summary


@dataclass
class Finished:
    """A run that is over: exit code, what it printed, and where it ran."""

    code: int
    out: str
    err: str
    cwd: Path

    @property
    def last_line(self):
        return self.err.rstrip('\n').rsplit('\n', 1)[-1]

    def log(self, start):
        """The lines of the log that begin with ``start``."""
        return [line for line in self.err.splitlines() if line.startswith(start)]

    def folder(self, experiment='run'):
        return self.cwd / 'out' / experiment

    def summary(self, experiment='run'):
        return summary(self.folder(experiment))

    def checkpoint(self, experiment='run', name='last'):
        # our own file of a moment ago; the scripts themselves never load with weights_only=False
        return torch.load(self.folder(experiment) / f'{name}.pth.tar', weights_only=False)
