"""Does flatness tell? In which order each measure of a flatness card puts runs, beside the order of what is wanted.

Kendall's tau over the runs of one table (one model on one data set): measures do not compare across networks.
Sharpness that goes along with accuracy has a tau near -1 with it, one that says nothing of it a tau around 0. As
M. Andriushchenko et al., "A modern look at the relationship between sharpness and generalization", ICML 2023,
https://arxiv.org/abs/2302.07011.
"""
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..cli import document
from ..cli.document import Block, Entry, Figure, Points, Section
from ..cli.text import csv_text
from ..evaluation.evaluated import Key, Number
from . import run_tables
from .evaluations import Joined
from .runs import Run
from .statistics import kendall_tau, tau_interval
from .tables import Table

FILE, RUNS_FILE, FLATNESS = "flatness.csv", "flatness_runs.csv", "flatness"  # tables, and a kind of picture
ACCURACY, GAP = " accuracy", "generalization gap"
VALIDATION = f"validation{ACCURACY}"
_FEWEST = 3  # runs: of fewer there is no order to speak of
_LOSS = "loss"  # of a card: at the weights, of training images without augmentation
_NO_MEASURE = ("standard error of the trace",)


@dataclass(frozen=True)
class Tau:
    """How far a measure and a target agree on the order of runs.

    Attributes:
        measure, target: What.
        value: Kendall's tau-b; None: one of them says the same of all runs, or there are less than three.
        interval: Its 95 % bootstrap interval over runs.
        n: Number of runs that have both.
    """

    measure: str
    target: str
    value: float | None
    interval: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class Values:
    """What is known of the runs of a table that have cards.

    Attributes:
        measures, targets: Name -> folder of a run -> number.
        runs: They.
    """

    measures: Mapping[str, Mapping[str, float]]
    targets: Mapping[str, Mapping[str, float]]
    runs: Sequence[Run] = ()


def values_of(table: Table, cards: Joined, joined: Joined | None, epoch: str) -> Values:
    """Every measure and every target of the runs of a table.

    Args:
        table: Whose runs.
        cards: What is known of them by their cards.
        joined: By validate.py; None: nothing.
        epoch: Which accuracy of training counts, ``"last"`` or ``"best"``.
    """
    runs = [run for cell in table.cells for run in cell.runs if run.path in cards.numbers]
    several = len({key.dataset for run in runs for key in cards.numbers[run.path]}) > 1
    measures: dict[str, dict[str, float]] = {}
    for run in runs:
        for key, number in cards.numbers[run.path].items():
            if key.measure not in _NO_MEASURE:
                # of other images it is another measure
                name = f"{key.measure} ({key.dataset})" if several else key.measure
                measures.setdefault(name, {})[run.path] = number.value
    return Values(measures, _targets(runs, cards, joined, epoch) if measures else {}, runs)


def taus(values: Values) -> list[Tau]:
    """Of every measure with every target."""
    found = []
    for name, measured in values.measures.items():
        for target, wanted in values.targets.items():
            both = [path for path in measured if path in wanted]
            first, second = [measured[path] for path in both], [wanted[path] for path in both]
            enough = len(both) >= _FEWEST
            found.append(Tau(name, target, kendall_tau(first, second) if enough else None,
                             tau_interval(first, second) if enough else None, len(both)))
    return found


def _targets(runs: Sequence[Run], cards: Joined, joined: Joined | None, epoch: str) -> dict[str, dict[str, float]]:
    """Target -> its value of each run that has one."""
    found = {VALIDATION: {run.path: run.accuracy(epoch) for run in runs}}
    if joined is not None:
        # those of other tables may be of other data sets
        keys = [key for key in joined.keys if any(key in joined.numbers.get(run.path, {}) for run in runs)]
        for group in ("ID", "OOD", "adversarial"):
            means = {run.path: mean for run in runs
                     if (mean := _mean_accuracy(joined.numbers.get(run.path, {}), keys, group)) is not None}
            if means:
                found[f"{group}{ACCURACY}"] = means
    gaps = {}
    for run in runs:
        losses = {key.dataset: number.value for key, number in cards.numbers[run.path].items() if key.measure == _LOSS}
        # of cards of several sets that of the training images
        loss = losses.get(run.args["train_split"]) if len(losses) > 1 else next(iter(losses.values()), None)
        if loss is not None and "eval_loss" in run.rows[-1]:
            gaps[run.path] = run.rows[-1]["eval_loss"] - loss
    if gaps:
        found[GAP] = gaps
    return found


