"""Runs that are killed, resumed, preempted or find torn files: real processes, compared with the run that was not."""
import argparse
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from support.places import ROOT, TESTS
from support.processes import Process, python, run, torchrun
from support.running import in_process, quiet_about_timm
from support.states import differences, summary

from timm_sam import train
from timm_sam.random_state import RandomState
from timm_sam.report.runs import MIXED, read_run
from timm_sam.runs import files
from timm_sam.runs.checkpoints import newest_checkpoint
from timm_sam.training.preemption import EXIT_PREEMPTED

SAM = '--sam-variant sam --sam-rho 0.5'
TWO = f'{SAM} --epochs 3 -b 2'


class Runs:
    """train.py as a process, on the tiny folder; -j 1 so that a worker process has random states of its own."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data

    def command(self, options: str) -> list[str]:
        base = (f'--device cpu --data-dir {self.data} --num-classes 4 --model test_resnet --img-size 32 -b 8 -j 1 '
                f'--drop 0.2 --drop-path 0.1 --model-ema --model-ema-decay 0.9 --lr 0.05 --warmup-epochs 1 '
                f'--log-interval 1 --checkpoint-hist 2 --output out')
        return [*base.split(), *options.split()]

    def start(self, options: str, ranks: int = 1, launcher: tuple[str, ...] = ()) -> Process:
        command = [ROOT / 'train.py', *self.command(options)]
        return Process(python(*command) if ranks == 1 else torchrun(
            *command, ranks=ranks, options=['--standalone', *launcher]), self.folder)

    def run(self, options: str, ranks: int = 1) -> str:
        """Runs in a process of its own, or of their own."""
        with self.start(options, ranks) as process:
            done = process.wait()
        assert done.code == 0, done.err[-3000:]
        return done.err

    def here(self, options: str, code: int = 0) -> str:
        """Runs in this process; returns what is printed to stderr."""
        with quiet_about_timm():
            done = in_process(train.main, self.command(options), self.folder)
        assert done.code == code, done.err[-3000:]
        return done.err

    def state(self, name: str) -> dict:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(self.folder / 'out' / name / 'last.pth.tar', weights_only=True)
        return {k: state[k] for k in ('epoch', 'state_dict', 'state_dict_ema', 'optimizer', 'random_state', 'metric')}

    def summary(self, name: str) -> list[dict[str, str]]:
        return summary(self.folder / 'out' / name)

    def epochs(self, name: str) -> list[str]:
        return [row['epoch'] for row in self.summary(name)]

    def assert_same(self, name: str, expected: str) -> None:
        assert self.summary(name) == self.summary(expected)
        assert differences(self.state(name), self.state(expected)) == []


@pytest.fixture(scope='module')
def runs(tmp_path_factory, image_folder) -> Runs:
    runs = Runs(tmp_path_factory.mktemp('restart'), image_folder)
    runs.run(f'{SAM} --epochs 4 --experiment whole')
    return runs


@pytest.fixture(scope='module')
def whole_of_two(runs) -> str:
    runs.run(f'{TWO} --experiment whole2', ranks=2)
    return 'whole2'


def test_run_killed_between_two_epochs_and_resumed_is_the_run_that_was_not(runs):
    with runs.start(f'{SAM} --epochs 4 --experiment killed') as process:
        process.wait_for('Train: 2 [   0/')  # the checkpoint of epoch 1 is complete
        process.kill()
        assert process.wait().code == -signal.SIGKILL
    runs.run(f'{SAM} --epochs 4 --experiment killed --resume out/killed/last.pth.tar')
    runs.assert_same('killed', 'whole')


def test_sigterm_finishes_the_update_and_the_resumed_run_is_the_one_that_was_not_stopped(runs):
    with runs.start(f'{SAM} --epochs 4 --experiment stopped') as process:
        process.wait_for('Train: 1 [   1/')
        process.signal(signal.SIGTERM)
        assert process.wait().code == EXIT_PREEMPTED
    found = newest_checkpoint(str(runs.folder / 'out' / 'stopped'))
    assert Path(found).name.startswith('recovery-1-')
    assert_goes_on_within_epoch_1(runs.run(f'{SAM} --epochs 4 --experiment stopped --resume auto'))
    runs.assert_same('stopped', 'whole')


def test_resume_auto_starts_anew_where_there_is_nothing_and_then_goes_on(runs):
    assert 'starting anew' in runs.here(f'{SAM} --epochs 2 --experiment auto --resume auto --sched step')
    out = runs.here(f'{SAM} --epochs 4 --experiment auto --resume auto --sched step')
    assert 'last.pth.tar' in out and 'Train: 1 [' not in out
    assert runs.epochs('auto') == ['0', '1', '2', '3']


def test_torn_checkpoint_is_skipped_with_a_warning(runs):
    runs.here(f'{SAM} --epochs 2 --experiment torn')
    folder = runs.folder / 'out' / 'torn'
    whole = (folder / 'last.pth.tar').read_bytes()
    (folder / 'last.pth.tar').unlink()  # a hard link of checkpoint-1
    (folder / 'last.pth.tar').write_bytes(whole[:len(whole) // 2])
    out = runs.here(f'{SAM} --epochs 3 --experiment torn --resume auto')
    assert 'last.pth.tar is not a whole checkpoint' in out
    resumed = out.split('--resume auto: ')[1].splitlines()[0]
    assert resumed in ('out/torn/checkpoint-1.pth.tar', 'out/torn/model_best.pth.tar')  # links to one file
    assert runs.epochs('torn') == ['0', '1', '2']


def test_resume_auto_without_experiment_is_refused(runs):
    assert '--resume auto needs --experiment' in runs.here(f'{SAM} --resume auto', code=2)


@pytest.mark.parametrize('who', ['torchrun', pytest.param('rank 1', marks=pytest.mark.slow)])
def test_two_ranks_stop_after_the_same_update_and_go_on_as_if_nothing_had_been(runs, whole_of_two, who):
    name = who.replace(' ', '')
    with runs.start(f'{TWO} --experiment {name}', ranks=2) as process:
        process.wait_for('Train: 1 [   0/10')
        # torchrun sends the signal to the ranks' process groups: the loaders' workers have to outlive it
        process.signal(signal.SIGTERM, None if who == 'torchrun' else process.rank(1))
        process.wait()
    found = newest_checkpoint(str(runs.folder / 'out' / name))
    assert Path(found).name.startswith('recovery-1-')
    assert_goes_on_within_epoch_1(runs.run(f'{TWO} --experiment {name} --resume auto', ranks=2))
    runs.assert_same(name, whole_of_two)


def assert_goes_on_within_epoch_1(out: str) -> None:
    assert 'recovery-1-' in out.split('--resume auto: ')[1].splitlines()[0]
    assert 'Train: 1 [' in out and 'Train: 0 [' not in out and 'Train: 1 [   0/' not in out


@pytest.mark.slow
def test_torchrun_restarts_after_a_rank_has_died_and_goes_on_from_the_last_epoch(runs, whole_of_two):
    with runs.start(f'{TWO} --experiment restarts --resume auto', 2, ('--max-restarts', '1')) as process:
        process.wait_for('Train: 1 [   0/10')
        process.signal(signal.SIGKILL, process.rank(1))
        done = process.wait()
    assert done.code == 0, done.err[-3000:]
    _, after = done.err.split('Train: 1 [   0/10', 1)
    assert '--resume auto: out/restarts/' in after and 'Train: 0 [' not in after
    runs.assert_same('restarts', whole_of_two)


@pytest.mark.parametrize('options, words', [
    ('--sam-rho 0.7', ['--sam-rho', '0.7']), ('--sam-rho 0.5 --lr 0.01', ['--lr', '0.01']),
    ('--sam-rho 0.5 --seed 1', ['--seed', '1']),
    ('--sam-rho 0.5 --epochs 2', ['--epochs', '2'])])
def test_resume_auto_does_not_go_on_with_another_run(runs, options, words):
    folder = runs.folder / 'out' / 'whole'
    before = (folder / 'args.yaml').read_bytes()
    out = runs.here(f'--sam-variant sam --epochs 4 {options} --experiment whole --resume auto', code=2)
    last = out.rstrip().splitlines()[-1]
    assert all(word in last for word in ['--resume auto', 'another', '--experiment', *words]) and 'Traceback' not in out
    assert (folder / 'args.yaml').read_bytes() == before


def test_options_of_a_run_that_goes_on_with_others_are_kept(runs):
    runs.here(f'{SAM} --epochs 1 --experiment changed')
    folder = runs.folder / 'out' / 'changed'
    before = (folder / 'args.yaml').read_bytes()
    out = runs.here(f'--sam-variant sam --sam-rho 0.1 --epochs 2 --experiment changed --resume {folder}/last.pth.tar')
    assert 'other options than before: epochs, sam_rho' in out
    assert (folder / 'args-before-epoch-1.yaml').read_bytes() == before
    assert read_run(str(folder)).status == MIXED
    between = (folder / 'args.yaml').read_bytes()
    for _ in range(2):  # from the same epoch once more, and yet once more with what that run had
        out = runs.here(f'{SAM} --epochs 2 --experiment changed --resume {folder}/checkpoint-0.pth.tar --seed 3')
    assert (folder / 'args-before-epoch-1.yaml').read_bytes() == before
    assert (folder / 'args-before-epoch-1-2.yaml').read_bytes() == between
    assert len(list(folder.glob('args-before*'))) == 2 and 'other options than before' not in out


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing_but_the_current_epoch(runs):
    chance, began = random.Random(0), time.monotonic()
    with runs.start(f'{SAM} --epochs 30 --experiment long') as process:
        process.wait_for('Training for')
        start = time.monotonic() - began  # of a process, before it trains
        assert process.wait().code == 0
    options, went_on = f'{SAM} --epochs 30 --experiment tortured --resume auto', 0
    for _ in range(20):
        done = complete_epochs(runs, 'tortured')
        with runs.start(options) as process:
            time.sleep(start * chance.uniform(0.4, 1.8))
            process.kill()
            out = process.wait().err
        if 'Training for' in out and done:
            # the summary has an epoch a moment before the checkpoint has it
            assert re.search(r'from epoch (\d+);', out)[1] in (str(done), str(done - 1)), out
            went_on += 1
    assert went_on >= 10
    runs.run(options)
    runs.assert_same('tortured', 'long')


@pytest.mark.slow
def test_run_killed_in_front_of_any_operation_on_its_files_goes_on_to_the_same_end(tmp_path, image_folder):
    """From the making of the folder to the last epoch; -j 0: a fork of this kind has no worker processes."""
    options = (f'--device cpu --data-dir {image_folder} --num-classes 4 --model test_resnet --img-size 32 -b 20 -j 0 '
               f'--drop 0.2 --model-ema --lr 0.05 --epochs 3 --warmup-epochs 0 --checkpoint-hist 1 '
               f'--recovery-interval 1 {SAM}')
    done = run(python('-m', 'support.killed_runs', tmp_path, *options.split()), TESTS, timeout=1800)
    assert done.code == 0, done.err[-3000:]
    whole = tmp_path / 'whole'
    cases = [path for path in tmp_path.iterdir() if path.is_dir() and path != whole]
    assert len(cases) > 60
    names = {path.name for path in whole.iterdir()}
    with torch.serialization.safe_globals([argparse.Namespace]):
        expected = {name: torch.load(whole / name, weights_only=True) for name in (files.LAST, files.BEST)}
        for case in cases:
            left = {path.name for path in case.iterdir()}
            assert {n for n in left if not n.startswith('recovery-')} == {
                n for n in names if not n.startswith('recovery-')}, case
            assert summary(case) == summary(whole), case
            for name, state in expected.items():
                found = torch.load(case / name, weights_only=True)
                for key in ('epoch', 'state_dict', 'state_dict_ema', 'optimizer', 'random_state', 'metric'):
                    assert differences(found[key], state[key]) == [], (case, name, key)


def complete_epochs(runs, name: str) -> int:
    return len(runs.summary(name)) if (runs.folder / 'out' / name / 'summary.csv').exists() else 0


def test_newest_checkpoint_prefers_progress_and_ignores_unfinished_files(tmp_path):
    def save(name: str, epoch: int, **entries) -> None:
        torch.save({'epoch': epoch, 'state_dict': {}, **entries}, tmp_path / f'{name}.pth.tar')

    assert newest_checkpoint(str(tmp_path)) is None
    save('checkpoint-3', 3)
    save('last', 4)
    save('recovery_tmp', 9)
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / 'last.pth.tar')
    save('recovery-5-2', 5, position={'batch': 3})
    save('recovery-5-1', 5, position={'batch': 2})
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / 'recovery-5-2.pth.tar')
    save('last', 5)
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / 'last.pth.tar')
    save('tmp', 9)  # whole, and not yet renamed when its process was killed
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / 'tmp.pth.tar')


def test_random_state_of_a_device_goes_to_the_one_that_the_run_goes_on_with():
    state = RandomState(set()).to_dict()
    state['devices'] = {'cuda:6': torch.ones(3)}
    assert RandomState.from_dict(state).devices == {}
    assert RandomState.from_dict(state, torch.device('cpu')).devices == {}
    for device in (torch.device('cuda:2'), torch.device('cuda')):
        assert RandomState.from_dict(state, device).devices == {device: state['devices']['cuda:6']}


def test_random_state_survives_a_checkpoint(tmp_path):
    import numpy as np

    def draw() -> tuple:
        return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), np.random.standard_normal()

    np.random.standard_normal()  # leaves half of a pair behind
    torch.save(RandomState({torch.device('cpu')}).to_dict(), tmp_path / 'state')
    expected = draw()
    RandomState.from_dict(torch.load(tmp_path / 'state', weights_only=True)).restore()
    assert draw() == expected
