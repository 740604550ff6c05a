"""Mistakes in a command line of validate.py or in its files: exit code 2, one line, nothing written."""
import argparse
import json
import os
import pickle
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from support.states import tree
from support.suites import R_IDS
from support.validating import GREYS, constant_checkpoint, run_validate

import timm_sam.evaluation.protocol
import timm_sam.evaluation.single
from timm_sam.cli.errors import OptionError
from timm_sam.evaluation.single import real_labels

SETS = '--eval validation={data}/validation'

# (command line after the base, words that the message has to hold); {data} is a folder with splits
ROWS = [
    # weights
    ('{single} --checkpoint nowhere.pth', ['--checkpoint nowhere.pth', 'not a file']),
    ('{single} --checkpoint empty', ['--checkpoint empty', '*.pth.tar']),
    ('{single} --model test_vit', ['--checkpoint', 'fitted.pth.tar', 'test_vit', '--model']),
    ('{sets} --model test_vit', ['--checkpoint', 'fitted.pth.tar', 'test_vit', '--model']),
    ('{single} --num-classes 7', ['fitted.pth.tar', 'test_resnet with 7 outputs', '--num-classes']),
    ('{sets} --num-classes 7', ['fitted.pth.tar', 'test_resnet with 7 outputs', '--num-classes']),
    ('{single} --checkpoint torn.pth', ['--checkpoint torn.pth', 'cannot be loaded']),
    ('{sets} --checkpoint torn.pth', ['--checkpoint torn.pth', 'cannot be loaded']),
    ('{single} --checkpoint text.pth', ['--checkpoint text.pth', 'cannot be loaded']),
    ('{single} --checkpoint number.pth', ['--checkpoint number.pth', 'cannot be loaded']),
    ('{single} --checkpoint evil.pth', ['--checkpoint evil.pth', 'never loaded']),
    ('{sets} --checkpoint evil.pth', ['--checkpoint evil.pth', 'never loaded']),
    ('{sets} --checkpoint evil.tar', ['--checkpoint evil.tar', 'cannot be loaded']),
    ('{sets} --checkpoint evil.pth ten.pth', ['--checkpoint evil.pth', 'never loaded']),
    ('{sets} --checkpoint ten.pth ./ten.pth', ['--checkpoint ten.pth', 'twice']),
    ('{single} --model test_resnot', ['--model test_resnot', 'did you mean', 'test_resnet']),
    ('{single} --model-kwargs foo=1', ['--model test_resnet', "'foo'", '--model-kwargs']),
    ('{sets} --checkpoint six.pth --use-ema', ['--use-ema: six.pth has no averaged weights', 'leave it out']),
    ('{sets} --checkpoint fitted.pth six.pth --use-ema', ['--use-ema: six.pth has no averaged weights']),
    # size of the images
    *((f'{{{kind}}} --model test_vit --num-classes 6 --checkpoint vit.pth {size}', words)
      for kind in ('single', 'sets') for size, words in [
          ('--model-kwargs img_size=160 dynamic_img_size=True --img-size 40',
           ['--model test_vit', 'images of 3x40x40', '--img-size', '--input-size', '--in-chans']),
          ('--img-size 40', ['--checkpoint vit.pth', 'size mismatch for pos_embed']),
          ('--model-kwargs img_size=160 --img-size 40', ['--model test_vit', 'Conflicting input image sizes']),
          ('--input-size 1 160 160 --in-chans 3', ['--model test_vit', 'Conflicting input channel counts'])]),
    # the data set
    ('', ['--data-dir is missing']),
    ('--data-dir nowhere', ['--data-dir nowhere', 'does not exist']),
    ('--data-dir empty', ['--data-dir empty', '--split validation']),
    ('{single} --split val2', ['--split val2', 'whose images would be mixed']),
    ('{single} --class-map nowhere.txt', ['--class-map nowhere.txt', 'does not exist']),
    *((f'{{{kind}}} --class-map {file}.pkl', [f'--class-map {file}.pkl', 'a class per line'])
      for kind in ('single', 'sets') for file in ('evil', 'torn', 'empty')),
    ('{sets} --class-map list.pkl', ['--class-map list.pkl', 'a class per line']),
    ('{single} --valid-labels nowhere.txt', ['--valid-labels nowhere.txt', 'not a file']),
    ('{single} --valid-labels words.txt', ['--valid-labels words.txt', 'one index of an output per line']),
    ('{single} --valid-labels six.txt', ['--valid-labels six.txt', 'from 0 to 5']),
    ('{single} --valid-labels twice.txt', ['--valid-labels twice.txt', 'different']),
    ('{single} --valid-labels two.txt', ['6 classes', '2 outputs that count']),
    ('{single} --real-labels nowhere.json', ['--real-labels nowhere.json', 'not a file']),
    ('{single} --real-labels words.txt', ['--real-labels words.txt', 'JSON list']),
    ('{single} --real-labels five.json', ['--real-labels five.json', 'JSON list']),
    ('{single} --real-labels short.json', ['--real-labels short.json', 'whole validation split']),
    ('{single} --real-labels right.json', ['--real-labels right.json', 'whole validation split']),  # other file names
    ('{single} --checkpoint ten.pth --num-classes 4', ['cannot be loaded']),
    ('{single} --checkpoint five.pth --num-classes 5', ['6 classes', '5 outputs', '--num-classes']),
    # suites
    ('--attack l2=1', ['no data set', '--eval NAME=DIR']),
    ('--eval validation', ['--eval validation', 'NAME=DIR']),
    ('--eval =x', ['--eval =x', 'NAME=DIR']),
    *((f'{command} --crop-border-pixels 40', ['nothing can be made of the image', '.png of ', '--crop-border-pixels'])
      for command in ('{single}', '{sets}', '{single} --no-prefetcher -j 1')),
    ('--eval x=nowhere', ['--eval x=nowhere', 'no such folder']),
    ('--eval x=text.pth', ['--eval x=text.pth', 'is a file', 'read folders', 'unpack it']),
    ('--eval x=empty', ['--eval x=empty', 'no class folders']),
    ('{sets} validation={data}/train', ['--eval', 'validation', 'twice']),
    ('--data-dir {data} {sets}', ['--eval validation=', '--split validation', 'another']),
    # errors name the flag that a set is from
    ('--data-dir {data}/validation --split grey0 --attack l2=1',
     ['error: --data-dir ', '/validation --split grey0: ', 'no class folders']),
    ('{sets} --eval-root published', ['error: --eval-root published (imagenet-a): ', '1000 outputs', 'has 6']),
    ('--eval x={data}', ['--eval x=', '2 class folders', '6 outputs']),
    ('--eval x=missing', ['--eval x=missing', '5 class folders', '--class-map']),
    ('--eval x=missing --class-map map.txt', ['1 of 6 classes', 'grey5', '--allow-partial']),
    ('--eval x=unknown --class-map map.txt', ['1 of 7 class folders', 'zebra', 'not classes of the class map']),
    ('--eval imagenet-r={data}/validation', ['imagenet-r', '1000 outputs', 'has 6']),
    ('--eval-root nowhere', ['--eval-root nowhere', 'not a folder']),
    ('--eval-root empty', ['--eval-root empty', 'holds none of imagenet, imagenetv2']),
    ('{sets} --dataset torch/cifar10', ['--dataset', 'single data set']),
    ('{sets} --valid-labels two.txt', ['--valid-labels', 'single data set']),
    ('{sets} --real-labels right.json', ['--real-labels', 'imagenet-real=DIR']),
    ('{sets} --metrics-avg macro', ['--metrics-avg', 'single data set']),
    ('{sets} --retry', ['--retry', 'single data set']),
    ('{sets} --num-samples 5', ['--num-samples', 'single data set']),
    ('{sets} --attack l2=1 --naflex-loader', ['--attack', '--naflex-loader', 'one size']),
    ('{sets} --attack-steps 5', ['--attack-steps', 'without --attack']),
    ('{single} --allow-partial', ['--allow-partial', '--eval']),
    ('{single} --attack-set x', ['--attack-set', '--eval']),
    ('{single} --attack-num-samples 5', ['--attack-num-samples', '--eval']),
    # attacks
    *((f'{{sets}} --attack {text}', ['--attack', text]) for text in (
        'l3=1', 'l2=0', 'linf=a/255', 'l2=0.5/0', 'l2', 'l2=-1', 'l2=nan')),
    ('{sets} --attack l2=1 --amp', ['--attack', 'float32', '--amp']),
    ('{sets} --attack l2=1 --model-dtype bfloat16', ['--attack', 'float32', '--model-dtype']),
    ('{sets} --attack l2=1 --torchscript', ['--attack', '--torchscript']),
    ('{sets} --attack l2=1 --attack-set nosuch', ['--attack-set nosuch', 'validation']),
    ('{sets} --attack l2=1 --attack-num-samples 25', ['--attack-num-samples 25', '24 images']),
    ('{sets} --attack l2=1 --attack-num-samples 0', ['--attack-num-samples 0', '>= 1']),
    ('{sets} --attack l2=1 --attack-steps 0', ['--attack-steps 0', '>= 1']),
    ('{sets} --attack l2=1 --attack-targets 0', ['--attack-targets 0', '>= 1']),
    ('{sets} --attack-set validation', ['--attack-set', 'without --attack']),
    ('{sets} --attack-num-samples 5', ['--attack-num-samples', 'without --attack']),
    ('--checkpoint three.pth --num-classes 3 --eval x=three --attack l2=1', ['x has 3 classes', '4 or more']),
    # results
    ('{sets} --skip-existing', ['--skip-existing', '--results-file']),
    ('{single} --skip-existing', ['--skip-existing', '--eval']),
    ('{sets} --results-file r --skip-existing --overwrite', ['--skip-existing', '--overwrite', 'leave one out']),
    ('{sets} --results-file r.xlsx', ['--results-file r.xlsx', '.xlsx', '.json, .csv or .md']),
    ('{sets} --results-file r --results-format xlsx', ['--results-format xlsx', 'csv, json, md']),
    ('{single} --results-file r --results-format md', ['--results-format md', 'csv or json']),
    ('{single} --results-file words.txt', ['--results-file words.txt', '--overwrite']),
    ('{sets} --results-file nowhere/r', ['--results-file nowhere/r', 'no folder']),
    ('{sets} --results-file empty', ['--results-file empty', 'is a folder']),
    # numbers
    ('{single} -b 0', ['--batch-size 0', '>= 1']),
    ('{single} -j -1', ['--workers -1', '>= 0']),
    ('{single} --log-freq 0', ['--log-freq 0', '>= 1']),
    ('{single} --seed -1', ['--seed -1', '>= 0']),
    ('{single} --img-size 0', ['--img-size 0', '>= 1']),
    ('{single} --input-size 3 0 32', ['--input-size [3, 0, 32]', '>= 1']),
    ('{single} --crop-pct 0', ['--crop-pct 0', '> 0']),
    ('{single} --crop-pct nan', ['--crop-pct nan', '> 0']),
    ('{single} --crop-border-pixels -1', ['--crop-border-pixels -1', '>= 0']),
    ('{single} --std 0', ['--std [0.0]', '> 0']),
    ('{single} --mean inf', ['--mean [inf]', 'finite']),
    ('{single} --mean 0.1 0.2', ['--mean [0.1, 0.2]', '3 for 3 channels']),
    ('{single} --crop-pct 1e-9', ['--crop-pct 1e-09', '0.875']),
    ('{single} --naflex-loader', ['--naflex-loader', 'images of one size']),
    ('{single} --task multilabel', ['--task multilabel', 'one class', '--dataset']),
    ('{single} --crop-mode foo', ['--crop-mode foo', 'squash']),
    ('{single} --interpolation foo', ['--interpolation foo', 'bicubic']),
    ('{single} --input-img-mode foo', ['--input-img-mode foo', 'RGB']),
    ('{single} --input-img-mode L', ['--input-img-mode L has 1 channels', 'test_resnet takes 3', '--in-chans']),
    ('{sets} --input-img-mode RGBA', ['--input-img-mode RGBA has 4 channels', 'test_resnet takes 3', '--in-chans']),
    ('{single} --input-img-mode I --no-prefetcher', ['--input-img-mode I:', 'use F', '--no-prefetcher']),
    ('{single} --amp --amp-dtype float8', ['--amp-dtype float8', 'bfloat16']),
    ('{single} --amp --model-dtype float16', ['--amp', '--model-dtype float16']),
    ('{single} --fuser foo', ['--fuser foo', 'nvfuser']),
    ('{single} --torchcompile nosuch', ['--torchcompile nosuch']),
    ('{single} --torchcompile --torchcompile-mode nosuch', ['--torchcompile-mode nosuch']),
    ('{single} --torchscript --torchcompile', ['--torchscript', '--torchcompile']),
    ('{single} --metrics-avg most', ['--metrics-avg', "'most'", 'macro']),
    ('{single} --device foo', ['--device foo']),
    ('{single} --nosuch-flag', ['--nosuch-flag']),
    ('--model test_resnet one two', ['two']),
]


