"""Where the figures of an epoch go beside ``summary.csv``: Weights & Biases, TensorBoard, trackio; off at first."""
import argparse
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
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
    """A logger at work: what takes a row, and what ends it, told whether the run failed."""

    log: Callable[[Row], None]
    close: Callable[[bool], None]


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
        self._open: dict[str, _Open] = {}
        for name, kind in _KINDS.items():
            if not getattr(args, f"log_{name}"):
                continue
            module = _imported(kind.module, f"--log-{name}")
            if module is None:
                _logger.warning(f"--log-{name}: {kind.package} is not installed, nothing is logged there; pip install "
                                f"{kind.package}")
                continue
            self._open[name] = kind.start(module, args, resolved, folder, start_epoch)

    def log(self, row: Row) -> None:
        """Hands on the figures of an epoch.

        Raises:
            OptionError: The run's folder cannot be written any more.
        """
        for name, logger in list(self._open.items()):
            self._try(name, f"nothing is logged there from epoch {row['epoch']} on", logger.log, row)

    def close(self, failed: bool) -> None:
        """Writes what is left to write, and tells how the run ended."""
        for name, logger in list(self._open.items()):
            self._try(name, "its last figures may be missing", logger.close, failed)

    def _try(self, name: str, consequence: str, call: Callable[[Any], None], argument: Any) -> None:
        """Does without a logger that fails: its process or its network is no reason to end a training."""
        try:
            call(argument)
        except OptionError:
            raise
        except Exception as e:
            _logger.warning(f"--log-{name} has failed ({type(e).__name__}: {one_line(e)}): {consequence}")
            del self._open[name]


def row_of(epoch: int, train: Mapping[str, Any], evaluated: Mapping[str, Any] | None, lr: float) -> dict[str, Any]:
    """The figures of an epoch, by the names that they have in ``summary.csv``."""
    return {"epoch": epoch, **{f"train_{name}": value for name, value in train.items()},
            **{f"eval_{name}": value for name, value in (evaluated or {}).items()}, "lr": lr}


def _imported(name: str, flag: str) -> ModuleType | None:
    """The module; None where it is not installed. ``flag`` is what asks for it."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    except Exception as e:  # of packages whose own needs are of another version than they can use
        raise OptionError(f"{flag}: {name} is installed, but cannot be imported ({one_line(e)}); mend the "
                          f"installation, or leave {flag} out") from e
    # the folder ./wandb of its runs can be imported too, as a namespace
    return None if hasattr(module, "__path__") and getattr(module, "__file__", None) is None else module


def _name(folder: str) -> str:
    """The folder's own name, also where it was given with a slash behind it."""
    return os.path.basename(os.path.normpath(folder))


def _to_stderr(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # it prints; stdout is for the results
        call(*arguments, **options)


@contextlib.contextmanager
def _starting(name: str, project: str, instead: str, refusals: tuple[type[Exception], ...]) -> Iterator[None]:
    """Makes one line of what a package has against its project, account or files."""
    try:
        yield
    except refusals as e:
        raise OptionError(f"--log-{name}: project {project!r} cannot be logged to ({one_line(e)}); see to it, "
                          f"{instead}, or leave it out") from e


def _wandb(wandb: ModuleType, args: argparse.Namespace, resolved: Resolved, folder: str, start_epoch: int) -> _Open:
    with _starting("wandb", args.wandb_project, "set WANDB_MODE=offline", (OSError, ValueError, wandb.Error)):
        wandb.init(project=args.wandb_project, name=_name(folder), config=vars(resolved.namespace(args)),
                   tags=args.wandb_tags, id=args.wandb_resume_id or None,
                   resume="must" if args.wandb_resume_id else None)
    # left to the end of the process it would print below the results
    return _Open(wandb.log, lambda failed: _to_stderr(wandb.finish, exit_code=int(failed)))


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

    return _Open(log, lambda failed: writer.close())


def _trackio(trackio: ModuleType, args: argparse.Namespace, resolved: Resolved, folder: str,
             start_epoch: int) -> _Open:
    with _starting("trackio", args.trackio_project, "choose another --trackio-project", (OSError, ValueError)):
        _to_stderr(trackio.init, project=args.trackio_project, name=_name(folder),
                   config=vars(resolved.namespace(args)), resume="allow" if resolved.resume else "never")
    return _Open(lambda row: _to_stderr(trackio.log, {name: value for name, value in row.items() if name != "epoch"},
                                        step=row["epoch"]), lambda failed: _to_stderr(trackio.finish))


_KINDS = {
    "wandb": _Kind("wandb", "wandb", _wandb),
    "tensorboard": _Kind("torch.utils.tensorboard", "tensorboard", _tensorboard),
    "trackio": _Kind("trackio", "trackio", _trackio),
}
