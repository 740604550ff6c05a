"""Runs that were begun before the package had wings (its files in one folder) go on in it, to the same end.

`data/written_before_the_wings` holds what train.py of then left of a plain run (SGD, EMA) and of one with SAM (AdamW):
three epochs of five updates on `write_image_folder`'s images, and a checkpoint from within the second epoch.
"""
import shutil

import pytest
import torch
from support.places import DATA
from support.running import in_process, quiet_about_timm
from support.states import flat, summary

from timm_sam import train

OLD = DATA / 'written_before_the_wings'
RUNS = ['plain', 'sam']
# another CPU may round otherwise
CLOSE = dict(rtol=1e-5, atol=1e-5)


def load(path):
    return torch.load(path, weights_only=False)


def assert_same_state(actual, expected):
    for part in ('state_dict', 'state_dict_ema', 'optimizer'):
        assert (part in actual) == (part in expected)
        first, second = flat(actual.get(part)), flat(expected.get(part))
        assert first.keys() == second.keys()
        for name, value in second.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(first[name], value, **CLOSE, msg=f'{part}{name}')
            else:
                assert first[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert actual['epoch'] == expected['epoch']


def assert_same_rows(actual, expected):
    assert len(actual) == len(expected)
    for row, old in zip(actual, expected):
        assert list(row) == list(old)
        assert [float(v) for v in row.values()] == pytest.approx([float(v) for v in old.values()], rel=1e-5, abs=1e-5)


@pytest.fixture
def begun(image_folder, tmp_path):
    """The folder of a run as it was when it was interrupted: with this checkpoint, after so many epochs."""
    def begin(name, checkpoint, epochs, within='old'):
        folder = tmp_path / within / 'out' / name
        folder.mkdir(parents=True)
        (tmp_path / within / 'images').symlink_to(image_folder)
        for file in ('args.yaml', checkpoint):
            shutil.copy(OLD / name / file, folder)
        lines = (OLD / name / 'summary.csv').read_text().splitlines(keepends=True)
        (folder / 'summary.csv').write_text(''.join(lines[:1 + epochs]))
        return folder
    return begin


def go_on(folder, *options):
    """Its own options are all in the file beside the checkpoint."""
    with quiet_about_timm():
        done = in_process(train.main, ['-c', str(folder / 'args.yaml'), *options], folder.parent.parent)
    assert done.code == 0, done.err[-3000:]
    return done


@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('resume', ['auto', 'out/{name}/recovery-1-2.pth.tar'])
def test_run_begun_by_old_code_ends_as_it_ended_there(begun, name, resume):
    folder = begun(name, 'recovery-1-2.pth.tar', 1)
    done = go_on(folder, '--resume', resume.format(name=name))
    assert 'Train: 1 [   3/' in done.err and 'Train: 1 [   1/' not in done.err and 'other options' not in done.err
    assert_same_state(load(folder / 'last.pth.tar'), load(OLD / name / 'last.pth.tar'))
    assert_same_rows(summary(folder), summary(OLD / name))


@pytest.mark.parametrize('name', RUNS)
def test_end_of_an_old_run_goes_on_as_that_of_a_new_one(begun, name):
    """Two more epochs, of a run of old code and of the one that today's code has brought to the same end."""
    old = begun(name, 'last.pth.tar', 3)
    go_on(old, '--epochs', '5', '--resume', f'out/{name}/last.pth.tar')
    expected = begun(name, 'recovery-1-2.pth.tar', 1, within='today')
    go_on(expected, '--resume', f'out/{name}/recovery-1-2.pth.tar')
    go_on(expected, '--epochs', '5', '--resume', f'out/{name}/last.pth.tar')
    assert load(old / 'last.pth.tar')['epoch'] == 4
    assert_same_state(load(old / 'last.pth.tar'), load(expected / 'last.pth.tar'))
    assert_same_rows(summary(old), summary(expected))
