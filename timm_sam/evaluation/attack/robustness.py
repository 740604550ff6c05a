"""Robust accuracy on a data set: batches, progress, and what is done already."""
import argparse
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from timm import utils

from ...cli.errors import OptionError
from ..journal import Journal, key_of
from ..ranks import Ranks, batches_of
from ..sets.images import class_balanced_subset
from ..sets.loaders import suite_loader
from ..sets.suites import Suite
from ..subject import Subject
from ..tables import Measure
from .attack import TARGETS, Attacked, Normalized, attack
from .ball import Radius
from .standard import ATTACKS, PACKAGE, standard

_logger = logging.getLogger(__name__)

APGD, STANDARD = VERSIONS = ("apgd", "standard")  # of the attack
MOST = 5000  # images that are attacked unless --attack-num-samples says otherwise


@dataclass(frozen=True)
class AttackedSet:
    """A data set and which of its samples are attacked (positions in ``suite.samples``, ascending)."""

    suite: Suite
    indices: list[int]

    @classmethod
    def of_options(cls, args: argparse.Namespace, suites: Sequence[Suite], outputs: int) -> "AttackedSet | None":
        """What ``--attack`` and its further flags ask for, of the suites that are evaluated; None: no attack.

        Args:
            args: All options.
            suites: The data sets.
            outputs: Of the model.

        Raises:
            OptionError: There is no such set, or it has too few classes or images.
        """
        if not args.attack:
            return None
        names = [suite.name for suite in suites]
        if args.attack_set is not None and args.attack_set not in names:
            raise OptionError(f"--attack-set {args.attack_set} is not evaluated: use one of {', '.join(names)}")
        single = [suite.name for suite in suites if suite.space.sets is None]
        if args.attack_set is not None and args.attack_set not in single:
            raise OptionError(f"--attack-set {args.attack_set}: its images have several labels, and the attack needs "
                              f"one; use another set, such as imagenet")
        name = args.attack_set or next((s.name for s in suites if s.kind == "id" and s.name in single), None)
        if name is None:
            raise OptionError(
                f"--attack: none of {', '.join(names)} is in distribution; choose one by --attack-set NAME")
        suite = suites[names.index(name)]
        classes = suite.space.num_classes(outputs)
        if classes < 4:
            raise OptionError(
                f"--attack: {name} has {classes} classes, targeted DLR needs 4 or more; leave --attack out")
        return cls.choose(suite, args)

    @classmethod
    def choose(cls, suite: Suite, args: argparse.Namespace) -> "AttackedSet":
        """All samples, or a class-balanced subset.

        Raises:
            OptionError: There are fewer samples than asked for.
        """
        count = args.attack_num_samples or min(MOST, len(suite.samples))
        if count == len(suite.samples):
            return cls(suite, list(range(count)))
        return cls(suite, class_balanced_subset(suite, count, args.seed))

    def describe(self, args: argparse.Namespace) -> dict[str, Any]:
        """What its numbers depend on beside the model and the data set."""
        digest = hashlib.sha256(",".join(map(str, self.indices)).encode()).hexdigest()
        version = {} if args.attack_version == APGD else dict(
            attacks=list(ATTACKS), version=args.attack_version, package=f"{PACKAGE} {metadata.version(PACKAGE)}",
            targets=TARGETS)
        return dict(
            attacks=["APGD-CE", "APGD-T"], dataset=self.suite.name, images=len(self.indices), subset_sha256=digest,
            seed=args.seed, steps=args.attack_steps, targets=args.attack_targets, restarts=1,
            radii=[dict(norm=radius.norm, radius=radius.value, written=radius.text) for radius in args.attack],
            precision="float32 (TF32 off)") | version


