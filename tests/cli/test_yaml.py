"""YAML files of any content: a mistake in one is one line, and nothing is read, built or written for it."""
import contextlib
import io
import os

import pytest
import yaml
from support.states import tree

from timm_sam import train
from timm_sam.cli.errors import shown

PARSER = train.build_parser()
NOT_NULL = [a.dest for a in PARSER._actions if a.default is not None and a.dest not in ('help', 'config')]


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """The one line with which a file is refused."""
    monkeypatch.chdir(tmp_path)

    def refuse(text):
        if text is not None:
            (tmp_path / 'c.yaml').write_bytes(text if isinstance(text, bytes) else text.encode())
        before = tree(tmp_path)
        with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
            train.main(['--device', 'cpu', '--data-dir', '.', '-c', 'c.yaml'])
        assert stop.value.code == 2 and err.getvalue().count('\n') == 1 and len(err.getvalue()) < 1000
        assert err.getvalue().startswith('train.py: error: ') and tree(tmp_path) == before
        return err.getvalue()
    return refuse


def test_null_for_a_flag_that_cannot_be_none_is_refused(refused):
    assert len(NOT_NULL) > 100
    for dest in NOT_NULL[::9]:
        message = refused(f'{dest}: null')
        assert f'{dest}: None' in message and 'leave it out for the default' in message, message


def test_every_null_is_taken_or_refused():
    from timm_sam.cli.errors import OptionError
    from timm_sam.cli.parser import yaml_value
    for action in PARSER._actions:
        if action.dest in NOT_NULL:
            with pytest.raises(OptionError, match='leave it out'):
                yaml_value('c', action, None)
        elif action.dest not in ('help', 'config'):
            assert yaml_value('c', action, None) is None


DEEP = '[' * 3000 + ']' * 3000
LAUGHS = 'model_kwargs:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'  a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 10)}]\n' for i in range(1, 9))


@pytest.mark.parametrize('text, words', [
    ('epochs: 2020-01-01', ['epochs: datetime.date(2020, 1, 1)', 'int']),
    ('experiment: 2020-01-01', ['experiment: datetime.date', 'text']),
    ('lr: 2020-01-01 10:00:00', ['lr: datetime.datetime', 'float']),
    ('epochs: !!int x', ['not a YAML file']),
    ('lr: !!float x', ['not a YAML file']),
    ('amp: !!bool x', ['not a YAML file']),
    ('lr: !!timestamp x', ['not a YAML file']),
    ('lr: !!binary x', ['not a YAML file']),
    ('lr: 2020-13-45', ['not a YAML file']),
    ('epochs: ' + '9' * 5000, ['not a YAML file']),
    ('epochs: 0x' + 'f' * 5000, ['epochs: an integer of 20000 bits', 'a number of this size']),
    ('lr: 0x' + 'f' * 5000, ['lr: an integer of 20000 bits']),
    ('experiment: 0x' + 'f' * 5000, ['experiment: an integer of 20000 bits']),
    ('? 0x' + 'f' * 5000 + '\n: 1', ['unknown key an integer of 20000 bits']),
    ('lr: ' + '9' * 400, ['lr: an integer of 1329 bits']),
    (f'scale: {DEEP}', ['not a YAML file']),
    ('scale: ' + '[' * 60 + ']' * 60, ['scale: [[[', 'float']),
    ('scale: &a [*a, *a]', ['scale: [', 'float']),
    ('model_kwargs: &a {x: *a}', ['model_kwargs: {', 'endless']),
    (LAUGHS, ['model_kwargs: {', 'endless or far too large']),
    ('model_kwargs: {1: 2}', ['model_kwargs: {1: 2}', 'a mapping of keyword arguments']),
    ('model_kwargs: !!set {a, b}', ['model_kwargs', 'a mapping']),
    ('experiment: "a\\0b"', ["experiment: 'a\\x00b'", 'NUL']),
    ('data_dir: "\\ud800"', ['data_dir', 'surrogate']),
    ('model_kwargs: {a: ["\\udfff"]}', ['model_kwargs', 'surrogate']),
    ('wandb_tags: ["\\0"]', ['wandb_tags', 'NUL']),
    ('base: "\\0"', ['base:', 'not the path of a YAML file']),
    ('base: ""', ["base: ''", 'not the path']),
    ('base: 3', ['base: 3']),
    ('mean: []', ['mean: []', 'one value or more']),
    ('decay_milestones: []', ['decay_milestones: []', 'one value or more']),
    ('seed: -1', ['--seed -1', '>= 0']),
    ('lr_base_size: 0', ['--lr-base-size 0', '>= 1']),
    ('crop_pct: .nan', ['--crop-pct nan', '> 0']),
    ('ratio: [0, 0]', ['--ratio [0.0, 0.0]', '> 0']),
    ('workers: 1000000', ['--workers 1000000', '<= 1024']),
    ('workers: .inf', ['workers: inf', 'int']),
    ('grad_accum_steps: -1', ['--grad-accum-steps -1', '>= 0']),
    ('class_stats: .', ['--class-stats . is no regular file']),
    ('{a: 1}: 2', ['not a YAML file']),
    ('<<: 5', ['not a YAML file']),
    ('? ' + 'x' * 100_000 + '\n: 1', ['unknown key']),
    ('lr: ' + 'x' * 100_000, ['lr:', 'float']),
    ('train_size_schedule: ' + 'x' * 100_000, ['train_size_schedule:', 'one of']),
    ('sam_variant: [sam]', ["sam_variant: ['sam']", 'a single value']),
    ('lr: 0.1\nepochs: 3\n"lr": 0.2\n', ["'lr' stands in it twice, in lines 1 and 3", 'remove one']),
    ('model_kwargs:\n  depth: 2\n  depth: 3\n', ["'depth' stands in it twice, in lines 2 and 3"]),
])
def test_content_that_is_no_value_is_one_line(refused, text, words):
    message = refused(text)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize('device, words', [
    ('meta', ['holds no numbers']), ('mps', ['torch has none here']), ('cuda:99999999999', ['no device of torch']),
    ('vulkan', ['torch has none here']), ('cpu:x', ['no device of torch'])])
