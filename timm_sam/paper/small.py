"""``run table1 table3 --preset small``: the rows of a table on small images with small networks, in two rounds.

Radii are chosen by what is held out of the training images, one run each. At these radii the networks are trained anew
on all training images, once per seed, and evaluated on the test images, which had no part in any choice: plain, SAM on
all parameters and on normalization layers only, and the two other variants that were best on the held-out images.
"""
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..cli.errors import OptionError
from ..cli.text import markdown, say, write_text
from ..digits import __main__ as digits
from ..fashion import __main__ as fashion
from ..jobs.job import TRAIN, VALIDATE, Job
from ..jobs.table import run_table
from ..report.__main__ import main as write_report
from ..report.runs import FINISHED, read_run
from ..runs import files
from .small_settings import DATA, RADII

MODELS = {"table1": "resnet10t", "table3": "vit_tiny"}  # BatchNorm and LayerNorm
SELECTIONS = ("all", "onlynorm")
HELD_OUT = "0.2"
OTHERS = 2  # variants beside SAM that are trained in the second round
FASHION_SIZE = 2000  # training images


@dataclass(frozen=True)
class Small:
    """What is asked for.

    Attributes:
        images: ``digits`` or ``fashion``.
        models: Of ``MODELS``.
        out: Folder of images, runs and report.
        hparams: Folder of the recipes.
        seeds: Of the second round.
        flags: Of train.py, over the recipes.
    """

    images: str
    models: tuple[str, ...]
    out: str
    hparams: str
    seeds: int = 3
    flags: tuple[str, ...] = ()

    def data(self, model: str) -> str:
        """The folder of the images of a model."""
        if self.images == "fashion":
            return os.path.join(self.out, f"fashion-{FASHION_SIZE}")
        return os.path.join(self.out, digits_folder(model))

    def export(self) -> None:
        """Writes the images, where they are not there yet."""
        for model in self.models:
            folder = self.data(model)
            if os.path.isdir(folder):
                continue
            if self.images == "fashion":
                fashion.export(folder, FASHION_SIZE)
            else:
                export_digits(folder, model)

    def job(self, part: str, model: str, variant: str | None, selection: str, rho: float | None, seed: int) -> Job:
        """A run of one of the two rounds, ``radii`` and ``final``."""
        sam = "plain" if variant is None else f"{variant}-{selection}-{rho:g}"
        name = f"{part}/{model}/{sam}-seed{seed}"
        runs = os.path.join(self.out, "runs")
        recipe = os.path.join(self.hparams, *(("fashion",) if self.images == "fashion" else ("digits", "table")),
                              f"{model}.yaml")
        more = [] if variant is None else ["--sam-variant", variant, "--sam-params", selection, "--sam-rho", f"{rho:g}"]
        held = ["--holdout", HELD_OUT] if part == "radii" else []
        argv = ("-c", recipe, "--data-dir", self.data(model), *self.flags, *held, *more, "--seed", str(seed),
                "--output", runs, "--experiment", name)
        keep = part == "final"  # its checkpoints are evaluated
        return Job(name, (part, model, selection), os.path.join(runs, name),
                   (*argv, "--resume", "auto") if keep else argv, keep=keep)

    def first(self) -> list[Job]:
        """The round in which radii are chosen; those of SAM first."""
        return [self.job("radii", model, variant, selection, rho, 0) for model in self.models
                for (variant, selection), radii in RADII[model].items() if selection in SELECTIONS for rho in radii]

    def chosen(self) -> dict[str, dict[tuple[str, str], tuple[float, float]]]:
        """Model -> variant and selection -> the radius with the highest accuracy on held-out images, and that accuracy.

        Raises:
            OptionError: A cell has no finished run.
        """
        found: dict[str, dict[tuple[str, str], tuple[float, float]]] = {}
        for model in self.models:
            cells = found.setdefault(model, {})
            for variant, selection in RADII[model]:
                if selection not in SELECTIONS:
                    continue
                done = self.finished(model, variant, selection)
                if not done:
                    raise OptionError(f"--out {self.out}: {model}, {variant}, {selection}: every radius failed")
                rho = max(done, key=lambda rho: (done[rho], -rho))  # of equals the smaller radius
                cells[variant, selection] = (rho, done[rho])
        return found

    def finished(self, model: str, variant: str, selection: str) -> dict[float, float]:
        """Radius -> accuracy on held-out images, of those runs of the first round that came to their end."""
        runs = {rho: read_run(self.job("radii", model, variant, selection, rho, 0).folder)
                for rho in RADII[model][variant, selection]}
        return {rho: run.accuracy() for rho, run in runs.items() if run.status == FINISHED}

    def second(self, chosen: dict[str, dict[tuple[str, str], tuple[float, float]]]) -> list[Job]:
        """The round that is reported, with the evaluation of every run: seed by seed."""
        jobs = []
        for seed in range(self.seeds):
            for model in self.models:
                trainings = [self.job("final", model, None, "", None, seed)]
                trainings += [self.job("final", model, variant, selection, chosen[model][variant, selection][0], seed)
                              for variant in ("sam", *best(chosen[model])) for selection in SELECTIONS]
                jobs += [job for train in trainings for job in (train, self.evaluated(train, model))]
        return jobs

    def evaluated(self, train: Job, model: str) -> Job:
        """The predictions of a run for every test image, for paired comparisons."""
        result = os.path.join(train.folder, "evaluation.json")
        argv = ("--checkpoint", os.path.join(train.folder, files.LAST), "--eval",
                f"test={os.path.join(self.data(model), 'validation')}", "--save-outputs", "predictions", "--device",
                "cpu", "--workers", "0", "--results-file", result, "--overwrite")
        return Job(f"{train.name} evaluation", ("evaluation", model), train.folder, argv, VALIDATE, True, result, train)


