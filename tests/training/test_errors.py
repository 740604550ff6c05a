"""Mistakes of the user: exit code 2 and one line with flag, value and remedy, before anything is written."""
import io
import os
import pickle
import shlex
import shutil

import pytest
import torch
import yaml
from support.command_lines import NAFLEX
from support.images import COLORS, PER_CLASS, write_image_folder
from support.places import ROOT
from support.processes import errors, python, run, torchrun
from support.states import tree

SAM = '--sam-variant sam --sam-rho 0.05'

# (command line after the base, words that the message has to hold)
ROWS = [
    # SAM
    ('--sam-variant foo --sam-rho 1', ['--sam-variant', "'foo'", 'layerwise_l2']),
    ('--sam-variant sam', ['--sam-variant sam', '--sam-rho']),
    ('--sam-variant sam --sam-rho -1', ['--sam-rho', '-1', '>= 0']),
    ('--sam-variant sam --sam-rho nan', ['--sam-rho', 'nan', 'finite']),
    ('--sam-variant sam --sam-rho', ['--sam-rho', 'expected one argument']),
    (f'{SAM} --sam-params most', ['--sam-params', "'most'", 'nonorm']),
    (f'{SAM} --sam-bn-stats none', ['--sam-bn-stats', "'none'", 'clean']),
    (f'{SAM} --sam-filter "layer[4"', ['--sam-filter', "'layer[4'", 'regular expression']),
    (f'{SAM} --sam-filter block9', ['--sam-filter', "'block9'", 'matches none', 'layer4.0.bn2.bias']),
    (f'{SAM} --model test_nfnet', ['--sam-params', "'onlynorm'", 'selects nothing', 'ScaledStdConv2d', "'all'"]),
    (f'{SAM} --sam-eta 0.1', ['--sam-eta', '0.1', '--sam-variant sam', 'no eta']),
    ('--sam-variant layerwise_l2 --sam-rho 1 --sam-eta 0', ['--sam-eta', '0.0', 'layerwise_l2', 'no eta']),
    ('--sam-variant fisher --sam-rho 1 --sam-eta -1', ['--sam-eta', '-1', '>= 0']),
    (f'{SAM} --sam-start-epoch 3 --sam-end-epoch 3', ['--sam-end-epoch 3', '--sam-start-epoch 3']),
    (f'{SAM} --sam-start-epoch 3 --sam-end-epoch 2', ['--sam-end-epoch 2', '--sam-start-epoch 3']),
    (f'{SAM} --sam-end-epoch 0', ['--sam-end-epoch 0', '--sam-start-epoch 0']),
    (f'{SAM} --sam-ascent-fraction 0', ['--sam-ascent-fraction', '0', '(0, 1]']),
    (f'{SAM} --sam-ascent-fraction 1.5', ['--sam-ascent-fraction', '1.5', '(0, 1]']),
    (f'{SAM} --sam-m 0', ['--sam-m', '0', '>= 1']),
    (f'{SAM} --sam-every 0', ['--sam-every', '0', '>= 1']),
    (f'{SAM} --sam-every 1.5', ['--sam-every', '1.5', 'integer']),
    (f'{SAM} --sam-start-epoch -1', ['--sam-start-epoch', '-1', '>= 0']),
    # SAM's flags without --sam-variant, also with the value that is their default
    *((f'{flag} {value}', [flag, shown, '--sam-variant']) for flag, value, shown in [
        ('--sam-rho', '0.05', '0.05'), ('--sam-rho', '0', '0'), ('--sam-params', 'all', 'all'),
        ('--sam-params', 'onlynorm', 'onlynorm'), ('--sam-filter', 'layer4', 'layer4'), ('--sam-eta', '0.1', '0.1'),
        ('--sam-bn-stats', 'both', 'both'), ('--sam-bn-stats', 'clean', 'clean'),
        ('--sam-ascent-fraction', '0.5', '0.5'), ('--sam-ascent-fraction', '1', '1'),
        ('--sam-no-shared-forward', '', ''), ('--sam-m', '64', '64'), ('--sam-sync', '', ''),
        ('--sam-every', '2', '2'),
        ('--sam-every', '1', '1'), ('--sam-start-epoch', '1', '1'), ('--sam-start-epoch', '0', '0'),
        ('--sam-end-epoch', '3', '3')]),
    # YAML
    ('-c missing.yaml', ['--config', 'missing.yaml', 'No such file']),
    ('-c typo.yaml', ['--config typo.yaml', "'bath_size'", "'batch_size'"]),
    # data
    ("--data-dir ''", ['--data-dir', 'missing']),
    ('--data-dir nowhere', ['--data-dir nowhere', 'does not exist']),
    ('--data-dir empty', ['--data-dir empty', '--train-split train']),
    ('--data-dir typo.yaml', ['--data-dir typo.yaml']),
    ('--train-split nosplit', ['--train-split nosplit', '--data-dir']),
    ('--val-split nosplit', ['--val-split nosplit', '--data-dir']),
    ('--num-classes 3', ['--num-classes 3', '4 classes', '--num-classes 4']),
    ('--num-classes 0', ['--num-classes 0', '>= 1']),
    ('--data-dir shifted', ['--val-split validation', 'shifted', "'green'", 'blue', '--class-map']),
    ('--data-dir extra', ['--val-split validation', 'extra', "'zebra'"]),
    ('--data-dir extra --num-classes 5', ['--val-split validation', 'extra', "'zebra'"]),
    ('--class-map nofile.txt', ['--class-map nofile.txt', 'does not exist']),
    ('--dataset torch/nosuch', ['--dataset torch/nosuch']),
    ('-b 0', ['--batch-size 0', '>= 1']),
    ('-b 41', ['--batch-size 41']),  # no full batch in 40 images, so nothing to train on
    ('-j -1', ['--workers -1', '>= 0']),
    ('--interpolation foo', ['--interpolation', 'foo']),
    ('--train-interpolation foo', ['--train-interpolation', 'foo']),
    ('--aa foo', ['foo']),
    ('--jsd-loss', ['--loss jsd', '--aug-splits 0']),
    ('--aug-splits 1', ['--aug-splits 1']),
    ('--mixup 0.2 --aug-splits 3', ['--aug-splits 3', '--mixup', 'leave one']),
    ('--aug-splits 3 --no-prefetcher', ['--aug-splits 3', '--no-prefetcher']),
    ('--cutmix-minmax 0.1', ['--cutmix-minmax', '0.1', 'two numbers']),
    ('--smoothing 2', ['--smoothing 2']),
    ('--in-chans 4', ['takes 4 channels (--in-chans)', '--input-img-mode']),
    ('--input-img-mode RGBA', ['--input-img-mode RGBA has 4 channels', 'takes 3', '--in-chans']),
    ('--in-chans 1 --input-img-mode RGB', ['--input-img-mode RGB has 3 channels', 'takes 1']),
    ('--in-chans 1 --input-img-mode I --no-prefetcher', ['--input-img-mode I:', 'use F', '--no-prefetcher']),
    ('--in-chans 1 --input-img-mode F', ['--input-img-mode F:', '--no-aug', '--color-jitter 0']),
    ('--mean 0.5 0.5', ['--mean', '3 channels']),
    ('--decay-epochs 0', ['--decay-epochs 0']),
    ('--reprob 0.5 --remode foo', ['--remode foo', 'pixel']),
    ('--experiment ..', ['--experiment ..']),
    ('--experiment ./', ['--experiment ./']),
    ('--device-modules nope', ['--device-modules nope', 'install']),
    ("--device-modules ''", ['--device-modules', 'Empty module name']),
    ('--device-modules .x', ['--device-modules .x', 'relative import']),
    ('--device foo --device-modules json', ['--device foo is no device of torch']),
    ('--save-images --in-chans 4 --input-img-mode RGBA', ['--save-images', '1 or 3 channels', 'not 4']),
    ('--mixup 0.2 --mixup-mode half --no-prefetcher', ['--mixup-mode half', '--no-prefetcher']),
    ('--mixup 0.2 --mixup-mode foo', ['--mixup-mode foo', 'batch, pair, elem']),
    ('--mixup 0.2 -b 7', ['--batch-size 7']),  # timm's mixup needs pairs
    ('--mixup 0.2 -b 7 --train-img-sizes 24 32', ['--batch-size 7']),
    ('--mixup 0.2 -b 7 --train-img-sizes 24 32 --train-batch-sizes 8 5', ['--train-batch-sizes 5', 'pairs']),
    # model
    ('--model test_resnot', ['--model test_resnot', 'did you mean', 'test_resnet']),
    ('--model qqq', ['--model qqq', 'list_models']),
    ('--model test_resnet.nosuch_tag', ['--model test_resnet.nosuch_tag']),
    ('--model-kwargs foo=1', ['--model-kwargs', "'foo'"]),
    ('--model-kwargs foo', ['--model-kwargs', 'foo']),
    ('--model-kwargs layers=x', ['--model-kwargs', 'test_resnet']),
    ('--gp foo', ['--gp', 'foo']),
    ('--img-size 0', ['--img-size 0']),
    ('--drop 2', ['--drop', '2']),
    ('--input-size 3 32', ['--input-size', '3 arguments']),
    ('--kd-model-name test_resnot', ['--kd-model-name test_resnot', 'test_resnet']),
    ('--split-bn', ['--split-bn', '--aug-splits']),
    ('--split-bn --resplit -b 5', ['--split-bn', '--batch-size 5', 'even']),
    ('--split-bn --resplit -b 6 --mixup 1 --mixup-mode half', ['--split-bn', '--batch-size 6 gives 3']),
    (f'{SAM} --split-bn --resplit --sam-m 3', ['--split-bn', '--sam-m 3', 'even']),
    (f'{SAM} --split-bn --resplit --sam-ascent-fraction 0.6', ['--sam-ascent-fraction 0.6', '5 samples of 8']),
    (f'--torchscript {NAFLEX.replace("--naflex-loader", "")}', ['--torchscript: --model naflexvit_base', 'scripted']),
    (f'{NAFLEX} --aug-repeats 3', ['the training loader refuses', 'repeats']),
    (f'{NAFLEX} --aa foo', ['the training loader refuses', 'foo']),
    ('--torchscript --kd-model-name test_resnet', ['--kd-model-name test_resnet', '--torchscript']),
    ('--torchscript --torchcompile', ['--torchscript', '--torchcompile']),
    ('--torchcompile nosuch', ['--torchcompile', 'nosuch']),
    ('--torchcompile --torchcompile-mode nosuch', ['--torchcompile-mode', 'nosuch']),
    # device and precision
    ('--device foo', ['--device foo']),
    ('--amp --amp-dtype float8', ['--amp-dtype float8', 'bfloat16']),
    ('--amp --model-dtype bfloat16', ['--amp', '--model-dtype bfloat16']),
    ('--model-dtype int8', ['--model-dtype int8', 'bfloat16']),
    # optimizer and schedule
    ('--opt nosuch', ['--opt nosuch', 'list_optimizers']),
    ('--opt-kwargs foo=1', ['--opt-kwargs', "'foo'"]),
    ('--opt adamw --opt-kwargs fused=True foreach=True', ['--opt adamw', 'cannot be `True` together', '--opt-kwargs']),
    ('--opt adamw --opt-betas 0.9', ['--opt-betas 0.9', '--opt adamw has 2']),
    ('--opt adamw --opt-betas 0.9 0.99 0.9', ['--opt-betas 0.9 0.99 0.9', '--opt adamw has 2']),
    ('--lr -1', ['--lr -1', '>= 0']),
    ('--lr nan', ['--lr nan', 'finite']),
    ('--sched nosuch', ['--sched nosuch']),
    ('--sched multistep --decay-milestones 180 90', ['--decay-milestones 180 90', 'rising order']),
    ('--lr-noise 0.9 0.4', ['--lr-noise [0.9, 0.4]', 'ends before it starts']),
    ('--clip-mode foo', ['--clip-mode foo', 'agc']),
    ('--epochs 0', ['--epochs 0', '>= 1']),
    ('--epochs x', ['--epochs', "'x'", 'int']),
    ('--start-epoch -1', ['--start-epoch -1']),
    ('--eval-metric foo', ['--eval-metric foo', 'top1']),
    ('--val-interval 0', ['--val-interval 0', '>= 1']),
    ('--checkpoint-hist 0', ['--checkpoint-hist 0', '>= 1']),
    ('--log-interval 0', ['--log-interval 0', '>= 1']),
    # files
    ('--resume nofile.pth', ['--resume nofile.pth', 'not a file']),
    ('--initial-checkpoint nofile.pth', ['--initial-checkpoint nofile.pth', 'not a file']),
    ('--pretrained --pretrained-path nofile.pth', ['--pretrained-path nofile.pth', 'not a file']),
    ('--output typo.yaml', ['--output typo.yaml']),
    ('--wandb-resume-id x', ['--wandb-resume-id x', '--resume']),
    ('--nosuch-flag', ['--nosuch-flag']),
    ('one two', ['two']),
]


