"""All tables and figures, by name."""
from . import cifar, figures, imagenet
from .exhibits import Exhibit


def _place(exhibit: Exhibit) -> tuple[bool, int]:
    figure = exhibit.name.startswith("figure")
    return figure, int(exhibit.name.removeprefix("figure").removeprefix("table"))


EXHIBITS: dict[str, Exhibit] = {exhibit.name: exhibit for exhibit in sorted(
    (*cifar.TABLES, *imagenet.TABLES, *imagenet.TEXTS, *figures.FIGURES), key=_place)}
