"""Running averages that read the device only when they are asked to."""
import math

import torch
from timm import utils
from torch import Tensor

from ..multi_tensor import widest


class Meters:
    """Running averages whose values stay on the device until :meth:`flush`.

    Norms that are not finite are counted elsewhere, and would hide all others of the epoch.
    """

    def __init__(self, *names: str) -> None:
        self.meters = {name: utils.AverageMeter() for name in names}
        self.waiting: list[tuple[str, Tensor, float, int]] = []

    def update(self, name: str, value: Tensor, n: int, factor: float = 1) -> None:
        self.waiting.append((name, value.detach(), factor, n))

    def flush(self) -> None:
        if self.waiting:
            values = torch.stack([value.to(widest(value.device)) for _, value, _, _ in self.waiting]).tolist()
            for (name, _, factor, n), value in zip(self.waiting, values):
                if math.isfinite(value) or not name.endswith("_norm"):
                    self.meters[name].update(value * factor, n)
            self.waiting.clear()

    def __getitem__(self, name: str) -> utils.AverageMeter:
        return self.meters[name]

    def state_dict(self) -> dict[str, dict[str, float]]:
        self.flush()
        return {name: dict(vars(meter)) for name, meter in self.meters.items()}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        for name, values in state.items():
            if name in self.meters:  # checkpoints of plain runs once had those of SAM, too
                vars(self.meters[name]).update(values)
