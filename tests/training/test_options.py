"""The command line: timm's flags unchanged, the SAM group, and YAML files of defaults."""
import json
import re
import shlex

import pytest
import torch
import yaml
from support.flags import as_lines, record
from support.places import DATA

from timm_sam import train
from timm_sam.cli.parser import dump_args
from timm_sam.training.options import parse_args

TIMM = json.loads((DATA / 'train_flags.json').read_text())
COMPLETED = {'smoothing': 0.1, 'decay_epochs': 90.0, 'eval_metric': 'top1'}  # what depends on other options
TIMM_DESTS = [flag['dest'] for flag in TIMM['train.py']]

HOLDOUT = [
    {'flags': ['--holdout'], 'dest': 'holdout', 'action': 'StoreAction', 'default': None},
    {'flags': ['--holdout-seed'], 'dest': 'holdout_seed', 'action': 'StoreAction', 'default': 0},
]
ABLATIONS = [
    {'flags': ['--norm-params'], 'dest': 'norm_params', 'action': 'StoreAction', 'default': None,
     'choices': ['fixed', 'only']},
    {'flags': ['--norm-drop'], 'dest': 'norm_drop', 'action': 'StoreAction', 'default': 0.0},
    {'flags': ['--wd-params'], 'dest': 'wd_params', 'action': 'StoreAction', 'default': 'timm',
     'choices': ['timm', 'all', 'nonorm', 'none']},
]
SAM = [
    {'flags': ['--sam-variant'], 'dest': 'sam_variant', 'action': 'StoreAction', 'default': None,
     'choices': ['sam', 'elementwise_l2', 'elementwise_l2_orig', 'elementwise_linf', 'layerwise_l2', 'fisher']},
    {'flags': ['--sam-rho'], 'dest': 'sam_rho', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-params'], 'dest': 'sam_params', 'action': 'StoreAction', 'default': 'onlynorm',
     'choices': ['onlynorm', 'all', 'nonorm']},
    {'flags': ['--sam-filter'], 'dest': 'sam_filter', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-eta'], 'dest': 'sam_eta', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-bn-stats'], 'dest': 'sam_bn_stats', 'action': 'StoreAction', 'default': 'clean',
     'choices': ['clean', 'both']},
    {'flags': ['--sam-m'], 'dest': 'sam_m', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-sync'], 'dest': 'sam_sync', 'action': 'StoreTrueAction', 'nargs': 0, 'const': True,
     'default': False},
    {'flags': ['--sam-ascent-fraction'], 'dest': 'sam_ascent_fraction', 'action': 'StoreAction', 'default': 1.0},
    {'flags': ['--sam-no-shared-forward'], 'dest': 'sam_no_shared_forward', 'action': 'StoreTrueAction', 'nargs': 0,
     'const': True, 'default': False},
    {'flags': ['--sam-every'], 'dest': 'sam_every', 'action': 'StoreAction', 'default': 1},
    {'flags': ['--sam-start-epoch'], 'dest': 'sam_start_epoch', 'action': 'StoreAction', 'default': 0},
    {'flags': ['--sam-end-epoch'], 'dest': 'sam_end_epoch', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-method'], 'dest': 'sam_method', 'action': 'StoreAction', 'default': None, 'nargs': '+',
     'choices': ['usam', 'msam', 'friendly', 'stable', 'looksam', 'gsam', 'late', 'random_mask', 'ssam_dynamic',
                 'esam', 'ssam_fisher']},
    {'flags': ['--sam-usam-lam'], 'dest': 'sam_usam_lam', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-friendly-sigma'], 'dest': 'sam_friendly_sigma', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-friendly-lam'], 'dest': 'sam_friendly_lam', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-looksam-k'], 'dest': 'sam_looksam_k', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-looksam-alpha'], 'dest': 'sam_looksam_alpha', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-gsam-alpha'], 'dest': 'sam_gsam_alpha', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-gsam-rho-min'], 'dest': 'sam_gsam_rho_min', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-late-start'], 'dest': 'sam_late_start', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-late-ramp', '--no-sam-late-ramp'], 'dest': 'sam_late_ramp', 'action': 'BooleanOptionalAction',
     'default': None, 'nargs': 0},
    {'flags': ['--sam-random-mask-sparsity'], 'dest': 'sam_random_mask_sparsity', 'action': 'StoreAction',
     'default': None},
    {'flags': ['--sam-random-mask-every'], 'dest': 'sam_random_mask_every', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-random-mask-norm'], 'dest': 'sam_random_mask_norm', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-ssam-dynamic-sparsity'], 'dest': 'sam_ssam_dynamic_sparsity', 'action': 'StoreAction',
     'default': None},
    {'flags': ['--sam-ssam-dynamic-every'], 'dest': 'sam_ssam_dynamic_every', 'action': 'StoreAction',
     'default': None},
    {'flags': ['--sam-ssam-dynamic-drop'], 'dest': 'sam_ssam_dynamic_drop', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-ssam-dynamic-norm'], 'dest': 'sam_ssam_dynamic_norm', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-esam-beta'], 'dest': 'sam_esam_beta', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-esam-gamma'], 'dest': 'sam_esam_gamma', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-ssam-fisher-sparsity'], 'dest': 'sam_ssam_fisher_sparsity', 'action': 'StoreAction',
     'default': None},
    {'flags': ['--sam-ssam-fisher-every'], 'dest': 'sam_ssam_fisher_every', 'action': 'StoreAction', 'default': None},
    {'flags': ['--sam-ssam-fisher-samples'], 'dest': 'sam_ssam_fisher_samples', 'action': 'StoreAction',
     'default': None},
    {'flags': ['--sam-ssam-fisher-norm'], 'dest': 'sam_ssam_fisher_norm', 'action': 'StoreAction', 'default': None},
]
RUN = [
    {'flags': ['--log-tensorboard'], 'dest': 'log_tensorboard', 'action': 'StoreTrueAction', 'nargs': 0, 'const': True,
     'default': False},
    {'flags': ['--log-trackio'], 'dest': 'log_trackio', 'action': 'StoreTrueAction', 'nargs': 0, 'const': True,
     'default': False},
    {'flags': ['--trackio-project'], 'dest': 'trackio_project', 'action': 'StoreAction', 'default': 'timm_sam'},
    {'flags': ['--allow-nonfinite'], 'dest': 'allow_nonfinite', 'action': 'StoreTrueAction', 'nargs': 0, 'const': True,
     'default': False},
]
BEYOND = [*SAM, *HOLDOUT, *ABLATIONS, *RUN]  # in the order of the help


