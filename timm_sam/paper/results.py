"""What the runs in a folder come to: the numbers of an exhibit, here and in the paper."""
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..cli.errors import OptionError, one_line
from ..cli.text import sample_std
from ..evaluation.evaluated import Evaluated, read_evaluations
from ..jobs.job import Job, options_of
from ..report.runs import FINISHED, read_run
from ..runs.sameness import changed_options
from . import numbers
from .exhibits import NORMS, Entry, Exhibit
from .numbers import Number
from .plan import Plan


@dataclass(frozen=True)
class Line:
    """A number of an exhibit.

    Attributes:
        labels: Its place.
        paper: What the paper prints; None: it prints none.
        values: Ours, one per seed, in the unit of the paper.
        why: Of each seed without one, what is the matter.
    """

    labels: tuple[str, ...]
    paper: Number | None
    values: tuple[float, ...] = ()
    why: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        return sample_std(self.values)

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        known = self.paper is not None and self.paper.mean and self.mean is not None
        return self.mean - self.paper.value if known and self.paper and self.mean is not None else None


@dataclass
class Found:
    """An exhibit with its numbers.

    Attributes:
        header: What labels are.
        lines: In the paper's order; what only the paper has at the end.
        folders: Of the finished runs.
        other: Options in which runs differ from their recipes -> the values.
    """

    header: tuple[str, ...]
    lines: list[Line] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    other: dict[str, set[str]] = field(default_factory=dict)


def collect(plan: Plan, exhibit: Exhibit) -> Found:
    """Reads the runs of an exhibit, as far as they are there.

    Args:
        plan: Without flags over the recipes: what differs from those is noted.
        exhibit: Which.

    Raises:
        OptionError: A run is there, and its recipe is not, or cannot be read.
    """
    printed = numbers.read(exhibit.name)
    found = Found(printed.header or exhibit.header or ("run",))
    seen: dict[str, tuple[float | None, str]] = {}
    for entry in exhibit.entries:
        values, why = [], []
        for job in _jobs(plan, entry):
            if job.folder not in seen:
                seen[job.folder] = _accuracy(entry, job, found)
            # distributions are drawn of all runs together, and no number of one
            own = entry.evaluation is None or exhibit.kind == NORMS
            value, reason = seen[job.folder] if own else _measured(plan, entry, job)
            if value is None:
                why.append(reason)
            else:
                values.append(value)
        found.lines.append(Line(entry.labels, printed.cells.get(entry.labels), tuple(values), tuple(why)))
    places = {labels: place for place, labels in enumerate(printed.cells)}
    found.lines.sort(key=lambda line: places.get(line.labels, len(places)))
    there = {line.labels for line in found.lines}
    found.lines += [Line(labels, number) for labels, number in printed.cells.items() if labels not in there]
    return found


def _jobs(plan: Plan, entry: Entry) -> Iterable[Job]:
    return [] if entry.config is None else [plan.train(entry.config, seed) for seed in range(plan.seeds)]


def _accuracy(entry: Entry, job: Job, found: Found) -> tuple[float | None, str]:
    """What a run reached in its last epoch; a run of other options than its recipe is noted."""
    if not os.path.isdir(job.folder):
        return None, "not run"
    run = read_run(job.folder)
    if run.status != FINISHED:
        return None, f"{run.status}: {run.reason}"
    found.folders.append(job.folder)
    try:
        wanted = options_of(job)
    except OptionError:
        if entry.config is None or not entry.config.needs:
            raise  # else nobody would be told that a run has other options
        wanted = {}  # a recipe that leaves its radius open
    for key in changed_options(run.args, wanted):
        if key not in ("data_dir", "seed"):
            found.other.setdefault(key, set()).add(str(run.args.get(key)))
    return run.accuracy(), ""


def _measured(plan: Plan, entry: Entry, train: Job) -> tuple[float | None, str]:
    assert entry.config is not None and entry.evaluation is not None
    job = plan.evaluate(entry.config, entry.evaluation, train)
    if not os.path.isfile(job.result):
        return None, "not evaluated" if os.path.isdir(job.folder) else "not run"
    try:
        value = _number(read_evaluations([job.result]), *entry.measure)
    except OptionError as e:
        return None, one_line(e)
    wanted = " ".join(filter(None, entry.measure))
    return (value, "") if value is not None else (None, f"{os.path.basename(job.result)} has no {wanted}")


def _number(evaluated: Sequence[Evaluated], dataset: str, measure: str) -> float | None:
    for one in evaluated:
        for key, number in one.numbers.items():
            if key.measure == measure and dataset in ("", key.dataset) and math.isfinite(number.value):
                return number.value
    return None
