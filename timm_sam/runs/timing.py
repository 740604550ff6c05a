"""How long the epochs of a run took: ``timing.csv`` beside ``summary.csv``, whose columns are timm's."""
import csv
import os

import torch

from .summary import trim

FILE = "timing.csv"
COLUMNS = ("epoch", "seconds", "ranks", "device")


def record(folder: str, epoch: int, seconds: float, ranks: int, device: torch.device) -> None:
    """Adds one epoch; rows of this epoch and later ones, which an earlier start of the run left, are dropped.

    Args:
        folder: The run's.
        epoch: From 0.
        seconds: Of training, without evaluation and checkpoints; NaN if only a part of the epoch was run here.
        ranks: Processes that trained together.
        device: Of this rank.
    """
    path = os.path.join(folder, FILE)
    trim(path, epoch)
    new = not os.path.exists(path) or os.path.getsize(path) == 0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    with open(path, "a", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        if new:
            writer.writerow(COLUMNS)
        writer.writerow((epoch, f"{seconds:.3f}", ranks, name))
