"""The folder that a run writes: whose it is, what is gone on with there, and what it begins with."""
import argparse
import filecmp
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from ..cli.device import Process
from ..cli.errors import OptionError, one_line
from ..cli.parser import dump_args, read_yaml
from ..runs import files, timing
from ..runs.checkpoints import NotWhole, Unreadable, check_records, newest_checkpoint, read
from ..runs.lock import Lock, Locked
from ..runs.sameness import changed_options
from ..runs.summary import number_of_rows, trim
from .saver import Saver

_logger = logging.getLogger(__name__)


def check_output(args: argparse.Namespace) -> None:
    """Refuses to write a new run over another one.

    Raises:
        OptionError: The experiment's folder has results that the run would not continue.
    """
    folder = _folder(args)
    if not args.experiment or not os.path.isdir(folder) or _inside(args.resume, folder):
        return
    with writing(folder):
        names = os.listdir(folder)
    for name in (files.ARGS, files.SUMMARY, timing.FILE):
        path = os.path.join(folder, name)
        if name in names and not os.path.isfile(path):
            raise OptionError(f"--experiment {args.experiment}: {path} is no regular file; remove it, or choose "
                              f"another name")
    if args.resume == "auto":
        # more epochs are a reason to go on; anything else is another run under the name of this one
        before = _options(folder)
        more = ("stop_epoch", "epochs") if _has_more_epochs(before, args.epochs) else ("stop_epoch",)
        changed = [name for name in _changed(before, dump_args(args)) if name not in more]
        checkpoints = any(name.endswith(files.ENDING) for name in names)
        with writing(folder):
            results = number_of_rows(os.path.join(folder, files.SUMMARY))
        if results > 1 and not checkpoints:  # one may be there a moment before the first checkpoint
            raise OptionError(
                f"--resume auto: {folder} has the results of a run ({files.SUMMARY}, {results} epochs), which would be "
                f"lost, but no checkpoint to go on with; choose another --experiment, or move the folder away")
        if changed and checkpoints:
            flag = "--" + changed[0].replace("_", "-")
            raise OptionError(
                f"--resume auto: the run in {folder} had another {flag} than {getattr(args, changed[0])}; choose "
                f"another --experiment, or go on with other options by --resume {os.path.join(folder, files.LAST)}")
        return
    if any(name == files.SUMMARY or name.endswith(files.ENDING) for name in names):
        raise OptionError(
            f"--experiment {args.experiment}: {folder} holds another run; choose another name, or go on with "
            f"--resume {os.path.join(folder, files.LAST)}")


@contextmanager
def writing(folder: str) -> Iterator[None]:
    """Around what reads or writes small files of the folder: a full disk, or one that turns read-only, is one line."""
    try:
        yield
    except OSError as e:
        raise OptionError(f"--output: {folder} cannot be read and written ({e.strerror or one_line(e)}); what is there "
                          f"is kept: go on with --resume auto when there is room and leave to write") from e


