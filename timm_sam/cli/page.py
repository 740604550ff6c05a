"""A document as one HTML file that needs nothing else: pictures inside, tables that sort, no network."""
import base64
import hashlib
import math
import mimetypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .document import Block, Document, Entry, Figure, Points, Table, as_entry
from .escape import printable

_LONG = 40  # characters: such a text is broken into lines, but not into very short ones
_MISSING = "–"  # of a cell without a value: last, however its column is sorted


@dataclass(frozen=True)
class _Column:
    """How one column looks: of numbers, of long texts, and whether it stays in sight when the table is moved."""

    name: str
    numeric: bool
    long: bool
    fixed: bool

    @property
    def style(self) -> str:
        kind = "number" if self.numeric else "long" if self.long else "text"
        return f"{kind} fixed" if self.fixed else kind


def as_html(document: Document, folder: str) -> str:
    """The whole file.

    Args:
        document: What it says; nothing in its texts is taken for HTML.
        folder: Where the files of its figures are.

    Raises:
        OSError: A figure cannot be read.
    """
    import jinja2  # torch brings it; here, so that no other command loads it

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["shown"] = printable
    style, script = _beside("page.css"), _beside("page.js")
    # whatever may get into the page: it can run no other script, and load nothing
    policy = (f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
              f"base-uri 'none'; form-action 'none'")
    sections = [dict(title=section.title, blocks=[_block(block, folder) for block in section.blocks])
                for section in document.sections]
    return environment.from_string(_beside("page.html")).render(
        title=document.title, blocks=[_block(block, folder) for block in document.blocks], sections=sections,
        policy=policy, style=style, script=script)


def _beside(name: str) -> str:
    with open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8") as f:
        return f.read()


def _hash(text: str) -> str:
    """As browsers compute it of what stands between two tags."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _block(block: Block, folder: str) -> dict[str, Any]:
    """What the template needs to know of a block."""
    if isinstance(block, str):
        return dict(kind="text", text=block)
    if isinstance(block, Points):
        return dict(kind="points", texts=block.texts)
    if isinstance(block, Figure):
        return dict(kind="figure", text=block.text, source=_source(os.path.join(folder, block.name)))
    rows = [[as_entry(cell) for cell in row] for row in block.rows]
    columns = _columns(block, rows)
    return dict(kind="table", columns=columns, rows=[[_cell(entry, column) for entry, column in zip(
        row, columns, strict=True)] for row in rows])


def _source(path: str) -> str:
    """A picture as an address that holds it."""
    with open(path, "rb") as f:
        content = base64.b64encode(f.read()).decode()
    return f"data:{mimetypes.guess_type(path)[0] or 'image/png'};base64,{content}"


def _columns(table: Table, rows: Sequence[Sequence[Entry]]) -> list[_Column]:
    found = []
    labels = len(table.header) if table.left is None else table.left
    for i, name in enumerate(table.header):
        numeric = i >= labels or any(row[i].number is not None for row in rows)
        long = any(len(row[i].text) > _LONG for row in rows)
        # of several labels the last one tells most
        found.append(_Column(name, numeric, long, fixed=i == max(0, (table.left or 1) - 1)))
    return found


def _cell(entry: Entry, column: _Column) -> dict[str, Any]:
    known = entry.number is not None and not math.isnan(entry.number)
    return dict(
        text=entry.text, note=entry.note.strip(), links=entry.links, spelled=entry.spelled, anchor=entry.anchor,
        style=" ".join(filter(None, [column.style, "strong" * entry.strong, "underlined" * entry.underlined,
                                     "code" * entry.code])),
        key=f"{entry.number:.17g}" if known else None, missing=entry.text in ("", _MISSING) and not entry.links)
