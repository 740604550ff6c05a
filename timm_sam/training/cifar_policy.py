"""``--aa cifar10``: AutoAugment's policy for CIFAR, which timm does not have, from torchvision."""
from typing import Any

from timm.data import AugMixDataset
from timm.data.naflex_dataset import NaFlexMapDatasetWrapper
from timm.data.naflex_transforms import RandomResizedCropToSequence
from timm.data.scheduled_sampler import ScheduledTransformDataset
from timm.data.transforms import (
    CenterCropOrPad,
    RandomCropOrPad,
    RandomResizedCropAndInterpolation,
    ResizeKeepRatio,
)
from torchvision.transforms import (
    AutoAugment,
    AutoAugmentPolicy,
    RandomHorizontalFlip,
    RandomVerticalFlip,
)

NAME = "cifar10"

_CROPS_AND_FLIPS = (RandomResizedCropAndInterpolation, RandomResizedCropToSequence, ResizeKeepRatio, CenterCropOrPad,
                    RandomCropOrPad, RandomHorizontalFlip, RandomVerticalFlip)


def add_cifar10_policy(loader: Any) -> None:
    """Puts the policy behind crop and flips, in front of everything else; in place.

    25 pairs of operations, one of which is drawn for each image; what is moved in from outside of the image is grey, of
    128 (Cubuk et al., 2019). Of an AugMix data set, all views but the first undergo it.

    Args:
        loader: A training loader of timm whose transforms have no policy.
    """
    dataset = getattr(loader, "loader", loader).dataset
    transforms: list[Any]
    if isinstance(dataset, AugMixDataset):
        transforms = [dataset.augmentation]
    elif isinstance(dataset, ScheduledTransformDataset):  # one for each size
        transforms = list(dataset.transforms)
    elif isinstance(dataset, NaFlexMapDatasetWrapper):
        transforms = list(dataset.transforms.values())
    else:
        transforms = [dataset.transform]
    policy = AutoAugment(AutoAugmentPolicy.CIFAR10, fill=128)  # of as many channels as the image has
    for transform in transforms:
        steps = transform.transforms
        steps.insert(sum(isinstance(step, _CROPS_AND_FLIPS) for step in steps), policy)