def test_device_that_is_not_there_is_one_line(tmp_path, monkeypatch, device, words):
    import torch
    if device == 'mps' and torch.backends.mps.is_available():
        pytest.skip('there is one')
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        train.main(['--device', device, '--data-dir', '.'])
    message = err.getvalue()
    assert stop.value.code == 2 and message.count('\n') == 1
    assert [word for word in (f'--device {device}', *words) if word not in message] == [], message


def test_pipe_is_not_waited_for(refused, tmp_path):
    os.mkfifo(tmp_path / 'c.yaml')
    assert '--config c.yaml: it is no regular file' in refused(None)


def test_bases_without_end_are_one_line(refused, tmp_path):
    for i in range(200):
        (tmp_path / f'b{i}.yaml').write_text(f'base: b{i + 1}.yaml\n')
    assert 'more than 50 bases' in refused('base: b0.yaml')


@pytest.mark.parametrize('text, expected', [
    ('epochs: 300.0', 300), ('wandb_tags: []', []), ('decay_milestones: [3.0, 5]', [3, 5]),
    ('experiment: 3', '3'), ('lr: 1', 1.0), ('<<: {lr: 0.1}\nlr: 0.2', 0.2),
    ('sam_every: 2.0', 2), ('model_kwargs: {d: 2020-01-01, n: null}', None)])
def test_what_can_be_read_is(tmp_path, text, expected):
    from timm_sam.cli.parser import load_yaml
    (tmp_path / 'c.yaml').write_text(text)
    [(key, value)] = load_yaml(str(tmp_path / 'c.yaml'), PARSER)[0].items()
    assert value == (yaml.safe_load(text)[key] if expected is None else expected)
    assert expected is None or type(value) is type(expected)


@pytest.mark.parametrize('value', [10 ** 6000, [10 ** 6000] * 100, 'x' * 10 ** 6, {'a': {'b': {'c': {'d': 1}}}}, None,
                                   float('nan'), '\ud800', {1, 2}, b'\0' * 1000], ids=range(9))
def test_any_value_can_be_shown(value):
    assert 0 < len(shown(value)) < 1000