def _mean_accuracy(numbers: Mapping[Key, Number], keys: Sequence[Key], group: str) -> float | None:
    """Over all data sets (or radii) of a group that any run of the table has; None: one of them is missing."""
    wanted = [key for key in keys if key.group == group and (
        key.measure == "top1" if group != "adversarial" else key.measure != "clean")]
    values = [numbers[key].value for key in wanted if key in numbers]
    return statistics.fmean(values) if values and len(values) == len(wanted) else None


def flatness_sections(tables: Sequence[Table], found: Mapping[int, Sequence[Tau]], cards: Joined,
                      drawn: Sequence[str]) -> list[Section]:
    """What the report says of cards.

    Args:
        tables: As they are numbered in the report.
        found: Number of a table, from 1 -> its taus.
        cards: Of which runs cards are.
        drawn: Names of the pictures that there are.
    """
    sections = []
    for number, several in found.items():
        name, title = f"table{number}-{FLATNESS}.png", tables[number - 1].title
        pictures = [Figure(name, f"Kendall's tau of each measure: {title}")] if name in drawn else []
        sections.append(_section(title, several, pictures))
    notes = [*cards.notes,
             *(f"{card.checkpoint} in {card.file} is of none of these runs" for card in cards.without_run)]
    if cards.numbers:
        notes += [f"{run.path} has no card" for run in cards.runs_without]
    else:
        notes.append("no card is of a finished run")
    return [*sections, Section("Cards", [Points(notes)])] if notes else sections


def _section(title: str, found: Sequence[Tau], pictures: Sequence[Figure]) -> Section:
    counts = sorted({tau.n for tau in found})
    blocks: list[Block] = [
        f"Kendall's tau between each measure of the cards and what is wanted of a network, over "
        f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} runs of any variant, radius and seed, with "
        f"the 95 % bootstrap interval over runs. 1: both put the runs in the same order, -1: in the reverse; bold: "
        f"the interval leaves out 0. The {GAP} is the last validation loss less the card's loss on training images, "
        f"both without augmentation.",
        taus_table(found), *pictures]
    return Section(f"Does flatness tell? {title}", blocks)


def taus_table(found: Sequence[Tau]) -> document.Table:
    """A line per measure, a column per target."""
    targets = list(dict.fromkeys(tau.target for tau in found))
    rows: list[list[str | Entry]] = []
    for measure in dict.fromkeys(tau.measure for tau in found):
        by_target = {tau.target: tau for tau in found if tau.measure == measure}
        rows.append([measure, *(_entry(by_target[target]) for target in targets)])
    return document.Table(["measure", *targets], rows, left=1)


def _entry(tau: Tau) -> Entry:
    if tau.value is None:
        return Entry("–")
    if tau.interval is None:
        return Entry(f"{tau.value:.2f}", number=tau.value)
    low, high = tau.interval
    return Entry(f"{tau.value:.2f} [{low:.2f}, {high:.2f}]", number=tau.value, strong=low > 0 or high < 0)


def flatness_csv(tables: Sequence[Table], found: Mapping[int, Sequence[Tau]]) -> str:
    """One line per measure and target; ``found`` is by the number of the table, from 1."""
    rows: list[Sequence[object]] = []
    for number, several in found.items():
        for tau in several:
            numbers = (tau.value, *(tau.interval or (None, None)))
            rows.append([tables[number - 1].title, tau.measure, tau.target, tau.n,
                         *("" if value is None else f"{value:.6g}" for value in numbers)])
    return csv_text(["table", "measure", "target", "runs", "tau", "low", "high"], rows)


def flatness_runs_csv(tables: Sequence[Table], found: Mapping[int, Values]) -> str:
    """One line per run with a card: what of :func:`flatness_csv` can be computed again."""
    names = list(dict.fromkeys(name for values in found.values() for name in values.measures))
    wanted = list(dict.fromkeys(name for values in found.values() for name in values.targets))
    rows: list[Sequence[object]] = []
    for number, values in found.items():
        for run in values.runs:
            numbers = [values.measures.get(name, {}).get(run.path) for name in names]
            numbers += [values.targets.get(name, {}).get(run.path) for name in wanted]
            rows.append([tables[number - 1].title, *run_tables.identity(run),
                         *("" if value is None else f"{value:.8g}" for value in numbers)])
    return csv_text(["table", *run_tables.IDENTITY, *names, *wanted], rows)
