"""Results of suites as a table: on the terminal, as Markdown, CSV and JSON."""
import csv
import io
import json
import os
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cli.errors import OptionError

GROUPS = ("ID", "OOD", "adversarial")  # the order of Table 4 of the SAM-ON paper


@dataclass
class Measure:
    """One number per checkpoint.

    Attributes:
        group: One of ``GROUPS``.
        dataset: Name of the data set.
        name: Of the measure: ``top1``, ``top5``, ``top1_1000way``, ``clean``, ``l2 0.25``, ...
        images: Number of images behind it.
        flags: What makes it not the number of the whole data set.
        values: In percent, one per checkpoint.
    """

    group: str
    dataset: str
    name: str
    images: int
    flags: Sequence[str] = ()
    values: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Standard deviation of the sample (n - 1); None for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def merge(per_checkpoint: Sequence[Sequence[Measure]]) -> list[Measure]:
    """The same measures of several checkpoints side by side, in the order ID, OOD, adversarial."""
    merged = []
    for same in zip(*per_checkpoint, strict=True):
        flags = list(dict.fromkeys(flag for m in same for flag in m.flags))
        values = [value for m in same for value in m.values]
        merged.append(Measure(same[0].group, same[0].dataset, same[0].name, same[0].images, flags, values))
    return sorted(merged, key=lambda m: GROUPS.index(m.group))


def _cells(measures: Sequence[Measure], names: Sequence[str]) -> list[list[str]]:
    many = len(names) > 1
    rows = [["", "data set", "measure", "images", *names, *(["mean ± std"] if many else [])]]
    group = None
    for m in measures:
        flags = f" ({'; '.join(m.flags)})" if m.flags else ""
        row = [m.group if m.group != group else "", m.dataset + flags, m.name, f"{m.images:,}",
               *(f"{value:.2f}" for value in m.values)]
        if many:
            row.append(f"{m.mean:.2f} ± {m.std:.2f}")
        rows.append(row)
        group = m.group
    return rows


def as_text(measures: Sequence[Measure], names: Sequence[str]) -> str:
    """The table for a terminal; accuracies in percent."""
    rows = _cells(measures, names)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        lines.append("  ".join(cell.ljust(width) if i < 3 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def as_markdown(measures: Sequence[Measure], names: Sequence[str]) -> str:
    """The table in Markdown; accuracies in percent."""
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rows = _cells(measures, names)
    rule = "|" + "|".join("---:" if i >= 3 else "---" for i in range(len(rows[0]))) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])]) + "\n"


def as_csv(measures: Sequence[Measure], names: Sequence[str]) -> str:
    """The table as CSV: numbers in percent with four digits, mean and standard deviation in columns of their own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "dataset", "measure", "images", *names, "mean", "std", "flags"])
    for m in measures:
        std = "" if m.std is None else f"{m.std:.4f}"
        writer.writerow([m.group, m.dataset, m.name, m.images, *(f"{value:.4f}" for value in m.values),
                         f"{m.mean:.4f}", std, "; ".join(m.flags)])
    return out.getvalue()


def as_json(measures: Sequence[Measure], names: Sequence[str], protocol: Mapping[str, Any]) -> str:
    """The table and all that its numbers depend on."""
    results = [dict(group=m.group, dataset=m.dataset, measure=m.name, images=m.images, values=m.values, mean=m.mean,
                    std=m.std, flags=list(m.flags)) for m in measures]
    return json.dumps(dict(checkpoints=list(names), results=results, protocol=protocol), indent=2, default=str) + "\n"


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


def check_kept(files: Mapping[str, str], paths: Sequence[str], sha256s: Collection[str | None],
               rows: Collection[tuple[str, str]]) -> None:
    """Looks whether a new table holds what an existing one does: its JSON, else its CSV; Markdown is not read.

    Args:
        files: Format -> file.
        paths: Of the new table's checkpoints; a CSV file's columns are named by parts of them.
        sha256s: Of the same files.
        rows: Its pairs (data set, measure).

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
                old = [(line[1], line[2]) for line in lines]
                wholes = [f"/{os.path.normpath(path)}/" for path in paths]
                lost = [name for name in head[4:-3]
                        if not any(f"/{os.path.normpath(name)}/" in whole for whole in wholes)]
    except (OSError, ValueError, LookupError, TypeError):
        raise OptionError(
            f"--skip-existing: {files[kind]} is no table of validate.py; name another --results-file, or use "
            f"--overwrite") from None
    lost += [f"{measure} of {dataset}" for dataset, measure in old if (dataset, measure) not in rows]
    if lost:
        raise OptionError(
            f"--skip-existing: {files[kind]} holds {lost[0]}{', ...' if len(lost) > 1 else ''}, which is not "
            f"evaluated now and would be lost; ask for it too, name another --results-file, or use --overwrite")


def write(files: Mapping[str, str], measures: Sequence[Measure], names: Sequence[str],
          protocol: Mapping[str, Any]) -> None:
    """Writes the table, each file in one piece.

    Raises:
        OptionError: A file cannot be written.
    """
    texts = {"md": lambda: as_markdown(measures, names), "csv": lambda: as_csv(measures, names),
             "json": lambda: as_json(measures, names, protocol)}
    for kind, path in files.items():
        write_text(path, texts[kind]())


def write_text(path: str, text: str) -> None:
    """Writes a file of results in one piece.

    Raises:
        OptionError: It cannot be written.
    """
    temporary = f"{path}.part"
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as f:
            f.write(text)
        os.replace(temporary, path)
    except OSError as e:
        raise OptionError(
            f"--results-file: {path} cannot be written ({e.strerror}); make room, or name another file") from None