class Output:
    """The run's folder, locked from before anything there is read to the end of the run.

    As a context manager it lets go of the folder at the end.

    Args:
        args: All options.
        process: This one; only the first rank touches the folder.

    Raises:
        OptionError: Another process is in it, or it cannot be written.
    """

    def __init__(self, args: argparse.Namespace, process: Process) -> None:
        self._args = args
        self._process = process
        self._lock: Lock | None = None
        if process.primary and args.experiment and os.path.isdir(_folder(args)):
            self._take(_folder(args))

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def _take(self, folder: str) -> None:
        try:
            self._lock = Lock(folder)
            tempfile.TemporaryFile(dir=folder).close()
        except Locked as e:
            raise OptionError(f"--experiment {self._args.experiment}: {folder} is being written by {e}; wait for its "
                              f"end, or choose another name") from e
        except OSError as e:
            raise self._not_writable(folder, e) from e

    def _not_writable(self, folder: str, error: OSError) -> OptionError:
        return OptionError(f"--output {self._args.output or './output/train'}: {folder} cannot be written "
                           f"({error.strerror}); choose another folder")

    def resolve_resume(self) -> str:
        """The checkpoint to go on with, which is whole; every rank has to call it.

        ``--resume auto`` is the newest whole one of the experiment's folder, or none. One that was written, but has not
        got its name yet, gets it now.

        Raises:
            OptionError: ``auto`` without ``--experiment``, hence no folder that would be the same after a restart; or
                a file that cannot be read, or is damaged.
        """
        if self._args.resume == "auto" and not self._args.experiment:
            raise OptionError("--resume auto needs --experiment NAME: the folder whose newest checkpoint is resumed")
        path, mistake = "", ""
        if self._process.primary:
            try:
                path = self._resolved()
            except OptionError as e:
                mistake = str(e)
        path, mistake = self._process.from_primary((path, mistake))
        if mistake:
            raise OptionError(mistake)
        return path

    def _resolved(self) -> str:
        path = self._args.resume
        if path != "auto":
            try:
                if os.path.isfile(path) and not check_records(path):
                    _logger.warning(f"--resume {path} has no checksums: whether it is damaged cannot be told.")
            except NotWhole as e:
                raise OptionError(f"--resume {path} is not whole: {e}; give another checkpoint, or --resume auto for "
                                  f"the newest whole one") from e
            except (OSError, MemoryError) as e:
                raise OptionError(f"--resume {path} cannot be read ({one_line(e)}); see to it, or give another "
                                  f"checkpoint") from e
            return path
        try:
            path = newest_checkpoint(_folder(self._args)) or ""
        except Unreadable as e:
            raise OptionError(f"--resume auto: {e}; nothing is started anew over it: see to the file, or give another "
                              f"checkpoint or --experiment") from e
        _logger.info(f"--resume auto: {path or 'no checkpoint yet, starting anew'}")
        return self._adopted(path)

    def _adopted(self, path: str) -> str:
        """Ends what a killed process had begun: a checkpoint that is whole gets its name."""
        if not path or not files.is_being_written(path):
            return path
        name = files.LAST
        if os.path.basename(path) != files.TMP:
            place = read(path)["position"]
            name = files.RECOVERY.format(place["epoch"], place["batch"] - 1)
        named = os.path.join(os.path.dirname(path), name)
        with writing(os.path.dirname(path)):
            files.rename(path, named)
        _logger.info(f"{path} was written, but did not get its name: it is {named} now.")
        return named

    def create(self, name: str, resume: str, start_epoch: int, saver: Callable[[str], Saver],
               args_text: str) -> tuple[str, Saver]:
        """Makes the run's folder with ``args.yaml``, and the saver in it; of the first rank only.

        Args:
            name: The folder's name if ``--experiment`` gives none; with a number, if that is taken.
            resume: The checkpoint that is resumed, or empty.
            start_epoch: Rows of an earlier ``summary.csv`` from this epoch on are dropped.
            saver: Makes the saver of a folder.
            args_text: The options as they were given (:func:`dump_args`).

        Raises:
            OptionError: The folder cannot be written, or another process is in it.

        Returns:
            The folder's path and the saver.
        """
        args = self._args
        folder = _folder(args, name)
        try:
            if args.experiment:
                os.makedirs(folder, exist_ok=True)
            else:
                folder = _new_folder(folder)
        except OSError as e:
            raise self._not_writable(folder, e) from e
        if self._lock is None:
            self._take(folder)
            check_output(args)  # another process may have made the folder, and left it, meanwhile
        made = saver(folder)
        if _inside(resume, folder):
            made.go_on(resume)
        with writing(folder):
            if _inside(resume, folder) or args.resume == "auto":
                trim(os.path.join(folder, files.SUMMARY), start_epoch)
            path = os.path.join(folder, files.ARGS)
            # a run that was stopped, and goes on to its end, is the one that was not
            changed = [name for name in _changed(_options(folder), args_text) if name != "stop_epoch"]
            if changed:
                before = _free_name(folder, start_epoch)
                _logger.warning(f"Going on with other options than before: {', '.join(changed)}. The earlier ones are "
                                f"kept in {before}.")
                if not os.path.exists(os.path.join(folder, before)):
                    files.duplicate(path, os.path.join(folder, before))
            with files.replacing(path) as f:
                f.write(args_text)
        return folder, made


def _new_folder(folder: str) -> str:
    for number in range(1000):
        path = f"{folder}-{number}" if number else folder
        try:
            os.makedirs(path)
            return path
        except FileExistsError:  # started in the same second
            continue
    raise FileExistsError(17, "a thousand of that name are there", folder)


def _options(folder: str) -> dict[str, Any]:
    """The options of the run in a folder; empty if they are unknown."""
    try:
        before = read_yaml(os.path.join(folder, files.ARGS))
    except (FileNotFoundError, ValueError):
        return {}
    except OSError as e:
        raise OptionError(f"--experiment: {os.path.join(folder, files.ARGS)} cannot be read ({e.strerror}), so nobody "
                          f"knows which run is there; see to the file, or choose another name") from e
    return before if isinstance(before, dict) else {}


def _changed(before: dict[str, Any], args_text: str) -> list[str]:
    """The options that make this run another one than that of :func:`_options`; none if that one's are unknown."""
    return changed_options(before, yaml.safe_load(args_text)) if before else []


def _has_more_epochs(before: dict[str, Any], epochs: int) -> bool:
    had = before.get("epochs")
    return isinstance(had, (int, float)) and epochs > had


def _free_name(folder: str, epoch: int) -> str:
    """Under which the options up to an epoch are kept: earlier ones that were kept there stay.

    A run may go on from the same epoch several times, each time with other options.
    """
    path, name, number = os.path.join(folder, files.ARGS), files.ARGS_BEFORE.format(epoch), 1
    while os.path.exists(kept := os.path.join(folder, name)) and not filecmp.cmp(path, kept, shallow=False):
        number += 1
        name = files.ARGS_BEFORE.format(f"{epoch}-{number}")
    return name


def _folder(args: argparse.Namespace, name: str = "") -> str:
    return os.path.join(args.output or os.path.join(".", "output", "train"), args.experiment or name)


def _inside(path: str, folder: str) -> bool:
    return bool(path) and os.path.realpath(os.path.dirname(path)) == os.path.realpath(folder)
