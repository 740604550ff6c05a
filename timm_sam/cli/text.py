"""Text that commands write: numbers, tables in Markdown and CSV, and files in one piece."""
import contextlib
import csv
import errno
import io
import os
import statistics
import sys
from collections.abc import Iterable, Sequence

from .errors import OptionError
from .escape import csv_cell


def sample_std(values: Sequence[float]) -> float | None:
    """Standard deviation of the sample (n - 1); None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def spread(mean: float, std: float | None, digits: int = 2) -> str:
    """``95.10 ± 0.20``, without the second part where there is no deviation."""
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = None) -> str:
    """A table in Markdown; what would end a cell or a line is escaped. Foreign names want ``markdown_text`` before.

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
    """A table as CSV, with its last line ended; nothing in it is a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=line_end)
    writer.writerows(map(csv_cell, row) for row in (header, *rows))
    return text.getvalue()


def why_not_writable(path: str) -> str | None:
    """Why :func:`replace_file` would fail, as far as that can be seen without writing; None: nothing speaks against it.

    What is no regular file, such as a device or a pipe, is not replaced by one.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if os.path.isdir(target):
        return "it is a folder"
    if os.path.lexists(target) and not os.path.isfile(target):
        return "it is no regular file"
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    if not os.access(folder, os.W_OK):
        return f"the folder {folder} is read-only"
    return None


def replace_file(path: str, text: str) -> None:
    """Writes a file in one piece: what stands there is whole at any time, and nothing else is left behind.

    Through a symbolic link the file that it points to is written; the link stays.

    Raises:
        OSError: It cannot be written, or is no regular file.
    """
    if (reason := why_not_writable(path)) is not None:
        raise OSError(errno.EINVAL, reason, path)
    target = os.path.realpath(path)
    temporary = f"{target}.part"
    with contextlib.suppress(FileNotFoundError):  # of a process that was killed; or a link to somewhere else
        os.unlink(temporary)
    try:
        with open(temporary, "x", encoding="utf-8", newline="") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


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


def write_table(path: str, text: str, origin: str) -> None:
    """:func:`write_text` for CSV that may replace an earlier table of the same columns, and no other file.

    Args:
        path: Of the file.
        text: Its content, with the names of the columns in the first line.
        origin: The flag that the path is from.

    Raises:
        OptionError: It holds something else, or cannot be written.
    """
    if os.path.isfile(path) and os.path.getsize(path):
        try:
            with open(path, encoding="utf-8") as f:
                first = f.readline().rstrip("\n")
        except (OSError, UnicodeDecodeError):
            first = ""
        if first != text.partition("\n")[0]:
            raise OptionError(f"{origin}: {path} is there, and is no earlier table of these columns; name another file")
    write_text(path, text, origin)


def say(text: str) -> None:
    """Prints a text; what the encoding of stdout lacks becomes ``\\u03c1`` and the like.

    Raises:
        OptionError: It cannot be written: stdout is a file on a full disk, or a pipe that nobody reads.
    """
    try:
        try:
            print(text, flush=True)
        except UnicodeEncodeError:  # of a locale that has no rho, or no plus-minus
            encoding = sys.stdout.encoding
            print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as e:
        sys.stdout = io.StringIO()  # what is left in the other one's buffer would raise again at the end
        raise OptionError(f"stdout cannot be written ({e.strerror}); make room, or send it elsewhere") from None
