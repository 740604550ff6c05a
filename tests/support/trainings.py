"""Several runs of train.py in the same processes, one after another; `test_train_ranks.py` compares what they leave.

    torchrun --standalone --nproc-per-node 2 -m support.trainings RUNS.json

Each rank saves `<name>-rank<i>.pt` in the current folder: its weights, the optimizer's state, and SAM's last norms.
"""
import sys

import torch

from support.turns import turns
from timm_sam import train
from timm_sam.selection import unwrap

torch.set_num_threads(1)
fit = train.fit


def main(file):
    for name, arguments in turns(file):
        def fit_and_save(state, *rest, name=name):
            fit(state, *rest)
            torch.save(dict(
                weights=unwrap(state.task.get_trainable_module()).state_dict(), optimizer=state.optimizer.state_dict(),
                stats=state.update.stats._asdict()), f'{name}-rank{state.process.rank}.pt')

        train.fit = fit_and_save
        code = train.main(arguments)
        if code:
            sys.exit(f'{name}: exit code {code}')


if __name__ == '__main__':
    main(sys.argv[1])
