"""ImageNet's validation images with reassessed labels: any number per image (Beyer et al., 2020, "ReaL").

Paper: https://arxiv.org/abs/2006.07159, labels: ``real.json`` of https://github.com/google-research/reassessed-imagenet,
a list of one list of outputs per image, in the order of the images' numbers. Images without a label do not count.
"""
import dataclasses
import json
import os
import re

from ...cli.errors import OptionError
from .label_spaces import IMAGENET_CLASSES, LabelSpace
from .suites import REAL, Suite

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")


def relabelled(suite: Suite, path: str) -> Suite:
    """The images of ImageNet with the labels of a file.

    Args:
        suite: ImageNet's validation images, under their published names.
        path: Of the file.

    Returns:
        A set whose targets are the numbers of sets of labels: see :class:`.label_spaces.LabelSpace`.

    Raises:
        OptionError: The file cannot be read or is none of labels, or an image is not one of those it is about.
    """
    flag = f"--real-labels {path}"
    try:
        with open(path, encoding="utf-8") as f:
            labels = json.load(f)
        lists = [tuple(sorted({int(label) for label in several})) for several in labels]
        if not lists or any(several and not 0 <= several[0] <= several[-1] < IMAGENET_CLASSES for several in lists):
            raise ValueError("labels out of range")
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        raise OptionError(f"{flag}: it is no JSON list of one list of ImageNet's outputs per image; give the published "
                          f"real.json") from None
    accepted: list[tuple[str, tuple[int, ...]]] = []
    for image, _ in suite.samples:
        match = _NUMBER.fullmatch(os.path.basename(image))
        number = int(match.group(1)) if match else 0
        if not 1 <= number <= len(lists):
            raise OptionError(f"{suite.flag}: {image} is no image of {flag}, which has {len(lists):,}: names must be "
                              f"the published ILSVRC2012_val_00000001.JPEG and so on")
        if lists[number - 1]:
            accepted.append((image, lists[number - 1]))
    if not accepted:
        raise OptionError(f"{flag}: it has no label for any image of {suite.root}; give the published real.json")
    sets = sorted({several for _, several in accepted})
    place = {several: i for i, several in enumerate(sets)}
    samples = sorted(((image, place[several]) for image, several in accepted),
                     key=lambda sample: (sample[1], os.path.basename(sample[0]), sample[0]))
    without = len(suite.samples) - len(samples)
    return dataclasses.replace(
        suite, samples=samples, space=LabelSpace(REAL, sets=tuple(sets)),
        notes=[*suite.notes, *([f"{without} images without a label left out"] if without else [])])
