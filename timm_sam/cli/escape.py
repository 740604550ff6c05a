"""Names of folders, files and options in what commands write: one escaping function per format.

Such names come from wherever data sets, checkpoints and runs come from. In a log they must not move the cursor or end
the line, in Markdown not become a table, a link or HTML, in a spreadsheet not be computed.
"""
import copy
import logging
import re

from timm import utils

# C0 and C1 controls, what turns the direction of text or is invisible, line separators, lone surrogates
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_FORMULA = ("=", "+", "-", "@")  # what spreadsheets take for the start of one


def printable(text: str) -> str:
    """One line for a terminal: characters that would act on it, rather than show, become ``\\x1b`` and the like."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, in a heading, a paragraph or a cell of a table."""
    return re.sub(r"^(\s*)([#+-])", r"\1\\\2", markdown_inline(text))


def markdown_inline(text: str) -> str:
    """The same where no line begins with it, as in a table of which numbers with signs are cells."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\\`*~\[\]$]", r"\\\g<0>", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word it is no emphasis
    return text.replace("|", "&#124;")


def markdown_code(text: str) -> str:
    """The same as code: between more backticks than it has in a row."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def csv_cell(value: object) -> object:
    """A cell of a CSV file; a spreadsheet does not compute what is no number."""
    if not isinstance(value, str):
        return value
    value = "\n".join(map(printable, value.split("\n")))
    return f"'{value}" if value.startswith(_FORMULA) and not _is_number(value) else value


def csv_plain(text: str) -> str:
    """A cell as it was before :func:`csv_cell`, but for what was not printable."""
    return text[1:] if text[:1] == "'" and text[1:].startswith(_FORMULA) else text


def markdown_plain(text: str) -> str:
    """What :func:`markdown_text` shows, but for what was not printable."""
    text = re.sub(r"\\([\\`*~\[\]$_#+-])", r"\1", text)
    for shown, plain in (("&#124;", "|"), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(shown, plain)
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class PrintableFormatter(logging.Formatter):
    """Another formatter's lines, with the message in one line and without control characters.

    Args:
        inner: The other formatter. What it adds, such as a traceback, stays as it is.
    """

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self.inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if (shown := printable(message)) != message:
            record = copy.copy(record)
            record.msg, record.args = shown, None
        return self.inner.format(record)


def setup_logging() -> None:
    """timm's way to log to the terminal, with messages made printable."""
    before = logging.getLogger().handlers[:]
    utils.setup_default_logging()
    for handler in logging.getLogger().handlers:
        if handler not in before:
            handler.setFormatter(PrintableFormatter(handler.formatter))