def attack_suite(args: argparse.Namespace, subject: Subject, attacked: AttackedSet, identity: Mapping[str, Any],
                 journal: Journal, ranks: Ranks) -> list[Measure]:
    """Clean accuracy of the attacked samples, and robust accuracy for each radius.

    Each finished batch goes into the journal, so that an interrupted attack goes on at the first unfinished one.

    Args:
        args: All options.
        subject: The model.
        attacked: The samples.
        identity: What the scores of the suite depend on.
        journal: What is done.
        ranks: Who shares the work.

    Raises:
        OptionError: An image cannot be read, or the model cannot be attacked.
    """
    suite = attacked.suite
    batches = batches_of(attacked.indices, args.batch_size)
    protocol = {**identity, "attack": {k: v for k, v in attacked.describe(args).items() if k != "radii"}}

    def key(place: int, radius: Radius) -> str:
        return key_of(part="attack", place=place, norm=radius.norm, radius=radius.value, **protocol)

    pending = [place for place in range(len(batches)) if any(key(place, r) not in journal.done for r in args.attack)]
    for part in ranks.run(lambda: _attack_batches(
            args, subject, attacked, batches, ranks.share(pending), key, journal, ranks)):
        journal.done.update(part)

    counted = {radius: {name: sum(journal.done[key(place, radius)][name] for place in range(len(batches)))
                        for name in ("clean", "robust", "non_finite", "no_gradient")} for radius in args.attack}
    images = len(attacked.indices)
    flags = [f"{images} of {len(suite.samples)} images, seed {args.seed}"] if images < len(suite.samples) else []
    flags += suite.flags
    for radius, counts in counted.items():
        if ranks.primary and counts["non_finite"] + counts["no_gradient"]:
            _logger.warning(
                f"{radius}: {counts['non_finite']} images gave logits or gradients that are not finite, "
                f"{counts['no_gradient']} have no gradient: what did not break them may not have been an attack, and "
                f"robust accuracy may be too high")
    clean = counted[args.attack[0]]["clean"]
    measures = [Measure("adversarial", suite.name, "clean", images, flags, [100 * clean / images])]
    for radius, counts in counted.items():
        suspicious = counts["non_finite"] + counts["no_gradient"]
        hidden = [f"{suspicious} images without usable gradients"] if suspicious else []
        measures.append(Measure("adversarial", suite.name, measure_name(args, radius), images, [*flags, *hidden],
                                [100 * counts["robust"] / images]))
    return measures


def measure_name(args: argparse.Namespace, radius: Radius) -> str:
    """How tables name robust accuracy at a radius: that of more attacks is another number."""
    return str(radius) if args.attack_version == APGD else f"{radius} ({args.attack_version})"


def _attack_batches(args: argparse.Namespace, subject: Subject, attacked: AttackedSet, batches: list[list[int]],
                    places: list[int], key: Any, journal: Journal, ranks: Ranks) -> dict[str, dict[str, int]]:
    """Attacks this rank's batches with every radius; returns what it has added to the journal."""
    config = subject.data_config
    # a compiled model would be compiled anew for each of the sizes to which batches shrink
    model = Normalized(getattr(subject.model, "_orig_mod", subject.model), config["mean"], config["std"],
                       attacked.suite.space.reduce)
    loaded = suite_loader(args, subject, attacked.suite, batches, places, raw=True)
    done: dict[str, dict[str, int]] = {}
    units = len(places) * len(args.attack)
    finished, started, robust = 0, time.time(), {radius: utils.AverageMeter() for radius in args.attack}
    for place, (images, labels) in zip(loaded.places, loaded):
        images, labels = images.to(subject.device), labels.to(subject.device)
        lowest, highest = (float(v) for v in images.aminmax())
        if not (lowest > -0.5 and highest < 1.5):  # resizing such images may overshoot by a little
            raise OptionError(f"--attack: images of {attacked.suite.name} lie in [{lowest:g}, {highest:g}], and radii "
                              f"are those of images in [0, 1]; leave out --input-img-mode {args.input_img_mode}")
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        for radius in args.attack:
            if key(place, radius) not in journal.done:
                try:
                    # rounding in the loader's division must not leave the unit cube
                    if args.attack_version == APGD:
                        found = attack(model, images.clamp(0, 1), labels, batches[place], radius.norm, radius.value,
                                       steps=args.attack_steps, n_targets=args.attack_targets, seed=args.seed)
                    else:
                        found = standard(model, images.clamp(0, 1), labels, radius.norm, radius.value, args.seed)
                except ValueError as e:
                    raise OptionError(f"--attack {radius.norm}={radius.text} of {subject.name}: {e}") from e
                done[key(place, radius)] = _count(found)
                journal.add(key(place, radius), _count(found))
            counts = journal.done[key(place, radius)]
            robust[radius].update(100 * counts["robust"] / len(labels), len(labels))
            finished += 1
            if ranks.primary:
                left = (time.time() - started) / finished * (units - finished)
                _logger.info(f"Attack: {attacked.suite.name} [{finished:>4d}/{units}]  {radius}: robust "
                             f"{robust[radius].avg:.2f} %  Left: {left:.0f}s")
    return done


def _count(found: Attacked) -> dict[str, int]:
    return {name: int(getattr(found, name).sum()) for name in ("clean", "robust", "non_finite", "no_gradient")}
