"""Suites of data sets and attacks on one or many checkpoints, in one process or one group of ranks."""
import argparse
import dataclasses
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torchvision
from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map

from .. import __version__
from ..cli.errors import OptionError, one_line
from . import tables
from .attack.robustness import AttackedSet, attack_suite
from .journal import Journal, key_of
from .precision import full_precision
from .ranks import Ranks, batches_of
from .scoring import mean_of, score
from .sets.loaders import suite_loader
from .sets.suites import Suite, find_suites, open_suites
from .subject import Subject, build_subject, check_weights, file_sha256
from .tables import Measure

_logger = logging.getLogger("validate")


def evaluate_suites(args: argparse.Namespace, device: torch.device, ranks: Ranks,
                    files: Mapping[str, str]) -> tuple[list[Measure], list[str], dict[str, Any]]:
    """Evaluates every checkpoint on every data set, and under attack.

    Args:
        args: All options.
        device: Of this rank.
        ranks: Who shares the work.
        files: Where the results will go, by format; they are not written here.

    Returns:
        The measures, the checkpoints' short names, and the protocol: all that the numbers depend on.

    Raises:
        OptionError: A data set is not what it is said to be, weights do not fit, or results would be replaced.
    """
    journal = _journal(args, ranks)
    _refuse_existing(args, [*files.values(), *journal.files()])
    checkpoints: list[str | None] = list(args.checkpoint) or [None]
    if len(checkpoints) > 1:
        # hours may lie between the first and the last one: a file that does not fit is found now
        ranks.each(lambda: check_weights(args, args.checkpoint))

    suites: list[Suite] = []
    attacked: AttackedSet | None = None
    per_checkpoint, described = [], []
    for checkpoint in checkpoints:
        subject = ranks.each(lambda c=checkpoint: build_subject(args, c, device, verbose=ranks.primary))
        if not suites:
            suites = ranks.each(lambda outputs=subject.num_classes: _open_suites(args, outputs, ranks))
            _check_same(suites, ranks)
            attacked = _attacked_set(args, suites, subject.num_classes)
            if args.skip_existing:
                rows = _rows(args, suites, attacked, subject.num_classes)
                sha256s = {subject.sha256, *map(file_sha256, args.checkpoint)}
                ranks.each(lambda s=sha256s, r=rows: tables.check_kept(
                    files, [path or args.model for path in checkpoints], s, r))
            _start(args, journal, ranks)  # the options are in order: from here on files change
        measures = []
        for suite in suites:
            measures += _evaluate_suite(args, subject, suite, journal, ranks)
        if attacked is not None:
            measures += attack_suite(args, subject, attacked, _identity(args, subject, attacked.suite), journal, ranks)
        per_checkpoint.append(measures)
        described.append(
            dict(path=checkpoint, sha256=subject.sha256, weights=subject.weights, model=subject.name,
                 parameters=subject.param_count))

    names = short_names(checkpoints, args.model)
    merged = tables.merge(per_checkpoint)
    return merged, names, _protocol(args, subject, suites, attacked, described)


def _journal(args: argparse.Namespace, ranks: Ranks) -> Journal:
    """The journal beside the results."""
    return Journal(args.results_file if args.format_given else os.path.splitext(args.results_file)[0], ranks.rank)


def _refuse_existing(args: argparse.Namespace, files: Sequence[str]) -> None:
    existing = [path for path in files if os.path.exists(path)]
    if existing and not (args.overwrite or args.skip_existing):
        raise OptionError(
            f"--results-file {args.results_file}: {existing[0]} exists; add --skip-existing to go on with it, "
            f"--overwrite to start anew, or name another file")


def _start(args: argparse.Namespace, journal: Journal, ranks: Ranks) -> None:
    """Takes over what is done, or forgets it."""
    ranks.gather(None)  # no rank removes or writes before all have looked
    if ranks.primary:
        if args.skip_existing:
            journal.load()
        else:
            journal.remove()
    journal.done = ranks.gather(journal.done)[0]
    if journal.done and ranks.primary:
        _logger.info(f"{len(journal.done)} finished parts of an earlier evaluation are at hand")


