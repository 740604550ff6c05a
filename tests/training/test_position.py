"""An epoch that goes on with batches of another size, or on another number of ranks."""
import re

import pytest
import torch

from timm_sam.cli.device import Process
from timm_sam.runs.checkpoints import newest_checkpoint
from timm_sam.training.position import Resumed, fitted

CPU = torch.device('cpu')


def process(rank=0, ranks=1):
    return Process(CPU, rank, rank, ranks, ranks > 1)


def place(batch, ranks=1, **known):
    return dict(epoch=3, batch=batch, update=3 * 100 + batch, meters=dict(world_size=ranks, ranks=[{}] * ranks),
                nonfinite=dict(world_size=ranks, ranks=list(range(ranks))), **known)


@pytest.mark.parametrize('had, now, expected', [
    # batches done, in all, for an update; batches in all now, for an update; batches done, updates of all epochs
    ((80, 100, 1), (50, 1), (40, 190)),
    ((80, 100, 1), (200, 1), (160, 760)),
    ((80, 100, 1), (100, 1), (80, 380)),
    ((80, 100, 1), (100, 2), (80, 190)),
    ((75, 100, 1), (10, 4), (8, 11)),  # 3 updates an epoch, of which 2 are not more than what is done
    ((100, 100, 1), (10, 4), (10, 12)),  # all of it
    ((1, 100, 1), (50, 1), (0, 150)),
])
def test_the_same_share_of_the_epoch_is_left(had, now, expected):
    batch, batches, group = had
    found = fitted(process(), place(batch, batches=batches, group=group), *now)
    assert (found['batch'], found['update']) == expected and found['epoch'] == 3


def test_older_checkpoints_are_fitted_to_the_number_of_ranks():
    assert fitted(process(ranks=4), place(40, ranks=2), 50, 1)['batch'] == 20
    same = place(40, ranks=2)
    assert fitted(process(ranks=2), same, 50, 1) is same


def test_batches_that_were_not_finite_are_as_many_on_other_ranks():
    for ranks in (1, 2, 3):
        assert sum(Resumed(process(rank, ranks), place(4, ranks=3)).nonfinite for rank in range(ranks)) == 3


def test_newest_checkpoint_has_most_of_the_epoch_not_most_batches(tmp_path):
    def write(batch, **known):
        path = tmp_path / f'recovery-3-{batch - 1}.pth.tar'
        torch.save(dict(epoch=3, position=dict(epoch=3, batch=batch, **known)), path)
        assert newest_checkpoint(str(tmp_path)) == str(path)

    write(8)
    write(500)
    write(150, batches=200)
    write(80, batches=100)


@pytest.mark.parametrize('options, left', [('-b 8', 1), ('-b 2', 4), ('-b 4 --grad-accum-steps 2', 1)])
def test_run_goes_on_with_the_rest_of_its_epoch_in_other_batches(run_train, updates, tmp_path, options, left):
    more = '--sched-on-updates --epochs 2 --stop-epoch 1'
    assert run_train(f'-b 4 --recovery-interval 2 {more}').code == 0
    assert len(updates) == 10
    rates = [rate for _, rate in updates]
    updates.clear()
    done = run_train(f'{options} {more} --resume out/run/recovery-0-7.pth.tar --experiment on')
    assert done.code == 0 and '8 of them done' in done.err, done.err
    assert len(updates) == left
    assert updates[0][1] == pytest.approx(rates[8])  # where the schedule was, not where this number of updates ends
    assert len(re.findall(r'Train: 0 \[', done.err)) == left
