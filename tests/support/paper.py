"""The tables of the paper (arXiv:2306.04226) as data: what each of its runs was trained with, and what it reached."""
from support.paper_cifar import CIFAR_SETTINGS
from support.paper_imagenet import IMAGENET_SETTINGS
from support.places import DATA

SETTINGS = IMAGENET_SETTINGS | CIFAR_SETTINGS
PAPER = [(f, n) for f, setting in SETTINGS.items() for n in setting.rows]
ILLEGIBLE = [(f, n) for f, n in PAPER if SETTINGS[f].rows[n].variant and SETTINGS[f].rows[n].rho is None]


def paper_tables():
    """Table -> its cells in the order of the paper's text, as pairs of labels (a set of those not empty) and text."""
    tables = {}
    for line in (DATA / 'paper_tables.txt').read_text(encoding='utf-8').splitlines():
        if line.startswith('['):
            name, _, head = line[1:].partition('] ')
            columns = [column.split(', ') for column in head.split(' | ')]
        elif not line.startswith('#'):
            row, _, cells = line.partition(': ')
            tables.setdefault(name, []).extend(
                (frozenset(row.split(', ') + column) - {''}, cell) for column, cell in zip(columns, cells.split(' | ')))
    return tables