def _open_suites(args: argparse.Namespace, num_classes: int, ranks: Ranks) -> list[Suite]:
    folders: dict[str, str] = {}
    if args.data_dir:
        try:
            folders[args.split] = create_dataset("", root=args.data_dir, split=args.split).reader.root
        except (RuntimeError, AssertionError, OSError) as e:
            raise OptionError(
                f"--data-dir {args.data_dir} --split {args.split}: {one_line(e)}; check the folder") from None
    for name, folder in args.eval:
        if name in folders:
            raise OptionError(
                f"--eval {name}={folder}: --data-dir --split {args.split} has this name already; give another")
        folders[name] = folder
    if args.eval_root:
        found, missing = find_suites(args.eval_root)
        if ranks.primary:
            _logger.info(f"--eval-root {args.eval_root}: found {', '.join(found) or 'nothing'}; not there: "
                         f"{', '.join(missing) or 'none'}")
        if not found and not folders:
            raise OptionError(
                f"--eval-root {args.eval_root} holds none of {', '.join(missing)} under its published name: check the "
                f"folder, or name the sets by --eval NAME=DIR")
        folders.update({name: folder for name, folder in found.items() if name not in folders})
    class_map = None
    if args.class_map:
        try:
            class_map = load_class_map(args.class_map, args.data_dir or "")
        except (AssertionError, ValueError, OSError, EOFError, pickle.UnpicklingError) as e:
            raise OptionError(
                f"--class-map {args.class_map}: {one_line(e)}; give a text file with a class per line") from None
    suites = open_suites(folders, num_classes, class_map, args.allow_partial)
    for suite in suites if ranks.primary else ():
        remarks = "".join(f"; {remark}" for remark in (*suite.flags, *suite.notes))
        _logger.info(f"{suite.name}: {len(suite.samples):,} images in {suite.root}, {suite.space.name}{remarks}")
    return suites


def _attacked_set(args: argparse.Namespace, suites: Sequence[Suite], outputs: int) -> AttackedSet | None:
    if not args.attack:
        return None
    names = [suite.name for suite in suites]
    if args.attack_set is not None and args.attack_set not in names:
        raise OptionError(f"--attack-set {args.attack_set} is not evaluated: use one of {', '.join(names)}")
    name = args.attack_set or next((suite.name for suite in suites if suite.kind == "id"), None)
    if name is None:
        raise OptionError(f"--attack: none of {', '.join(names)} is in distribution; choose one by --attack-set NAME")
    suite = suites[names.index(name)]
    classes = suite.space.num_classes(outputs)
    if classes < 4:
        raise OptionError(f"--attack: {name} has {classes} classes, targeted DLR needs 4 or more; leave --attack out")
    return AttackedSet.choose(suite, args)


def _check_same(suites: Sequence[Suite], ranks: Ranks) -> None:
    """Compares what the ranks see, which may run on different machines.

    Raises:
        OptionError: A data set is not the same for all of them.
    """
    first, *others = ranks.run(lambda: {suite.name: suite.samples_sha256 for suite in suites})
    for rank, theirs in enumerate(others, 1):
        different = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if different:
            raise OptionError(f"--eval {different[0]}: rank {rank} does not see the files that rank 0 sees; give all "
                              f"machines the same data")


def _rows(args: argparse.Namespace, suites: Sequence[Suite], attacked: AttackedSet | None,
          outputs: int) -> set[tuple[str, str]]:
    """What the table will hold, as pairs (data set, measure)."""
    rows = {(suite.name, name) for suite in suites for name in _names(suite, outputs)}
    if attacked is not None:
        rows |= {(attacked.suite.name, name) for name in ("clean", *map(str, args.attack))}
    return rows


def _names(suite: Suite, outputs: int) -> list[str]:
    return ["top1", "top5", *([f"top1_{outputs}way"] if suite.space.differs else [])]


def _identity(args: argparse.Namespace, subject: Subject, suite: Suite) -> dict[str, Any]:
    """What the scores of a suite depend on: all of it is in the protocol too."""
    return dict(sha256=subject.sha256, settings=_settings(args, subject), dataset=_dataset(args, suite))


