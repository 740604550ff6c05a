"""The files that the results of suites go to: their names, what stands there already, and writing them."""
import csv
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..cli.errors import OptionError
from ..cli.escape import csv_cell, csv_plain, markdown_plain, printable
from ..cli.text import why_not_writable, write_text
from .tables import MEAN, Measure, as_csv, as_json, as_markdown

_UNIT = re.compile(r" \((nats|d = \d+)\)$")  # what Markdown has behind the name of a measure


def result_files(results_file: str, results_format: str | None) -> dict[str, str]:
    """Format -> file: by the extension, all three without one, or the format that was asked for."""
    if not results_file:
        return {}
    extension = os.path.splitext(results_file)[1][1:]
    if results_format is not None:
        return {results_format: results_file}
    if extension:
        return {extension: results_file}
    return {kind: f"{results_file}.{kind}" for kind in ("md", "csv", "json")}


def refuse_special(files: Sequence[str], origin: str) -> None:
    """What is no regular file, or cannot be written, is found before anything is computed.

    Args:
        files: That will be written.
        origin: The flag that their names are from, with its value.

    Raises:
        OptionError: One of them is a folder, a device or a pipe, or in a folder that cannot be written.
    """
    for path in files:
        if (reason := why_not_writable(path)) is not None:
            raise OptionError(f"{origin}: {path} cannot be written: {reason}; name another file")


def refuse_existing(files: Sequence[str], origin: str) -> None:
    """Nothing is replaced or gone on with unless it is asked for.

    Args:
        files: That would be.
        origin: The flag that their names are from, with its value.

    Raises:
        OptionError: One of them exists.
    """
    existing = [path for path in files if os.path.exists(path)]
    if existing:
        raise OptionError(f"{origin}: {existing[0]} exists; add --skip-existing to go on with it, --overwrite to start "
                          f"anew, or name another file")


def check_kept(files: Mapping[str, str], paths: Sequence[str], sha256s: Collection[str | None],
               rows: Collection[tuple[str, str]], command: str = "validate.py", out: str = "--results-file") -> None:
    """Looks whether a new table holds what an existing one does: its JSON, else its CSV, else its Markdown.

    Args:
        files: Format -> file.
        paths: Of the new table's checkpoints; the columns of CSV and Markdown are named by parts of them.
        sha256s: Of the same files.
        rows: Its pairs (data set, measure).
        command: Whose table it is.
        out: The flag that names it.

    Raises:
        OptionError: It lacks something, or the existing table cannot be read.
    """
    kind = next((kind for kind in ("json", "csv", "md") if os.path.exists(files.get(kind, ""))), None)
    if kind is None:
        return
    try:
        with open(files[kind], encoding="utf-8", newline="") as f:
            if kind == "json":
                content = json.load(f)
                old = [(row["dataset"], row["measure"]) for row in content["results"]]
                lost = [f"{c['path']} (SHA-256 {str(c['sha256'])[:12]})" for c in content["protocol"]["checkpoints"]
                        if c["sha256"] not in sha256s]
            elif kind == "csv":
                head, *lines = csv.reader(f)
                old = [(csv_plain(line[1]), csv_plain(line[2])) for line in lines]
                rows = {(_in_csv(dataset), _in_csv(measure)) for dataset, measure in rows}
                lost = _not_among(map(csv_plain, head[4:-3]), map(_in_csv, map(os.path.normpath, paths)))
            else:
                rows = {(printable(dataset), printable(measure)) for dataset, measure in rows}
                names, old = _of_markdown(f.read(), {dataset for dataset, _ in rows})
                lost = _not_among(names, map(printable, map(os.path.normpath, paths)))
    except (OSError, ValueError, LookupError, TypeError, csv.Error):
        raise OptionError(f"--skip-existing: {files[kind]} is no table of {command}; name another {out}, or use "
                          f"--overwrite") from None
    lost += [f"{measure} of {dataset}" for dataset, measure in old if (dataset, measure) not in rows]
    if lost:
        raise OptionError(
            f"--skip-existing: {files[kind]} holds {lost[0]}{', ...' if len(lost) > 1 else ''}, which is not "
            f"evaluated now and would be lost; ask for it too, name another {out}, or use --overwrite")


def _not_among(names: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The columns that are of none of these checkpoints: they are named by parts of their paths."""
    wholes = [f"/{path}/" for path in paths]
    return [name for name in names if not any(f"/{os.path.normpath(name)}/" in whole for whole in wholes)]


def _of_markdown(text: str, datasets: Collection[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """What a table in Markdown holds: its checkpoints' names, and its pairs (data set, measure).

    Args:
        text: The table.
        datasets: Names of data sets, without the flags that may stand behind them there.

    Raises:
        ValueError, IndexError: It is none of ours.
    """
    head, _, *lines = [[markdown_plain(cell) for cell in line[2:-2].split(" | ")] for line in text.splitlines()]
    if head[1:4] != ["data set", "measure", "images"]:
        raise ValueError("another table")
    return head[4:-1] if head[-1] == MEAN else head[4:], [
        (next((name for name in datasets if line[1].startswith(f"{name} (")), line[1]), _UNIT.sub("", line[2]))
        for line in lines]


def _in_csv(text: str) -> str:
    """What is read back of a text in a CSV file: what is not printable is escaped in it."""
    return csv_plain(str(csv_cell(text)))


def write(files: Mapping[str, str], measures: Sequence[Measure], names: Sequence[str], protocol: Mapping[str, Any],
          origin: str = "--results-file") -> None:
    """Writes the table, each file in one piece.

    Args:
        files: Format -> file.
        measures: The rows.
        names: Of the checkpoints, the columns.
        protocol: All that the numbers depend on.
        origin: The flag that the files' names are from.

    Raises:
        OptionError: A file cannot be written.
    """
    texts = {"md": lambda: as_markdown(measures, names), "csv": lambda: as_csv(measures, names),
             "json": lambda: as_json(measures, names, protocol)}
    for kind, path in files.items():
        write_text(path, texts[kind](), origin)
