"""The grid of runs that tables and reports are made of."""

import pytest
from support.reports import sam, write_run


@pytest.fixture
def grid(tmp_path):
    """Plain, and SAM in two selections with two radii; 3 seeds each, but for one radius with one."""
    def seeds(name, accuracies, seconds, **args):
        for seed, accuracy in enumerate(accuracies):
            write_run(tmp_path / 'runs' / f'{name}-{seed}', (1.0, 2.0, accuracy), seconds=seconds,
                      **{**args, 'seed': seed})

    seeds('plain', (90.0, 91.0, 92.0), 1.0)
    seeds('all-.1', (93.0, 94.0, 95.0), 2.0, **sam(0.1))
    seeds('all-.2', (91.0, 94.0, 97.0), 2.0, **sam(0.2))
    seeds('all-.4', (99.0,), 2.0, **sam(0.4))
    seeds('on-1', (95.0, 95.5, 96.0), 1.5, **sam(1, params='onlynorm'))
    seeds('on-2', (97.0, 97.0, 98.0), 1.5, **sam(2, params='onlynorm'))
    return tmp_path