def _settings(args: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    """What scores depend on beside the weights and the data set."""
    options = ("model_kwargs", "gp", "use_ema", "reparam", "test_pool", "fast_norm", "batch_size", "num_gpu",
               "channels_last", "torchscript", "torchcompile", "torchcompile_mode", "aot_autograd", "fuser")
    return dict(
        {option: getattr(args, option) for option in options}, model=subject.name, num_classes=subject.num_classes,
        prefetcher=not args.no_prefetcher, preprocessing=_preprocessing(args, subject),
        precision=_precision(args, subject.device), device_type=subject.device.type,
        versions=dict(timm_sam=__version__, timm=timm.__version__, torch=torch.__version__,
                      torchvision=torchvision.__version__))


def _dataset(args: argparse.Namespace, suite: Suite) -> dict[str, Any]:
    """What scores depend on of a data set."""
    border = suite.crop_border_pixels if args.crop_border_pixels is None else args.crop_border_pixels
    return dict(name=suite.name, label_space=suite.space.name, groups=key_of(groups=suite.space.groups),
                classes=suite.num_classes, crop_border_pixels=border, samples_sha256=suite.samples_sha256)


def _preprocessing(args: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    return dict(subject.data_config, crop_pct=subject.crop_pct, crop_border_pixels=args.crop_border_pixels,
                img_mode=args.input_img_mode, naflex=args.naflex_max_seq_len if args.naflex_loader else None)


def _precision(args: argparse.Namespace, device: torch.device) -> str:
    if args.amp:
        return f"float32, autocast to {args.amp_dtype}"
    dtype = args.model_dtype or "float32"
    return f"{dtype} (TF32 off)" if device.type == "cuda" and dtype == "float32" else dtype


def _evaluate_suite(args: argparse.Namespace, subject: Subject, suite: Suite, journal: Journal,
                    ranks: Ranks) -> list[Measure]:
    key = key_of(part="scores", **_identity(args, subject, suite))
    if key not in journal.done:
        batches = batches_of(range(len(suite.samples)), args.batch_size)
        loaded = suite_loader(args, subject, suite, batches, ranks.share(range(len(batches))))
        with full_precision():
            parts = ranks.run(lambda: score(
                subject, loaded, loaded.places, suite.space, suite.name, prefetcher=not args.no_prefetcher,
                channels_last=args.channels_last, log_freq=args.log_freq))
        together = [batch for part in parts for batch in part]
        scores = mean_of(sorted(together, key=lambda batch: batch.index))
        if ranks.primary:
            journal.add(key, dataclasses.asdict(scores))
        journal.done[key] = dataclasses.asdict(scores)
    scores = journal.done[key]
    images = scores["images"]
    right = (scores["right1"], scores["right5"], scores["right1_all"])
    return [Measure(suite.kind.upper(), suite.name, name, images, suite.flags, [100 * count / images])
            for name, count in zip(_names(suite, subject.num_classes), right)]


def short_names(checkpoints: Sequence[str | None], model: str) -> list[str]:
    """Names for the columns: what tells the paths apart, or the model's name without a file."""
    paths = [checkpoint or model for checkpoint in checkpoints]
    normal = [os.path.normpath(path) for path in paths]
    if len(paths) == 1 or len(set(normal)) < len(paths):
        return paths
    parts = [path.split(os.sep) for path in normal]
    shared = len(os.path.commonprefix(parts))
    ending = len(os.path.commonprefix([part[shared:][::-1] for part in parts]))
    names = ["/".join(part[shared:len(part) - ending]) for part in parts]
    # where a/x and a/b/x end alike, nothing is left of the first
    return names if all(names) else ["/".join(part[shared:]) for part in parts]


def _protocol(args: argparse.Namespace, subject: Subject, suites: Sequence[Suite], attacked: AttackedSet | None,
              described: list[dict[str, Any]]) -> dict[str, Any]:
    device = torch.cuda.get_device_name(subject.device) if subject.device.type == "cuda" else subject.device.type
    return dict(
        _settings(args, subject),
        checkpoints=described,
        class_map=args.class_map,
        allow_partial=args.allow_partial,
        seed=args.seed,
        datasets=[dict(
            _dataset(args, suite), folder=os.path.abspath(suite.root), images=len(suite.samples), kind=suite.kind,
            flags=suite.flags, notes=suite.notes) for suite in suites],
        attack=None if attacked is None else attacked.describe(args),
        device=device,
    )