@pytest.fixture(scope='session')
def shifted(tmp_path_factory):
    """Validation has no blue: counted by themselves, its folders get other labels than those of training."""
    folder = write_image_folder(tmp_path_factory.mktemp('data') / 'shifted')
    shutil.rmtree(folder / 'validation' / 'blue')
    return folder


@pytest.fixture(scope='session')
def extra(tmp_path_factory):
    """Validation has a class that training lacks, with the next label."""
    folder = write_image_folder(tmp_path_factory.mktemp('data') / 'extra')
    shutil.copytree(folder / 'validation' / 'blue', folder / 'validation' / 'zebra')
    return folder


@pytest.fixture
def refused(run_train, tmp_path):
    """Runs a command line that has to be refused; returns the message."""
    def run(command):
        before = tree(tmp_path)
        done = run_train(command)
        assert done.code == 2, done.err[-2000:]
        assert done.last_line.startswith('train.py: error: '), done.last_line
        assert done.err.endswith('\n') and done.err.count('train.py: error: ') == 1
        assert 'Traceback' not in done.err and done.out == ''
        assert tree(tmp_path) == before
        return done.last_line
    return run


@pytest.mark.parametrize('command, words', ROWS, ids=[row[0] for row in ROWS])
def test_mistake_ends_in_one_line_that_names_it(refused, tmp_path, shifted, extra, command, words):
    (tmp_path / 'typo.yaml').write_text('bath_size: 3\n')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'shifted').symlink_to(shifted)
    (tmp_path / 'extra').symlink_to(extra)
    message = refused(command)
    assert [word for word in words if word not in message] == [], message


