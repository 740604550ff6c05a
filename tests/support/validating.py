"""What the tests of validate.py share: runs of it in process, and checkpoints whose outputs are known."""
import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.utils import accuracy

from support.running import in_process
from timm_sam import validate

SIZE = 32
BASE = f'--device cpu --model test_resnet --img-size {SIZE} -j 0 -b 5'


def run_validate(cwd, command, base=BASE):
    """Runs validate.py in process and in a folder."""
    return in_process(validate.main, shlex.split(f'{base} {command}'), cwd)


def result(done):
    """The JSON after the line that marks it."""
    assert done.code == 0, done.err[-3000:]
    return json.loads(done.out.split('--result\n')[1])


def model_of(num_classes, name='test_resnet'):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=num_classes).eval()


def constant_checkpoint(path, outputs, num_classes=1000, key=None):
    """Weights that give every image the same outputs: those named here, best first, then all the others.

    The best has logit 10, the next ones 9, 8, ...; the others have -100, -101, ... by their index. With ``key``, they
    lie under this key of the file, beside ``state_dict`` with zero outputs.
    """
    model = model_of(num_classes)
    zeros = dict(model.state_dict())
    zeros['fc.weight'] = torch.zeros_like(zeros['fc.weight'])
    zeros['fc.bias'] = torch.zeros_like(zeros['fc.bias'])
    bias = -100 - torch.arange(num_classes, dtype=torch.float32)
    bias[list(outputs)] = 10 - torch.arange(len(outputs), dtype=torch.float32)
    state = {**zeros, 'fc.bias': bias}
    torch.save({'state_dict': state} if key is None else {'state_dict': zeros, key: state}, path)
    return str(path)


def preprocessed(paths, model, crop_border_pixels=None, **options):
    """Images as timm's own transform makes them, one by one."""
    config = resolve_data_config({'img_size': SIZE, **options}, model=model)
    transform = create_transform(**config, crop_border_pixels=crop_border_pixels)
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(transform(image.convert('RGB')))
    return torch.stack(images)


def labelled(folder):
    """Paths and labels of a folder of class folders, in order."""
    classes = sorted(Path(folder).iterdir())
    found = [(path, label) for label, name in enumerate(classes) for path in sorted(name.iterdir())]
    return [path for path, _ in found], torch.tensor([label for _, label in found])


# six greys that lie close together: a model for them makes mistakes
GREYS = {f'grey{i}': (118 + 4 * i, 128, 138 - 4 * i) for i in range(6)}


@dataclass
class Fitted:
    """A model, its checkpoint and the data that it is for (``train``, ``validation``)."""

    model: torch.nn.Module
    checkpoint: str
    data: Path

    @property
    def base(self):
        return f'{BASE} --num-classes {len(GREYS)} --checkpoint {self.checkpoint}'


def fit(folder):
    """Writes a folder of noisy images, and fits the last layer of a network to them by least squares."""
    data, generator = folder / 'data', np.random.default_rng(0)
    for split, count in {'train': 10, 'validation': 4}.items():
        for name, color in GREYS.items():
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(color, 40, (*generator.integers(16, 25, 2), 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(data / split / name / f'{i}.png')
    model = model_of(len(GREYS))
    paths, labels = labelled(data / 'train')
    with torch.no_grad():
        x = preprocessed(paths, model)
        features = model.forward_head(model.forward_features(x), pre_logits=True).double()
        targets = 8 * torch.nn.functional.one_hot(labels, len(GREYS)).double() - 2
        gram = features.T @ features + 0.3 * torch.eye(features.shape[1], dtype=torch.float64)
        model.fc.weight.copy_(torch.linalg.solve(gram, features.T @ targets).T)
        model.fc.bias.zero_()
    path = folder / 'fitted.pth.tar'
    torch.save({'state_dict': model.state_dict(), 'state_dict_ema': model.state_dict()}, path)
    return Fitted(model, str(path), data)


def hits(space, logits, targets, topk=(1, 5)):
    """Per k, which samples are right in the label space: as timm counts them, one by one."""
    reduced = space.reduce(logits)
    return torch.tensor([[bool(accuracy(row[None], target[None], (k,))[0]) for row, target in zip(reduced, targets)]
                         for k in topk])


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
