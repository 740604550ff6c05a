"""What a table or a figure of the paper is made of."""
import re
from dataclasses import dataclass, field

PLAIN = "plain"
ACCURACY = "accuracy"
TABLE, REPORT, NORMS, TEXT = "table", "report", "norms", "text"


@dataclass(frozen=True)
class Data:
    """A data set of the paper.

    Attributes:
        folder: What its folder is called below ``--data-dir``.
        classes: How many.
        train: Number of training images.
    """

    folder: str
    classes: int
    train: int


CIFAR10, CIFAR100 = Data("cifar10", 10, 50_000), Data("cifar100", 100, 50_000)
IMAGENET = Data("imagenet", 1000, 1_281_167)


@dataclass(frozen=True)
class Config:
    """What is trained, once per seed.

    Attributes:
        recipe: Below ``hparams``, without its ending.
        data: On which images.
        variant: For ``--only``, and the rows of tables.
        flags: Of train.py, over the recipe.
        device: Further flags, such that one device does what the recipe does on several.
        needs: What is open: a flag that has to be given, as the paper's value is not legible.
    """

    recipe: str
    data: Data
    variant: str
    flags: tuple[str, ...] = ()
    device: tuple[str, ...] = ()
    needs: str = ""

    @property
    def name(self) -> str:
        """Of its folder: tables that share a run share the folder."""
        more = "_".join(word.lstrip("-") for word in self.flags)
        return self.recipe + (f"__{re.sub(r'[^A-Za-z0-9_.=-]', '-', more)}" if more else "")


@dataclass(frozen=True)
class Evaluation:
    """What is measured of a trained network, beside the accuracy that its training prints.

    Attributes:
        name: Of the file of its results.
        command: ``validate`` or ``analyze``.
        words: Before all flags: the name of an analysis.
        flags: Of the command.
        passes: Images that pass forward and backward, at most.
        sets: Published evaluation sets that it reads, by their names; empty: it reads the run's own images.
    """

    name: str
    command: str
    words: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    passes: int = 0
    sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A number of a table.

    Attributes:
        labels: Its place, as in the file of the paper's numbers.
        config: Whose runs it is the mean of; None: nothing that is trained here.
        evaluation: Where it comes from; None: the accuracy that training prints.
        measure: Its row there: data set (empty: whichever) and measure.
    """

    labels: tuple[str, ...]
    config: Config | None
    evaluation: Evaluation | None = None
    measure: tuple[str, str] = ("", ACCURACY)


@dataclass(frozen=True)
class Exhibit:
    """A table or figure.

    Attributes:
        name: ``table1``, ``figure2``.
        title: Of it.
        entries: Its numbers, in order; of a figure that the report draws one per run.
        header: What labels are, where the paper prints no numbers.
        kind: ``table``: numbers; ``report``: what the report draws of its runs; ``norms``: distributions of the
            parameters of normalization layers; ``text``: settings, which nothing is run for.
        missing: What of it cannot be made here, and why.
    """

    name: str
    title: str
    entries: tuple[Entry, ...] = ()
    header: tuple[str, ...] = ()
    kind: str = TABLE
    missing: tuple[str, ...] = field(default=())

    @property
    def configs(self) -> list[Config]:
        """What it needs trained, each once."""
        return list(dict.fromkeys(entry.config for entry in self.entries if entry.config is not None))

    @property
    def evaluations(self) -> list[tuple[Config, Evaluation]]:
        """What it needs evaluated, each once."""
        return list(dict.fromkeys((entry.config, entry.evaluation) for entry in self.entries
                                  if entry.config is not None and entry.evaluation is not None))

    @property
    def variants(self) -> list[str]:
        """What ``--only`` takes."""
        return list(dict.fromkeys(config.variant for config in self.configs))