def test_teacher_that_takes_images_of_one_size_is_refused_with_patches(run_train, teacher):
    done = run_train(f'{NAFLEX} --kd-model-name local-dir:{teacher}')
    assert done.code == 2 and 'Traceback' not in done.err and not done.folder().exists()
    assert f'--naflex-loader: --kd-model-name local-dir:{teacher} takes images of one size' in done.last_line


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
@pytest.mark.parametrize('device', ['cuda', 'cuda:0', 'cuda:3'])
def test_cuda_without_a_device_is_refused(refused, device):
    message = refused(f'--device {device}')
    assert f'--device {device}' in message and '--device cpu' in message


def test_cuda_is_the_default_device_and_refused_without_one(tmp_path, image_folder, capsys):
    if torch.cuda.is_available():
        pytest.skip('there is a CUDA device')
    from timm_sam import train
    with pytest.raises(SystemExit) as stop:
        train.main(['--data-dir', str(image_folder)])
    assert stop.value.code == 2 and '--device cuda' in capsys.readouterr().err


def test_split_with_no_images_is_refused(refused, tmp_path):
    folder = write_image_folder(tmp_path / 'data')
    shutil.rmtree(folder / 'validation')
    (folder / 'validation' / 'blue').mkdir(parents=True)
    message = refused(f'--data-dir {folder}')
    assert '--val-split validation' in message and str(folder) in message


