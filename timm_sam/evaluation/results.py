"""The files that the results of suites go to: their names, what stands there already, and writing them."""
import csv
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..cli.errors import OptionError
from ..cli.escape import csv_cell, csv_plain
from ..cli.text import why_not_writable, write_text
from .tables import Measure, as_csv, as_json, as_markdown


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
    """Looks whether a new table holds what an existing one does: its JSON, else its CSV; Markdown is not read.

    Args:
        files: Format -> file.
        paths: Of the new table's checkpoints; a CSV file's columns are named by parts of them.
        sha256s: Of the same files.
        rows: Its pairs (data set, measure).
        command: Whose table it is.
        out: The flag that names it.

    Raises:
        OptionError: It lacks something, or the existing table cannot be read.
    """
    kind = next((kind for kind in ("json", "csv") if os.path.exists(files.get(kind, ""))), None)
    if kind is None:
        return
    try:
        with open(files[kind], encoding="utf-8", newline="") as f:
            if kind == "json":
                content = json.load(f)
                old = [(row["dataset"], row["measure"]) for row in content["results"]]
                lost = [f"{c['path']} (SHA-256 {str(c['sha256'])[:12]})" for c in content["protocol"]["checkpoints"]
                        if c["sha256"] not in sha256s]
            else:
                head, *lines = csv.reader(f)
                old = [(csv_plain(line[1]), csv_plain(line[2])) for line in lines]
                rows = {(_in_csv(dataset), _in_csv(measure)) for dataset, measure in rows}
                wholes = [f"/{_in_csv(os.path.normpath(path))}/" for path in paths]
                lost = [name for name in map(csv_plain, head[4:-3])
                        if not any(f"/{os.path.normpath(name)}/" in whole for whole in wholes)]
    except (OSError, ValueError, LookupError, TypeError, csv.Error):
        raise OptionError(f"--skip-existing: {files[kind]} is no table of {command}; name another {out}, or use "
                          f"--overwrite") from None
    lost += [f"{measure} of {dataset}" for dataset, measure in old if (dataset, measure) not in rows]
    if lost:
        raise OptionError(
            f"--skip-existing: {files[kind]} holds {lost[0]}{', ...' if len(lost) > 1 else ''}, which is not "
            f"evaluated now and would be lost; ask for it too, name another {out}, or use --overwrite")


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
