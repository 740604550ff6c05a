"""From an exhibit to jobs: which folders of runs, which command lines, and whether the data can be what they need."""
import argparse
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..cli.errors import OptionError
from ..cli.image_folders import split_root
from ..cli.parser import OptionParser, program
from ..evaluation.sets.folders import find_suites
from ..jobs.job import Job
from ..runs import files
from ..training.checks import check_surroundings
from ..training.options import build_train_parser, read_args
from .exhibits import NORMS, Config, Data, Evaluation, Exhibit

RUNS = "runs"


@dataclass(frozen=True)
class Plan:
    """What the jobs of all exhibits have in common.

    Attributes:
        out: Folder of the runs.
        hparams: Folder of the recipes.
        data_dir: Folder of the data set, or of several by their names; empty: none is looked at.
        seeds: How many.
        flags: Of train.py, over the recipes.
        eval_root: Folder of the published evaluation sets.
    """

    out: str
    hparams: str
    data_dir: str = ""
    seeds: int = 3
    flags: tuple[str, ...] = ()
    eval_root: str = ""

    def folder(self, config: Config, seed: int) -> str:
        """Of a run."""
        return os.path.join(self.out, RUNS, config.name, f"seed{seed}")

    def recipe(self, config: Config) -> tuple[str, ...]:
        """The flags of a run as the paper had it."""
        return ("-c", os.path.join(self.hparams, f"{config.recipe}.yaml"), *config.flags)

    def data(self, data: Data) -> str:
        """The folder of a data set."""
        below = os.path.join(self.data_dir, data.folder)
        return below if os.path.isdir(below) else self.data_dir

    def train(self, config: Config, seed: int) -> Job:
        """The training of a run."""
        name = f"{config.name}/seed{seed}"
        device = config.device if self._given.batch_size is None else ()
        argv = (*self.recipe(config), *device, "--data-dir", self.data(config.data), "--checkpoint-hist", "1",
                *self.flags, "--seed", str(seed), "--output", os.path.join(self.out, RUNS), "--experiment", name,
                "--resume", "auto")
        return Job(name, config.name, self.folder(config, seed), argv, keep=True)

    def evaluate(self, config: Config, evaluation: Evaluation, train: Job) -> Job:
        """What is measured of a run; on its validation images, or on its training images for sharpness."""
        checkpoint = os.path.join(train.folder, files.LAST)
        result = os.path.join(train.folder, f"{evaluation.name}.json")
        data = self.data(config.data)
        sets: dict[str, str] = {}
        if evaluation.command == "validate":
            sets = self._sets(evaluation) if evaluation.sets else {
                config.data.folder: split_root(data, "validation", "--data-dir")}
            where = ["--eval", *(f"{name}={folder}" for name, folder in sets.items())] if sets else []
            more = [*where, "--results-file", result, "--skip-existing"]
        else:
            # its files are called by the name of the analysis
            out = os.path.join(train.folder, evaluation.name)
            result = os.path.join(out, f"{evaluation.words[0]}.json")
            more = ["--data-dir", data, "--out", out, "--skip-existing"]
        argv = (*evaluation.words, "--checkpoint", checkpoint, *more, *evaluation.flags, *self.passed_on())
        return Job(f"{train.name} {evaluation.name}", (config.name, evaluation.name), train.folder, argv,
                   evaluation.command, True, result, train, tuple(sets) if evaluation.sets else ())

    def _sets(self, evaluation: Evaluation) -> dict[str, str]:
        """The evaluation's published sets that are there, and their folders: others may be, and take days."""
        return {name: self.published[name] for name in evaluation.sets if name in self.published}

    @functools.cached_property
    def published(self) -> dict[str, str]:
        """The published evaluation sets below ``eval_root``, and their folders; looked for once, not for every run."""
        return find_suites(self.eval_root)[0] if self.eval_root else {}

    def passed_on(self) -> list[str]:
        """Of the flags of train.py those of execution that evaluations have, too."""
        return [word for flag, value in (("--device", self._given.device), ("--workers", self._given.workers))
                if value is not None for word in (flag, value)]

    @functools.cached_property
    def _given(self) -> argparse.Namespace:
        """What ``flags`` say of execution, however it is written; None: nothing."""
        parser = OptionParser(prog=f"{program('timm_sam.paper')} run", add_help=False)
        for names in (("--device",), ("-j", "--workers"), ("-b", "--batch-size")):
            parser.add_argument(*names)
        return parser.parse_known_args(self.flags)[0]

    def jobs(self, exhibit: Exhibit, only: Sequence[str] = ()) -> list[Job]:
        """All of an exhibit; seed by seed, so that the whole of it is there early, though with fewer seeds."""
        made: list[Job] = []
        wanted = [config for config in exhibit.configs if not only or config.variant in only]
        for seed in range(self.seeds):
            trainings = {config: self.train(config, seed) for config in wanted}
            made += trainings.values()
            if exhibit.kind != NORMS:  # which reads all checkpoints at once, when they are there
                made += [self.evaluate(config, evaluation, trainings[config])
                         for config, evaluation in exhibit.evaluations if config in trainings]
        return made


