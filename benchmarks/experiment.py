"""What the scripts of experiments without a grid of runs share: a table as CSV and Markdown, and a figure."""
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from timm_sam.cli.errors import OptionError
from timm_sam.cli.text import csv_text, markdown, say, write_text

COLORS = {"gd": "#555555", "plain": "#555555", "sam": "#0072B2", "usam": "#D55E00"}
LINES = {"gd": ":", "plain": ":", "sam": "-", "usam": "--"}


def folder(out: str) -> str:
    """Makes the folder of ``--out``.

    Raises:
        OptionError: It cannot be made.
    """
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as e:
        raise OptionError(f"--out {out} cannot be written ({e.strerror}): name another folder") from e
    return out


def number(value: float | None) -> str:
    """Three digits, as tables show them; empty for None."""
    return "" if value is None else f"{value:.3g}"


def publish(out: str, name: str, header: Sequence[str], rows: Sequence[Sequence[object]], caption: str,
            table: tuple[Sequence[str], Sequence[Sequence[str]]], draw: Callable[[Any], None],
            size: tuple[float, float]) -> None:
    """Writes ``NAME.csv`` and ``NAME.png``, and prints the caption with a table.

    Args:
        out: The folder.
        name: Of the experiment.
        header, rows: Of the CSV file: everything that was measured.
        caption: Of figure and table: what was done, and after whom.
        table: Header and rows of what is printed.
        draw: Draws into the figure that it is given; not called without matplotlib (extra ``report``).
        size: Of the figure in inches.

    Raises:
        OptionError: A file cannot be written.
    """
    folder(out)
    write_text(os.path.join(out, f"{name}.csv"), csv_text(header, rows), "--out")
    say(f"{caption}\n\n{markdown(*table)}\n")
    picture = os.path.join(out, f"{name}.png")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        say(f"{picture} is left out: figures need matplotlib (extra report)")
        return
    from timm_sam.cli.figures import SETTINGS, label

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(label(caption), fontsize=8, wrap=True)
        draw(figure)
        try:
            figure.savefig(picture, dpi=130)
        except OSError as e:
            raise OptionError(f"--out: {picture} cannot be written ({e.strerror}); make room, or name another folder"
                              ) from None


class Clock:
    """Says how long something took."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def __str__(self) -> str:
        return f"{time.monotonic() - self.began:.0f} s"
