"""Folders of runs as train.py leaves them, and what the report makes of them."""
import csv
import os
import time
from pathlib import Path

import torch
import yaml

from timm_sam.report.runs import (
    default_args,
    find_runs,
    read_run,
)
from timm_sam.report.tables import build_tables
from timm_sam.runs import timing

EPOCHS = 3
LONG_AGO = time.time() - 7 * 24 * 3600


def write_run(folder, accuracies=(50.0, 60.0, 70.0), epochs=EPOCHS, seconds=None, loss='0.5', old=True, ranks=1,
              **args):
    """A run's folder as train.py writes it: one evaluated epoch per accuracy."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    args = {**default_args(), 'model': 'resnet10t', 'data_dir': 'data/digits', 'epochs': epochs, 'warmup_epochs': 0,
            'lr': 0.1, 'seed': 0, **args}
    if args['sam_variant'] is None:
        args['sam_rho'] = None
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    sam = args['sam_variant'] is not None
    with open(folder / 'summary.csv', 'w', newline='') as f:
        writer = csv.writer(f)
        writer.writerow(['epoch', 'train_loss', *(['train_sam_loss'] if sam else []), 'eval_loss', 'eval_top1', 'lr'])
        for epoch, accuracy in enumerate(accuracies):
            last = epoch == len(accuracies) - 1
            writer.writerow([epoch, loss if last else '0.5', *(['0.75'] if sam else []), '1.0', accuracy, 0.1])
    if seconds is not None:
        for epoch in range(len(accuracies)):
            timing.record(str(folder), epoch, seconds, ranks, torch.device('cpu'))
    if old:
        age(folder)
    return folder


def age(folder):
    for path in folder.iterdir():
        os.utime(path, (LONG_AGO, LONG_AGO))


def sam(rho, seed=0, variant='sam', params='all', **args):
    return dict(sam_variant=variant, sam_params=params, sam_rho=rho, seed=seed, **args)


def tables_of(folder, epoch='last'):
    return build_tables([read_run(path) for path in find_runs([str(folder)])], epoch)


def rows(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))
