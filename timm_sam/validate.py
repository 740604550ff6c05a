#!/usr/bin/env python3
"""Evaluates image classifiers with the command line of timm's validate.py, and on suites of data sets and under attack.

    validate.py --model resnet50 --checkpoint last.pth.tar --data-dir /data/imagenet
    torchrun --nproc-per-node 8 validate.py --checkpoint last.pth.tar --eval-root /data --attack l2=0.25 linf=0.25/255

On a single data set it prints the numbers of timm's script, digit for digit. With ``--eval``, ``--eval-root``,
``--attack`` or several checkpoints it evaluates all of them in one process (or group of processes) and prints a table.
"""
import json
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.models import is_model, list_models

from .cli.errors import OptionError
from .cli.escape import setup_logging
from .cli.parser import OptionParser, program
from .cli.tasks import EVALUATORS
from .cli.text import csv_text, say, write_text
from .evaluation import results, tables
from .evaluation.command import run
from .evaluation.options import build_validate_parser, parse_validate_args
from .evaluation.protocol import evaluate_suites
from .evaluation.session import Session
from .evaluation.single import evaluate_single, with_smaller_batches

_logger = logging.getLogger(__name__)

# timm's weights that are no ImageNet-1k classifiers: left out by --model all
_NOT_IMAGENET = ["*_in21k", "*_in22k", "*in12k", "*_dino", "*fcmae", "*seer"]


def build_parser() -> OptionParser:
    """The parser of this script: timm's flags and the groups ``Suites`` and ``Attack``."""
    return build_validate_parser(program("timm_sam.validate", "validate.py"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs an evaluation; returns the exit code: 0, 2 for a mistake in the options or the data, 1 for outputs that are
    NaN or infinite."""
    parser = build_parser()
    args, resolved = parse_validate_args(parser, argv)
    setup_logging()
    return run(
        parser.prog, args, resolved, suites if resolved.suites else one_or_bulk,
        lambda device, words: f"--batch-size {args.batch_size} is too large for the memory of {device} ({words}); use "
                              f"a smaller one",
        lambda found: f"NaN or infinite outputs: {found}; give other checkpoints, or --allow-nonfinite to have exit "
                      f"code 0", args.allow_nonfinite)


def suites(session: Session) -> None:
    """Every checkpoint on every data set; the table and its JSON on stdout, and in ``--results-file``."""
    args = session.args
    files = results.result_files(args.results_file, session.resolved.format_given)
    measures, names, protocol = evaluate_suites(session, files)
    if session.primary:
        rows = [dict(model=args.model, checkpoint=checkpoint["path"], **_entries(measures, i))
                for i, checkpoint in enumerate(protocol["checkpoints"])]
        try:
            say(tables.as_text(measures, names))
            print_result(tables.finite(rows))
        finally:  # where nobody listens, the files are still wanted
            results.write(files, measures, names, protocol)
        for path in files.values():
            _logger.info(f"Wrote {path}")


def _entries(measures: Sequence[tables.Measure], number: int) -> dict[str, Any]:
    """All numbers of the ``number``-th checkpoint, and of data sets with outputs that are not finite, of how many
    images these are: the numbers beside them say nothing."""
    found: dict[str, Any] = {f"{m.dataset}_{m.name}".replace(" ", "_"): round(m.values[number], 4) for m in measures}
    for m in measures:
        if broken := m.broken[number]:
            name = f"{m.dataset}_non_finite".replace(" ", "_")
            found[name] = max(broken, found.get(name, 0))
    return found


def one_or_bulk(session: Session) -> None:
    """One data set as timm's script does it: a model, or many of them one by one."""
    args = session.args
    many = models_of(session)
    found: Any = []
    mistakes = 0
    if many is None:
        evaluate = partial(evaluate_single, session, args.model, args.checkpoint[0] if args.checkpoint else None)
        found = retried(session, evaluate, args.model) if args.retry else evaluate(args.batch_size)
    else:
        if session.primary:
            _logger.info(f"{len(many)} evaluations: {', '.join(checkpoint or name for name, checkpoint in many)}")
        for name, checkpoint in many:
            try:
                result = retried(session, partial(evaluate_single, session, name, checkpoint), name)
            except OptionError as e:  # the others are still worth having
                mistakes += 1
                if session.primary:
                    _logger.error(f"{checkpoint or name} left out: {e}")
                continue
            except KeyboardInterrupt:
                if session.primary:
                    _logger.warning(f"Interrupted: {checkpoint or name} and what follows it is left out")
                break
            if "error" not in result:
                found.append(result if checkpoint is None else OrderedDict(result, checkpoint=checkpoint))
        metric = EVALUATORS[args.task].default_metric
        found.sort(key=lambda result: result[metric], reverse=True)
    if session.primary:
        try:
            print_result(found)
        finally:
            if args.results_file:
                write_text(args.results_file, as_file(found, args.results_format), "--results-file")
    if mistakes:
        raise OptionError(f"{mistakes} of {len(many or ())} evaluations were left out, see above; mend or remove them")


def models_of(session: Session) -> list[tuple[str, str | None]] | None:
    """The pairs (model, checkpoint) of a bulk evaluation; None: there is only one.

    Raises:
        OptionError: A wildcard matches no model, or a file names none.
    """
    args = session.args
    if session.resolved.folder_of_checkpoints:
        return [(args.model, checkpoint) for checkpoint in args.checkpoint]
    if args.checkpoint or is_model(args.model) or ":" in args.model:
        return None
    if args.model == "all":
        return [(name, None) for name in list_models(pretrained=True, exclude_filters=_NOT_IMAGENET)]
    if os.path.isfile(args.model):
        try:
            with open(args.model, encoding="utf-8") as f:
                lines = [line.strip() for line in f.read().split("\n")]
        except (OSError, UnicodeDecodeError):
            lines = []
        if not any(lines):
            raise OptionError(f"--model {args.model}: the file cannot be read, or names no model; write one name per "
                              f"line, and give weights by --checkpoint")
        return [(line, None) for line in lines if line]
    names = list_models(args.model, pretrained=True)
    if not names and "*" in args.model:
        raise OptionError(f"--model {args.model} matches no model of timm with weights: see timm.list_models()")
    return [(name, None) for name in names] or None


def retried(session: Session, evaluate: Callable[[int], "OrderedDict[str, Any]"],
            name: str) -> "OrderedDict[str, Any]":
    """Evaluates with smaller and smaller batches as long as memory is short, beginning with the options' size."""
    return with_smaller_batches(evaluate, name, session.args.batch_size, session.args.num_gpu, session.device)


def as_file(found: Any, kind: str) -> str:
    """What timm's script writes of its results: CSV with one row per evaluation, or JSON."""
    if kind == "json":
        return json.dumps(found, indent=4)
    rows = found if isinstance(found, list) else [found]
    if not rows:
        return ""
    header = list(dict.fromkeys(name for row in rows for name in row))
    return csv_text(header, [[row.get(name, "") for name in header] for row in rows], line_end="\r\n")


def print_result(found: Any) -> None:
    """The results as JSON on stdout, after the line with which timm's script marks them."""
    say(f"--result\n{json.dumps(found, indent=4)}")


if __name__ == "__main__":
    sys.exit(main())
