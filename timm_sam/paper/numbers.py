"""The numbers that the paper prints, as it prints them; what is not legible says so."""
import csv
import functools
from dataclasses import dataclass
from importlib import resources

_FOLDER = resources.files(__package__) / "numbers"
MEAN, STD, TEXT, NOTE = "mean", "std", "text", "note"
ILLEGIBLE = "not legible"


@dataclass(frozen=True)
class Number:
    """A cell of a table of the paper.

    Attributes:
        mean: As printed: ``83.11``; a text where the table has no numbers; empty where it is not legible.
        std: Likewise; empty where there is none.
        note: What is odd about it.
    """

    mean: str
    std: str = ""
    note: str = ""

    @property
    def value(self) -> float:
        return float(self.mean)

    @property
    def digits(self) -> int:
        """Decimals that are printed."""
        return len(self.mean.partition(".")[2])

    @property
    def shown(self) -> str:
        text = self.mean + (f" ± {self.std}" if self.std else "") if self.mean else ILLEGIBLE
        return f"{text} ({self.note})" if self.note else text


@dataclass(frozen=True)
class Numbers:
    """A table of the paper: what its labels are, and labels -> number."""

    header: tuple[str, ...]
    cells: dict[tuple[str, ...], Number]


@functools.cache
def read(name: str) -> Numbers:
    """The numbers of a table; none where the paper prints none."""
    file = _FOLDER / f"{name}.csv"
    if not file.is_file():
        return Numbers((), {})
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    header = tuple(key for key in rows[0] if key not in (MEAN, STD, TEXT, NOTE))
    return Numbers(header, {tuple(row[key] for key in header): Number(
        row.get(MEAN) or row.get(TEXT) or "", row.get(STD, ""), row[NOTE]) for row in rows})


def radii(variant: str, selection: str, setting: str) -> list[str]:
    """The radii that the paper tried (Table 7), from small to large."""
    return [f"{float(text):g}" for text in read("table7").cells[variant, selection, setting, "tried"].mean.split()]
