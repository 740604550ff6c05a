"""What the CIFAR networks are made of, as data."""
from dataclasses import dataclass

import torch
from torch import Tensor

import timm_sam.models as models  # registers them

assert models.cifar


@dataclass(frozen=True)
class Expected:
    """Parameters with 10 and 100 classes, norm parameters and their tensors, 1e9 multiply-adds, width of the features,
    channels and strides of the stages."""

    parameters: tuple[int, int]
    norm: tuple[int, int]
    gmac: float
    features: int
    channels: list[int]
    reductions: list[int]


THREE, FOUR, SIX = [1, 1, 2, 4], [1, 1, 2, 4, 8], [1, 2, 4, 8, 16, 32]
VGG = [64, 128, 256, 512, 512, 512]

NETWORKS = {
    'cifar_resnet56': Expected((855_770, 861_620), (4_256, 114), 0.1257, 64, [16, 16, 32, 64], THREE),
    'cifar_resnext29_32x4d': Expected(
        (4_775_754, 4_868_004), (25_216, 62), 0.7741, 1024, [64, 256, 512, 1024], THREE),
    'cifar_wrn28_10': Expected((36_479_194, 36_536_884), (17_952, 50), 5.243, 640, [16, 160, 320, 640], THREE),
    'cifar_resnet18': Expected((11_173_962, 11_220_132), (9_600, 40), 0.5554, 512, [64, 64, 128, 256, 512], FOUR),
    'cifar_resnet101': Expected(
        (42_512_970, 42_697_380), (105_344, 208), 2.510, 2048, [64, 256, 512, 1024, 2048], FOUR),
    'cifar_vgg13_bn': Expected((9_416_010, 9_462_180), (5_888, 20), 0.2283, 512, VGG, SIX),
    'cifar_vgg16_bn': Expected((14_728_266, 14_774_436), (8_448, 26), 0.3132, 512, VGG, SIX),
    'cifar_vgg19_bn': Expected((20_040_522, 20_086_692), (11_008, 32), 0.3981, 512, VGG, SIX),
    'cifar_densenet100': Expected((769_162, 800_032), (23_988, 198), 0.2880, 342, [24, 216, 300, 342], THREE),
}

# residual blocks, and how they are spread over the stages
STAGES = {
    'cifar_resnet56': (27, [9, 9, 9]),
    'cifar_resnext29_32x4d': (9, [3, 3, 3]),
    'cifar_wrn28_10': (12, [4, 4, 4]),
    'cifar_resnet18': (8, [2, 2, 2, 2]),
    'cifar_resnet101': (33, [3, 4, 23, 3]),
}


def images(count: int, size: int = 32) -> Tensor:
    """(count, 3, size, size), the same each time."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
