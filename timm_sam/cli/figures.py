"""What all figures share; nothing here needs matplotlib."""
from typing import Any

from .escape import printable

MARKERS = "osD^vPX*"
# Any: in matplotlib's annotations each of its settings is a type of its own
SETTINGS: dict[Any, Any] = {
    "font.size": 10, "axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False}


def label(text: str) -> str:
    """Text that is shown as it is: between two dollar signs matplotlib reads formulas."""
    return printable(text).replace("$", r"\$")
