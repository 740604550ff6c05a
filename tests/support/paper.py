"""The tables of the paper (arXiv:2306.04226) as data: what each of its runs was trained with, and what it reached."""
from support.paper_cifar import CIFAR_SETTINGS
from support.paper_imagenet import IMAGENET_SETTINGS

SETTINGS = IMAGENET_SETTINGS | CIFAR_SETTINGS
PAPER = [(f, n) for f, setting in SETTINGS.items() for n in setting.rows]
ILLEGIBLE = [(f, n) for f, n in PAPER if SETTINGS[f].rows[n].variant and SETTINGS[f].rows[n].rho is None]
