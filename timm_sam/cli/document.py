"""What a command has to say: sections of text, tables and figures. Markdown is written here, HTML in ``page``.

All texts are plain and may hold names from files: whoever writes a format escapes them.
"""
from collections.abc import Sequence
from dataclasses import dataclass

from .escape import markdown_code, markdown_inline, markdown_text
from .text import markdown


@dataclass(frozen=True)
class Link:
    """A way to another place of the same page; Markdown leaves it out.

    Attributes:
        anchor: Of the place: of an :class:`Entry`, or of a row by its first entry.
        label: A word or a number for it.
    """

    anchor: str
    label: str


@dataclass(frozen=True)
class Entry:
    """A cell of a table.

    Attributes:
        text: What it says.
        note: What follows, never emphasized.
        strong: Bold.
        underlined: Underlined.
        code: Set as code, such as paths.
        number: By what its column is sorted in HTML; None: by the text.
        links: Places that belong to it. The text leads to the first.
        spelled: Whether every link stands in the cell by its label, after the text.
        anchor: Under which others lead here; letters, digits and hyphens.
    """

    text: str
    note: str = ""
    strong: bool = False
    underlined: bool = False
    code: bool = False
    number: float | None = None
    links: Sequence[Link] = ()
    spelled: bool = False
    anchor: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of the same length as the header; others raise a ``ValueError``.

    Attributes:
        header: Of the columns.
        rows: Plain texts, or entries.
        left: How many columns are labels, aligned to the left, with numbers to the right of them; None: it is not said.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Entry | str]]
    left: int | None = None

    def __post_init__(self) -> None:
        if wrong := [len(row) for row in self.rows if len(row) != len(self.header)]:
            raise ValueError(f"a row of {wrong[0]} cells below a header of {len(self.header)}")


@dataclass(frozen=True)
class Figure:
    """A picture beside the document.

    Attributes:
        name: Of its file: PNG or SVG.
        text: What it shows, for those who do not see it.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Points:
    """A list of short texts."""

    texts: Sequence[str]


Block = str | Table | Figure | Points


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """A title, what stands before the first section, and the sections."""

    title: str
    blocks: Sequence[Block]
    sections: Sequence[Section]


def as_entry(cell: Entry | str) -> Entry:
    return cell if isinstance(cell, Entry) else Entry(cell)


def as_markdown(document: Document) -> str:
    """The document in Markdown, with the last line ended; links between its places are left out."""
    parts = [f"# {markdown_text(document.title)}", *map(_block, document.blocks)]
    for section in document.sections:
        parts += [f"## {markdown_text(section.title)}", *map(_block, section.blocks)]
    return "\n\n".join(parts) + "\n"


def table_markdown(table: Table) -> str:
    """One table, without the last line's end."""
    return markdown([markdown_inline(name) for name in table.header],
                    [[_cell(as_entry(cell)) for cell in row] for row in table.rows], table.left)


def _block(block: Block) -> str:
    if isinstance(block, str):
        return markdown_text(block)
    if isinstance(block, Table):
        return table_markdown(block)
    if isinstance(block, Figure):
        return f"![{markdown_text(block.text)}]({block.name})"
    return "\n".join(f"- {markdown_text(text)}" for text in block.texts)


def _cell(entry: Entry) -> str:
    text = markdown_code(entry.text) if entry.code else markdown_inline(entry.text)
    if entry.strong:
        text = f"**{text}**"
    if entry.underlined:
        text = f"<u>{text}</u>"
    return text + markdown_inline(entry.note)
