"""ImageNet-C: 15 corruptions in five severities each, as one evaluation set.

Paper: Hendrycks & Dietterich, ICLR 2019, https://arxiv.org/abs/1903.12261. Its mean corruption error (mCE) divides the
error of each corruption, over its severities, by AlexNet's. The numbers are those of the authors' code,
https://github.com/hendrycks/robustness.
"""
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence

from ...cli.errors import OptionError
from ..tables import Measure
from .folders import some

NAME = "imagenet-c"
SEVERITIES = (1, 2, 3, 4, 5)
# AlexNet's error in percent, mean over the severities; in the order of the paper's tables
ALEXNET: dict[str, float] = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.264,
    "defocus_blur": 81.988, "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.836,
    "snow": 86.6816, "frost": 82.6572, "fog": 81.9324, "brightness": 56.4592,
    "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.784, "jpeg_compression": 60.65,
}
# the folders that the archives are named after, which some copies keep
_AROUND = ("", "noise", "blur", "weather", "digital")
# the names of its parts as sets
PARTS = tuple(f"{NAME}/{corruption}/{severity}" for corruption in ALEXNET for severity in SEVERITIES)
MCE = "mce"


def is_part(name: str) -> bool:
    """Whether a set is one severity of one corruption."""
    return name.startswith(f"{NAME}/")


def parts(folder: str, flag: str, allow_partial: bool) -> dict[str, str]:
    """The sets that ImageNet-C is made of.

    Args:
        folder: With a folder per corruption, or those folders of folders as the archives are named; in each of them
            the severities ``1`` to ``5``, in these the class folders.
        flag: What errors begin with.
        allow_partial: Whether some may be missing.

    Returns:
        Name (``imagenet-c/<corruption>/<severity>``) -> folder of class folders, in the order of the paper.

    Raises:
        OptionError: There is no such folder, or something is missing.
    """
    if not os.path.isdir(folder):
        raise OptionError(f"{flag}: no such folder; check the path")
    found: dict[str, str] = {}
    missing: list[str] = []
    for corruption in ALEXNET:
        tops = [os.path.join(folder, around, corruption) for around in _AROUND]
        top = next((top for top in tops if os.path.isdir(top)), None)
        for severity in SEVERITIES:
            if top is not None and os.path.isdir(os.path.join(top, str(severity))):
                found[f"{NAME}/{corruption}/{severity}"] = os.path.join(top, str(severity))
            else:
                missing.append(f"{corruption}/{severity}")
    if not found or (missing and not allow_partial):
        raise OptionError(
            f"{flag}: {len(missing)} of {len(PARTS)} folders of {NAME} are not there: "
            f"{some(missing)}; complete the set" + (", or add --allow-partial to score the others" if found else ""))
    return found


def summary(measures: Sequence[Measure]) -> list[Measure]:
    """The measures of one checkpoint, those of all corruptions and severities as those of one set.

    Each measure becomes the mean over the corruptions of the means over their severities. Of ``top1`` there is also a
    row per corruption, whose details are the severities', and, if all are there, ``mce``.
    """
    others: list[Measure] = []
    by_name: dict[str, dict[str, dict[str, Measure]]] = {}
    for measure in measures:
        if not is_part(measure.dataset) or measure.group == "adversarial":
            others.append(measure)
            continue
        _, corruption, severity = measure.dataset.split("/")
        by_name.setdefault(measure.name, {}).setdefault(corruption, {})[severity] = measure
    found: list[Measure] = []
    for name, corruptions in by_name.items():
        values = {corruption: statistics.fmean(m.values[0] for m in severities.values())
                  for corruption, severities in corruptions.items()}
        together = [m for severities in corruptions.values() for m in severities.values()]
        found.append(_summed(name, together, statistics.fmean(values.values())))
        if name != "top1":
            continue
        if len(together) == len(PARTS):
            found.append(_summed(MCE, together, mce(values)))
        for corruption, severities in corruptions.items():
            row = _summed(corruption, list(severities.values()), values[corruption])
            row.details = [{severity: dict(top1=m.values[0], **(dict(outputs=m.details[0]) if m.details else {}))
                            for severity, m in severities.items()}]
            found.append(row)
    return [*others, *found]


def mce(accuracies: Mapping[str, float]) -> float:
    """Mean corruption error in percent of AlexNet's.

    Args:
        accuracies: Corruption -> top-1 in percent, mean over its severities; all corruptions.
    """
    return 100 * statistics.fmean((100 - accuracies[corruption]) / error for corruption, error in ALEXNET.items())


def rows(pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """What :func:`summary` makes of pairs (data set, measure)."""
    pairs = list(pairs)
    ours = [(dataset, name) for dataset, name in pairs if is_part(dataset)]
    found = {pair for pair in pairs if pair not in ours} | {(NAME, name) for _, name in ours}
    scored = {dataset for dataset, name in ours if name == "top1"}
    found |= {(NAME, dataset.split("/")[1]) for dataset in scored}
    return found | ({(NAME, MCE)} if len(scored) == len(PARTS) else set())


def _summed(name: str, together: Sequence[Measure], value: float) -> Measure:
    flags = list(dict.fromkeys(flag for m in together for flag in m.flags))
    parts_there, parts_all = len({m.dataset for m in together}), len(SEVERITIES if name in ALEXNET else PARTS)
    if parts_there < parts_all:
        flags.append(f"partial: {parts_there} of {parts_all} folders")
    first = together[0]
    return Measure(first.group, NAME, name, sum(m.images for m in together), flags, [value],
                   [sum(sum(m.broken) for m in together)], first.unit, first.digits)
