"""The paper's figures of runs: by the report, or by an analysis."""
import os

from ..cli.errors import OptionError, one_line
from ..cli.text import say
from ..jobs.job import ANALYZE, Job
from ..report.__main__ import main as write_report
from ..report.runs import FINISHED, read_run
from ..runs import files
from .exhibits import NORMS, REPORT, Exhibit
from .plan import Plan
from .results import Found


def norms_job(plan: Plan, exhibit: Exhibit) -> Job:
    """The analysis of the last checkpoints of an exhibit's finished runs; one of older checkpoints is made again.

    Raises:
        OptionError: There are none.
    """
    labels, paths = [], []
    for entry in exhibit.entries:
        for seed in range(plan.seeds) if entry.config is not None else ():
            folder = plan.folder(entry.config, seed)  # type: ignore[arg-type]
            path = os.path.join(folder, files.LAST)
            # a run that failed has left one too, of an epoch on the way, or of NaN
            if os.path.isfile(path) and read_run(folder).status == FINISHED:
                labels.append(" ".join(filter(None, entry.labels)))
                paths.append(path)
    if not paths:
        raise OptionError(f"{exhibit.name}: none of its runs has finished and left a checkpoint; see why they failed")
    folder = os.path.join(plan.out, exhibit.name)
    result = os.path.join(folder, "norms.json")
    if os.path.isfile(result) and os.path.getmtime(result) < max(map(os.path.getmtime, paths)):
        os.remove(result)
    argv = ("norms", "--checkpoint", *paths, "--labels", *labels, "--out", folder, "--overwrite", *plan.passed_on())
    return Job(exhibit.name, exhibit.name, folder, argv, ANALYZE, True, result)


def draw(plan: Plan, exhibit: Exhibit, found: Found) -> int:
    """Draws a figure of the runs that are there, and says where; of tables there is nothing to draw.

    Returns:
        The exit code: 0, or 2 where the report has said, in a line of its own, what it cannot write.

    Raises:
        OptionError: A table cannot be read, or stdout not be written.
    """
    folder = os.path.join(plan.out, exhibit.name)
    if exhibit.kind == REPORT and found.folders:
        return write_report([*found.folders, "--out", folder])
    if exhibit.kind == NORMS:
        table = os.path.join(folder, "norms.md")
        if os.path.isfile(table):
            try:
                with open(table, encoding="utf-8") as f:
                    text = f.read().strip()
            except (OSError, UnicodeDecodeError) as e:
                raise OptionError(f"{table} cannot be read: {one_line(e)}; remove it, and run {exhibit.name}") from None
            say(f"{text}\n\nFigures and tables in {folder}")
        else:
            say(f"{exhibit.name} is not made yet: {exhibit.name} wants run")
    return 0
