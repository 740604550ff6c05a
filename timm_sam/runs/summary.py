"""Tables of a run with one row per epoch: ``summary.csv``, ``timing.csv``."""
import csv
import io
import logging
import os

from . import files

_logger = logging.getLogger(__name__)


def trim(path: str, start_epoch: int) -> None:
    """Drops the rows from an epoch on, which an earlier start of the run left, and what it left half written.

    Rows without an epoch go, too. The file is replaced as a whole, or stays as it is.

    Args:
        path: The table, with a header and the epoch in the first column; need not be there.
        start_epoch: The first epoch that goes.
    """
    if not os.path.exists(path):
        return
    with open(path, newline="", encoding="utf-8") as f:
        text = f.read()
    whole = text[:text.rfind("\n") + 1]
    rows = [row for row in csv.reader(io.StringIO(whole, newline="")) if row]
    kept = [row for row in rows[1:] if (epoch := _epoch(row[0])) is not None and epoch < start_epoch]
    if whole == text and len(kept) == max(0, len(rows) - 1):
        return
    dropped = len(rows) - 1 - len(kept)
    if dropped > 0:
        _logger.info(f"{path}: dropping {dropped} row(s) from epoch {start_epoch} on.")
    with files.replacing(path, newline="") as f:
        if kept:
            csv.writer(f).writerows([rows[0], *kept])


def _epoch(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
