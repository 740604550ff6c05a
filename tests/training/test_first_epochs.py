"""A run stopped after any update of its first epochs goes on bit for bit: the loaders' workers start in the first one.

Those of validation start when it is first validated, which `--val-interval` may make a later epoch.
"""
import argparse

import pytest
import torch
from support.processes import RANKS, run_in_turn
from support.states import differences, summary

FEW = [(0, 0), (0, 3), (1, 2)]
MANY = [(epoch, update) for epoch in range(3) for update in (0, 2, 3)]
slow = pytest.mark.slow


def state(folder):
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(folder / 'last.pth.tar', weights_only=True)
    return {key: state[key] for key in ('epoch', 'state_dict', 'state_dict_ema', 'optimizer', 'random_state', 'metric')}


@pytest.mark.parametrize('workers, ranks, options, places', [
    (2, 1, '--val-interval 2', FEW), pytest.param(1, RANKS, '', [(0, 3)], marks=slow),
    *(pytest.param(workers, ranks, options, MANY, marks=slow) for workers, ranks, options in (
        (0, 1, ''), (1, 1, ''), (2, 1, ''), (1, 1, '--no-prefetcher --mixup 0.2'),
        (0, RANKS, ''), (1, RANKS, ''), (2, RANKS, '--val-interval 2')))])
def test_run_goes_on_after_any_update_of_its_first_three_epochs(image_folder, tmp_path, workers, ranks, options,
                                                                places):
    base = (f'--device cpu --data-dir {image_folder} --num-classes 4 --model test_resnet --img-size 32 -j {workers} '
            f'-b {8 // ranks} --epochs 3 --warmup-epochs 0 --lr 0.05 --drop 0.2 --drop-path 0.1 --reprob 0.3 '
            f'--model-ema --sam-variant sam --sam-rho 0.5 --output out {options}')
    commands = {'whole': f'{base} --experiment whole --recovery-interval 1'}
    for epoch, update in places:
        name = f'from-{epoch}-{update}'
        commands[name] = f'{base} --experiment {name} --resume out/whole/every-{epoch}-{update}.pth.tar'
    run_in_turn('support.recoveries', commands, tmp_path, ranks)
    whole = tmp_path / 'out' / 'whole'
    for epoch, update in places:
        folder = tmp_path / 'out' / f'from-{epoch}-{update}'
        assert differences(state(folder), state(whole)) == [], (epoch, update)
        rows = [row for row in summary(whole) if int(row['epoch']) >= epoch]
        assert summary(folder) == rows, (epoch, update)
