"""Suites of data sets and attacks on one or many checkpoints, in one process or one group of ranks."""
import argparse
import dataclasses
import hashlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torchvision
from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map

from .. import __version__
from ..errors import OptionError, one_line
from . import tables
from .journal import Journal, key_of
from .loaders import suite_loader
from .ranks import Ranks, batches_of
from .robustness import AttackedSet, attack_suite
from .scoring import mean_of, score
from .subject import Subject, build_subject, check_weights
from .suites import Suite, find_suites, open_suites
from .tables import Measure

_logger = logging.getLogger("validate")


def evaluate_suites(args: argparse.Namespace, device: torch.device,
                    ranks: Ranks) -> tuple[list[Measure], list[str], dict[str, Any]]:
    """Evaluates every checkpoint on every data set, and under attack.

    Returns:
        The measures, the checkpoints' short names, and the protocol: all that the numbers depend on.

    Raises:
        OptionError: A data set is not what it is said to be, weights do not fit, or results would be replaced.
    """
    files = tables.result_files(args.results_file, args.results_format if args.format_given else None)
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
            attacked = _attacked_set(args, suites, subject.num_classes)
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
    protocol = _protocol(args, subject, suites, attacked, described)
    if ranks.primary:
        tables.write(files, merged, names, protocol)
    return merged, names, protocol


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
        except (AssertionError, ValueError, OSError) as e:
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


def _identity(args: argparse.Namespace, subject: Subject, suite: Suite) -> dict[str, Any]:
    """What the scores of a suite depend on."""
    return dict(
        sha256=subject.sha256, model=subject.name, num_classes=subject.num_classes, model_kwargs=args.model_kwargs,
        pool=args.gp, use_ema=args.use_ema, reparam=args.reparam, test_pool=args.test_pool, fast_norm=args.fast_norm,
        preprocessing=_preprocessing(args, subject), precision=_precision(args), batch_size=args.batch_size,
        device=subject.device.type, suite=suite.name, space=suite.space.groups, border=suite.crop_border_pixels,
        samples=samples_sha256(suite))


def samples_sha256(suite: Suite) -> str:
    """Fingerprint of a suite: the files' names below its folder with their classes and sizes, in order."""
    digest = hashlib.sha256()
    for path, target in suite.samples:
        entry = f"{os.path.relpath(path, suite.root)}\0{target}\0{os.path.getsize(path)}\n"
        digest.update(entry.encode("utf-8", "replace"))
    return digest.hexdigest()


def _preprocessing(args: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    return dict(subject.data_config, crop_pct=subject.crop_pct, crop_border_pixels=args.crop_border_pixels,
                img_mode=args.input_img_mode, naflex=args.naflex_max_seq_len if args.naflex_loader else None)


def _precision(args: argparse.Namespace) -> str:
    if args.amp:
        return f"float32, autocast to {args.amp_dtype}"
    tf32 = args.device != "cpu" and torch.backends.cuda.matmul.allow_tf32
    return (args.model_dtype or "float32") + (" (TF32 products)" if tf32 and not args.model_dtype else "")


def _evaluate_suite(args: argparse.Namespace, subject: Subject, suite: Suite, journal: Journal,
                    ranks: Ranks) -> list[Measure]:
    key = key_of(part="scores", **_identity(args, subject, suite))
    if key not in journal.done:
        batches = batches_of(range(len(suite.samples)), args.batch_size)
        loaded = suite_loader(args, subject, suite, batches, ranks.share(range(len(batches))))
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
    right = {"top1": scores["right1"], "top5": scores["right5"]}
    if suite.space.differs:
        right[f"top1_{subject.num_classes}way"] = scores["right1_all"]
    return [Measure(suite.kind.upper(), suite.name, name, images, suite.flags, [100 * count / images])
            for name, count in right.items()]


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
        checkpoints=described,
        use_ema=args.use_ema,
        preprocessing=_preprocessing(args, subject),
        precision=_precision(args),
        batch_size=args.batch_size,
        seed=args.seed,
        datasets=[dict(
            name=suite.name, folder=os.path.abspath(suite.root), images=len(suite.samples), kind=suite.kind,
            label_space=suite.space.name, classes=suite.num_classes,
            crop_border_pixels=suite.crop_border_pixels if args.crop_border_pixels is None else args.crop_border_pixels,
            samples_sha256=samples_sha256(suite), flags=suite.flags, notes=suite.notes) for suite in suites],
        attack=None if attacked is None else attacked.describe(args),
        device=device,
        versions=dict(timm_sam=__version__, timm=timm.__version__, torch=torch.__version__,
                      torchvision=torchvision.__version__),
    )
