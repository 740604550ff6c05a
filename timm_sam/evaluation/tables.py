"""Results of suites as a table: on the terminal, as Markdown, CSV and JSON."""
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cli.text import csv_text, markdown, sample_std, spread

FORMATS = ("csv", "json", "md")
GROUPS = ("ID", "OOD", "adversarial")  # the order of Table 4 of the SAM-ON paper
_TEXT = 3  # columns before the numbers


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
        return sample_std(self.values)


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
            row.append(spread(m.mean, m.std))
        rows.append(row)
        group = m.group
    return rows


def as_text(measures: Sequence[Measure], names: Sequence[str]) -> str:
    """The table for a terminal; accuracies in percent."""
    rows = _cells(measures, names)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        lines.append("  ".join(cell.ljust(width) if i < _TEXT else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def as_markdown(measures: Sequence[Measure], names: Sequence[str]) -> str:
    """The table in Markdown; accuracies in percent."""
    header, *rows = _cells(measures, names)
    return markdown(header, rows, left=_TEXT) + "\n"


def as_csv(measures: Sequence[Measure], names: Sequence[str]) -> str:
    """The table as CSV: numbers in percent with four digits, mean and standard deviation in columns of their own."""
    return csv_text(
        ["group", "dataset", "measure", "images", *names, "mean", "std", "flags"],
        [[m.group, m.dataset, m.name, m.images, *(f"{value:.4f}" for value in m.values), f"{m.mean:.4f}",
          "" if m.std is None else f"{m.std:.4f}", "; ".join(m.flags)] for m in measures])


def as_json(measures: Sequence[Measure], names: Sequence[str], protocol: Mapping[str, Any]) -> str:
    """The table and all that its numbers depend on."""
    results = [dict(group=m.group, dataset=m.dataset, measure=m.name, images=m.images, values=m.values, mean=m.mean,
                    std=m.std, flags=list(m.flags)) for m in measures]
    return json.dumps(dict(checkpoints=list(names), results=results, protocol=protocol), indent=2, default=str) + "\n"


def short_names(checkpoints: Sequence[str | None], model: str) -> list[str]:
    """Names for the columns: what tells the paths apart, or the model's name without a file."""
    paths = [checkpoint or model for checkpoint in checkpoints]
    normal = [os.path.normpath(path) for path in paths]
    if len(paths) == 1 or len(set(normal)) < len(paths):
        return paths
    parts = [path.split(os.sep) for path in normal]
    shared = len(os.path.commonprefix(parts))
    ending = len(os.path.commonprefix([part[shared:][::-1] for part in parts]))
    names = ["/".join(part[shared:len(part) - ending]) for part in parts]
    # where a/x and a/b/x end alike, nothing is left of the first
    return names if all(names) else ["/".join(part[shared:]) for part in parts]