class Evil:
    """A pickle that leaves a file when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ('pwned',)


@pytest.fixture
def folder(tmp_path, fitted):
    """What the rows name."""
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'published' / 'imagenet-a').mkdir(parents=True)
    torch.save({'state_dict': {'fc.bias': Evil()}}, tmp_path / 'evil.pth')
    (tmp_path / 'evil.tar').write_bytes(pickle.dumps(Evil()))
    (tmp_path / 'evil.pkl').write_bytes(pickle.dumps({'grey0': Evil()}))
    (tmp_path / 'list.pkl').write_bytes(pickle.dumps(list(GREYS)))
    (tmp_path / 'torn.pkl').write_bytes(pickle.dumps(dict.fromkeys(GREYS, 0))[:-20])
    (tmp_path / 'empty.pkl').write_bytes(b'')
    content = Path(fitted.checkpoint).read_bytes()
    (tmp_path / 'fitted.pth').write_bytes(content)
    (tmp_path / 'torn.pth').write_bytes(content[:len(content) // 2])
    (tmp_path / 'text.pth').write_text('weights')
    torch.save(5, tmp_path / 'number.pth')
    for name, outputs in {'three': 3, 'five': 5, 'six': 6, 'ten': 10}.items():
        constant_checkpoint(tmp_path / f'{name}.pth', [0], outputs)
    vit = timm.create_model('test_vit', num_classes=6)
    torch.save({'state_dict': vit.state_dict()}, tmp_path / 'vit.pth')
    texts = {'words.txt': 'one\ntwo\n', 'six.txt': '0\n6\n', 'twice.txt': '1\n1\n', 'two.txt': '0\n1\n',
             'five.json': '5', 'short.json': '[[1], [2]]', 'right.json': str([[1]] * 24), 'map.txt': '\n'.join(GREYS)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for name, classes in {'three': ['grey0', 'grey1', 'grey2'], 'missing': list(GREYS)[:-1], 'unknown': GREYS}.items():
        (tmp_path / name).mkdir()
        for c in classes:
            (tmp_path / name / c).symlink_to(fitted.data / 'validation' / c)
    (tmp_path / 'unknown' / 'zebra').symlink_to(fitted.data / 'validation' / 'grey0')
    return tmp_path


def refused(cwd, command, base):
    """The one line with which a command line is refused."""
    before = tree(cwd)
    done = run_validate(cwd, command, base)
    assert done.code == 2, done.err[-2000:]
    assert done.last_line.startswith('validate.py: error: '), done.last_line
    assert done.err.endswith('\n') and done.err.count('validate.py: error: ') == 1
    assert 'Traceback' not in done.err and done.out == ''
    assert tree(cwd) == before
    return done.last_line


@pytest.mark.parametrize('command, words', ROWS, ids=[row[0] for row in ROWS])
def test_mistake_ends_in_one_line_that_names_it(folder, fitted, command, words):
    sets = SETS.format(data=fitted.data)
    results = '' if '--results-file' in command or '--eval' not in command and '{sets}' not in command else (
        ' --results-file results')  # so that there is something to be written
    if '--skip-existing' in command:
        results = ''
    message = refused(folder, command.format(
        data=fitted.data, sets=sets, single=f'--data-dir {fitted.data}') + results, fitted.base)
    assert [word for word in words if word not in message] == [], message
    assert not (folder / 'pwned').exists()


def test_malicious_pickle_of_these_tests_would_do_its_work(folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.load('evil.pth', weights_only=False)
    assert (folder / 'pwned').is_dir()


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
@pytest.mark.parametrize('device', ['', '--device cuda', '--device cuda:1'])
def test_cuda_without_a_device_is_refused(tmp_path, fitted, device):
    message = refused(tmp_path, f'--data-dir {fitted.data} {device}', '--model test_resnet')
    assert f'{device or "--device cuda"}: torch finds no CUDA device' in message and '--device cpu' in message


def test_devices_of_one_process_and_torchrun_exclude_each_other(tmp_path, fitted, monkeypatch, capsys):
    from timm_sam import validate
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(SystemExit) as stop:
        validate.main(f'{fitted.base} --data-dir {fitted.data} --num-gpu 2'.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count('\n') == 1 and '--num-gpu 2 and torchrun' in err


def test_no_attack_without_a_set_in_distribution(tmp_path):
    """Published sets are in distribution by their name only, others by their place."""
    for name in R_IDS[:2]:
        (tmp_path / 'r' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'r' / name / '1.png')
    path = constant_checkpoint(tmp_path / 'c.pth', [0])
    message = refused(tmp_path, f'--checkpoint {path} --eval imagenet-r=r --allow-partial --attack l2=1',
                      '--device cpu --model test_resnet -j 0 --img-size 32')
    assert 'none of imagenet-r is in distribution' in message and '--attack-set' in message


def test_metrics_without_scikit_learn_are_refused_at_once(tmp_path, fitted, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    message = refused(tmp_path, f'--data-dir {fitted.data} --metrics-avg macro', fitted.base)
    assert '--metrics-avg macro needs scikit-learn: pip install scikit-learn' in message


@pytest.mark.parametrize('content', [b'\x80\x02\xff', b' \n'], ids=['binary', 'blank'])
def test_file_of_models_that_names_none_is_refused(tmp_path, fitted, content):
    (tmp_path / 'last.pth.tar').write_bytes(content)
    message = refused(tmp_path, f'--data-dir {fitted.data} --model last.pth.tar', '--device cpu')
    assert '--model last.pth.tar: the file cannot be read, or names no model' in message and '--checkpoint' in message


def test_model_that_cannot_be_scripted_is_refused(tmp_path, fitted, monkeypatch):
    def no(*args, **kwargs):
        raise RuntimeError('no such statement\nin this language')
    monkeypatch.setattr(torch.jit, 'script', no)
    message = refused(tmp_path, f'--data-dir {fitted.data} --torchscript', fitted.base)
    assert '--torchscript: --model test_resnet cannot be scripted (no such statement in this language); ' in message


@pytest.mark.parametrize('labels, known', [([[1], []], True), ([[1], 5], False), ({'0': [1], '1': 'x'}, False)])
def test_real_labels_are_lists(tmp_path, labels, known):
    path = tmp_path / 'real.json'
    path.write_text(json.dumps(labels))
    names = [f'ILSVRC2012_val_0000000{i}.JPEG' for i in (1, 2)]
    dataset, loaded = SimpleNamespace(filenames=lambda basename: names), SimpleNamespace(indices=[1])
    args = argparse.Namespace(real_labels=str(path))
    if known:
        assert real_labels(args, dataset, loaded).filenames == names[1:]
    else:
        with pytest.raises(OptionError, match='needs a JSON list of one list per image'):
            real_labels(args, dataset, loaded)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('kind', ['single', 'suite'])
@pytest.mark.parametrize('content', [b'', b'no image', 'half'], ids=['empty', 'text', 'half'])
def test_unreadable_image_is_named_at_once(tmp_path, fitted, kind, workers, content):
    data = tmp_path / 'data'
    shutil.copytree(fitted.data / 'validation', data / 'validation')
    broken = data / 'validation' / 'grey2' / '3.png'
    broken.write_bytes(broken.read_bytes()[:-200] if content == 'half' else content)
    command = {'single': f'--data-dir {data} --results-file r.csv',
               'suite': f'--eval validation={data}/validation --results-file r'}[kind]
    start = time.monotonic()
    message = refused(tmp_path, f'{command} -j {workers}', fitted.base)
    assert time.monotonic() - start < 4  # a loader that is not let go of is waited for 5 s
    assert 'cannot read the image' in message and 'grey2/3.png' in message and 'restore the file' in message


@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')  # timm leaves the tar file open
@pytest.mark.parametrize('command', ['--data-dir data.tar -j 1', '--data-dir data.tar --dataset tar',
                                     '--data-dir data --dataset folder'])
def test_unreadable_image_is_named_for_every_kind_of_files(tmp_path, fitted, command):
    shutil.copytree(fitted.data / 'validation', tmp_path / 'data')
    (tmp_path / 'data' / 'grey2' / '3.png').write_bytes(b'no image')
    shutil.make_archive(str(tmp_path / 'data'), 'tar', tmp_path / 'data')
    message = refused(tmp_path, command, fitted.base)
    assert 'cannot read the image' in message and 'grey2/3.png' in message


@pytest.mark.parametrize('where, command', [
    (timm_sam.evaluation.single, '--data-dir {data}'),
    (timm_sam.evaluation.protocol, '--eval validation={data}/train')])
def test_bug_is_not_reported_as_a_mistake(tmp_path, fitted, monkeypatch, where, command):
    def bug(*args, **kwargs):
        raise RuntimeError('a bug')
    monkeypatch.setattr(where, 'score', bug)
    with pytest.raises(RuntimeError, match='a bug') as caught:
        run_validate(tmp_path, command.format(data=fitted.data), fitted.base)
    assert caught.traceback[-1].name == 'bug'
