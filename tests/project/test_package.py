"""The package carries everything: built offline, sdist and from it the wheel, and used in an empty folder.

Every command takes seconds to start: all of them together take minutes.
"""
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from importlib.metadata import version
from pathlib import Path

import pytest
from support.places import ROOT
from support.processes import run, torchrun
from support.recipes import HPARAMS, path_of
from support.states import summary

SETUPTOOLS = 77  # from which on it knows how the licence is written
RECIPE = 'digits/resnet10t_sam_on'
NOT_COPIED = {'.git', 'data', 'output', 'build', 'dist'}
COMMANDS = ('analyze', 'digits', 'paper', 'report', 'sweep', 'train', 'validate')

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.skipif(
    int(version('setuptools').split('.')[0]) < SETUPTOOLS, reason=f'needs setuptools >= {SETUPTOOLS}: pip install it')]


def build(kind, folder):
    """Builds with what is installed; gives the one file that comes of it."""
    done = run([sys.executable, '-c', f'from setuptools import build_meta; build_meta.build_{kind}("dist")'], folder)
    assert done.code == 0, done.err[-3000:]
    built, = (folder / 'dist').iterdir()
    return built


@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    """The sdist of a copy of the clone."""
    copy = tmp_path_factory.mktemp('package') / 'clone'
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.name in NOT_COPIED or path.name.startswith('.venv') or path.name.endswith(('_cache', '.egg-info')):
            continue
        if path.is_dir():
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(path, copy)
    return build('sdist', copy)


@pytest.fixture(scope='module')
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp('unpacked')
    with tarfile.open(sdist) as f:
        f.extractall(folder, filter='data')
    root, = folder.iterdir()
    return root


@pytest.fixture(scope='module')
def wheel(unpacked):
    return build('wheel', unpacked)


class Environment:
    """A fresh environment, with what this one has installed beside ours; nothing is downloaded."""

    def __init__(self, folder):
        subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
        self.bin = folder / 'bin'
        self.packages, = folder.glob('lib/python*/site-packages')
        # the line of a .pth file adds a folder, but not what the .pth files in there add: no clone that is installed
        (self.packages / 'others.pth').write_text('\n'.join(path for path in sys.path if path.endswith('-packages')))

    def install(self, *what):
        done = run([sys.executable, '-m', 'pip', '--python', self.bin / 'python', 'install', '--quiet', '--no-index',
                    '--no-deps', '--no-build-isolation', *what], self.bin)
        assert done.code == 0, done.err[-3000:]

    def run(self, cwd, command, *arguments):
        """Runs a command of this environment without a trace of the clone on the path."""
        done = run([self.bin / command, *arguments], cwd, PYTHONPATH='')
        assert 'Traceback' not in done.err, done.err[-3000:]
        return done

    def succeed(self, *command):
        done = self.run(*command)
        assert done.code == 0, done.err[-3000:]
        return done


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp('installed'))
    environment.install(wheel)
    return environment


def files_below(folder, ending):
    return {path.relative_to(folder).as_posix() for path in folder.rglob(f'*{ending}')}


def test_wheel_has_each_module_and_each_recipe_once_and_nothing_beside(wheel):
    with zipfile.ZipFile(wheel) as f:
        names = f.namelist()
        metadata = message_from_string(next(f.read(n).decode() for n in names if n.endswith('/METADATA')))
    assert len(names) == len({*names})
    files = [name for name in names if '.dist-info/' not in name]
    modules = {f'timm_sam/{name}' for name in files_below(ROOT / 'timm_sam', '.py')}
    recipes = {f'timm_sam/hparams/{name}' for name in files_below(HPARAMS, '.yaml')}
    beside = {f'timm_sam/{path.relative_to(ROOT / "timm_sam")}' for path in (ROOT / 'timm_sam').rglob('*.*')
              if path.suffix not in ('.py', '.pyc')}
    assert {*files} == modules | recipes | beside and len(recipes) > 300 and 'timm_sam/py.typed' in beside
    assert metadata['Author'] == 'timm_sam contributors' and metadata['License'] == 'Apache-2.0'
    assert metadata['Requires-Python'] == '>=3.10' and 'SAM-ON' in metadata['Keywords'].split(',')
    assert 'Programming Language :: Python :: 3.13' in metadata.get_all('Classifier')
    assert metadata['Summary'] and metadata['Description-Content-Type'] == 'text/markdown'
    assert {*metadata.get_all('Provides-Extra')} >= {'digits', 'examples', 'loggers', 'report', 'test'}


