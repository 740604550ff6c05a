"""Scenarios on two ranks: all in one process group, the results of each in one file, one start of torchrun for all.

A module of scenarios has `scenarios()`, which yields `(name, function, arguments, options)`, and ends with
`main(scenarios)`; a scenario that raises has its traceback as the result.
"""
import datetime
import gc
import sys
import time
import traceback

import torch
from torch import distributed

from support.processes import RANKS, TIMEOUT, run, torchrun


def main(scenarios):
    """What each rank does."""
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds=20))
    rank = distributed.get_rank()
    results = {}
    for name, function, arguments, options in scenarios():
        try:
            results[name] = function(rank, *arguments, **options)
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, f'{sys.argv[1]}/rank{rank}.pt')
    gc.collect()
    time.sleep(0.1)  # gloo's destructor may wait for ever for a thread that has yet to let go of its tensors
    distributed.destroy_process_group()


def of_both_ranks(module, folder, *arguments, timeout=TIMEOUT):
    """Runs the scenarios of a module; returns what gives the results of both ranks for the name of one."""
    done = run(torchrun('-m', module, folder, *arguments), folder, timeout)
    assert done.code == 0, done.err[-3000:]
    results = [torch.load(folder / f'rank{i}.pt') for i in range(RANKS)]

    def of_both(name):
        both = [result[name] for result in results]
        for result in both:
            assert not isinstance(result, str), result
        return both
    return of_both
