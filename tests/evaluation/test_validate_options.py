"""The command line of validate.py: timm's flags unchanged, suites and attacks, and what a run's args.yaml supplies."""
import argparse
import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from support.flags import as_lines, record
from support.places import DATA

from timm_sam import validate
from timm_sam.evaluation.options import parse_validate_args
from timm_sam.evaluation.weights import Hashes

TIMM = json.loads((DATA / 'validate_flags.json').read_text())['validate.py']
TIMM_DESTS = [flag['dest'] for flag in TIMM]

# where we depart from timm on purpose: several checkpoints
DEPARTURES = {'checkpoint': {'nargs': '+'}}

OURS = [
    {'flags': ['--overwrite'], 'dest': 'overwrite', 'action': 'StoreTrueAction', 'nargs': 0, 'const': True,
     'default': False},
    {'flags': ['--allow-nonfinite'], 'dest': 'allow_nonfinite', 'action': 'StoreTrueAction', 'nargs': 0, 'const': True,
     'default': False},
    {'flags': ['--eval'], 'dest': 'eval', 'action': 'StoreAction', 'nargs': '+', 'default': []},
    {'flags': ['--eval-root'], 'dest': 'eval_root', 'action': 'StoreAction', 'default': None},
    {'flags': ['--calibration'], 'dest': 'calibration', 'action': 'StoreTrueAction', 'nargs': 0, 'const': True,
     'default': False},
    {'flags': ['--quantize-weights'], 'dest': 'quantize_weights', 'action': 'StoreAction', 'nargs': '+',
     'default': None},
    {'flags': ['--save-outputs'], 'dest': 'save_outputs', 'action': 'StoreAction', 'default': None,
     'choices': ['predictions', 'logits']},
    {'flags': ['--allow-partial'], 'dest': 'allow_partial', 'action': 'StoreTrueAction', 'nargs': 0, 'const': True,
     'default': False},
    {'flags': ['--skip-existing'], 'dest': 'skip_existing', 'action': 'StoreTrueAction', 'nargs': 0, 'const': True,
     'default': False},
    {'flags': ['--attack'], 'dest': 'attack', 'action': 'StoreAction', 'nargs': '+', 'default': []},
    {'flags': ['--attack-version'], 'dest': 'attack_version', 'action': 'StoreAction', 'default': 'apgd',
     'choices': ['apgd', 'standard']},
    {'flags': ['--attack-set'], 'dest': 'attack_set', 'action': 'StoreAction', 'default': None},
    {'flags': ['--attack-num-samples'], 'dest': 'attack_num_samples', 'action': 'StoreAction', 'default': None},
    {'flags': ['--attack-steps'], 'dest': 'attack_steps', 'action': 'StoreAction', 'default': 100},
    {'flags': ['--attack-targets'], 'dest': 'attack_targets', 'action': 'StoreAction', 'default': 9},
]


def actions():
    return [a for a in validate.build_parser()._actions if a.dest != 'help']


def test_flags_are_those_of_timm_in_every_field_but_for_the_departures():
    ours = [a for a in actions() if a.dest in TIMM_DESTS]
    expected = [{**flag, **DEPARTURES.get(flag['dest'], {})} for flag in TIMM]
    assert as_lines(record(a) for a in ours) == as_lines(expected)
    assert len(expected) == 60


def test_flags_beyond_timm_are_those_of_suites_and_attacks():
    ours = [a for a in actions() if a.dest not in TIMM_DESTS]
    assert as_lines(record(a, with_type=False) for a in ours) == as_lines(OURS)


def test_no_flag_is_required_and_ways_to_compile_exclude_each_other():
    parser = validate.build_parser()
    assert [a.dest for a in parser._actions if a.required] == []
    groups = [[a.dest for a in group._group_actions] for group in parser._mutually_exclusive_groups]
    assert groups == [['torchscript', 'torchcompile', 'aot_autograd']]


def test_two_parsers_share_no_mutable_default():
    first, second = ({a.dest: a.default for a in validate.build_parser()._actions} for _ in range(2))
    mutable = [dest for dest, default in first.items() if isinstance(default, (list, dict))]
    assert sorted(mutable) == ['attack', 'eval', 'model_kwargs']
    assert [dest for dest in mutable if first[dest] is second[dest]] == []


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        validate.main(['--help'])
    shown = capsys.readouterr()
    assert stop.value.code == 0 and shown.err == ''
    words = shown.out.replace(',', ' ').split()
    assert [name for a in actions() for name in a.option_strings if name not in words] == []


