"""What every evaluation opens: processes and device, checkpoints, models, data sets."""
import argparse
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..cli.device import Process, set_up
from ..cli.errors import OptionError
from ..cli.image_folders import read_class_map, split_root
from ..cli.processes import leave_process_group
from . import results
from .options import Resolved
from .ranks import Ranks
from .sets import corruptions
from .sets.folders import find_suites
from .sets.names import like
from .sets.real import relabelled
from .sets.suites import REAL, Suite, open_suites
from .subject import Subject, build_subject, create
from .weights import Hashes, check_weights

_logger = logging.getLogger(__name__)


@dataclass
class Session:
    """One evaluation by one process, or by a group of them.

    Attributes:
        args: All options; nothing writes into them.
        resolved: What comes of them.
        process: Device of this process, and where it stands.
        ranks: Who shares the work.
        hashes: Of the files of weights.
        non_finite: What gave outputs that are NaN or infinite, in words; the same for all ranks.
    """

    args: argparse.Namespace
    resolved: Resolved
    process: Process
    ranks: Ranks
    hashes: Hashes = field(default_factory=Hashes)
    non_finite: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, args: argparse.Namespace, resolved: Resolved) -> "Session":
        """Sets up this process, and says what the options come to."""
        process = set_up(args.device, args.fuser, args.fast_norm)
        session = cls(args, resolved, process, Ranks())
        if not session.primary:
            logging.getLogger().setLevel(logging.WARNING)
        if resolved.taken_from is not None:
            _logger.info(f"Model and preprocessing as in {resolved.taken_from}: {args.model} {resolved.taken}")
        if resolved.not_taken:
            _logger.info(f"{', '.join(resolved.not_taken)} not looked at, because --model is given: preprocessing is "
                         f"that of timm's tests, where the command line does not say")
        return session

    @property
    def device(self) -> torch.device:
        return self.process.device

    @property
    def primary(self) -> bool:
        return self.ranks.primary

    def note_non_finite(self, what: str, broken: int, images: int) -> None:
        """Remembers and says that a model gave outputs that are not finite, if it did.

        Args:
            what: Which model, and on what.
            broken: Number of images with such outputs.
            images: Number of all.
        """
        if not broken:
            return
        self.non_finite.append(what)
        if self.primary:
            _logger.warning(f"{what}: {broken:,} of {images:,} images have outputs that are NaN or infinite: the "
                            f"accuracy says nothing, and is left out of means")

    def close(self) -> None:
        """Leaves the group of processes."""
        self.ranks.close()
        leave_process_group()

    def checkpoints(self) -> list[str | None]:
        """The files to evaluate, copies left out; ``[None]`` without any: timm's weights.

        Hours may lie between the first and the last of several: one that does not fit the model is found here.

        Raises:
            OptionError: A file cannot be read, is given twice, or does not fit.
        """
        args = self.args
        files, copies = self.ranks.each(lambda: self.hashes.distinct(args.checkpoint, self.resolved.in_folders))
        if (left_out := [*self.resolved.left_out, *copies]) and self.primary:
            _logger.info(f"Unfinished or the same as another checkpoint: {', '.join(left_out)}")
        if len(files) > 1:
            self.ranks.each(lambda: check_weights(
                create(args, args.model, pretrained=False), args.model, files, args.use_ema, must_be_averaged=True))
        return [*files] or [None]

    def subject(self, checkpoint: str | None) -> Subject:
        """The model with the weights of a file, on the device; all ranks together.

        Raises:
            OptionError: As :func:`~timm_sam.evaluation.subject.build_subject`.
        """
        return self.ranks.each(lambda: build_subject(
            self.args, checkpoint, self.device, verbose=self.primary, hashes=self.hashes, must_be_averaged=True))

    def suites(self, outputs: int) -> list[Suite]:
        """The data sets that are asked for, the same ones for all ranks.

        Args:
            outputs: Of the model.

        Raises:
            OptionError: One is not what it is said to be, or not the same for all ranks.
        """
        suites = self.ranks.each(lambda: _open(self.args, outputs, self.primary))
        for suite in suites if self.resolved.crop_given else ():
            suite.crop_pct = None
        check_same(suites, self.ranks)
        return suites

    def check_kept(self, files: Mapping[str, str], checkpoints: Sequence[str | None], subject: Subject,
                   rows: Collection[tuple[str, str]], **whose: str) -> None:
        """Looks whether a new table of some checkpoints holds what an existing one does.

        Args:
            files: Format -> file.
            checkpoints: All of them.
            subject: The first.
            rows: Pairs (data set, measure) of the new table.
            whose: ``command`` and ``out`` of :func:`~timm_sam.evaluation.results.check_kept`.

        Raises:
            OptionError: It lacks something, or the existing table cannot be read.
        """
        sha256s = {subject.sha256, *(self.hashes.of_file(path) for path in checkpoints if path is not None)}
        results.check_kept(files, [path or self.args.model for path in checkpoints], sha256s, rows, **whose)


