"""Where the figures of an epoch go beside ``summary.csv``: Weights & Biases, TensorBoard, trackio; off at first."""
import argparse
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from ..cli.errors import OptionError, one_line
from .output import writing
from .resolved import Resolved

_logger = logging.getLogger(__name__)

Row = Mapping[str, Any]  # {name: number}; 'epoch' is its number


def add_logger_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the loggers that timm's script does not have."""
    add = parser.add_argument_group("Loggers").add_argument
    add("--log-tensorboard", action="store_true",
        help="write the figures of each epoch for TensorBoard into the run's folder; needs the tensorboard package")
    add("--log-trackio", action="store_true",
        help="log the figures of each epoch to trackio, under the name of the run's folder; needs the trackio package")
    add("--trackio-project", metavar="NAME", default="timm_sam", help="trackio project to log to")


class _Open(NamedTuple):
    """A logger at work: what takes a row, and what ends it."""

    log: Callable[[Row], None]
    close: Callable[[], None]


class _Kind(NamedTuple):
    """A logger that can be asked for: the module that is imported, what to install for it, and what starts it."""

    module: str
    package: str
    start: Callable[[ModuleType, argparse.Namespace, Resolved, str, int], _Open]


class Loggers:
    """Those that the options ask for; of the first rank only.

    Args:
        args: All options.
        resolved: What came of them.
        folder: The run's; its name is the name of the run.
        start_epoch: The first epoch that is trained; a run that is gone on with goes on in the loggers too.

    Raises:
        OptionError: A name is refused, or nothing can be written.
    """

    def __init__(self, args: argparse.Namespace, resolved: Resolved, folder: str, start_epoch: int) -> None:
        self._open: list[_Open] = []
        for name, kind in _KINDS.items():
            if not getattr(args, f"log_{name}"):
                continue
            try:
                module = importlib.import_module(kind.module)
            except ImportError:
                _logger.warning(f"--log-{name}: {kind.package} is not installed, nothing is logged there; pip install "
                                f"{kind.package}")
                continue
            self._open.append(kind.start(module, args, resolved, folder, start_epoch))

    def log(self, row: Row) -> None:
        """Hands on the figures of an epoch."""
        for logger in self._open:
            logger.log(row)

    def close(self) -> None:
        """Writes what is left to write."""
        for logger in self._open:
            logger.close()


def row_of(epoch: int, train: Mapping[str, Any], evaluated: Mapping[str, Any] | None, lr: float) -> dict[str, Any]:
    """The figures of an epoch, by the names that they have in ``summary.csv``."""
    return {"epoch": epoch, **{f"train_{name}": value for name, value in train.items()},
            **{f"eval_{name}": value for name, value in (evaluated or {}).items()}, "lr": lr}


def _wandb(wandb: ModuleType, args: argparse.Namespace, resolved: Resolved, folder: str, start_epoch: int) -> _Open:
    wandb.init(project=args.wandb_project, name=os.path.basename(folder), config=vars(resolved.namespace(args)),
               tags=args.wandb_tags, resume="must" if args.wandb_resume_id else None, id=args.wandb_resume_id or None)
    return _Open(wandb.log, lambda: None)  # it ends with the process, and knows then whether that failed


def _tensorboard(tensorboard: ModuleType, args: argparse.Namespace, resolved: Resolved, folder: str,
                 start_epoch: int) -> _Open:
    with writing(folder):
        # earlier figures from this epoch on are hidden: they are of updates that are made once more
        writer = tensorboard.SummaryWriter(log_dir=folder, purge_step=start_epoch)

    def log(row: Row) -> None:
        with writing(folder):
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, row["epoch"])
            writer.flush()

    return _Open(log, writer.close)


def _trackio(trackio: ModuleType, args: argparse.Namespace, resolved: Resolved, folder: str,
             start_epoch: int) -> _Open:
    def to_stderr(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # it prints; stdout is for the results
            call(*arguments, **options)

    try:
        to_stderr(trackio.init, project=args.trackio_project, name=os.path.basename(folder),
                  config=vars(resolved.namespace(args)), resume="allow" if resolved.resume else "never")
    except (OSError, ValueError) as e:
        raise OptionError(f"--log-trackio: project {args.trackio_project!r} cannot be logged to ({one_line(e)}); see "
                          f"to it, choose another --trackio-project, or leave it out") from e
    return _Open(lambda row: to_stderr(trackio.log, {name: value for name, value in row.items() if name != "epoch"},
                                       step=row["epoch"]), lambda: to_stderr(trackio.finish))


_KINDS = {
    "wandb": _Kind("wandb", "wandb", _wandb),
    "tensorboard": _Kind("torch.utils.tensorboard", "tensorboard", _tensorboard),
    "trackio": _Kind("trackio", "trackio", _trackio),
}
