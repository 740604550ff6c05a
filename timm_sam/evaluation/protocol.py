"""Suites of data sets and attacks on one or many checkpoints, in one process or one group of ranks."""
import dataclasses
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from . import calibration, provenance, results, tables
from .attack.robustness import AttackedSet, attack_suite, measure_name
from .journal import Journal, key_of
from .outputs import Outputs
from .per_image import Collector, Kept, Look, whole
from .precision import full_precision
from .quantize import quantized
from .ranks import batches_of
from .scoring import Batch, mean_of, score
from .session import Session
from .sets import corruptions
from .sets.loaders import suite_loader
from .sets.suites import Suite
from .subject import Subject
from .tables import Measure


def evaluate_suites(session: Session, files: Mapping[str, str]) -> tuple[list[Measure], list[str], dict[str, Any]]:
    """Evaluates every checkpoint on every data set, and under attack.

    Args:
        session: The options, and what is open.
        files: Where the results will go, by format; they are not written here.

    Returns:
        The measures, the checkpoints' short names, and the protocol: all that the numbers depend on.

    Raises:
        OptionError: A data set is not what it is said to be, weights do not fit, or results would be replaced.
    """
    args, ranks = session.args, session.ranks
    journal, outputs = _journal(session), _outputs(session)
    results.refuse_special([*files.values(), *journal.files()], f"--results-file {args.results_file}")
    if not (args.overwrite or args.skip_existing):
        kept = [outputs.folder] if outputs.kind else []
        results.refuse_existing([*files.values(), *journal.files(), *kept], f"--results-file {args.results_file}")
    checkpoints = session.checkpoints()

    suites: list[Suite] = []
    attacked: AttackedSet | None = None
    per_checkpoint, described = [], []
    for checkpoint in checkpoints:
        subject = session.subject(checkpoint)
        if not suites:
            suites = session.suites(subject.num_classes)
            attacked = AttackedSet.of_options(args, suites, subject.num_classes)
            if args.skip_existing:
                rows = _rows(session, suites, attacked, subject.num_classes)
                ranks.each(partial(session.check_kept, files, checkpoints, subject, rows))
            journal.begin(ranks, args.skip_existing)  # the options are in order: from here on files change
        measures: list[Measure] = []
        for suite in suites:
            measures += _evaluate_suite(session, subject, suite, journal, outputs)
        for bits in args.quantize_weights or ():
            with quantized(subject.model, bits):
                for suite in suites:
                    measures += _evaluate_quantized(session, subject, suite, bits, journal)
        if attacked is not None:
            identity = provenance.identity(args, subject, attacked.suite)
            broken = next(measure.non_finite for measure in measures if measure.dataset == attacked.suite.name)
            for measure in attack_suite(args, subject, attacked, identity, journal, ranks):
                measures.append(dataclasses.replace(measure, non_finite=broken))
        per_checkpoint.append(corruptions.summary(measures))
        described.append(provenance.checkpoint(subject))

    protocol = provenance.protocol(args, subject, suites, described,
                                   None if attacked is None else attacked.describe(args))
    return tables.merge(per_checkpoint), tables.short_names(checkpoints, args.model), protocol


def _journal(session: Session) -> Journal:
    """The journal beside the results."""
    return Journal(_beside(session), session.ranks.rank)


def _outputs(session: Session) -> Outputs:
    """The outputs beside the results."""
    return Outputs(_beside(session), session.args.save_outputs)


def _beside(session: Session) -> str:
    """What names of files beside the results begin with."""
    path: str = session.args.results_file
    return path if session.resolved.format_given else os.path.splitext(path)[0]


def _rows(session: Session, suites: list[Suite], attacked: AttackedSet | None,
          outputs: int) -> set[tuple[str, str]]:
    """What the table will hold, as pairs (data set, measure)."""
    rows = {(suite.name, name) for suite in suites for name in _accuracies(suite, outputs)}
    if session.args.calibration:
        rows |= {(suite.name, name) for suite in suites for name in calibration.names(outputs, suite.space.differs)}
    rows |= {(suite.name, name) for suite in suites for bits in session.args.quantize_weights or ()
             for name in _of_bits(bits)}
    rows = corruptions.rows(rows)
    if attacked is not None:
        rows |= {(attacked.suite.name, name) for name in (
            "clean", *(measure_name(session.args, radius) for radius in session.args.attack))}
    return rows


def _of_bits(bits: int) -> list[str]:
    return [f"top1_w{bits}", f"drop_w{bits}"]


def _accuracies(suite: Suite, outputs: int) -> list[str]:
    return ["top1", "top5", *([f"top1_{outputs}way"] if suite.space.differs else [])]


