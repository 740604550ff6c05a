"""Every number of both commands has a range: what is outside of it is one line with flag, value and remedy."""
import contextlib
import io
import re

import pytest

from timm_sam import train, validate
from timm_sam.cli.ranges import Range
from timm_sam.evaluation import checks
from timm_sam.evaluation.options import parse_validate_args
from timm_sam.methods import METHODS
from timm_sam.training.options import read_args
from timm_sam.training.ranges import RANGES, WITHOUT_RANGE

# where these numbers have a meaning
ZERO = {
    'head_init_scale', 'head_init_bias', 'mean', 'lr', 'lr_base', 'warmup_lr', 'min_lr', 'lr_noise', 'lr_noise_std',
    'lr_cycle_decay', 'lr_cycle_limit', 'opt_eps', 'opt_betas', 'momentum', 'weight_decay', 'layer_decay_min_scale',
    'layer_decay_no_opt_scale', 'grad_accum_steps', 'epoch_repeats', 'start_epoch', 'warmup_epochs', 'cooldown_epochs',
    'patience_epochs', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob',
    'aug_repeats', 'aug_splits', 'reprob', 'mixup', 'cutmix', 'mixup_prob', 'mixup_switch_prob', 'mixup_off_epoch',
    'holdout_seed', 'smoothing', 'bce_target_thresh', 'loss_weight_power', 'asl_gamma_pos', 'asl_gamma_neg',
    'asl_clip', 'poly_epsilon', 'poly_gamma', 'poly_alpha', 'db_init_bias', 'db_focal_gamma', 'drop', 'drop_connect',
    'norm_drop', 'drop_path', 'drop_block', 'bn_momentum', 'model_ema_decay', 'seed', 'workers', 'tta',
    'recovery_interval', 'train_size_schedule_spread', 'train_size_random_mix', 'distill_loss_weight',
    'task_loss_weight', 'local_rank',
    'crop_border_pixels', 'sam_rho', 'sam_eta', 'sam_start_epoch', 'sam_friendly_sigma', 'sam_friendly_lam',
    'sam_looksam_alpha', 'sam_gsam_alpha', 'sam_gsam_rho_min', 'sam_random_mask_sparsity', 'sam_ssam_dynamic_sparsity',
    'sam_ssam_fisher_sparsity', 'sam_ssam_dynamic_drop'}
NEGATIVE = {'head_init_scale', 'head_init_bias', 'mean', 'bce_target_thresh', 'loss_weight_power', 'poly_epsilon',
            'local_rank'}
SAM = ['--sam-variant', 'elementwise_l2', '--sam-rho', '0.1']


def of_methods():
    """What else each parameter of a method needs, to be looked at itself."""
    actions = [a for a in train.build_parser()._actions if a.dest.startswith('sam_')]
    found = {}
    for method in METHODS:
        others = [name for name in METHODS if name.startswith(f'{method}_')]
        own = [a for a in actions if a.dest.startswith(f'sam_{method}_')
               and not any(a.dest.startswith(f'sam_{name}_') for name in others)]
        needed = [word for a in own if '(required ' in a.help
                  for word in (a.option_strings[0], '2' if a.type is int else '0.5')]
        found.update((a.dest, [*SAM, '--sam-method', method, *needed]) for a in own)
    return found


def numbers(parser):
    """Numeric flags, and what may not follow them."""
    for action in parser._actions:
        if action.nargs == 0 or action.dest == 'attack':  # radii have tests of their own
            continue
        convert = action.type if callable(action.type) else str
        try:
            kind = type(convert('1'))
        except (ValueError, TypeError):
            continue
        if kind not in (int, float):
            continue
        values = ['nan', 'inf'] + ['-inf'] * (not isinstance(action.nargs, int))  # which is a flag to argparse there
        values += ['-1'] * (action.dest not in NEGATIVE) + ['0'] * (action.dest not in ZERO)
        yield action, values


def train_refuses(argv):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            read_args(train.build_parser(), argv)
        except train.OptionError as e:
            return 2, str(e)
        except SystemExit as e:
            return e.code, err.getvalue()
    return 0, ''


def validate_refuses(argv):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            parse_validate_args(validate.build_parser(), argv)
        except SystemExit as e:
            return e.code, err.getvalue()
    return 0, ''


def test_every_number_has_a_range():
    ranges = {*RANGES, *WITHOUT_RANGE, *(a.dest for a in train.build_parser()._actions if a.dest.startswith('sam_'))}
    assert {action.dest for action, _ in numbers(train.build_parser())} - ranges == set()
    assert {action.dest for action, _ in numbers(validate.build_parser())} == {*checks.RANGES}
    assert len(list(numbers(train.build_parser()))) >= 120 and len(checks.RANGES) >= 19
    assert set(RANGES) | {*WITHOUT_RANGE} <= {action.dest for action, _ in numbers(train.build_parser())}


