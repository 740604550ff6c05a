"""The command line of validate.py: flags, what a run's ``args.yaml`` supplies, checks, and what comes of them."""
import argparse
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from timm.utils import natural_key

from ..cli import rules
from ..cli.errors import OptionError
from ..cli.parser import OptionParser
from ..runs import files
from . import checks, flags
from .from_run import FromRun, beside, from_run
from .sets.names import canonical, meant


@dataclass(frozen=True)
class Resolved:
    """What the options come to beside their values. Nothing writes into the options once they are parsed.

    Attributes:
        suites: Whether anything is asked that timm's script does not do.
        folder_of_checkpoints: Whether ``--checkpoint`` is one folder.
        in_folders: Those of the checkpoints that were found in folders.
        left_out: Files in folders that no finished epoch has left, in suites.
        taken_from: The ``args.yaml`` that supplied the model and its preprocessing, if one did.
        taken: What it supplied, as flags.
        not_taken: The ``args.yaml`` beside the checkpoints, where ``--model`` says not to look at it.
        format_given: ``--results-format`` if it was given, else None.
        crop_given: Whether the command line itself has ``--crop-pct``: then it is of images that are cropped already,
            too, and not only what a run had for its own.
    """

    suites: bool = False
    folder_of_checkpoints: bool = False
    in_folders: frozenset[str] = frozenset()
    left_out: list[str] = field(default_factory=list)
    taken_from: str | None = None
    taken: str = ""
    not_taken: list[str] = field(default_factory=list)
    format_given: str | None = None
    crop_given: bool = False


def build_validate_parser(prog: str = "validate.py") -> OptionParser:
    """The parser of validate.py: timm's flags with timm's defaults, and the groups ``Suites`` and ``Attack``."""
    parser = OptionParser(prog=prog, description="Evaluates image classifiers of timm: on one data set as timm's own "
                                                 "script does, or on suites of data sets and under attack.")
    for add in (flags.add_dataset, flags.add_model, flags.add_input, flags.add_execution, flags.add_results,
                flags.add_suites, flags.add_attack):
        add(parser)
    return parser


def parse_validate_args(parser: argparse.ArgumentParser,
                        argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Resolved]:
    """Parses and checks a command line.

    In the options, ``checkpoint`` becomes a list of files, ``eval`` a list of pairs (name, folder), ``attack`` a list
    of radii, and ``data_dir`` takes the positional folder. What the command line does not say of the model and its
    images is taken from the ``args.yaml`` beside the checkpoints, if ``--model`` is not given. Of the checkpoints only
    the names are looked at.

    Returns:
        The options, and what comes of them.

    Raises:
        SystemExit: With code 2, after one line on stderr, for anything wrong with the values.
    """
    given, args = parse_given(parser, argv)
    try:
        args.eval = [_named_folder(text) for text in args.eval]
        args.attack_set = args.attack_set and canonical(args.attack_set)
        args.attack = list(dict.fromkeys(radius for radii in args.attack for radius in radii))
        args.checkpoint = list(args.checkpoint)
        _release_data(args)
        suites = bool(args.eval or args.eval_root or args.attack) or len(args.checkpoint) > 1
        resolved = resolve(parser, given, args, suites)
        rules.apply(args, partial(checks.files, suites=suites), checks.values, partial(checks.conflicts, suites=suites))
        if suites:
            rules.apply(args, partial(checks.of_suites, default=parser.get_default,
                                      format_given=given.results_format is not None))
        else:
            rules.apply(args, partial(checks.of_one_set, default=parser.get_default))
    except OptionError as e:
        parser.error(str(e))
    return args, resolved


def parse_given(parser: argparse.ArgumentParser,
                argv: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """What the command line gives, None for each option that it does not; and all options with their defaults."""
    # only what was given says that a default may be replaced
    given = parser.parse_args(argv, argparse.Namespace(**{a.dest: None for a in parser._actions if a.dest != "help"}))
    return given, parser.parse_args(argv)


def resolve(parser: argparse.ArgumentParser, given: argparse.Namespace, args: argparse.Namespace,
            suites: bool) -> Resolved:
    """Finds the checkpoints and the data, and completes the options by the run that wrote the checkpoints.

    Args:
        parser: Of the command; it has the flags of the groups ``Dataset``, ``Model``, ``Input`` and ``Execution``.
        given: As of :func:`parse_given`.
        args: Likewise; ``checkpoint`` becomes a list of files, ``data_dir`` takes the positional folder.
        suites: Whether data sets are suites.

    Raises:
        OptionError: A folder holds no checkpoint, or an ``args.yaml`` is of no use.
    """
    args.data_dir = args.data or args.data_dir
    folder_of_checkpoints = len(args.checkpoint) == 1 and os.path.isdir(args.checkpoint[0])
    args.checkpoint, in_folders, left_out = checkpoint_files([path for path in args.checkpoint if path], suites)
    taken = FromRun()
    if given.model is None and args.checkpoint:
        taken = from_run(parser, args.checkpoint, given, suites)
        taken.complete(args)
    return Resolved(
        suites, folder_of_checkpoints, frozenset(in_folders), left_out, taken.path, taken.shown,
        beside(args.checkpoint) if given.model is not None else [], getattr(given, "results_format", None),
        given.crop_pct is not None)


def _named_folder(text: str) -> tuple[str, str]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise OptionError(f"--eval {text}: write NAME=DIR, such as imagenet-r=/data/imagenet-r")
    return meant(name, f"--eval {text}"), folder


def _release_data(args: argparse.Namespace) -> None:
    """``--checkpoint FILE DIR`` is timm's way to name the data after the checkpoint, not two checkpoints."""
    last = args.checkpoint[-1] if len(args.checkpoint) > 1 else ""
    if not args.data and not args.data_dir and not args.eval and os.path.isdir(last) and not _in_folder(last):
        args.data = args.checkpoint.pop()


def _in_folder(path: str) -> list[str]:
    """The checkpoints in a folder: timm's script takes these two endings."""
    return [file for ending in ("*.pth.tar", "*.pth") for file in glob.glob(os.path.join(glob.escape(path), ending))]


def checkpoint_files(paths: Sequence[str], finished: bool) -> tuple[list[str], list[str], list[str]]:
    """The files that paths of files and folders stand for.

    Args:
        paths: Of ``--checkpoint``.
        finished: Leave out the files of folders that no finished epoch has left.

    Returns:
        The files, those of them that were found in folders, and those left out.

    Raises:
        OptionError: A folder holds none.
    """
    kept: list[str] = []
    found: list[str] = []
    left_out: list[str] = []
    for path in paths:
        if not os.path.isdir(path):
            kept.append(path)
            continue
        there = sorted(_in_folder(path), key=natural_key)
        unfinished = [file for file in there if finished and files.is_unfinished(file)]
        there = [file for file in there if file not in unfinished]
        if not there and unfinished:
            raise OptionError(f"--checkpoint {path} holds {os.path.basename(unfinished[0])}, but nothing that a "
                              f"finished epoch has left; give the file itself")
        if not there:
            raise OptionError(f"--checkpoint {path} holds no *.pth.tar and no *.pth; give the file")
        kept += there
        found += there
        left_out += unfinished
    return kept, found, left_out