def digits_folder(model: str) -> str:
    """What the folder of a model's digits is called."""
    size, noise = DATA[model]
    return f"digits-{size}-noise{100 * noise:.0f}"


def export_digits(folder: str, model: str) -> None:
    """Writes them.

    Raises:
        OptionError: The folder is in use or cannot be written, or scikit-learn is missing.
    """
    size, noise = DATA[model]
    digits.export(folder, train_size=size, label_noise=noise)


def best(cells: dict[tuple[str, str], tuple[float, float]]) -> list[str]:
    """The variants beside SAM with the highest accuracy on held-out images, by the better of their selections."""
    others = list(dict.fromkeys(variant for variant, _ in cells if variant != "sam"))
    return sorted(others, key=lambda variant: -max(cells[variant, selection][1] for selection in SELECTIONS))[:OTHERS]


def run(small: Small, devices: int, prog: str) -> int:
    """Both rounds and the report; returns 0, 1 if a run failed, 2 for a mistake, 130 for Ctrl-C."""
    def prepare() -> Sequence[Job]:
        small.export()
        return small.first()

    code = run_table(prog, prepare, small.out, devices, lambda: 0)
    if code > 1:
        return code
    return max(code, run_table(prog, lambda: small.second(small.chosen()), small.out, devices, lambda: report(small)))


def report(small: Small) -> int:
    """What was chosen, and the report of the second round.

    Runs at radii that an earlier start has chosen, when others had failed, are no part of it: the report would choose
    among them on the test images.
    """
    chosen = small.chosen()
    rows = [[model, variant, selection, f"{rho:g}", f"{accuracy:.2f}",
             f"{len(small.finished(model, variant, selection))} of {len(RADII[model][variant, selection])}"]
            for model, cells in chosen.items() for (variant, selection), (rho, accuracy) in cells.items()]
    text = "\n\n".join([
        f"Radii with the highest accuracy on {100 * float(HELD_OUT):g} % of the training images, which were held out, "
        f"one run each:",
        markdown(["model", "variant", "perturbs", "rho", "held-out accuracy in %", "radii that finished"], rows)])
    say(f"{text}\n")
    os.makedirs(os.path.join(small.out, "report"), exist_ok=True)
    write_text(os.path.join(small.out, "report", "radii.md"), f"{text}\n", "--out")
    second = small.second(chosen)
    evaluations = [job.result for job in second if job.command == VALIDATE and os.path.isfile(job.result)]
    folders = [job.folder for job in second if job.command == TRAIN]
    runs = [folder for folder in folders if os.path.isfile(os.path.join(folder, files.ARGS))]
    if not runs:
        raise OptionError(f"--out {small.out}: no run of the second round has begun; see why they failed")
    return write_report([*runs, "--out", os.path.join(small.out, "report"), "--running-minutes", "0",
                         *(["--evaluations", *evaluations] if evaluations else [])])