def actions(keep):
    return [a for a in train.build_parser()._actions if keep(a.dest)]


def test_flags_are_those_of_timm_in_every_field():
    ours = actions(lambda dest: dest not in ('help', 'config', *(flag['dest'] for flag in BEYOND)))
    assert as_lines(record(a) for a in ours) == as_lines(TIMM['train.py'])


def test_flags_beyond_timm_are_help_config_sam_the_holdout_ablations_loggers_and_what_a_diverged_run_does():
    ours = actions(lambda dest: dest not in TIMM_DESTS)
    assert [a.dest for a in ours] == ['help', 'config', *(flag['dest'] for flag in BEYOND)]
    assert as_lines(record(a, with_type=False) for a in ours[2:]) == as_lines(BEYOND)
    assert record(ours[1]) == {'flags': ['-c', '--config'], 'dest': 'config', 'action': 'StoreAction', 'default': ''}


def test_no_flag_is_required_and_two_pairs_exclude_each_other():
    parser = train.build_parser()
    assert [a.dest for a in parser._actions if a.required] == []
    groups = [[a.dest for a in group._group_actions] for group in parser._mutually_exclusive_groups]
    assert groups == [['torchscript', 'torchcompile'], ['persistent_workers', 'persistent_workers']]


def test_two_parsers_share_no_mutable_default():
    first, second = ({a.dest: a.default for a in train.build_parser()._actions} for _ in range(2))
    mutable = [dest for dest, default in first.items() if isinstance(default, (list, dict))]
    assert 'model_kwargs' in mutable and 'scale' in mutable
    assert [dest for dest in mutable if first[dest] is second[dest]] == []


