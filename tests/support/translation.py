"""What the tests of the translation example share: its scripts, small models, and two invented languages.

Imported where the extra `translation` is missing, it skips the module that imports it.
"""
import random
import sys

import pytest
import torch

from support.places import ROOT

for package in ('sentencepiece', 'sacrebleu'):
    pytest.importorskip(package, reason=f'{package} is not installed (extra `translation`)')
sys.path.insert(0, str(ROOT / 'examples' / 'translation'))  # scripts that import each other

import bible_es_en  # noqa: E402
import data  # noqa: E402
import table  # noqa: E402
import transformer  # noqa: E402

import train  # noqa: E402

__all__ = ['LANGUAGES', 'TINY', 'bible_es_en', 'data', 'examples', 'model_of', 'table', 'train', 'transformer',
           'translated', 'write_toy']

TINY = transformer.Size(width=16, layers=1, between=32, heads=2, subwords=60)
LANGUAGES = ['--source', 'xx', '--target', 'yy']
# each word has one of the other language, and the order is turned round
WORDS = dict(ba='sta', de='tra', fi='spi', go='blo', ku='klu', la='gra')


def model_of(size=TINY, subwords=30, dropout=0.0, seed=0):
    """In float64."""
    torch.manual_seed(seed)
    return transformer.Transformer(size, subwords, dropout).double()


def examples(count=6, subwords=30, seed=0):
    """Random ones of different lengths."""
    generator = random.Random(seed)
    return [data.Example(*([generator.randrange(4, subwords) for _ in range(generator.randint(2, 7))]
                           for _ in range(2))) for _ in range(count)]


def translated(sentence):
    return ' '.join(WORDS[word] for word in reversed(sentence.split()))


def write_toy(folder, train=200, other=25, longest=3, seed=0):
    """Files of a data set whose languages are ``xx`` and ``yy``; no sentence is in two splits."""
    generator = random.Random(seed)
    sentences = set()
    while len(sentences) < train + 2 * other:
        sentences.add(' '.join(generator.choices(sorted(WORDS), k=generator.randint(1, longest))))
    sentences = sorted(sentences)
    generator.shuffle(sentences)
    folder.mkdir(parents=True)
    splits = {'train': sentences[2 * other:], 'valid': sentences[:other], 'test': sentences[other:2 * other]}
    for split, lines in splits.items():
        (folder / f'{split}.xx').write_text(''.join(f'{line}\n' for line in lines))
        (folder / f'{split}.yy').write_text(''.join(f'{translated(line)}\n' for line in lines))
    return folder
