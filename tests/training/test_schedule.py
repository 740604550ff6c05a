"""The learning rate with which a run goes on: within its first epoch, and from files of timm."""
import pytest
import torch

from timm_sam import train
from timm_sam.training.schedule import create_schedule, resume_schedule


def rate(options, saved, start_epoch, updates):
    args = train.build_parser().parse_args(f'--lr 0.5 --epochs 8 {options}'.split())
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.lr)
    scheduler, _ = create_schedule(args, optimizer, 10, False)
    resume_schedule(saved, scheduler, start_epoch, updates, args.sched_on_updates)
    return optimizer.param_groups[0]['lr']


def test_first_epoch_goes_on_without_noise_as_it_began():
    options = '--warmup-epochs 0 --decay-epochs 90 --lr-noise 0 1'
    assert rate(options, {}, 0, 0) == rate(options, {}, 0, 5) == 0.5
    assert rate(options, {}, 1, 10) not in (0.5, rate('--warmup-epochs 0 --decay-epochs 90', {}, 1, 10))


@pytest.mark.filterwarnings('ignore:PlateauLRScheduler is deprecated:FutureWarning')
@pytest.mark.parametrize('start_epoch, expected', [(1, 0.3), (2, 0.5), (5, 0.5)])
def test_plateau_without_a_history_does_not_stay_at_the_rate_of_the_warm_up(start_epoch, expected):
    options = '--sched plateau --warmup-epochs 2 --warmup-lr 0.1'
    assert rate(options, {'metric': 3.0}, start_epoch, 10 * start_epoch) == pytest.approx(expected)