def _open(args: argparse.Namespace, outputs: int, verbose: bool) -> list[Suite]:
    folders: dict[str, str] = {}
    origins: dict[str, str] = {}
    if args.data_dir:
        origin = f"--data-dir {args.data_dir} --split {args.split}"
        folders[args.split] = split_root(args.data_dir, args.split, f"--split {args.split}")
        origins[args.split] = origin
    for name, folder in args.eval:
        if name in folders:
            raise OptionError(
                f"--eval {name}={folder}: --data-dir --split {args.split} has this name already; give another")
        folders[name] = folder
        if verbose and (published := like(name)) is not None:
            _logger.warning(f"--eval {name}={folder}: taken for class folders of the training; if {published} is "
                            f"meant, its label space is another one: write {published}={folder}")
    if args.eval_root:
        found, missing = find_suites(args.eval_root)
        if verbose:
            _logger.info(f"--eval-root {args.eval_root}: found {', '.join(found) or 'nothing'}; not there: "
                         f"{', '.join(missing) or 'none'}")
        if not found and not folders:
            raise OptionError(
                f"--eval-root {args.eval_root} holds none of {', '.join(missing)} under its published name: check the "
                f"folder, or name the sets by --eval NAME=DIR")
        for name, folder in found.items():
            if name not in folders:
                folders[name], origins[name] = folder, f"--eval-root {args.eval_root} ({name})"
    if corruptions.NAME in folders:
        folders, origins = _with_parts(folders, origins, args.allow_partial)
    class_map = read_class_map(args.class_map, args.data_dir or "") if args.class_map else None
    suites = open_suites(folders, outputs, class_map, args.allow_partial, origins)
    suites = [relabelled(suite, args.real_labels) if suite.name == REAL else suite for suite in suites]
    for suite in suites if verbose else ():
        remarks = "".join(f"; {remark}" for remark in (*suite.flags, *suite.notes))
        _logger.info(f"{suite.name}: {len(suite.samples):,} images in {suite.root}, {suite.space.name}{remarks}")
    return suites


def _with_parts(folders: Mapping[str, str], origins: Mapping[str, str],
                allow_partial: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Sets and the flags that they are from, with the parts of ImageNet-C in its place.

    Raises:
        OptionError: Parts are missing, or one is named by itself, too.
    """
    all_folders: dict[str, str] = {}
    all_origins = dict(origins)
    for name, folder in folders.items():
        if name != corruptions.NAME:
            all_folders[name] = folder
            continue
        flag = origins.get(name, f"--eval {name}={folder}")
        found = corruptions.parts(folder, flag, allow_partial)
        if (twice := next((part for part in found if part in folders), None)) is not None:
            raise OptionError(f"--eval {twice}={folders[twice]}: {flag} has this part, too; leave one of them out")
        all_folders.update(found)
        all_origins.update({part: f"{flag} ({part})" for part in found})
    return all_folders, all_origins


def check_same(suites: Sequence[Suite], ranks: Ranks) -> None:
    """Compares what the ranks see, which may run on different machines.

    Raises:
        OptionError: A data set is not the same for all of them.
    """
    first, *others = ranks.run(lambda: {suite.name: suite.samples_sha256 for suite in suites})
    for rank, theirs in enumerate(others, 1):
        different = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if different:
            origins = {suite.name: suite.origin for suite in suites}
            raise OptionError(f"{origins.get(different[0]) or f'--eval {different[0]}'}: rank {rank} does not see the "
                              f"files that rank 0 sees; give all machines the same data")
