"""The paper's figures of runs: by the report, or by an analysis."""
import os

from ..cli.errors import OptionError
from ..cli.text import say
from ..jobs.job import ANALYZE, Job
from ..report.__main__ import main as write_report
from ..runs import files
from .exhibits import NORMS, REPORT, Exhibit
from .plan import Plan
from .results import Found


def norms_job(plan: Plan, exhibit: Exhibit) -> Job:
    """The analysis of all checkpoints of an exhibit that are there; one of older checkpoints is made again.

    Raises:
        OptionError: There are none.
    """
    labels, paths = [], []
    for entry in exhibit.entries:
        for seed in range(plan.seeds) if entry.config is not None else ():
            path = os.path.join(plan.folder(entry.config, seed), files.LAST)  # type: ignore[arg-type]
            if os.path.isfile(path):
                labels.append(" ".join(filter(None, entry.labels)))
                paths.append(path)
    if not paths:
        raise OptionError(f"{exhibit.name}: none of its runs has left a checkpoint; see why they failed")
    folder = os.path.join(plan.out, exhibit.name)
    result = os.path.join(folder, "norms.json")
    if os.path.isfile(result) and os.path.getmtime(result) < max(map(os.path.getmtime, paths)):
        os.remove(result)
    argv = ("norms", "--checkpoint", *paths, "--labels", *labels, "--out", folder, "--overwrite", *plan.passed_on())
    return Job(exhibit.name, exhibit.name, folder, argv, ANALYZE, True, result)


def draw(plan: Plan, exhibit: Exhibit, found: Found) -> None:
    """Draws a figure of the runs that are there, and says where; of tables there is nothing to draw.

    Raises:
        OptionError: The folder cannot be written.
    """
    folder = os.path.join(plan.out, exhibit.name)
    if exhibit.kind == REPORT and found.folders:
        write_report([*found.folders, "--out", folder])
    if exhibit.kind == NORMS:
        table = os.path.join(folder, "norms.md")
        if os.path.isfile(table):
            with open(table, encoding="utf-8") as f:
                say(f"{f.read().strip()}\n\nFigures and tables in {folder}")
        else:
            say(f"{exhibit.name} is not made yet: {exhibit.name} wants run")
