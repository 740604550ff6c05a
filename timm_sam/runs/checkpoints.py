"""Checkpoint files in a run's folder: which is the newest whole one, and what is wrong with the others."""
import logging
import os

from timm.utils.checkpoint_saver import load_checkpoint_metadata

from ..cli.errors import one_line
from . import files

_logger = logging.getLogger(__name__)


def why_unreadable(error: Exception) -> str:
    """What is wrong with a checkpoint, in one line: unpickling a torn or foreign file raises almost anything."""
    if "weights_only" in str(error) or "Weights only" in str(error):
        return "it is no checkpoint, or holds objects that could run code, which are never loaded"
    return one_line(error)


def newest_checkpoint(folder: str) -> str | None:
    """The whole checkpoint of the latest epoch in a run's folder; torn files are skipped with a warning.

    Args:
        folder: Where ``last.pth.tar``, ``checkpoint-*.pth.tar`` and ``recovery-*.pth.tar`` are.

    Returns:
        Its path, or None if there is none.
    """
    found = []
    for path in files.checkpoints(folder):
        if files.is_being_written(path):
            continue
        try:
            checkpoint = load_checkpoint_metadata(path)
            done = float(checkpoint["epoch"]) + (0.0 if checkpoint.get("position") else 1.0)
            position = (checkpoint.get("position") or {}).get("batch", 0)
        except Exception as e:
            _logger.warning(f"{path} is not a whole checkpoint ({type(e).__name__}) and is skipped.")
            continue
        is_last = os.path.basename(path) == files.LAST
        found.append((done, position, is_last, os.path.getmtime(path), path))
    return max(found)[-1] if found else None
