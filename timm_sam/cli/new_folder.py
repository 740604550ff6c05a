"""A folder that is there as a whole, or not at all."""
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import OptionError


def check_new(folder: str) -> None:
    """Looks whether a folder can be made: it must not exist, or hold nothing.

    Raises:
        OptionError: It does.
    """
    if os.path.isdir(folder) and os.listdir(folder) or os.path.lexists(folder) and not os.path.isdir(folder):
        raise OptionError(f"{folder} is in use: remove it, or name another folder")


@contextmanager
def written_aside(folder: str, prefix: str) -> Iterator[str]:
    """A folder to write into, which takes the place of ``folder`` in the end, in one piece.

    What is interrupted leaves nothing that looks like a data set.

    Args:
        folder: As of :func:`check_new`.
        prefix: Of the name of the folder meanwhile, beside it.

    Raises:
        OptionError: It cannot be written.
    """
    parent = os.path.dirname(os.path.abspath(folder))
    temporary = None
    try:
        os.makedirs(parent, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=parent, prefix=prefix)
        yield temporary
        os.chmod(temporary, 0o755)
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.replace(temporary, folder)
    except OSError as e:
        raise OptionError(f"{folder} cannot be written ({e.strerror or e}): make room, or name another folder") from e
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
