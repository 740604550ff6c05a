#!/usr/bin/env python3
"""Evaluates image classifiers with the command line of timm's validate.py, and on suites of data sets and under attack.

    validate.py --model resnet50 --checkpoint last.pth.tar --data-dir /data/imagenet
    torchrun --nproc-per-node 8 validate.py --checkpoint last.pth.tar --eval-root /data --attack l2=0.25 linf=0.25/255

On a single data set it prints the numbers of timm's script, digit for digit. With ``--eval``, ``--eval-root``,
``--attack`` or several checkpoints it evaluates all of them in one process (or group of processes) and prints a table.
"""
import argparse
import csv
import io
import json
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm import utils
from timm.models import is_model, list_models

from .cli.errors import OptionError, one_line, report
from .cli.parser import OptionParser
from .cli.processes import end_failed_rank, leave_process_group
from .evaluation import tables
from .evaluation.options import build_validate_parser, parse_validate_args
from .evaluation.protocol import evaluate_suites
from .evaluation.ranks import Ranks
from .evaluation.single import evaluate_single, with_smaller_batches
from .evaluation.subject import prepare_device

_logger = logging.getLogger("validate")

# timm's weights that are no ImageNet-1k classifiers: left out by --model all
_NOT_IMAGENET = ["*_in21k", "*_in22k", "*in12k", "*_dino", "*fcmae", "*seer"]


def build_parser() -> OptionParser:
    """The parser of this script: timm's flags and the groups ``Suites`` and ``Attack``."""
    return build_validate_parser("validate.py")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs an evaluation; returns the exit code: 0, or 2 for a mistake in the options or the data."""
    parser = build_parser()
    args = parse_validate_args(parser, argv)
    utils.setup_default_logging()
    try:
        device = prepare_device(args)
        ranks = Ranks()
        if not ranks.primary:
            logging.getLogger().setLevel(logging.WARNING)
        if getattr(args, "taken_from", None) and ranks.primary:
            _logger.info(f"Model and preprocessing as in {args.taken_from}: {args.model}")
        if args.left_out and ranks.primary:
            _logger.info(f"Unfinished or the same as another checkpoint: {', '.join(args.left_out)}")
        (suites if args.suites else one_or_bulk)(args, device, ranks)
    except (OptionError, torch.OutOfMemoryError) as e:
        message = str(e)
        if not isinstance(e, OptionError):
            message = (f"--batch-size {args.batch_size} is too large for the memory of {args.device} "
                       f"({one_line(e, 80)}); use a smaller one")
        report(parser.prog, message)
        end_failed_rank(2)
        return 2
    except BaseException:
        end_failed_rank(1)
        raise
    ranks.close()
    leave_process_group()
    return 0


def suites(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
    """Every checkpoint on every data set; the table and its JSON on stdout, and in ``--results-file``."""
    files = tables.result_files(args.results_file, args.results_format if args.format_given else None)
    measures, names, protocol = evaluate_suites(args, device, ranks, files)
    if ranks.primary:
        print(tables.as_text(measures, names))
        rows = [dict(model=args.model, checkpoint=checkpoint["path"],
                     **{f"{m.dataset}_{m.name}".replace(" ", "_"): round(m.values[i], 4) for m in measures})
                for i, checkpoint in enumerate(protocol["checkpoints"])]
        print_result(rows)
        tables.write(files, measures, names, protocol)
        for path in files.values():
            _logger.info(f"Wrote {path}")


def one_or_bulk(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
    """One data set as timm's script does it: a model, or many of them one by one."""
    many = models_of(args)
    results: Any = []
    mistakes = 0
    if many is None:
        name, checkpoint = args.model, args.checkpoint[0] if args.checkpoint else None

        def evaluate() -> "OrderedDict[str, Any]":
            return evaluate_single(args, device, ranks, name, checkpoint)

        results = with_smaller_batches(args, evaluate, name) if args.retry else evaluate()
    else:
        if ranks.primary:
            _logger.info(f"{len(many)} evaluations: {', '.join(checkpoint or name for name, checkpoint in many)}")
        for name, checkpoint in many:
            try:
                result = with_smaller_batches(
                    args, lambda n=name, c=checkpoint: evaluate_single(args, device, ranks, n, c), name)
            except OptionError as e:  # the others are still worth having
                mistakes += 1
                if ranks.primary:
                    _logger.error(f"{checkpoint or name} left out: {e}")
                continue
            except KeyboardInterrupt:
                if ranks.primary:
                    _logger.warning(f"Interrupted: {checkpoint or name} and what follows it is left out")
                break
            if "error" not in result:
                results.append(result if checkpoint is None else OrderedDict(result, checkpoint=checkpoint))
        results.sort(key=lambda result: result["top1"], reverse=True)
    if ranks.primary:
        print_result(results)
        if args.results_file:
            write_results(args.results_file, results, args.results_format)
    if mistakes:
        raise OptionError(f"{mistakes} of {len(many or ())} evaluations were left out, see above; mend or remove them")


def models_of(args: argparse.Namespace) -> list[tuple[str, str | None]] | None:
    """The pairs (model, checkpoint) of a bulk evaluation; None: there is only one.

    Raises:
        OptionError: A wildcard matches no model.
    """
    if args.folder_of_checkpoints:
        return [(args.model, checkpoint) for checkpoint in args.checkpoint]
    if args.checkpoint or is_model(args.model) or ":" in args.model:
        return None
    if args.model == "all":
        args.pretrained = True
        return [(name, None) for name in list_models(pretrained=True, exclude_filters=_NOT_IMAGENET)]
    if os.path.isfile(args.model):
        with open(args.model, encoding="utf-8") as f:
            return [(line.strip(), None) for line in f if line.strip()]
    names = list_models(args.model, pretrained=True)
    if not names and "*" in args.model:
        raise OptionError(f"--model {args.model} matches no model of timm with weights: see timm.list_models()")
    return [(name, None) for name in names] or None


def write_results(path: str, results: Any, kind: str) -> None:
    """Writes results as timm's script does: CSV with one row per evaluation, or JSON.

    Raises:
        OptionError: The file cannot be written.
    """
    text = io.StringIO()
    if kind == "json":
        json.dump(results, text, indent=4)
    else:
        rows = results if isinstance(results, list) else [results]
        writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [])
        if rows:
            writer.writeheader()
            writer.writerows(rows)
    tables.write_text(path, text.getvalue())


def print_result(results: Any) -> None:
    """The results as JSON on stdout, after the line with which timm's script marks them."""
    print(f"--result\n{json.dumps(results, indent=4)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
