"""Names of the published evaluation sets, and small trees of their layouts."""
import os

from timm_sam.evaluation.sets.label_spaces import imagenet_subset, imagenet_wordnet_ids

IDS = imagenet_wordnet_ids()
R_IDS = [IDS[i] for i in imagenet_subset('r')]
A_IDS = [IDS[i] for i in imagenet_subset('a')]
V2 = 'imagenetv2-matched-frequency-format-val'

# Line n of ObjectNet's names file is output (n + 300) % 1000 in these trees; "crane" stands on two lines, as in the
# published file.
NAMES = ['crane' if line in (4, 6) else f'name {line}, also {line}' for line in range(1000)]


def write_tree(root, image, classes, files=('1.png',)):
    """A folder of class folders, each with links to one image under the same names; gives its path."""
    for name in classes:
        os.makedirs(root / name)
        for file in files:
            os.link(image, root / name / file)
    return str(root)
