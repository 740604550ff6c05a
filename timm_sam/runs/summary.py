"""Tables of a run with one row per epoch: ``summary.csv``, ``timing.csv``."""
import csv
import io
import logging
import os
from collections.abc import Mapping
from typing import Any

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


def add(path: str, row: Mapping[str, Any]) -> None:
    """Adds a row, in timm's format.

    A run may go on with options that give other columns (SAM's, those of a validation): a table has all that its rows
    have, and ``nan`` where a row has none.

    Args:
        path: The table; a new one gets the names as its header.
        row: Column -> value.
    """
    columns, header = list(row), _header(path)
    if header is not None and set(row) <= set(header):
        columns = header
    elif header is not None:
        columns += [name for name in header if name not in row]
        with open(path, newline="", encoding="utf-8") as f:
            earlier = list(csv.DictReader(f))
        with files.replacing(path, newline="") as f:
            writer = csv.DictWriter(f, columns, restval="nan", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(earlier)
    with open(path, "a", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, restval="nan")
        if header is None:
            writer.writeheader()
        writer.writerow(row)


def number_of_rows(path: str) -> int:
    """How many rows a table has beside its header; 0 where there is none."""
    if not os.path.exists(path):
        return 0
    with open(path, "rb") as f:
        return max(0, sum(1 for line in f if line.strip()) - 1)


def _header(path: str) -> list[str] | None:
    if not os.path.exists(path):
        return None
    with open(path, newline="", encoding="utf-8") as f:
        return next(csv.reader(f), None)


def _epoch(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
