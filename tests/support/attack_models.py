"""Small models and images that the tests of attacks share."""
import math

import torch
from torch import nn

from timm_sam.evaluation.attack.attack import attack

SHAPE = (3, 4, 4)


def pictures(count, shape=SHAPE, seed=0, spread=0.1):
    """Random images around grey: the sides of the box are far."""
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + spread * (2 * torch.rand(count, *shape, generator=generator) - 1)


def linear(classes=6, seed=0, scale=1.0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), classes))
    model[1].weight.data.mul_(scale)
    return model.eval()


def biased(logits):
    """The same logits for every image, although they depend on it formally."""
    model = linear(len(logits))
    model[1].weight.data.zero_()
    model[1].bias.data.copy_(torch.tensor(logits))
    return model


def convolutional(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                          nn.Flatten(), nn.Linear(32, 6)).eval()
    with torch.no_grad():  # every class gets its share of the images
        model[-1].bias -= model(pictures(64, seed=9, spread=0.5)).mean(0)
    return model


class Recording:
    """A model that keeps the images it was asked about."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, images):
        self.seen.append(images.detach().clone())
        return self.model(images)


def predicted(model, images):
    with torch.no_grad():
        return model(images).argmax(1)


def run(model, images, labels=None, radius=0.05, norm='linf', **kwargs):
    labels = predicted(model, images) if labels is None else labels
    return attack(model, images, labels, range(len(images)), norm, radius, **{'steps': 20, **kwargs})