def check(plan: Plan, exhibits: Sequence[Exhibit], only: Sequence[str], prog: str) -> None:
    """Parses every run as train.py would, and looks at the data, before anything is started or written.

    Raises:
        OptionError: A table has no such variant; a recipe, a data folder or the evaluation sets are not there, or are
            those of another data set; a run needs a flag.
        SystemExit: With code 2, after one line that names the run, for what train.py would refuse.
    """
    check_recipes(plan.hparams)
    for exhibit in exhibits:
        known = exhibit.variants
        for variant in only:
            if variant not in known:
                raise OptionError(f"--only {variant}: {exhibit.name} has {', '.join(known) or 'nothing to run'}")
        sets = {name for _, evaluation in exhibit.evaluations for name in evaluation.sets}
        if sets and not os.path.isdir(plan.eval_root):
            raise OptionError(f"--eval-root {plan.eval_root or 'is missing'}: {exhibit.name} needs the folder of the "
                              f"published evaluation sets, see docs/evaluation.md")
        if "imagenet" in sets and "imagenet" not in plan.published:
            raise OptionError(f"--eval-root {plan.eval_root}: {exhibit.name} needs ImageNet's validation images in it, "
                              f"as imagenet/val: it is they that are attacked")
    configs = dict.fromkeys(config for exhibit in exhibits for config in exhibit.configs
                            if not only or config.variant in only)
    parsed: dict[Data, tuple[OptionParser, argparse.Namespace]] = {}
    for config in configs:
        parser = build_train_parser(f"{prog}: {config.name}")
        try:
            args = read_args(parser, plan.train(config, 0).argv)
        except OptionError as e:
            parser.error(f"{e}{f' ({config.needs})' if config.needs else ''}")
        parsed.setdefault(config.data, (parser, args))
    for parser, args in parsed.values():  # what is looked at is the same in all runs of a data set
        try:
            check_surroundings(args)
            _check_data(args)
        except OptionError as e:
            parser.error(str(e))


def check_recipes(folder: str) -> None:
    """The recipes are there.

    Raises:
        OptionError: They are not.
    """
    if not os.path.isdir(folder):
        raise OptionError(f"--hparams {folder} is not a folder: give the recipes' folder, or leave it out for those "
                          f"that come with the package")


def _check_data(args: argparse.Namespace) -> None:
    """The folder has both splits, each with the classes of the recipe.

    Raises:
        OptionError: It has not.
    """
    classes = args.num_classes or 1000
    for flag, split in (("--train-split", args.train_split), ("--val-split", args.val_split)):
        root = split_root(args.data_dir, split, f"{flag} {split}")
        if not os.path.isdir(root):
            continue  # a tar file
        found = sum(entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(root))
        if root == args.data_dir or found != classes:
            where = "no such folder" if root == args.data_dir else f"{found} class folders"
            raise OptionError(f"--data-dir {args.data_dir}: {split} has {where}, and the recipe {classes} classes; "
                              f"give the folder of that data set")
