"""A run that keeps a checkpoint of every update, and runs that go on from some; `test_first_epochs.py` compares them.

    [torchrun --standalone --nproc-per-node 2] -m support.recoveries RUNS.json

`timm`'s saver keeps two checkpoints within an epoch; here each of them stays, as `every-EPOCH-UPDATE.pth.tar`.
"""
import os
import sys

import torch

from support.turns import turns
from timm_sam import train
from timm_sam.training.saver import Saver

torch.set_num_threads(1)
save_recovery = Saver.save_recovery


def keep(self, epoch, update, extras):
    save_recovery(self, epoch, update, extras)
    folder = os.path.join('out', 'whole')
    kept = os.path.join(folder, f'every-{epoch}-{update}.pth.tar')
    if not os.path.exists(kept):
        os.link(os.path.join(folder, f'recovery-{epoch}-{update}.pth.tar'), kept)


def main(file):
    for name, arguments in turns(file):
        Saver.save_recovery = keep if name == 'whole' else save_recovery
        code = train.main(arguments)
        if code:
            sys.exit(f'{name}: exit code {code}')


if __name__ == '__main__':
    main(sys.argv[1])
