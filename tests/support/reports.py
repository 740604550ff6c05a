"""Folders of runs as train.py leaves them, results as validate.py does, and what the report makes of them."""
import csv
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from timm_sam.evaluation.calibration import calibration
from timm_sam.report.runs import (
    default_args,
    find_runs,
    read_run,
)
from timm_sam.report.tables import build_tables
from timm_sam.runs import timing

EPOCHS = 3
LONG_AGO = time.time() - 7 * 24 * 3600
ROWS = {  # group, data set, measure, unit -> what plain has, and what each step towards SAM adds
    ('ID', 'imagenet', 'top1', '%'): (70.0, 2.0), ('ID', 'imagenet', 'top5', '%'): (90.0, 1.0),
    ('OOD', 'imagenet-r', 'top1', '%'): (25.0, 0.0), ('adversarial', 'imagenet', 'clean', '%'): (71.0, 2.0),
    ('adversarial', 'imagenet', 'l2 0.25', '%'): (20.0, 9.0),
    ('adversarial', 'imagenet', 'linf 0.5/255', '%'): (15.0, 7.0),
    ('calibration', 'imagenet', 'ece_mass', '%'): (5.0, -1.0), ('calibration', 'imagenet', 'nll', 'nats'): (1.5, -0.1),
}
IMAGES = 400


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


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_results(path, checkpoints, steps, outputs=False, **changes):
    """A file as validate.py writes it: ``steps`` says how far each of the checkpoints is from plain."""
    results = []
    generator = np.random.default_rng(0)
    for (group, dataset, measure, unit), (value, step) in ROWS.items():
        values = [value + step * s + 0.1 * i for i, s in enumerate(steps)]
        row = dict(group=group, dataset=dataset, measure=measure, unit=unit, images=IMAGES, values=values,
                   **{'non_finite': [0] * len(values), **changes})
        if measure == 'ece_mass':
            images = np.stack([generator.random((IMAGES, len(steps))), generator.random((IMAGES, len(steps))) > 0.5],
                              axis=-1)
            row['details'] = [calibration(np.concatenate([images[:, i], np.zeros((IMAGES, 2))], axis=1))['bins']['mass']
                              for i in range(len(steps))]
        if outputs and measure == 'top1' and group == 'ID':
            row['details'] = [write_outputs(path.parent / f'{path.stem}.outputs' / f'{i}.npz', v / 100)
                              for i, v in enumerate(values)]
        results.append(row)
    protocol = dict(checkpoints=[dict(path=str(c), sha256=sha256(c)) for c in checkpoints],
                    datasets=[dict(name=name, folder=f'/data/{name}') for name in ('imagenet', 'imagenet-r')])
    path.write_text(json.dumps(dict(checkpoints=[str(c) for c in checkpoints], results=results, protocol=protocol)))
    return path


def write_outputs(path, share, order=1):
    """Outputs of which this share is right, always the first images; names in either order."""
    path.parent.mkdir(exist_ok=True)
    right = np.arange(IMAGES) < round(share * IMAGES)
    np.savez(path, names=np.array([f'a/{i:04d}.png' for i in range(IMAGES)])[::order], right=right[::order])
    return f'{path.parent.name}/{path.name}'


def checkpoint(run, name='last.pth.tar', content=None):
    path = run / name
    path.write_bytes(str(content or path).encode())
    return path