def parsed(argv):
    """The options and what comes of them, in one."""
    args, resolved = parse_validate_args(validate.build_parser(), argv)
    assert not vars(args).keys() & vars(resolved).keys()
    return argparse.Namespace(**vars(args), **dataclasses.asdict(resolved))


@pytest.fixture
def parse(tmp_path):
    """Parses a command line after ``--device cpu --data-dir FOLDER``, in that folder."""
    def run(command=''):
        return parsed(['--device', 'cpu', '--data-dir', str(tmp_path), *shlex.split(command)])
    return run


@pytest.fixture
def refuse(parse, capsys):
    """The one line that a command line is refused with."""
    def check(command):
        with pytest.raises(SystemExit) as stop:
            parse(command)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith('validate.py: error: ') and err.count('\n') == 1, err
        return err
    return check


def test_options_without_flags_are_timms_defaults(parse, tmp_path):
    args = vars(parse())
    assert {dest: args[dest] for dest in TIMM_DESTS} == {
        **{flag['dest']: flag['default'] for flag in TIMM}, 'device': 'cpu', 'data_dir': str(tmp_path),
        'checkpoint': []}
    assert args['suites'] is False


def test_positional_folder_stands_before_data_dir_as_in_timm(tmp_path):
    (tmp_path / 'one').mkdir()
    args = parsed([str(tmp_path / 'one'), '--data-dir', str(tmp_path), '--device', 'cpu'])
    assert args.data_dir == str(tmp_path / 'one')


@pytest.mark.parametrize('text, radii', [
    ('l2=0.5', [('l2', 0.5, '0.5')]),
    ('linf=4/255', [('linf', 4 / 255, '4/255')]),
    ('l2=0.25,0.5 linf=0.25/255,1/255',
     [('l2', 0.25, '0.25'), ('l2', 0.5, '0.5'), ('linf', 0.25 / 255, '0.25/255'), ('linf', 1 / 255, '1/255')]),
    ('l2=1e-1', [('l2', 0.1, '1e-1')]),
    ('l2=0.5,0.5', [('l2', 0.5, '0.5')]),
])
def test_radii_are_read_with_fractions(parse, text, radii):
    args = parse(f'--attack {text}')
    assert [(radius.norm, radius.value, radius.text) for radius in args.attack] == radii
    assert args.suites is True


@pytest.mark.parametrize('text', [
    'l3=1', 'l2', 'l2=', '=0.5', 'l2=0', 'l2=-1', 'l2=nan', 'l2=inf', 'linf=a/255', 'l2=0.5/0', 'l2=1/2/3', 'l2=0.5,',
    'L2=0.5', 'l2:0.5', 'linf=8', 'linf=1/255,256/255'])
def test_radius_that_is_none_is_refused(refuse, text):
    message = refuse(f'--attack {text}')
    assert '--attack' in message and text in message


def test_suites_are_asked_for_by_their_flags_or_several_checkpoints(parse, tmp_path):
    for name in ('a.pth', 'b.pth'):
        (tmp_path / name).write_bytes(b'')
    a, b = f'{tmp_path}/a.pth', f'{tmp_path}/b.pth'
    assert parse(f'--model test_resnet --checkpoint {a}').suites is False
    assert parse(f'--model test_resnet --checkpoint {a} {b}').suites is True
    assert parse(f'--model test_resnet --eval x={tmp_path}').eval == [('x', str(tmp_path))]
    assert parse(f'--model test_resnet --eval-root {tmp_path}').suites is True


