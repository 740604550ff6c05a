"""Text that commands write: numbers, tables in Markdown and CSV, and files in one piece."""
import csv
import io
import os
import statistics
from collections.abc import Iterable, Sequence

from .errors import OptionError


def sample_std(values: Sequence[float]) -> float | None:
    """Standard deviation of the sample (n - 1); None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def spread(mean: float, std: float | None, digits: int = 2) -> str:
    """``95.10 ± 0.20``, without the second part where there is no deviation."""
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = None) -> str:
    """A table in Markdown; what would end a cell or a line is escaped.

    Args:
        header: Of the columns.
        rows: Their cells.
        left: How many columns are aligned to the left, the others to the right; None: all, by the reader's default.
    """
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|".join("---" if left is None or i < left else "---:" for i in range(len(header)))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]], line_end: str = "\n") -> str:
    """A table as CSV, with its last line ended."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=line_end)
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def replace_file(path: str, text: str) -> None:
    """Writes a file in one piece: what stands there is whole at any time.

    Raises:
        OSError: It cannot be written.
    """
    temporary = f"{path}.part"
    with open(temporary, "w", encoding="utf-8", newline="") as f:
        f.write(text)
    os.replace(temporary, path)


def write_text(path: str, text: str, origin: str) -> None:
    """:func:`replace_file` for a path that the user has given.

    Args:
        path: Of the file.
        text: Its content.
        origin: The flag that the path is from.

    Raises:
        OptionError: It cannot be written.
    """
    try:
        replace_file(path, text)
    except OSError as e:
        raise OptionError(
            f"{origin}: {path} cannot be written ({e.strerror}); make room, or name another file") from None
