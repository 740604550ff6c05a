"""Comparing what runs leave: files, nested states and rows of summaries."""
import csv
import math
from pathlib import Path

import torch


def flat(tree, path=''):
    """``{path: leaf}`` of nested dicts and lists; an empty one is a leaf."""
    if isinstance(tree, (dict, list, tuple)) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in flat(value, f'{path}/{key}').items()}
    return {path: tree}


def differences(first, second):
    """The paths at which two nested structures are not bitwise equal."""
    first, second = flat(first), flat(second)

    def same(a, b):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return type(a) is type(b) and a == b

    return [p for p in first.keys() | second.keys() if p not in first or p not in second or
            not same(first[p], second[p])]


def finite(row):
    return all(math.isfinite(float(value)) for value in row.values())


def tree(folder):
    """Every file below a folder, with its size and its time of change."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob('*'))}


def summary(folder):
    """The rows of a run's ``summary.csv``."""
    with open(Path(folder) / 'summary.csv', newline='') as f:
        return list(csv.DictReader(f))