def test_folder_is_all_of_its_checkpoints_in_natural_order(parse, tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    for name in ('checkpoint-10.pth.tar', 'checkpoint-9.pth.tar', 'last.pth', 'args.txt'):
        (folder / name).write_text(name)
    args = parse(f'--model test_resnet --checkpoint {folder}')
    assert args.checkpoint == [f'{folder}/{name}' for name in ('checkpoint-9.pth.tar', 'checkpoint-10.pth.tar',
                                                               'last.pth')]
    assert args.suites is False and args.folder_of_checkpoints is True
    assert parse(f'--model test_resnet --checkpoint {folder} --attack l2=1').checkpoint == args.checkpoint


def test_copies_and_unfinished_files_of_a_folder_count_in_no_suite(parse, tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    for name in ('checkpoint-8.pth.tar', 'checkpoint-9.pth.tar', 'tmp.pth.tar', 'recovery-1-5.pth.tar'):
        (folder / name).write_text(name)
    (folder / 'last.pth.tar').hardlink_to(folder / 'checkpoint-9.pth.tar')
    (folder / 'model_best.pth.tar').write_text('checkpoint-8.pth.tar')
    (tmp_path / 'copy.pth').write_text('checkpoint-9.pth.tar')
    suites = f'--model test_resnet --eval x={tmp_path} --checkpoint'
    args = parse(f'{suites} {folder}')
    kept, copies = Hashes().distinct(args.checkpoint, args.in_folders)
    assert [Path(path).name for path in kept] == ['checkpoint-8.pth.tar', 'checkpoint-9.pth.tar']
    assert {Path(path).name for path in [*args.left_out, *copies]} == {
        'tmp.pth.tar', 'recovery-1-5.pth.tar', 'last.pth.tar', 'model_best.pth.tar'}
    args = parse(f'{suites} {folder} {tmp_path}/copy.pth')
    assert len(Hashes().distinct(args.checkpoint, args.in_folders)[0]) == 3  # what is named is wanted
    assert len(parse(f'--model test_resnet --checkpoint {folder}').checkpoint) == 6  # as in timm's script
    assert parse(f'--model test_resnet --checkpoint {folder}').left_out == []


def test_folder_of_unfinished_files_only_says_so(parse, refuse, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'recovery-1-5.pth.tar').write_text('')
    suites = f'--model test_resnet --eval x={tmp_path} --checkpoint {tmp_path}/run'
    assert 'holds recovery-1-5.pth.tar, but nothing that a finished epoch has left' in refuse(suites)
    assert len(parse(f'{suites}/recovery-1-5.pth.tar').checkpoint) == 1


def test_devices_that_share_batches_are_there(parse, refuse, monkeypatch):
    assert parse('--num-gpu 2').num_gpu == 2  # without any DataParallel does nothing
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert '--num-gpu 3: there are 2 CUDA devices here' in refuse('--num-gpu 3')
    assert '--num-gpu 2: batches are shared by the first CUDA devices, not by --device cpu' in refuse('--num-gpu 2')


# args.yaml of a training run

@pytest.fixture
def run(tmp_path):
    """Writes the args.yaml of a run beside a checkpoint; gives that checkpoint's path."""
    def write(text=None, **values):
        folder = tmp_path / 'run'
        folder.mkdir(exist_ok=True)
        (folder / 'last.pth.tar').write_bytes(b'')
        (folder / 'args.yaml').write_text(yaml.safe_dump(values) if text is None else text)
        return folder / 'last.pth.tar'
    return write


OF_A_RUN = dict(model='test_vit', num_classes=7, img_size=32, mean=[0.1, 0.2, 0.3], std=[0.4], interpolation='nearest',
                crop_pct=0.9, model_kwargs={'depth': 2}, fast_norm=False, gp=None, in_chans=None)


def test_model_and_preprocessing_are_those_of_the_run(parse, run):
    path = run(**OF_A_RUN, lr=0.5, batch_size=3, data_dir='/elsewhere', seed=9)
    args = vars(parse(f'--checkpoint {path}'))
    assert {key: args[key] for key in OF_A_RUN} == OF_A_RUN
    assert args['batch_size'] == 256 and args['seed'] == 42 and args['data_dir'] != '/elsewhere'
    assert args['taken_from'] == f'{path.parent}/args.yaml'


@pytest.mark.parametrize('flag, dest, value', [
    ('--num-classes 8', 'num_classes', 8), ('--img-size 40', 'img_size', 40), ('--mean 0 0 0', 'mean', [0.0, 0.0, 0.0]),
    ('--interpolation bicubic', 'interpolation', 'bicubic'), ('--crop-pct 1', 'crop_pct', 1.0),
    ('--model-kwargs depth=3', 'model_kwargs', {'depth': 3}), ('--fast-norm', 'fast_norm', True)])
def test_command_line_wins_over_the_run(parse, run, flag, dest, value):
    args = vars(parse(f'--checkpoint {run(**OF_A_RUN)} {flag}'))
    assert args[dest] == value
    assert {key: args[key] for key in OF_A_RUN if key != dest} == {k: v for k, v in OF_A_RUN.items() if k != dest}


def test_invalid_flag_is_not_hidden_by_the_run(refuse, run):
    assert '--num-classes 0' in refuse(f'--checkpoint {run(**OF_A_RUN)} --num-classes 0')


def test_size_of_the_command_line_wins_over_the_runs_input_size(parse, run):
    path = run(model='test_vit', input_size=[1, 28, 28])
    args = parse(f'--checkpoint {path}')
    assert args.input_size == [1, 28, 28] and args.img_size is None
    args = parse(f'--checkpoint {path} --img-size 40')
    assert args.input_size is None and args.img_size == 40 and args.in_chans == 1


def test_run_is_not_looked_at_if_the_model_is_named(parse, run):
    args = parse(f'--model test_resnet --checkpoint {run(**OF_A_RUN)}')
    assert args.model == 'test_resnet' and args.num_classes is None and args.crop_pct is None


@pytest.mark.parametrize('text', [
    '', '- 1\n', 'a: [', 'a: !!int x\n', 'a: 2020-99-99\n', 'a: ' + '[' * 5000,
    '!!python/object/apply:os.system ["touch pwned"]\n'])
@pytest.mark.full
def test_broken_yaml_of_a_run_is_refused(refuse, run, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    path = run(text)
    message = refuse(f'--checkpoint {path}')
    assert '--model' in message and f'{path.parent}/args.yaml' in message
    assert not (tmp_path / 'pwned').exists()


@pytest.mark.parametrize('key, value', [
    ('num_classes', 'ten'), ('mean', 0.5), ('img_size', [3]), ('model_kwargs', 'x'), ('fast_norm', 'yes'),
    ('input_size', [3, 32]), ('model', ['test_vit'])])
def test_value_of_a_wrong_type_in_a_run_is_refused(refuse, run, key, value):
    message = refuse(f'--checkpoint {run(**{**OF_A_RUN, key: value})}')
    assert 'args.yaml' in message and f'{key}: {value!r}' in message


def test_epsilon_of_batch_norm_goes_into_the_model_as_it_did_in_the_run(parse, run):
    path = run(**OF_A_RUN, bn_eps=0.01)
    assert parse(f'--checkpoint {path}').model_kwargs == {'bn_eps': 0.01, 'depth': 2}
    assert parse(f'--checkpoint {path} --model-kwargs bn_eps=0.1').model_kwargs == {'bn_eps': 0.1}


def test_overlay_of_a_run_goes_into_the_model_but_for_where_its_weights_were(parse, run):
    overlay = {'mean': [0.1, 0.2, 0.3], 'input_size': [3, 40, 40], 'file': 'gone.pth', 'custom_load': True}
    path = run(**OF_A_RUN, pretrained_cfg_overlay=overlay)
    kept = {'mean': [0.1, 0.2, 0.3], 'input_size': [3, 40, 40]}
    assert parse(f'--checkpoint {path}').model_kwargs == {'pretrained_cfg_overlay': kept, 'depth': 2}
    for nothing in ({}, None, {'file': 'gone.pth'}):
        path = run(**OF_A_RUN, pretrained_cfg_overlay=nothing)
        assert parse(f'--checkpoint {path}').model_kwargs == {'depth': 2}


def second_run(tmp_path, **values):
    folder = tmp_path / 'other'
    folder.mkdir()
    (folder / 'last.pth.tar').write_bytes(b'other')
    (folder / 'args.yaml').write_text(yaml.safe_dump(values))
    return folder / 'last.pth.tar'


@pytest.mark.parametrize('key, value', [
    ('num_classes', 8), ('mean', None), ('interpolation', 'bicubic'), ('model', 'test_resnet'), ('gp', 'avg'),
    ('model_kwargs', {}), ('bn_eps', 0.01), ('pretrained_cfg_overlay', {'mean': [0.1, 0.1, 0.1]})])
def test_runs_that_differ_are_not_evaluated_together(refuse, parse, run, tmp_path, key, value):
    values = {**OF_A_RUN, 'bn_eps': 0.1, 'pretrained_cfg_overlay': {'mean': [0.2, 0.2, 0.2]}}
    first, second = run(**values), second_run(tmp_path, **{**values, key: value})
    message = refuse(f'--checkpoint {first} {second}')
    assert f'--checkpoint: {key} is ' in message and repr(values[key]) in message
    assert f'{first.parent}/args.yaml' in message and f'{second.parent}/args.yaml' in message
    assert vars(parse(f'--model test_vit --checkpoint {first} {second}'))['num_classes'] is None


def test_runs_may_differ_in_other_options_and_in_what_the_command_line_says(parse, run, tmp_path):
    without = tmp_path / 'last.pth'
    without.write_bytes(b'')
    first, second = run(**OF_A_RUN, lr=1.0), second_run(tmp_path, **{**OF_A_RUN, 'crop_pct': 0.8, 'lr': 2.0})
    args = parse(f'--checkpoint {without} {first} {second} --crop-pct 1')
    assert (args.model, args.num_classes, args.crop_pct) == ('test_vit', 7, 1)


def test_folder_after_the_checkpoint_is_the_data_as_in_timms_script(parse, run, tmp_path):
    path, data = run(**OF_A_RUN), tmp_path / 'images'
    data.mkdir()
    args = parsed(['--device', 'cpu', '--checkpoint', str(path), str(data)])
    assert (args.checkpoint, args.data_dir, args.suites) == ([str(path)], str(data), False)