def test_help_lists_every_flag_even_beside_a_config_that_is_missing(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(['-c', 'missing.yaml', '--help'])
    shown = capsys.readouterr()
    assert stop.value.code == 0 and shown.err == ''
    names = [name for a in train.build_parser()._actions for name in a.option_strings]
    words = shown.out.replace(',', ' ').split()
    assert [name for name in names if name not in words] == []
    groups = re.findall(r'^(\S.*):$', shown.out, re.M)
    assert {*groups[:2]} == {'positional arguments', 'options'} and groups[2] == 'SAM'


# Without a configuration

@pytest.fixture
def parse(tmp_path):
    """Parses a command line after ``--device cpu --data-dir FOLDER``."""
    return lambda command='': parse_args(
        train.build_parser(), ['--device', 'cpu', '--data-dir', str(tmp_path), *shlex.split(command)])


@pytest.fixture
def refuse(parse, capsys):
    """The one line that a command line is refused with, without its start."""
    def check(command):
        with pytest.raises(SystemExit) as stop:
            parse(command)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith('train.py: error: ') and err.count('\n') == 1, err
        return err
    return check


def test_options_without_flags_are_the_defaults(parse, tmp_path):
    defaults = {flag['dest']: flag['default'] for flag in TIMM['train.py'] + BEYOND}
    assert vars(parse()) == {**defaults, **COMPLETED, 'device': 'cpu', 'data_dir': str(tmp_path), 'config': ''}


@pytest.mark.parametrize('flag, value', [
    ('--sam-rho', 0.0), ('--sam-rho', 0.05), ('--sam-rho', 1e-4), ('--sam-eta', 0.0), ('--sam-eta', 2.5),
    ('--sam-ascent-fraction', 1.0), ('--sam-ascent-fraction', 0.25), ('--sam-every', 1), ('--sam-every', 7),
    ('--sam-start-epoch', 0), ('--sam-start-epoch', 4), ('--sam-end-epoch', 9),
])
def test_sam_numbers_are_read(parse, flag, value):
    args = parse(f'--sam-variant fisher --sam-rho 1 {flag} {value}')
    read = getattr(args, flag[2:].replace('-', '_'))
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize('flag', ['--sam-rho', '--sam-eta'])
@pytest.mark.parametrize('value', ['-1', '-1e-9', 'nan', 'inf', '-inf', '1e999', 'x', ''])
def test_sam_radius_and_eta_are_finite_and_not_negative(refuse, flag, value):
    message = refuse(f'--sam-variant fisher --sam-rho 1 {flag}={value}')
    assert flag in message and f'must be a finite number >= 0, got {value}'.strip() in message


@pytest.mark.parametrize('value', ['0', '-0.5', '1.01', 'nan', 'inf', 'x', ''])
def test_sam_ascent_fraction_is_above_0_and_at_most_1(refuse, value):
    message = refuse(f'--sam-variant sam --sam-rho 1 --sam-ascent-fraction={value}')
    assert '--sam-ascent-fraction' in message and f'must be a number in (0, 1], got {value}'.strip() in message


@pytest.mark.parametrize('flag, least', [('--sam-every', 1), ('--sam-start-epoch', 0), ('--sam-end-epoch', 0)])
@pytest.mark.parametrize('value', ['-1', '1.5', 'nan', 'x'])
def test_sam_counts_are_integers_in_range(refuse, flag, least, value):
    message = refuse(f'--sam-variant sam --sam-rho 1 {flag} {value}')
    assert flag in message and f'must be an integer >= {least}, got {value}' in message


# With a configuration

@pytest.fixture
def config(tmp_path):
    """Writes a YAML file and returns the flag for it."""
    def write(text):
        path = tmp_path / 'config.yaml'
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return f'--config {path}'
    return write


def test_yaml_sets_defaults_and_the_command_line_wins(parse, config):
    flag = config('model: test_vit\nbatch_size: 32\nepochs: 7\nscale: [0.5, 1.0]\namp: true\namp_dtype: bfloat16\n'
                  'model_kwargs: {img_size: 32, stages: [1, 2]}\nlr: 0.25\nsam_variant: sam\nsam_rho: 0.5\n')
    args = parse(f'--epochs 9 {flag} --sam-rho 2 --scale 0.1 0.2')
    assert (args.model, args.batch_size, args.lr, args.amp, args.amp_dtype, args.sam_variant, args.model_kwargs) == (
        'test_vit', 32, 0.25, True, 'bfloat16', 'sam', {'img_size': 32, 'stages': [1, 2]})
    assert (args.epochs, args.sam_rho, args.scale) == (9, 2.0, [0.1, 0.2])


def test_command_line_mapping_replaces_the_one_of_the_yaml_file(parse, config):
    args = parse(f"{config('model_kwargs: {img_size: 32}')} --model-kwargs patch_size=4")
    assert args.model_kwargs == {'patch_size': 4}


@pytest.mark.parametrize('flag', ['-c PATH', '-cPATH', '--config PATH', '--config=PATH'])
def test_config_flag_is_found_in_every_spelling(parse, config, flag):
    path = config('epochs: 7').split()[1]
    assert parse(flag.replace('PATH', path)).epochs == 7


def test_numbers_that_yaml_reads_as_text_become_numbers(parse, config):
    args = parse(config("lr: 1e-3\nweight_decay: 5e-2\nbatch_size: '64'\nopt_betas: [9e-1, 0.95]\nsam_variant: sam\n"
                        'sam_rho: 5e-2\nmin_lr: 0\n'))
    values = args.lr, args.weight_decay, args.batch_size, args.opt_betas, args.sam_rho, args.min_lr
    assert values == (0.001, 0.05, 64, [0.9, 0.95], 0.05, 0.0)
    assert type(args.lr) is float and type(args.batch_size) is int and type(args.min_lr) is float


@pytest.mark.parametrize('text', ['', '# nothing but this\n', '---\n', '{}\n'])
def test_empty_yaml_changes_nothing(parse, config, text):
    flag = config(text)
    assert {**vars(parse(flag)), 'config': ''} == vars(parse())


def test_null_in_yaml_is_none(parse, config):
    assert parse(config('num_classes: null\nsam_rho:\n')).num_classes is None


def test_yaml_may_hold_the_neutral_values_of_sam_without_a_variant(parse, config):
    args = parse(config('sam_variant: null\nsam_rho: null\nsam_params: onlynorm\nsam_bn_stats: clean\nsam_every: 1\n'
                        'sam_ascent_fraction: 1\nsam_no_shared_forward: false\nsam_start_epoch: 0\n'
                        'sam_end_epoch: null\nsam_eta: null\nsam_filter: null\n'))
    assert args.sam_variant is None


def test_yaml_with_sam_values_but_no_variant_is_refused(refuse, config):
    assert '--sam-params all has no effect without --sam-variant' in refuse(config('sam_params: all'))


def test_contradiction_between_yaml_and_command_line_is_refused(refuse, config):
    message = refuse(f"{config('amp: true')} --model-dtype bfloat16")
    assert '--amp' in message and '--model-dtype bfloat16' in message


def test_yaml_choice_of_both_compilers_is_refused(refuse, config):
    message = refuse(config('torchscript: true\ntorchcompile: inductor'))
    assert '--torchscript' in message and '--torchcompile' in message


@pytest.mark.parametrize('text, words', [
    ('bath_size: 3', ["'bath_size'", "'batch_size'"]),
    ('batch-size: 3', ["'batch-size'", "'batch_size'"]),
    ('sam_rh0: 3', ["'sam_rh0'", "'sam_rho'"]),
    ('qqqqqq: 3', ["'qqqqqq'", '--help']),
    ('3: 3', ['unknown key 3']),
    ('help: true', ["'help'"]),
    ('config: other.yaml', ["'config'"]),
])
def test_unknown_yaml_key_is_named_with_a_suggestion(refuse, config, text, words):
    message = refuse(config(text))
    assert 'unknown key' in message and [w for w in words if w not in message] == []


@pytest.mark.parametrize('text, key, value, expected', [
    ('epochs: many', 'epochs', "'many'", 'int'),
    ('epochs: 1.5', 'epochs', '1.5', 'int'),
    ('epochs: true', 'epochs', 'True', 'int'),
    ('epochs: [1]', 'epochs', '[1]', 'a single value'),
    ('epochs: {a: 1}', 'epochs', "{'a': 1}", 'int'),
    ('epochs: 2026-01-01', 'epochs', 'datetime', 'int'),
    ('lr: fast', 'lr', "'fast'", 'float'),
    ('lr: true', 'lr', 'True', 'float'),
    ('model: [a]', 'model', "['a']", 'a single value'),
    ('model: true', 'model', 'True', 'text'),
    ('amp: 1', 'amp', '1', 'true or false'),
    ("amp: 'yes'", 'amp', "'yes'", 'true or false'),
    ('scale: 0.5', 'scale', '0.5', 'a list'),
    ('scale: [a, b]', 'scale', "'a'", 'float'),
    ('scale: [[1, 2]]', 'scale', '[1, 2]', 'float'),
    ('input_size: [3, 32]', 'input_size', '[3, 32]', 'a list of 3 values'),
    ('model_kwargs: [a]', 'model_kwargs', "['a']", 'a mapping'),
    ('model_kwargs: a=1', 'model_kwargs', "'a=1'", 'a mapping'),
    ('train_size_schedule: foo', 'train_size_schedule', "'foo'", 'one of constant, progressive'),
    ('sam_variant: foo', 'sam_variant', "'foo'", 'one of sam, elementwise_l2'),
    ('sam_rho: -1', 'sam_rho', '-1', 'number >= 0'),
    ('sam_rho: .nan', 'sam_rho', 'nan', 'number >= 0'),
    ('sam_rho: .inf', 'sam_rho', 'inf', 'number >= 0'),
    ('sam_ascent_fraction: 0', 'sam_ascent_fraction', '0', 'number in (0, 1]'),
    ('sam_no_shared_forward: 1', 'sam_no_shared_forward', '1', 'true or false'),
    ('sam_every: 0', 'sam_every', '0', 'integer >= 1'),
    ('sam_every: 2.5', 'sam_every', '2.5', 'integer >= 1'),
    ('sam_start_epoch: -1', 'sam_start_epoch', '-1', 'integer >= 0'),
    ('sam_start_epoch: true', 'sam_start_epoch', 'True', 'integer >= 0'),
])
def test_yaml_value_of_a_wrong_type_is_named(refuse, config, text, key, value, expected):
    message = refuse(config(text))
    assert [w for w in (f'{key}:', value, expected) if w not in message] == []


@pytest.mark.parametrize('text, words', [
    ('- a\n- b\n', 'holds a list'),
    ('just words\n', 'holds a str'),
    ('a: [1\nb: }', 'not a YAML file'),
    ('a: 1\n\tb: 2\n', 'not a YAML file'),
    (b'\xff\xfe\x00bad\x81', 'not a YAML file'),
    ('a: 1\n---\nb: 2\n', 'not a YAML file'),
])
def test_file_that_is_no_yaml_mapping_is_refused(refuse, config, text, words):
    flag = config(text)
    message = refuse(flag)
    assert words in message and flag in message


def test_yaml_that_calls_python_is_refused_and_not_run(refuse, config, tmp_path):
    trap = tmp_path / 'trap'
    assert 'not a YAML file' in refuse(config(f'model: !!python/object/apply:os.mkdir ["{trap}"]'))
    assert not trap.exists()


@pytest.mark.parametrize('path, words', [('missing.yaml', 'No such file'), ('.', 'directory')])
def test_config_that_cannot_be_read_is_named(refuse, path, words):
    message = refuse(f'--config {path}')
    assert f'--config {path}' in message and words in message


# From one run to the next

COMMANDS = [
    '',
    '--sam-variant fisher --sam-rho 0.5 --sam-eta 2 --sam-params all --sam-filter "layer[34]\\." --sam-bn-stats both '
    '--sam-every 3 --sam-start-epoch 1 --sam-end-epoch 5 --sam-ascent-fraction 0.25 --sam-no-shared-forward',
    '--sam-variant sam --sam-rho 1 --sam-m 64 --sam-sync',
    '--scale 0.5 1 --ratio 1 1 --mean 0.5 --input-size 3 64 32 --opt-betas 0.9 0.99 --cutmix-minmax 0.2 0.8',
    "--model-kwargs img_size=32 layers=[1,2] name=x flag=True none=None p=1e-3 word='on' --opt-kwargs caution=True",
    "--wandb-tags 1 1e3 true null '' --wandb-project 007",
    "--lr 1e-3 --opt-eps 1e-16 --min-lr 0 --model-ema --torchcompile --seed 7 --class-map '' --val-split ''",
    "--experiment 'a: b # c' --wandb-project 'übung \\ \"x\" %d {y}'",
    '--grad-accum-steps 0',
]


@pytest.mark.parametrize('command', COMMANDS)
def test_dumped_options_read_back_the_same(parse, config, command):
    args = parse(command)
    again = parse_args(train.build_parser(), shlex.split(config(dump_args(args))))
    assert {**vars(again), 'config': ''} == vars(args)


def test_args_yaml_of_a_run_reads_back_to_the_options_it_was_given(run_train, base):
    # what the run makes of the open --lr does not count as given
    command = ('--lr 0 --scale 0.5 1 --model-kwargs zero_init_last=False --sam-variant sam '
               '--sam-rho 0.05 --drop-path 0.1')
    done = run_train(command)
    assert done.code == 0
    given = parse_args(train.build_parser(), shlex.split(f'{base} {command}'))
    again = parse_args(train.build_parser(), ['-c', str(done.folder() / 'args.yaml')])
    assert {**vars(again), 'config': ''} == vars(given)


def test_run_repeated_from_its_args_yaml_gives_the_same_weights(run_train):
    first = run_train('--sam-variant sam --sam-rho 0.05')
    weights = first.checkpoint()['state_dict']
    again = run_train(f"--experiment again -c {first.folder() / 'args.yaml'}")
    assert again.code == 0
    repeated = again.checkpoint('again')['state_dict']
    assert [name for name in weights if not torch.equal(weights[name], repeated[name])] == []


def test_args_yaml_of_timm_is_read(tmp_path):
    # timm writes vars(args) with yaml.safe_dump; it knows neither our flags nor 'config'
    options = {flag['dest']: flag['default'] for flag in TIMM['train.py']}
    options.update(COMPLETED)
    options.update(data_dir=str(tmp_path), device='cpu', lr=1e-5, opt='lamb', model_kwargs={'img_size': 32},
                   input_size=[3, 64, 64], amp=True, wandb_tags=['a', '1'])
    path = tmp_path / 'args.yaml'
    path.write_text(yaml.safe_dump(options, default_flow_style=False))
    args = vars(parse_args(train.build_parser(), ['-c', str(path)]))
    assert {dest: args[dest] for dest in options} == options
    assert {dest: args[dest] for dest in args if dest not in options} == {
        **{flag['dest']: flag['default'] for flag in BEYOND}, 'config': str(path)}


# Files that build on others

def test_base_gives_what_a_file_leaves_open(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'common.yaml').write_text('lr: 0.1\nepochs: 7\nopt: adamw\n')
    (tmp_path / 'sub' / 'middle.yaml').write_text('base: ../common.yaml\nepochs: 8\n')
    (tmp_path / 'sub' / 'run.yaml').write_text('base: middle.yaml\nlr: 0.2\n')
    command = ['-c', str(tmp_path / 'sub' / 'run.yaml'), '--device', 'cpu', str(tmp_path)]
    args = parse_args(train.build_parser(), command)
    assert (args.lr, args.epochs, args.opt) == (0.2, 8, 'adamw')
    assert 'base' not in vars(args)


@pytest.mark.parametrize('files, words', [
    ({'a': 'base: b.yaml\n', 'b': 'base: a.yaml\n'}, ['a.yaml', 'its own base']),
    ({'a': 'base: a.yaml\n'}, ['a.yaml', 'its own base']),
    ({'a': 'base: nowhere.yaml\n'}, ['nowhere.yaml', 'No such file']),
    ({'a': 'base: 3\n'}, ['a.yaml', 'base: 3']),
    ({'a': 'base: b.yaml\n', 'b': 'bath_size: 3\n'}, ['b.yaml', "'bath_size'", "'batch_size'"]),
])
def test_mistake_in_bases_names_the_file(tmp_path, capsys, files, words):
    for name, text in files.items():
        (tmp_path / f'{name}.yaml').write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse_args(train.build_parser(), ['-c', str(tmp_path / 'a.yaml'), '--device', 'cpu', str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    assert [word for word in words if word not in error] == []
