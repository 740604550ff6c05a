"""The paper's three CIFAR networks in plain torch, block by block, with nothing of timm in them."""
import torch.nn.functional as F
from torch import Tensor, nn


def convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)


class PostActivation(nn.Module):
    """Convolutions, each with BatchNorm behind it; ReLU between them and behind the sum."""

    def __init__(self, inputs: int, widths: list[int], sizes: list[int], strided: int, stride: int, groups: int):
        super().__init__()
        all_widths = [inputs, *widths]
        self.convs = nn.ModuleList(
            convolution(all_widths[i], all_widths[i + 1], size, stride if i == strided else 1,
                        groups if size == 3 else 1) for i, size in enumerate(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.shortcut = nn.ModuleList()
        if stride != 1 or inputs != widths[-1]:
            self.shortcut.extend([convolution(inputs, widths[-1], 1, stride), nn.BatchNorm2d(widths[-1])])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            y = norm(conv(y))
            if i < len(self.convs) - 1:
                y = F.relu(y)
        for module in self.shortcut:
            x = module(x)
        return F.relu(y + x)


class PreActivation(nn.Module):
    """BatchNorm, ReLU, convolution, twice; the shortcut convolution sees the raw input."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), convolution(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), convolution(outputs, outputs, 3)
        self.shortcut = convolution(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class Network(nn.Module):
    """A 3x3 convolution, three stages, global average, linear layer."""

    def __init__(self, name: str, classes: int):
        super().__init__()
        self.pre = name == 'wrn28_10'
        stem, depth, widths = {'resnet56': (16, 9, (16, 32, 64)), 'resnext29_32x4d': (64, 3, (256, 512, 1024)),
                               'wrn28_10': (16, 4, (160, 320, 640))}[name]
        self.stem = convolution(3, stem, 3)
        self.first = None if self.pre else nn.BatchNorm2d(stem)
        blocks, inputs = [], stem
        for stage, width in enumerate(widths):
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                if self.pre:
                    blocks.append(PreActivation(inputs, width, stride))
                elif name == 'resnet56':
                    blocks.append(PostActivation(inputs, [width, width], [3, 3], 0, stride, 1))
                else:
                    blocks.append(PostActivation(inputs, [width // 2, width // 2, width], [1, 3, 1], 1, stride, 32))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.BatchNorm2d(inputs) if self.pre else None
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.first is not None:
            x = F.relu(self.first(x))
        x = self.blocks(x)
        if self.last is not None:
            x = F.relu(self.last(x))
        return self.linear(x.mean((2, 3)))