def refused(refuses, action, value, argv):
    count = action.nargs if isinstance(action.nargs, int) else 1
    flag = action.option_strings[-1]
    code, message = refuses([*argv, f'{flag}={value}'] if count == 1 else [*argv, flag, *[value] * count])
    lines = message.strip().splitlines()
    assert code == 2 and len(lines) == 1, (flag, value, code, message)
    assert any(name in message for name in action.option_strings) and str(value).lstrip('-') in message, message
    assert re.search(r'must be|invalid|use |>=|integer|leave it out|lower it', message), message


@pytest.mark.full
def test_every_number_of_training_is_refused_outside_of_its_range():
    needed = of_methods()
    for action, values in numbers(train.build_parser()):
        argv = needed.get(action.dest, SAM if action.dest.startswith('sam_') else [])
        for value in values:
            refused(train_refuses, action, value, argv)


@pytest.mark.full
def test_every_number_of_an_evaluation_is_refused_outside_of_its_range(tmp_path):
    for action, values in numbers(validate.build_parser()):
        argv = ['--data-dir', str(tmp_path), '--device', 'cpu', '--model', 'test_resnet']
        if action.dest.startswith('attack'):
            argv = ['--eval', f'x={tmp_path}', '--attack', 'l2=1', *argv[2:]]
        for value in values:
            refused(validate_refuses, action, value, argv)


@pytest.mark.parametrize('argv', [
    '--lr 0', '--momentum 0', '--opt-eps 0', '--weight-decay 0', '--clip-grad 1e-9', '--warmup-epochs 0', '--mixup 0',
    '--smoothing 0', '--drop 1', '--hflip 1', '--poly-epsilon -1', '--head-init-bias -6.9', '--mean -1', '--seed 0',
    '--grad-accum-steps 0', '--lr-noise 0.2 0.8', '--scale 1 1', '--ratio 0.5 2', '--layer-decay 1', '--workers 0',
    '--start-epoch 0', '--local_rank -1', '--opt-betas 0 0.999', '--bn-momentum 1', '--tta 0', '--epoch-repeats 0.5'])
def test_what_is_at_the_edge_is_taken(argv):
    assert train_refuses(argv.split()) == (0, '')


@pytest.mark.parametrize('argv, words', [
    ('--ratio 0 0', ['--ratio [0.0, 0.0]', '> 0']),
    ('--ratio 2 1', ['--ratio [2.0, 1.0]', 'lower']),
    ('--scale 1 0.5', ['--scale [1.0, 0.5]', 'lower']),
    ('--lr-noise 0.1 0.2 0.3', ['--lr-noise [0.1, 0.2, 0.3]']),
    ('--lr-noise 0.1 --lr-noise-std 1e6', ['--lr-noise-std 1000000.0', 'smaller']),
    ('--train-img-sizes 32 64 --train-size-probs 0 0', ['--train-size-probs [0.0, 0.0]', '> 0']),
    ('--workers 1000000', ['--workers 1000000', '<= 1024']),
    ('--seed 4294967296', ['--seed 4294967296', '<= 4294901760']),
    ('--epochs 99999999999', ['--epochs 99999999999', '<= 2147483647']),
    ('--epochs 2147483647', ['--sched cosine', '2147483647 epochs', '--epochs']),
    ('--lr-cycle-mul 1e200 --lr-cycle-limit 9', ['--lr-cycle-mul', 'smaller']),
    ('--epochs 3 --start-epoch 3', ['--start-epoch 3', '3 epochs', 'raise --epochs']),
    ('--epochs 3 --stop-epoch 2 --start-epoch 2', ['--start-epoch 2', '2 epochs']),
    ('--tta 9 -b 8', ['--tta 9', '8 inputs', '--validation-batch-size']),
    ('--sam-variant sam --sam-rho 1 --sam-m 99999999999', ['--sam-m', '99999999999']),
])
def test_numbers_that_do_not_go_together_are_one_line(argv, words):
    code, message = train_refuses(['--warmup-epochs', '0', *argv.split()])
    assert code == 2 and [word for word in words if word not in message] == [], message


@pytest.mark.parametrize('allowed, value, demand', [
    (Range(), float('nan'), 'a finite number'),
    (Range(0, 1), 2.0, 'a finite number >= 0 and <= 1'),
    (Range(0, without_low=True), 0.0, 'a finite number > 0'),
    (Range(0, 1, without_high=True), 1.0, 'a finite number >= 0 and < 1'),
    (Range(1), 0, '>= 1'),
    (Range(1), 2 ** 31, '>= 1 and <= 2147483647'),
    (Range(0, 1), 0.5, None),
    (Range(1), 10 ** 400, '>= 1 and <= 2147483647'),
])
def test_range_says_what_it_demands(allowed, value, demand):
    assert allowed.demand(value) == demand
