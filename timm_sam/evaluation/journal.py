"""What an evaluation has finished so far, on disk, so that it can be gone on with."""
import glob
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from ..cli.errors import OptionError
from .ranks import Ranks

_logger = logging.getLogger(__name__)


def key_of(**protocol: Any) -> str:
    """A short name for everything that a result depends on: equal keys mean equal results."""
    text = json.dumps(protocol, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Journal:
    """Finished parts of an evaluation: one line of JSON each, in one file per rank beside the results.

    Args:
        path: Of the results, without extension; the files are ``<path>.journal.<rank>.jsonl``. Empty: nothing is kept.
        rank: Of this process.
        origin: The flag that the path is from, which errors name.
        going_on: The flag that asks for going on, likewise.
    """

    def __init__(self, path: str, rank: int, origin: str = "--results-file",
                 going_on: str = "--skip-existing") -> None:
        self._rank = rank
        self.path, self.origin, self.going_on = path, origin, going_on
        self.done: dict[str, Any] = {}
        self._file = f"{path}.journal.{rank}.jsonl" if path else ""

    def files(self) -> list[str]:
        """The journal's files, of all ranks of all attempts."""
        return sorted(glob.glob(f"{glob.escape(self.path)}.journal.*.jsonl")) if self.path else []

    def begin(self, ranks: Ranks, keep: bool) -> None:
        """Takes over what is done, or forgets it, on all ranks together.

        Args:
            ranks: Who shares the work: all of them call this.
            keep: Whether to go on with what is done.

        Raises:
            OptionError: A file cannot be read, or removed.
        """
        ranks.gather(None)  # no rank removes or writes before all have looked
        if ranks.primary:
            if keep:
                self.load()
            else:
                self.remove()
        self.done = ranks.gather(self.done)[0]
        if self.done and ranks.primary:
            _logger.info(f"{len(self.done)} finished parts of an earlier evaluation are at hand")

    def load(self) -> None:
        """Reads what is finished. A line that was being written when a process was killed is left out.

        Raises:
            OptionError: A file cannot be read.
        """
        for file in self.files():
            try:
                with open(file, encoding="utf-8") as f:
                    lines = f.read().split("\n")
            except (OSError, UnicodeDecodeError) as e:
                raise OptionError(
                    f"{self.going_on}: {file} cannot be read ({e}); remove it, or use --overwrite") from None
            for line in lines[:-1]:  # what follows the last line break is a torn line, or nothing
                try:
                    entry = json.loads(line)
                    self.done[entry["key"]] = entry["value"]
                except (ValueError, KeyError, TypeError):
                    continue

    def remove(self) -> None:
        """Forgets everything.

        Raises:
            OptionError: A file cannot be removed.
        """
        for file in self.files():
            try:
                os.remove(file)
            except OSError as e:
                raise OptionError(
                    f"{self.origin}: {file} cannot be removed ({e.strerror}); name another file") from None

    def note(self, key: str, value: Mapping[str, Any]) -> None:
        """Notes what all ranks have found out together; the first of them writes it.

        Raises:
            OptionError: As :meth:`add`.
        """
        if self._rank == 0:
            self.add(key, value)
        self.done[key] = value

    def add(self, key: str, value: Mapping[str, Any]) -> None:
        """Notes a finished part; it is on disk when this returns.

        Raises:
            OptionError: The file cannot be written.
        """
        self.done[key] = value
        if not self._file:
            return
        try:
            torn = (os.path.exists(self._file) and os.path.getsize(self._file) > 0
                    and not _ends_with_line_break(self._file))
            with open(self._file, "a", encoding="utf-8") as f:
                f.write(("\n" if torn else "") + json.dumps({"key": key, "value": value}) + "\n")
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise OptionError(f"{self.origin}: {self._file} cannot be written ({e.strerror}); make room, or name "
                              f"another file") from None


def _ends_with_line_break(path: str) -> bool:
    with open(path, "rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read(1) == b"\n"