@pytest.mark.parametrize('split, flag', [('train', '--train-split train'), ('validation', '--val-split validation')])
def test_data_folder_that_lacks_a_split_is_refused(refused, tmp_path, split, flag):
    # timm falls back to the folder above: it would validate on training images, or train on validation images
    folder = write_image_folder(tmp_path / 'data')
    shutil.rmtree(folder / split)
    message = refused(f'--data-dir {folder}')
    assert flag in message and str(folder) in message


# Checkpoints

@pytest.fixture(scope='session')
def checkpoints(tmp_path_factory, run_in):
    """A folder with checkpoints: one that is fine, and what can happen to one."""
    folder = tmp_path_factory.mktemp('checkpoints')
    for model, options in (('test_resnet', ''), ('test_vit', '--model-kwargs img_size=32')):
        assert run_in(folder, f'--model {model} {options} --experiment {model}').code == 0
        shutil.copy(folder / 'out' / model / 'last.pth.tar', folder / f'{model}.pth.tar')
    good = (folder / 'test_resnet.pth.tar').read_bytes()
    torch.manual_seed(0)
    files = {
        'empty': b'',
        'random': bytes(torch.randint(256, (4096,)).tolist()),
        'pickle_that_ends_early': b'.',  # IndexError inside torch's unpickler
        'pickle_with_half_a_number': b'M',  # struct.error there
        'text': b'lr: 0.1\n',
        'half': good[:len(good) // 2],
        'without_end': good[:-1],
        'start_overwritten': b'\0' * 1000 + good[1000:],
    }
    for name, content in files.items():
        (folder / f'{name}.pth.tar').write_bytes(content)
    state = torch.load(folder / 'test_resnet.pth.tar', weights_only=False)
    objects = {
        'list': [1, 2],
        'number': 3,
        'tensor': torch.zeros(3),
        'no_weights': {'epoch': 3},
        'weights_none': {**state, 'state_dict': None},
        'weights_missing': {**state, 'state_dict': dict(list(state['state_dict'].items())[:-1])},
        'weights_of_5_classes': {**state, 'state_dict': {**state['state_dict'], 'fc.bias': torch.zeros(5)}},
    }
    for name, content in objects.items():
        torch.save(content, folder / f'{name}.pth.tar')
    return folder


BAD_FILES = ['empty', 'random', 'pickle_that_ends_early', 'pickle_with_half_a_number', 'text', 'half', 'without_end',
             'start_overwritten', 'list', 'number', 'tensor', 'no_weights', 'weights_none', 'weights_missing',
             'weights_of_5_classes', 'test_vit']


@pytest.mark.parametrize('flag', ['--resume', '--initial-checkpoint'])
@pytest.mark.parametrize('name', BAD_FILES)
def test_checkpoint_that_does_not_fit_is_refused(refused, checkpoints, flag, name):
    path = checkpoints / f'{name}.pth.tar'
    message = refused(f'{flag} {path}')
    assert f'{flag} {path}' in message and 'give a' in message


@pytest.mark.parametrize('name', ['random', 'pickle_that_ends_early', 'half', 'tensor'])
def test_pretrained_file_that_does_not_fit_is_refused(refused, checkpoints, name):
    path = checkpoints / f'{name}.pth.tar'
    message = refused(f'--pretrained --pretrained-path {path}')
    assert f'--pretrained-path {path}' in message and 'give a' in message


def test_checkpoint_of_another_optimizer_is_refused_with_the_way_out(refused, checkpoints):
    message = refused(f"--resume {checkpoints / 'test_resnet.pth.tar'} --opt adamw")
    assert '--resume' in message and '--no-resume-opt' in message


@pytest.mark.parametrize('change', [{'optimizer': None}, {'optimizer': {}}, {'epoch': 'x'}, {'epoch': None}])
def test_checkpoint_with_a_broken_entry_is_refused(refused, checkpoints, tmp_path, change):
    state = torch.load(checkpoints / 'test_resnet.pth.tar', weights_only=False)
    torch.save({**state, **change}, tmp_path / 'broken.pth.tar')
    assert '--resume broken.pth.tar' in refused('--resume broken.pth.tar')


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickled(content):
    return pickle.dumps(content, protocol=2)


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def saved_the_old_way(content):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize('flag', ['--resume', '--initial-checkpoint', '--pretrained --pretrained-path'])
@pytest.mark.parametrize('write', [pickled, saved, saved_the_old_way])
def test_checkpoint_that_would_run_code_is_refused_and_not_run(refused, checkpoints, tmp_path, flag, write):
    trap = tmp_path / 'sprung'
    weights = torch.load(checkpoints / 'test_resnet.pth.tar', weights_only=False)['state_dict']
    content = write({'state_dict': weights, 'extra': Trap(str(trap))})
    (tmp_path / 'evil.pth.tar').write_bytes(content)
    message = refused(f'{flag} evil.pth.tar')
    assert f'{flag.split()[-1]} evil.pth.tar' in message and not trap.exists()
    # the trap works: the same file springs it once it is loaded without care
    if write is pickled:
        pickle.loads(content)
        assert trap.exists()


# Folders of earlier runs

def test_new_run_into_the_folder_of_another_is_refused(refused, run_train, tmp_path):
    assert run_train().code == 0
    message = refused('')
    assert '--experiment run' in message and '--resume' in message and 'last.pth.tar' in message
    assert '--experiment run' in refused('--epochs 3 --sam-variant sam --sam-rho 0.05')


def test_checkpoint_of_one_run_does_not_open_the_folder_of_another(refused, run_train):
    assert run_train('--experiment first').code == 0
    assert run_train('--experiment second').code == 0
    message = refused('--experiment second --resume out/first/last.pth.tar --epochs 2')
    assert '--experiment second' in message


def test_folder_without_results_may_be_used(run_train, tmp_path):
    (tmp_path / 'out' / 'run').mkdir(parents=True)
    (tmp_path / 'out' / 'run' / 'notes.txt').write_text('mine')
    done = run_train()
    assert done.code == 0 and (done.folder() / 'summary.csv').exists()
    assert (done.folder() / 'notes.txt').read_text() == 'mine'


def test_yaml_values_are_checked_like_those_of_the_command_line(refused, tmp_path):
    (tmp_path / 'config.yaml').write_text(yaml.safe_dump({'sam_variant': 'sam'}))
    assert 'needs --sam-rho' in refused('-c config.yaml')


# As users run it

def test_script_ends_with_code_2_and_one_line(base, tmp_path):
    done = run(python(ROOT / 'train.py', *shlex.split(base), '--sam-variant', 'sam'), tmp_path)
    assert done.code == 2 and done.out == ''
    assert done.err.startswith('train.py: error: --sam-variant sam needs --sam-rho') and done.err.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_say_it_once_and_write_nothing(base, tmp_path):
    # found only when the model is built, by both ranks
    command = f'{base} --sam-variant sam --sam-rho 0.05 --sam-filter block9'
    done = run(torchrun(ROOT / 'train.py', *shlex.split(command)), tmp_path)
    messages = errors(done, 'train.py')
    assert done.code != 0 and len(messages) == 1 and messages[0].startswith('train.py: error: '), done.err[-3000:]
    assert '--sam-filter' in messages[0] and "'block9'" in messages[0]
    assert list(tmp_path.iterdir()) == []


def test_image_folder_of_these_tests_is_as_described(image_folder):
    for split, count in PER_CLASS.items():
        assert {path.name: len(list(path.iterdir())) for path in (image_folder / split).iterdir()} == dict.fromkeys(
            COLORS, count)
