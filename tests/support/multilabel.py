"""A small tree of images with several labels each, and what stands in for a library that reads it by name.

timm reads such data from libraries that are not installed here; the stand-in takes the place of its `create_dataset`.
As a module, it runs train.py on ranks as `support.trainings` does:

    torchrun --standalone --nproc-per-node 2 -m support.multilabel RUNS.json
"""
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageDataset

from support import trainings
from timm_sam.cli import image_folders

CLASSES = 4
COUNTS = {'train': 24, 'validation': 7}  # 7: neither two nor three ranks share them evenly
FIELDS = ','.join(f'has{k}' for k in range(CLASSES))


def write_labelled_tree(root, counts=COUNTS, seed=0):
    """``root/<split>/<i>.png`` and ``labels.json``: each class lights up its quarter of the image."""
    generator = np.random.default_rng(seed)
    for split, count in counts.items():
        folder = Path(root, split)
        folder.mkdir(parents=True)
        labels = []
        for i in range(count):
            # the first image has no label, and the second all of them
            has = [i == 1 or i > 1 and bool(generator.random() < 0.45) for _ in range(CLASSES)]
            pixels = generator.normal(60, 30, (32, 32, 3))
            for k in np.flatnonzero(has):
                pixels[16 * (k // 2):16 * (k // 2) + 16, 16 * (k % 2):16 * (k % 2) + 16] += (120, 60, 90)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f'{i}.png')
            labels.append([int(k) for k in np.flatnonzero(has)])
        (folder / 'labels.json').write_text(json.dumps(labels))
    return Path(root)


def multi_hot(root, split):
    """The targets of a split (images, classes)."""
    labels = json.loads(Path(root, split, 'labels.json').read_text())
    return np.array([[int(k in has) for k in range(CLASSES)] for has in labels])


class Labelled:
    """A reader of the tree, with fields `labels` (indices), `hot` (one number per class) and `has0`, `has1`, ..."""

    def __init__(self, root, split, field):
        self.folder = Path(root, split)
        hot = multi_hot(root, split).tolist()
        indices = json.loads((self.folder / 'labels.json').read_text())
        columns = [field.split(',').index(f'has{k}') for k in range(CLASSES)] if ',' in field else None
        # timm's readers make indices of several fields, too
        self.targets = indices if columns else {'labels': indices, 'hot': hot}[field]

    def __getitem__(self, index):
        return open(self.folder / f'{index}.png', 'rb'), self.targets[index]

    def __len__(self):
        return len(self.targets)

    def filename(self, index, basename=False, absolute=False):
        return f'{index}.png'


def create_dataset(name, root=None, split='validation', target_key='labels', target_transform=None,
                   input_img_mode='RGB', **options):
    assert name == 'hfds/tree', name
    return ImageDataset(root, reader=Labelled(root, split, target_key or 'labels'), target_transform=target_transform,
                        input_img_mode=input_img_mode)


def install(patch=setattr):
    """Lets both scripts find `hfds/tree`."""
    patch(image_folders, 'create_dataset', create_dataset)


if __name__ == '__main__':
    install()
    trainings.main(sys.argv[1])
