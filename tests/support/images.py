"""A small folder of images that a network can learn."""
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {'blue': (60, 60, 200), 'green': (60, 200, 60), 'red': (200, 60, 60), 'yellow': (190, 190, 60)}
PER_CLASS = {'train': 10, 'validation': 4}


def write_image_folder(root, classes=COLORS, splits=PER_CLASS, seed=0):
    """``root/<split>/<class>/<i>.png``: noise around the color of the class, 16 to 24 pixels a side."""
    generator = np.random.default_rng(seed)
    for split, count in splits.items():
        for name in classes:
            folder = Path(root, split, name)
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = generator.integers(16, 25, 2)
                pixels = generator.normal(COLORS[name], 40, (height, width, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f'{i}.png')
    return Path(root)
