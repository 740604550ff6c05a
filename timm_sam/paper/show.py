"""What ``list`` and ``show`` print."""
import os
from collections.abc import Sequence

from ..cli.escape import markdown_code, markdown_text
from ..cli.text import csv_text, markdown, spread
from ..jobs.job import is_finished
from . import numbers
from .cost import Costs
from .exhibits import NORMS, TABLE, TEXT, Exhibit
from .plan import Plan
from .results import Found, Line

_SECONDS = 3600


def overview(plan: Plan, exhibits: Sequence[Exhibit], throughput: float) -> str:
    """The table of ``list``.

    Args:
        plan: Whose folder, recipes and seeds.
        exhibits: Which.
        throughput: FLOPs per second that are taken for granted.
    """
    costs = Costs(plan)
    rows, notes = [], []
    for exhibit in exhibits:
        notes += [f"- {exhibit.name}: not here: {reason}" for reason in exhibit.missing]
        known = {config: costs.run(config) for config in exhibit.configs}
        refused = [config.name for config, count in known.items() if count is None]
        notes += [f"- {exhibit.name}: train.py refuses {len(refused)} of its runs, such as {name}"
                  for name in refused[:1]]
        notes += [f"- {config.name}: {config.needs}" for config in known if config.needs]
        folders = [plan.folder(config, seed) for config in known for seed in range(plan.seeds)]
        jobs = [(config, plan.train(config, seed)) for config in known for seed in range(plan.seeds)]
        done = sum(map(is_finished, folders))
        evaluated = [plan.evaluate(config, evaluation, job) for config, evaluation in exhibit.evaluations
                     for trained, job in jobs if trained == config] if exhibit.kind != NORMS else []
        training = plan.seeds * sum(filter(None, known.values()))
        evaluating = plan.seeds * sum(costs.evaluation(*pair) for pair in exhibit.evaluations)
        rows.append([
            exhibit.name, markdown_text(exhibit.title), str(len(known)), str(len(folders)), str(done),
            f"{sum(os.path.isfile(job.result) for job in evaluated)} of {len(evaluated)}" if evaluated else "",
            _number(training), _hours(training, throughput), _number(evaluating), _hours(evaluating, throughput)])
    return "\n\n".join([
        markdown(["", "what", "configurations", "runs", "there", "evaluated", "FLOPs", "hours", "to evaluate, at most",
                  "hours "], rows, left=2),
        f"With {plan.seeds} seeds. FLOPs: forward and backward of every image, and of the gradient that gives eps, "
        f"counted on the networks; hours at {throughput:g} FLOP/s, which is what you say, not what was measured. "
        f"Tables share runs: what is there for one is there for all.",
        *(["\n".join(dict.fromkeys(notes))] if notes else [])])


def _number(count: float) -> str:
    return f"{count:.2e}" if count else ""


def _hours(count: float, throughput: float) -> str:
    return f"{count / throughput / _SECONDS:,.1f}" if count else ""


def table_text(exhibit: Exhibit, found: Found) -> str:
    """The numbers of an exhibit beside the paper's, in Markdown."""
    parts = [f"## {exhibit.name}: {markdown_text(exhibit.title)}"]
    if exhibit.kind == TEXT:
        rows = [[*labels, number.shown] for labels, number in numbers.read(exhibit.name).cells.items()]
        return "\n\n".join([*parts, *([markdown([*found.header, "paper"], rows)] if rows else []), *_missing(exhibit)])
    if exhibit.kind == TABLE:
        rows = [[*map(_label, line.labels), *_cells(line)] for line in found.lines]
        parts.append(markdown([*found.header, "paper", "here", "n", "difference"], rows, left=len(found.header)))
        if not numbers.read(exhibit.name).cells:
            parts.append("The paper draws these and prints no numbers.")
    reasons: dict[str, int] = {}
    for line in found.lines:
        for reason in line.why:
            reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        parts.append("Without a number here: " + "; ".join(
            f"{count} {markdown_text(reason)}" for reason, count in reasons.items()) + ".")
    if found.other:
        other = ", ".join(f"{key} {' or '.join(sorted(values))}" for key, values in sorted(found.other.items()))
        parts.append(f"**Not the paper's setting**: runs here have other options than its recipes, "
                     f"{markdown_code(other)}.")
    return "\n\n".join([*parts, *_missing(exhibit)])


def _missing(exhibit: Exhibit) -> list[str]:
    return [f"Not here: {markdown_text(reason)}." for reason in exhibit.missing]


def _label(text: str) -> str:
    return markdown_text(text) if text else "–"


def _cells(line: Line) -> list[str]:
    printed = line.paper.shown if line.paper is not None else ""
    if line.mean is None:
        return [printed, "–", "0", ""]
    digits = line.paper.digits if line.paper is not None and line.paper.mean else 2
    difference = "" if line.difference is None else f"{line.difference:+.{digits}f}"
    return [printed, spread(line.mean, line.std, digits), str(len(line.values)), difference]


def table_csv(exhibit: Exhibit, found: Found) -> str:
    """The same as CSV, one line per number."""
    rows = []
    for line in found.lines:
        paper = line.paper
        rows.append([*line.labels, paper.mean if paper else "", paper.std if paper else "",
                     "" if line.mean is None else f"{line.mean:.6g}", "" if line.std is None else f"{line.std:.6g}",
                     len(line.values), "" if line.difference is None else f"{line.difference:.6g}",
                     paper.note if paper else ""])
    return csv_text([*found.header, "paper_mean", "paper_std", "mean", "std", "n", "difference", "note"], rows)


