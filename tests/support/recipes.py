"""The recipes of hparams/: where they are, what they parse to, the commands in their headers, and their bases."""
import functools
import itertools
import re
import shlex
from pathlib import Path

import torch
import yaml

from support.paper import ILLEGIBLE
from support.places import ROOT
from timm_sam import train
from timm_sam.cli.device import Process
from timm_sam.training.options import parse_args

HPARAMS = ROOT / 'hparams'
DIGITS = sorted(p for p in HPARAMS.glob('digits/*.yaml') if p.stem != 'base')
FILES = sorted(p for folder in ('cifar', 'imagenet') for p in HPARAMS.glob(f'{folder}/**/*.yaml'))
RECIPES = [p for p in FILES if not p.stem.endswith('base')]
QUIET = Process(torch.device('cpu'), rank=1)  # says nothing


def identify(value):
    return str(value.relative_to(HPARAMS)) if isinstance(value, Path) else None


def path_of(folder, name):
    return HPARAMS / folder / f'{name}.yaml'


def parse(recipe, data_dir, *options):
    where = ['-c', str(recipe), '--data-dir', str(data_dir), '--device', 'cpu']
    return parse_args(train.build_parser(), [*where, *options])


def rho_if_missing(folder, name):
    return ['--sam-rho', '0.02'] if (folder, name) in ILLEGIBLE else []


def header(recipe):
    """The comment a recipe opens with, without its '# '."""
    lines = itertools.takewhile(lambda line: line.startswith('#'), recipe.read_text().splitlines())
    return '\n'.join(line[2:] for line in lines)


def commands(text):
    """Command lines of a text: (processes per node, arguments of train.py) of each."""
    joined = re.sub(r'\s*\\\n\s*', ' ', text)
    found = []
    for line in joined.splitlines():
        if not re.match(r'\s*(python|torchrun) .*\btrain\.py ', line):
            continue
        words = shlex.split(line)
        launcher, arguments = words[:words.index('train.py')], words[words.index('train.py') + 1:]
        assert launcher in (['python'], ['torchrun', '--nproc-per-node', launcher[-1]]), line
        found.append((1 if launcher == ['python'] else int(launcher[-1]), arguments))
    return found


@functools.cache
def values_of(path):
    return yaml.safe_load(path.read_text())


def chain(path):
    """The files a recipe is made of, itself first: (path, its own values)."""
    values = dict(values_of(path))
    base = values.pop('base', None)
    return [(path, values), *(chain((path.parent / base).resolve()) if base else [])]
