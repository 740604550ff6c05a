"""Results of suites as a table: on the terminal, as Markdown, CSV and JSON."""
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cli.escape import markdown_text, printable
from ..cli.text import csv_text, markdown, sample_std, spread

FORMATS = ("csv", "json", "md")
GROUPS = ("ID", "OOD", "adversarial", "calibration", "quantised")  # the first three as in Table 4 of the SAM-ON paper
MEAN = "mean ± std"  # heads the column after those of several checkpoints
_TEXT = 3  # columns before the numbers


@dataclass
class Measure:
    """One number per checkpoint.

    Attributes:
        group: One of ``GROUPS``; of an analysis, its name.
        dataset: Name of the data set.
        name: Of the measure: ``top1``, ``top5``, ``top1_1000way``, ``clean``, ``l2 0.25``, ...
        images: Number of images behind it.
        flags: What makes it not the number of the whole data set.
        values: In ``unit``, one per checkpoint.
        non_finite: Images whose outputs are NaN or infinite, one number per checkpoint: a value with some says nothing,
            and is in no mean. Empty: none has any.
        unit: Of the values: percent, or what else the measure has.
        digits: That tables show.
        details: What the JSON keeps beside the values, one entry per checkpoint; empty: nothing.
    """

    group: str
    dataset: str
    name: str
    images: int
    flags: Sequence[str] = ()
    values: list[float] = field(default_factory=list)
    non_finite: list[int] = field(default_factory=list)
    unit: str = "%"
    digits: int = 2
    details: list[Any] = field(default_factory=list)

    @property
    def counted(self) -> list[float]:
        """The values that are in the mean."""
        return [value for value, broken in zip(self.values, self.broken) if not broken]

    @property
    def broken(self) -> list[int]:
        """``non_finite``, with a zero for each checkpoint if there are none."""
        return self.non_finite or [0] * len(self.values)

    @property
    def mean(self) -> float | None:
        """None if there is nothing to average."""
        return statistics.fmean(self.counted) if self.counted else None

    @property
    def std(self) -> float | None:
        """Standard deviation of the sample (n - 1); None for less than two values."""
        return sample_std(self.counted)


def merge(per_checkpoint: Sequence[Sequence[Measure]]) -> list[Measure]:
    """The same measures of several checkpoints side by side, in the order of ``GROUPS``, others after them."""
    merged = []
    for same in zip(*per_checkpoint, strict=True):
        flags = list(dict.fromkeys(flag for m in same for flag in m.flags))
        values = [value for m in same for value in m.values]
        broken = [number for m in same for number in m.broken]
        merged.append(Measure(same[0].group, same[0].dataset, same[0].name, same[0].images, flags, values,
                              broken if any(broken) else [], same[0].unit, same[0].digits,
                              [detail for m in same for detail in m.details]))
    return sorted(merged, key=lambda m: GROUPS.index(m.group) if m.group in GROUPS else len(GROUPS))


def _cells(measures: Sequence[Measure], names: Sequence[str]) -> list[list[str]]:
    many = len(names) > 1
    rows = [["", "data set", "measure", "images", *names, *([MEAN] if many else [])]]
    group = None
    for m in measures:
        flags = f" ({'; '.join(m.flags)})" if m.flags else ""
        name = m.name if m.unit in ("%", "") else f"{m.name} ({m.unit})"
        row = [m.group if m.group != group else "", m.dataset + flags, name, f"{m.images:,}",
               *(f"{value:.{m.digits}f}{' non-finite' if broken else ''}" for value, broken in zip(m.values, m.broken))]
        if many:
            left_out = f" (n = {len(m.counted)})" if any(m.broken) else ""
            row.append(("–" if m.mean is None else spread(m.mean, m.std, m.digits)) + left_out)
        rows.append(row)
        group = m.group
    return rows


def as_text(measures: Sequence[Measure], names: Sequence[str]) -> str:
    """The table for a terminal; in percent, where no other unit is said."""
    rows = [list(map(printable, row)) for row in _cells(measures, names)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        lines.append("  ".join(cell.ljust(width) if i < _TEXT else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def as_markdown(measures: Sequence[Measure], names: Sequence[str]) -> str:
    """The table in Markdown; in percent, where no other unit is said."""
    header, *rows = _cells(measures, names)
    escaped = [[markdown_text(cell) for cell in row] for row in (header, *rows)]
    return markdown(escaped[0], escaped[1:], left=_TEXT) + "\n"


def as_csv(measures: Sequence[Measure], names: Sequence[str]) -> str:
    """The table as CSV: numbers in their units, four digits or what tables show; mean and deviation in own columns.

    A value that is in no mean is ``nan``, so that it is in none that a reader computes either.
    """
    def shown(m: Measure, number: float) -> str:
        return f"{number:.{max(4, m.digits)}f}"

    return csv_text(
        ["group", "dataset", "measure", "images", *names, "mean", "std", "flags"],
        [[m.group, m.dataset, m.name, m.images,
          *("nan" if broken else shown(m, value) for value, broken in zip(m.values, m.broken)),
          *("" if number is None else shown(m, number) for number in (m.mean, m.std)), "; ".join(m.flags)]
         for m in measures])


def as_json(measures: Sequence[Measure], names: Sequence[str], protocol: Mapping[str, Any]) -> str:
    """The table and all that its numbers depend on."""
    results = [dict(group=m.group, dataset=m.dataset, measure=m.name, unit=m.unit, images=m.images,
                    values=finite(m.values),
                    non_finite=m.broken, n=len(m.counted), mean=m.mean, std=m.std, flags=list(m.flags),
                    **({"details": finite(m.details)} if m.details else {}))
               for m in measures]
    return json.dumps(dict(checkpoints=list(names), results=results, protocol=protocol), indent=2, default=str) + "\n"


def finite(value: Any) -> Any:
    """Values for a JSON file, which knows neither NaN nor infinity: those are null."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
