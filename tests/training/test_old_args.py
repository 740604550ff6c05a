"""`args.yaml` of older versions of timm, given to `-c`: it is read, and what there is no more is said."""
import shlex

import pytest
import yaml

from timm_sam import train
from timm_sam.training.options import GONE, parse_args

# what timm 0.2 to 1.0 wrote beside the flags of today
OLD = {
    'amp_impl': 'native', 'native_amp': True, 'apex_amp': False, 'jsd': False, 'mixup_elem': False, 'bn_tf': False,
    'prefetcher': True, 'world_size': 8, 'rank': 0, 'distributed': True, 'num_gpu': 1, 'aot_autograd': False,
    'dist_backend': None, 'dist_url': 'env://', 'validation_batch_size_multiplier': 1, 'local_rank': 0}
KEPT = {'model': 'test_resnet', 'epochs': 300.0, 'batch_size': 32, 'lr': 0.5, 'aa': 'rand-m9', 'opt_betas': None,
        'scale': [0.08, 1.0], 'smoothing': 0.1, 'decay_epochs': 30, 'clip_grad': None, 'amp': True, 'wandb_tags': []}


@pytest.fixture
def parse(tmp_path, caplog):
    def run(values, command=''):
        (tmp_path / 'args.yaml').write_text(yaml.safe_dump(values))
        return parse_args(train.build_parser(), shlex.split(
            f'--device cpu --data-dir {tmp_path} -c {tmp_path}/args.yaml {command}'))
    return run


def test_old_options_are_read_and_what_is_left_out_is_said_in_one_line(parse, caplog):
    args = parse({**KEPT, **OLD})
    assert (args.epochs, args.batch_size, args.lr, args.amp) == (300, 32, 0.5, True) and type(args.epochs) is int
    [message] = caplog.messages
    assert 'left out, as there are no such flags any more' in message
    gone = [key for key in OLD if key != 'local_rank']
    assert [key for key in gone if f'{key}: ' not in message] == [] and set(gone) == set(GONE)
    assert "native_amp: True (amp: true is the same)" in message
    assert not hasattr(args, 'native_amp')


def test_options_of_today_leave_nothing_out(parse, caplog):
    parse(KEPT)
    assert caplog.messages == []
    assert not set(GONE) & {action.dest for action in train.build_parser()._actions}


def test_only_the_first_rank_says_it(parse, caplog, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    parse({**KEPT, **OLD})
    assert caplog.messages == []


def test_what_is_like_an_old_option_is_still_unknown(parse, capsys):
    with pytest.raises(SystemExit):
        parse({'native_ampp': True})
    assert "unknown key 'native_ampp'" in capsys.readouterr().err
