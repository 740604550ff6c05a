"""Options at random: each command line and file is taken, or refused with one line and code 2; there is no traceback.

The same cases every time; 500 of them. A case that fails is named by its seed: `command(parser, seed, ...)`.
"""
import contextlib
import io
import logging
import signal

import pytest
import timm
import torch
from support import fuzz
from support.images import write_image_folder
from support.running import in_process, quiet_about_timm
from support.states import tree

from timm_sam import train, validate
from timm_sam.evaluation.options import parse_validate_args
from timm_sam.training.options import parse_args

SECONDS = 60  # for one case; it takes less than one, with the deepest of files five
# what needs another machine, a network, or many processes
ELSEWHERE = ('device', 'pretrained', 'log_wandb', 'dataset_download', 'workers', 'retry', 'num_gpu')

pytestmark = [pytest.mark.slow, pytest.mark.full]


class Endless(BaseException):
    """A case does not come to an end."""


@pytest.fixture(autouse=True)
def bounded():
    """`bounded()` begins a case, which has a limited time."""
    def stop(number, frame):
        raise Endless

    before = signal.signal(signal.SIGALRM, stop)
    yield lambda: signal.alarm(SECONDS)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def one_line_or_nothing(parse, case):
    """Whether the options are taken."""
    err, out = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            parse()
    except SystemExit as e:
        assert e.code == 2 and err.getvalue().count('\n') == 1 and ': error: ' in err.getvalue(), (case, err.getvalue())
        return False
    except BaseException as e:
        raise AssertionError(case) from e
    return True


@pytest.mark.parametrize('kind', ['yaml', 'train', 'validate'])
def test_options_are_taken_or_refused_with_one_line(tmp_path, monkeypatch, bounded, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger(), 'disabled', True)
    start = ['--device', 'cpu', '--data-dir', '.']
    taken = 0
    for seed in range(100):
        bounded()
        if kind == 'yaml':
            case = fuzz.yaml_text(train.build_parser(), seed)
            (tmp_path / 'c.yaml').write_text(case)
            before = tree(tmp_path)
            taken += one_line_or_nothing(lambda: parse_args(train.build_parser(), [*start, '-c', 'c.yaml']), case)
        else:
            parser = {'train': train, 'validate': validate}[kind].build_parser()
            case = fuzz.command(parser, seed)
            before = tree(tmp_path)
            parse = parse_args if kind == 'train' else parse_validate_args
            taken += one_line_or_nothing(lambda: parse(parser, [*start, *case]), case)  # noqa: B023 called at once
        assert tree(tmp_path) == before, case
    assert 0 < taken < 50  # some of both


@pytest.fixture
def small(tmp_path):
    return write_image_folder(tmp_path / 'images', splits={'train': 4, 'validation': 2})


@pytest.mark.parametrize('script', [train, validate], ids=['train', 'validate'])
@pytest.mark.filterwarnings('ignore')  # of torch and timm, on options that nobody gives
def test_runs_end_well_or_with_one_line(tmp_path, small, bounded, script):
    base = f'--data-dir {small} --num-classes 4 --model test_resnet --img-size 32 -b 8 -j 0 --device cpu'
    base += {train: ' --epochs 1 --warmup-epochs 0 --lr 0.05 --output out --experiment run',
             validate: f' --checkpoint {tmp_path}/weights.pth'}[script]
    torch.save(timm.create_model('test_resnet', num_classes=4).state_dict(), tmp_path / 'weights.pth')
    ended = {0: 0, 1: 0, 2: 0}
    for seed in range(100):
        bounded()
        folder = tmp_path / str(seed)
        folder.mkdir()
        case = fuzz.command(script.build_parser(), seed, without=(*ELSEWHERE, 'output'), words=fuzz.SMALL, most=3,
                            text=seed % 4 == 0)
        try:
            with quiet_about_timm():
                done = in_process(script.main, [*base.split(), *case], folder)
        except BaseException as e:
            raise AssertionError(case) from e
        assert done.code in ended and 'Traceback' not in done.err, (case, done.err[-2000:])
        ended[done.code] += 1
        if done.code:
            assert f'{script.__name__[9:]}.py: error: ' in done.last_line, (case, done.err[-2000:])
        if done.code == 2:
            assert not any(folder.iterdir()), (case, done.last_line)
    assert ended[0] >= 10 and ended[2] >= 10  # some of both