def _key(session: Session, subject: Subject, suite: Suite, **more: Any) -> str:
    return key_of(part="scores", **provenance.identity(session.args, subject, suite), **more)


def _evaluate_suite(session: Session, subject: Subject, suite: Suite, journal: Journal,
                    outputs: Outputs) -> list[Measure]:
    ranks, args = session.ranks, session.args
    key = _key(session, subject, suite)
    path = outputs.path(subject.sha256, suite)
    # one process writes these files, and only where that one runs they need be
    missing = outputs.kind is not None and not ranks.gather(ranks.primary and outputs.holds(path, key))[0]
    done = journal.done.get(key, {})
    # an older version did not look at what is not finite, and calibration may not have been asked for
    if missing or "non_finite" not in done or (args.calibration and "calibration" not in done):
        looks: dict[str, Look] = {}
        if args.calibration:
            looks["calibration"] = partial(calibration.certainties, space=suite.space)
        if missing:
            looks["outputs"] = partial(outputs.look, space=suite.space)
        scores, kept = _scores(session, subject, suite, looks)
        if args.calibration:
            scores["calibration"] = {space: calibration.calibration(values)
                                     for space, values in kept["calibration"].items()}
        if missing:
            # if one cannot write, all end
            ranks.run(lambda: outputs.write(path, suite, key, kept["outputs"]) if ranks.primary else None)
        journal.note(key, scores)
    measures = _measures(session, subject, suite, journal.done[key])
    if outputs.kind is not None:
        measures[0].details = [outputs.shown(path)]
    return measures


def _evaluate_quantized(session: Session, subject: Subject, suite: Suite, bits: int, journal: Journal) -> list[Measure]:
    """Accuracy with the rounded weights that the model has now, and what it has lost by them."""
    key = _key(session, subject, suite, quantized=bits)
    if key not in journal.done:
        journal.note(key, _scores(session, subject, suite, {})[0])
    scores, exact = journal.done[key], journal.done[_key(session, subject, suite)]
    images, broken = scores["images"], max(scores["non_finite"], exact["non_finite"])
    session.note_non_finite(f"{subject.called} on {suite.name} with weights of {bits} bits",
                            scores["non_finite"], images)
    counts = scores["right1"], exact["right1"] - scores["right1"]
    return [Measure("quantised", suite.name, name, images, suite.flags, [100 * count / images], [broken])
            for name, count in zip(_of_bits(bits), counts)]


def _scores(session: Session, subject: Subject, suite: Suite,
            looks: Mapping[str, Look]) -> tuple[dict[str, Any], dict[str, Kept]]:
    """Runs the model over a data set, all ranks together; returns its scores, and what each look has kept."""
    args, ranks = session.args, session.ranks
    batches = batches_of(range(len(suite.samples)), args.batch_size)
    loaded = suite_loader(args, subject, suite, batches, ranks.share(range(len(batches))))

    def share() -> tuple[list[Batch], dict[str, dict[int, Kept]]]:
        collectors = {name: Collector(look, loaded.places, args.log_freq) for name, look in looks.items()}
        scored = score(
            subject, loaded, loaded.places, suite.space, suite.name, prefetcher=not args.no_prefetcher,
            channels_last=args.channels_last, log_freq=args.log_freq, watch=list(collectors.values()))
        return scored, {name: collector.by_place() for name, collector in collectors.items()}

    with full_precision():
        parts = ranks.run(share)
    together = [batch for scored, _ in parts for batch in scored]
    scores = dataclasses.asdict(mean_of(sorted(together, key=lambda batch: batch.index)))
    return scores, {name: whole(collected[name] for _, collected in parts) for name in looks}


def _measures(session: Session, subject: Subject, suite: Suite, scores: Mapping[str, Any]) -> list[Measure]:
    images, broken = scores["images"], scores["non_finite"]
    flags = [*suite.flags, *([f"{broken} of {images} outputs not finite"] if broken else [])]
    session.note_non_finite(f"{subject.called} on {suite.name}", broken, images)
    right = (scores["right1"], scores["right5"], scores["right1_all"])
    measures = [Measure(suite.kind.upper(), suite.name, name, images, flags, [100 * count / images], [broken])
                for name, count in zip(_accuracies(suite, subject.num_classes), right)]
    if session.args.calibration:
        for name, (space, measure) in calibration.names(subject.num_classes, suite.space.differs).items():
            found = scores["calibration"][space]
            unit, digits = calibration.MEASURES[measure]
            bins = calibration.bins_shown(found, measure)
            measures.append(Measure("calibration", suite.name, name, found["images"], flags, [found[measure]], [broken],
                                    unit, digits, [] if bins is None else [bins]))
    return measures
