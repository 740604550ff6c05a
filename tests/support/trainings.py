"""Several runs of train.py in the same processes, one after another; `test_distributed.py` compares what they leave.

    torchrun --standalone --nproc-per-node 2 -m support.trainings RUNS.json

RUNS.json: `[{"name": ..., "port": ..., "command": ...}, ...]`. Each rank saves `<name>-rank<i>.pt` in the current
folder.
"""
import json
import os
import shlex
import sys
from pathlib import Path

import torch

from timm_sam import train
from timm_sam.selection import unwrap

torch.set_num_threads(1)
fit = train.fit


def main(file):
    for run in json.loads(Path(file).read_text()):
        def fit_and_save(state, *rest, name=run['name']):
            fit(state, *rest)
            weights = unwrap(state.task.get_trainable_module()).state_dict()
            torch.save(weights, f'{name}-rank{state.args.rank}.pt')

        train.fit = fit_and_save
        # the launcher's store remembers the first run's addresses: each run gets a store of its own
        os.environ.update(MASTER_PORT=str(run['port']), TORCHELASTIC_USE_AGENT_STORE='False')
        code = train.main(shlex.split(run['command']))
        if code:
            sys.exit(f'{run["name"]}: exit code {code}')


if __name__ == '__main__':
    main(sys.argv[1])