def test_sdist_has_what_is_in_the_repository_and_runs_its_tests(sdist, unpacked):
    if (ROOT / '.git').exists():
        tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert {*tracked.split('\n')} - {'', '.gitignore'} <= files_below(unpacked, '')
    python = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider']
    collected = run([*python, '--collect-only', 'tests'], unpacked, PYTHONPATH='')
    assert collected.code == 0, collected.out[-3000:]
    some = ('cli/test_recipe_names.py', 'project/test_house.py', 'project/test_docs.py', 'plugin/test_sam.py',
            'training/test_old_args.py')
    done = run([*python, *(f'tests/{file}' for file in some)], unpacked, PYTHONPATH='')
    assert done.code == 0 and ' failed' not in done.out, done.out[-3000:]
    assert 'site-packages' not in done.out


def test_commands_work_from_an_empty_folder(installed, image_folder, tmp_path):
    where = installed.succeed(tmp_path, 'python', '-c', 'import timm_sam; print(timm_sam.__file__)')
    assert Path(where.out.strip()).is_relative_to(installed.packages)
    launcher = torchrun('-m', 'timm_sam.train')[1:]  # without its Python
    done = installed.succeed(
        tmp_path, 'python', *launcher, '-c', RECIPE, '--data-dir', image_folder, '--num-classes', 4, '-b', 8, '-j', 0,
        '--epochs', 1, '--warmup-epochs', 0, '--output', 'runs', '--experiment', 'run')
    assert done.out.startswith('--result')
    row, = summary(tmp_path / 'runs' / 'run')
    assert float(row['train_sam_eps_norm']) > 0
    checkpoint = ('--checkpoint', 'runs/run/last.pth.tar', '--data-dir', image_folder, '--device', 'cpu')
    for command in (('python', '-m', 'timm_sam.validate'), ('timm-sam-validate',)):
        found = installed.succeed(tmp_path, *command, *checkpoint, '-j', 0, '-b', 8)
        assert f'"top1": {float(row["eval_top1"]):g}' in found.out
    installed.succeed(tmp_path, 'timm-sam-report', 'runs', '--out', 'report', '--no-plots')
    installed.succeed(tmp_path, 'timm-sam-analyze', 'norms', *checkpoint, '--out', 'norms')
    assert {path.name for path in tmp_path.iterdir()} == {'runs', 'report', 'norms'}


def test_recipes_by_name_are_those_inside_the_package(installed, tmp_path):
    script = ('import json, sys; from timm_sam import train; from timm_sam.cli import recipes; '
              'from timm_sam.cli.parser import load_yaml; parser = train.build_parser(); '
              'print(json.dumps([recipes.folder(), len(recipes.names()), '
              '*(load_yaml(name, parser)[0] == load_yaml(path, parser)[0] for name, path in '
              'zip(sys.argv[1::2], sys.argv[2::2]))]))')
    pairs = [text for name in (RECIPE, 'imagenet/resnet50/layerwise_l2_onlynorm', 'cifar/resnet56/cifar10/sam_all.yaml')
             for text in (name, path_of('', name.removesuffix('.yaml')))]
    done = installed.succeed(tmp_path, 'python', '-c', script, *pairs)
    folder, count, *same = json.loads(done.out)
    assert Path(folder) == installed.packages / 'timm_sam' / 'hparams' and count > 200 and same == [True] * 3


def test_each_command_is_called_by_the_name_it_was_started_by(installed, tmp_path):
    for name in COMMANDS:
        refused = installed.run(tmp_path, f'timm-sam-{name}', '--qqqqqq')
        assert refused.code == 2 and refused.err.startswith(f'timm-sam-{name}: error: '), refused.err
    module = installed.run(tmp_path, 'python', '-m', 'timm_sam.train', '-c', 'digits/resnet10t_sam_of')
    assert module.code == 2 and module.err.count('\n') == 1
    assert module.err.startswith('python -m timm_sam.train: error: --config digits/resnet10t_sam_of: No such file')
    assert f'did you mean {RECIPE}' in module.err
    shown = installed.succeed(tmp_path, 'python', '-m', 'timm_sam.train', '--help')
    assert shown.out.startswith('usage: python -m timm_sam.train ')


def test_clone_can_be_installed_to_be_edited(unpacked, tmp_path):
    environment = Environment(tmp_path / 'environment')
    environment.install('-e', unpacked)
    done = environment.succeed(tmp_path, 'python', '-c', 'import timm_sam; from timm_sam.cli import recipes; '
                               f'print(timm_sam.__file__, recipes.find("{RECIPE}"))')
    assert done.out.split() == [f'{unpacked}/timm_sam/__init__.py', f'{unpacked}/hparams/{RECIPE}.yaml']
    assert os.access(environment.bin / 'timm-sam-train', os.X_OK)
