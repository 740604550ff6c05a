"""Mistakes that every analysis knows: one line, exit code 2, nothing written."""
import shlex
import shutil

import pytest
import torch
from support.running import in_process
from support.validating import BASE

from timm_sam.analyze import __main__ as analyze
from timm_sam.analyze.options import COMMANDS

WITH_IMAGES = [name for name in COMMANDS if name != 'norms']
BY_BATCH = ['sharpness', 'line', 'card']


def run(cwd, name, fitted, more, data=None):
    few = '--m 6 --num-images 6' if name in BY_BATCH else '--num-images 12' if name in WITH_IMAGES else ''
    line = (f'{name} {BASE.replace(" -b 5", "")} --num-classes 6 --data-dir {data or fitted.data} --checkpoint '
            f'{fitted.checkpoint} {few} --out out {more}')
    return in_process(analyze.main, shlex.split(line), cwd)


def one_line(done, name, words):
    assert done.code == 2, done.err[-3000:]
    assert done.out == '' and 'Traceback' not in done.err
    line = done.err.strip().splitlines()[-1]
    assert line.startswith(f'python -m timm_sam.analyze {name}: error: ') and words in line, line
    assert not [path for path in done.cwd.glob('out/*') if path.suffix != '.txt']


@pytest.mark.parametrize('name', COMMANDS)
def test_what_no_analysis_takes(fitted, tmp_path, name):
    for more, words in (
            ('--amp', '--amp is not for analyses: leave it out'),
            ('--model-dtype float16', '--model-dtype float16: small differences'),
            ('--model-dtype bfloat16', '--model-dtype bfloat16: small differences'),
            ('--torchscript', '--torchscript is not for analyses'), ('--num-gpu 2', '--num-gpu 2: leave it out'),
            ('--naflex-loader', '--naflex-loader is not'), ('--reparam', '--reparam is not'),
            ('--test-pool', '--test-pool is not'), ('--task multilabel', '--task multilabel: '),
            ('--out ""', '--out is missing'), ('--overwrite --skip-existing', '--skip-existing '),
            ('--checkpoint nothing.pth', '--checkpoint nothing.pth is not a file')):
        one_line(run(tmp_path, name, fitted, more), name, words)


@pytest.mark.parametrize('name', COMMANDS)
def test_weights_that_do_not_fit_or_are_not_finite(fitted, tmp_path, name):
    one_line(run(tmp_path, name, fitted, '--model test_vit'), name, 'fitted.pth.tar')
    state = {key: value.clone() for key, value in fitted.model.state_dict().items()}
    state['layer2.0.bn1.running_var'].view(-1)[0] = float('nan')
    torch.save({'state_dict': state}, tmp_path / 'nan.pth.tar')
    one_line(run(tmp_path, name, fitted, '--checkpoint nan.pth.tar'), name,
             'layer2.0.bn1.running_var holds NaN or infinite numbers')


@pytest.mark.parametrize('name', COMMANDS)
def test_output_that_is_there_already(fitted, tmp_path, name):
    (tmp_path / 'out').mkdir()
    (tmp_path / f'out/{name}.md').write_text('mine')
    done = run(tmp_path, name, fitted, '')
    assert done.code == 2 and f'{name}.md exists; add ' in done.err.splitlines()[-1]
    assert [path.name for path in (tmp_path / 'out').iterdir()] == [f'{name}.md']
    assert (tmp_path / f'out/{name}.md').read_text() == 'mine'


@pytest.mark.parametrize('name', WITH_IMAGES)
def test_images_that_are_missing(fitted, tmp_path, name):
    shutil.copytree(fitted.data / 'train', tmp_path / 'data/train')
    for path in (tmp_path / 'data/train/grey3').iterdir():
        path.unlink()
    one_line(run(tmp_path, name, fitted, '', tmp_path / 'data'), name, 'grey3')
    one_line(run(tmp_path, name, fitted, '--num-images 606'), name, '--num-images 606: train has 60 images')
    one_line(run(tmp_path, name, fitted, '--num-images 0'), name, '--num-images 0 must be >= 1')
    (tmp_path / 'data/train/grey3/0.png').write_text('no image')
    done = run(tmp_path, name, fitted, '--num-images 48 --allow-partial', tmp_path / 'data')
    assert done.code == 2 and 'Traceback' not in done.err and done.out == ''
    assert 'grey3/0.png (no image); restore the file' in done.err.splitlines()[-1]


@pytest.mark.parametrize('name', BY_BATCH)
def test_batches_that_do_not_divide_the_images(fitted, tmp_path, name):
    one_line(run(tmp_path, name, fitted, '--num-images 20'), name, '--num-images 20 is no multiple of --m 6: use 18')
    one_line(run(tmp_path, name, fitted, '-b 7'), name, '--batch-size 7: batches of this analysis are --m images')
    one_line(run(tmp_path, name, fitted, '--m 0'), name, '--m 0 must be >= 1')
    one_line(run(tmp_path, name, fitted, '--filter nothing'), name, '--params all --filter nothing: ')
    one_line(run(tmp_path, name, fitted, '--filter ('), name, 'is not a regular expression')


@pytest.mark.parametrize('more, words', [
    ('--layers conv9', '--layers conv9: conv9: ResNet has no such layer; use '),
    ('--layers layer1.0', None),
    ('--tokens first', '--tokens first: none of layer3, pre_logits gives tokens'),
    ('--variance 1', '--variance [1.0] must be a finite number > 0 and < 1'),
    ('--memory 2', "'2' is no size such as"), ('--memory 1KMB', "'1KMB' is no size"), ('--memory nanGB', 'no size'),
])
def test_mistakes_of_rank(fitted, tmp_path, more, words):
    done = run(tmp_path, 'rank', fitted, f'{more} --num-images 12')
    if words is None:
        assert done.code == 0, done.err
        assert 'rank layer1.0 0.99' in done.out
    else:
        one_line(done, 'rank', words)


@pytest.mark.parametrize('more, words', [
    ('--variant sam fisher --rho 0.1 0.2 0.3', '--rho 0.1 0.2 0.3: give one, or one for each of sam fisher'),
    ('--rho 0', '--rho [0.0] must be a finite number > 0'), ('--eta 0.1', '--eta 0.1: sam has no eta'),
    ('--variant sma', 'argument --variant: invalid choice'), ('--params norm', 'argument --params: invalid choice'),
])
def test_mistakes_of_line(fitted, tmp_path, more, words):
    one_line(run(tmp_path, 'line', fitted, more), 'line', words)
