"""Ranks that were started with other options, or that see other images, than the first."""
import argparse
import contextlib
import shutil

import pytest
from support.places import ROOT
from support.processes import Process as Command
from support.processes import free_ports, python
from support.states import summary

from timm_sam.cli.errors import OptionError
from timm_sam.training.agreement import check_data, check_options
from timm_sam.training.options import build_train_parser, read_args

COMMON = '--device cpu --data-dir data --sam-variant sam --sam-rho 0.1'


class Ranks:
    """Stands for the process of each rank: `compare` lets all of them look, and gives what they say."""

    def __init__(self):
        self.given = []

    def gather(self, mine):
        self.given.append(mine)
        return self.given

    def compare(self, check, *each):
        """What the last one says; those before have told what they have."""
        for arguments in each:
            with contextlib.suppress(OptionError):
                check(*arguments[:1], self, *arguments[1:])
        self.gather = lambda mine: self.given
        check(*each[-1][:1], self, *each[-1][1:])


def options(text):
    return read_args(build_train_parser(), f'{COMMON} {text}'.split())


@pytest.mark.parametrize('other, words', [
    ('--lr 0.2', ['--lr is 0.2 on rank 1, and 0.1 on rank 0', 'same options']),
    ('--sam-rho 0.2', ['--sam-rho is 0.2 on rank 1', '0.1 on rank 0']),
    ('-b 64', ['--batch-size is 64', 'rank 1']),
    ('--seed 1', ['--seed is 1']),
    ('--recovery-interval 5', ['--recovery-interval is 5']),
    ('--log-interval 5', ['--log-interval is 5']),
    ('--model-kwargs depth=3', ['--model-kwargs', 'depth']),
])
def test_rank_with_other_options_is_one_line(other, words):
    with pytest.raises(OptionError) as error:
        Ranks().compare(check_options, [options('--lr 0.1')], [options(f'--lr 0.1 {other}')])
    assert [word for word in words if word not in str(error.value)] == []


def test_places_on_a_machine_and_what_the_first_rank_alone_does_may_differ():
    Ranks().compare(check_options, [options('--lr 1 --log-wandb -j 2 --output out')],
                    [options('--lr 1.0 -j 8 --data-dir /elsewhere/set --device cpu --checkpoint-hist 3')])


class Images:
    def __init__(self, count, classes):
        self.count, self.class_to_idx = count, {name: index for index, name in enumerate(classes)}

    def __len__(self):
        return self.count


@pytest.mark.parametrize('other, words', [
    (Images(9, 'abc'), ['on rank 1', 'number of images of --train-split train is 9, and 10 on rank 0']),
    (Images(10, 'ab'), ['number of classes of --train-split train is 2, and 3 on rank 0']),
    (Images(10, 'acb'), ['numbering of the classes of --train-split train is another']),
])
def test_rank_that_sees_other_images_is_one_line(other, words):
    args = argparse.Namespace(data_dir='data')
    first = {'--train-split train': Images(10, 'abc'), '--val-split val': None}
    with pytest.raises(OptionError) as error:
        Ranks().compare(check_data, [args, first], [args, {**first, '--train-split train': other}])
    assert [word for word in words if word not in str(error.value)] == []
    Ranks().compare(check_data, [args, first], [args, {**first, '--train-split train': Images(10, 'abc')}])


@pytest.fixture
def start(base, tmp_path):
    """Starts train.py once for each text of options, each as a rank; gives exit codes and what they print."""
    def run(*each):
        port = free_ports(1)[0]
        with contextlib.ExitStack() as stack:
            ranks = [stack.enter_context(Command(
                python(ROOT / 'train.py', *base.split(), *options.split()), tmp_path, MASTER_ADDR='127.0.0.1',
                MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(each)),
                LOCAL_WORLD_SIZE=str(len(each))))
                for rank, options in enumerate(each)]
            return [rank.wait() for rank in ranks]
    return run


@pytest.mark.slow
@pytest.mark.parametrize('other, words', [
    ('--lr 0.01', '--lr is 0.01 on rank 1, and 0.05 on rank 0'),
    ('--data-dir other', 'on rank 1 the number of images of --train-split train is'),
])
def test_ranks_that_do_not_agree_end_before_anything_is_written(start, image_folder, tmp_path, other, words):
    shutil.copytree(image_folder, tmp_path / 'other')
    shutil.rmtree(sorted((tmp_path / 'other' / 'train').iterdir())[0])
    done = start('--val-split=', f'--val-split= {other}')
    assert [rank.code for rank in done] == [2, 2]
    assert words in done[0].last_line and all('Traceback' not in rank.err for rank in done)
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_ranks_train_on_copies_of_the_same_images(start, image_folder, tmp_path):
    other = shutil.copytree(image_folder, tmp_path / 'elsewhere')
    done = start('', f'--data-dir {other} -j 1')
    assert [d.code for d in done] == [0, 0], done[1].err
    assert len(summary(tmp_path / 'out' / 'run')) == 1
