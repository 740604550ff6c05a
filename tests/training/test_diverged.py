"""Runs whose loss or weights stop being finite: one line, exit code 1, and nothing written over what was."""
import functools

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import write_image_folder
from support.states import differences
from torch import nn

from timm_sam.cli.device import Process
from timm_sam.report.runs import DIVERGED, FINISHED, read_run
from timm_sam.training import factory
from timm_sam.training.diverged import Diverged, Watch, are_finite

SAM_ON = '--sam-variant sam --sam-rho 0.05'


@pytest.fixture
def nan_image(tmp_path):
    """Images of which one has a pixel that is no number (32-bit TIFF, as measurements are kept)."""
    write_image_folder(tmp_path / 'images')
    pixels = np.full((20, 20), 100, np.float32)
    pixels[3, 3] = np.nan
    Image.fromarray(pixels).save(tmp_path / 'images' / 'train' / 'red' / 'nan.tiff')
    return '--data-dir images --input-img-mode F --in-chans 1 --mean 0.5 --std 0.5 --no-aug --no-prefetcher -b 41'


def poison(monkeypatch, at, value=float('nan')):
    """The loss of the `at`-th batch, counted from 0, becomes that value."""
    calls, real = [], factory.create_task

    def create(*args, **kwargs):
        task = real(*args, **kwargs)
        criterion = task.criterion

        class Poisoned(nn.Module):
            def forward(self, *inputs):
                calls.append(1)
                loss = criterion(*inputs)
                return loss * value if len(calls) == at + 1 else loss

        task.criterion = Poisoned()
        return task

    monkeypatch.setattr(factory, 'create_task', create)


@pytest.mark.parametrize('options', ['', '--log-interval 1', '--model-ema', SAM_ON])
def test_run_ends_with_one_line_and_keeps_what_it_had(run_train, monkeypatch, options):
    assert run_train('--epochs 1').code == 0
    with monkeypatch.context() as patch:
        poison(patch, 2)
        done = run_train(f'--epochs 3 {options} --resume out/run/last.pth.tar --log-interval 50')
    assert done.code == 1 and 'Traceback' not in done.err
    assert done.last_line.startswith('train.py: error: the training loss is not finite any more, in epoch 1, ')
    assert '--allow-nonfinite' in done.last_line
    assert done.checkpoint()['epoch'] == 0
    assert [(row['epoch'], row['train_loss'] == 'nan') for row in done.summary()] == [('0', False), ('1', True)]
    assert run_train(f'--epochs 3 {options} --resume out/run/last.pth.tar').code == 0  # without what went wrong


def test_report_knows_that_it_diverged_until_it_has_gone_on_to_its_end(run_train, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, 7)
        done = run_train('--epochs 3')
    run = read_run(str(done.folder()))
    assert (run.status, run.reason) == (DIVERGED, 'train_loss is nan in epoch 1 of 0..2')
    assert run_train('--epochs 3 --resume auto').code == 0
    assert read_run(str(done.folder())).status == FINISHED


@pytest.mark.parametrize('log_interval, update', [(1, 3), (2, 3), (50, 5)])
def test_run_ends_at_the_next_line_of_the_log(run_train, monkeypatch, log_interval, update):
    poison(monkeypatch, 2)
    done = run_train(f'--log-interval {log_interval}')
    assert done.code == 1 and f'in epoch 0, at update {update} of the run' in done.last_line


def test_weights_that_are_not_finite_are_never_saved_for_recovery(run_train, monkeypatch):
    poison(monkeypatch, 2)
    done = run_train('--recovery-interval 1 --log-interval 50')
    assert done.code == 1 and 'weights or running statistics are not finite' in done.last_line
    assert {p.name for p in done.folder().glob('*.pth.tar')} == {f'recovery-0-{i}.pth.tar' for i in (0, 1)}


def test_last_update_of_an_epoch_is_looked_at(run_train, monkeypatch):
    """Its loss is finite, what it makes of the weights is not."""
    step = torch.optim.SGD.step

    def overflowing(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        overflowing.calls += 1
        if overflowing.calls == 5:
            self.param_groups[0]['params'][0].data.view(-1)[0] = float('inf')
        return result

    overflowing.calls = 0
    monkeypatch.setattr(torch.optim.SGD, 'step', overflowing)
    done = run_train('--epochs 2')
    assert done.code == 1 and 'weights or running statistics are not finite any more, in epoch 0' in done.last_line


def test_allow_nonfinite_goes_on(run_train, monkeypatch):
    poison(monkeypatch, 2)
    done = run_train('--epochs 2 --allow-nonfinite')
    assert done.code == 0 and [row['train_loss'] for row in done.summary()] == ['nan', 'nan']


@pytest.mark.filterwarnings(r'ignore:unclosed file <_io.*nan\.tiff:ResourceWarning')  # timm leaves it open
@pytest.mark.parametrize('options', ['', SAM_ON])
def test_image_that_is_not_finite_ends_the_run(run_train, nan_image, options):
    done = run_train(f'{nan_image} {options}')
    assert done.code == 1 and 'images or targets that are not finite' in done.last_line
    assert not list(done.folder().glob('*.pth.tar'))


def test_updates_that_a_loss_scaler_leaves_out_end_nothing(run_train, monkeypatch):
    def precision(args, device):
        autocast = functools.partial(torch.autocast, device_type='cpu', dtype=torch.float16)
        return None, autocast, factory.LossScaler('cpu', init_scale=2.0 ** 10)

    monkeypatch.setattr(factory, 'precision', precision)
    poison(monkeypatch, 2)
    assert run_train('--epochs 2').code == 0
    poison(monkeypatch, 0, float('inf'))
    monkeypatch.setattr(factory.LossScaler, 'get_scale', lambda self: 1e-7)
    done = run_train('--experiment other')
    assert done.code == 1 and 'the training loss is not finite' in done.last_line


class Half(Process):
    """The other rank's weights are not finite."""

    def mean(self, value):
        return value / 2


def test_ranks_end_together():
    class Options:
        allow_nonfinite = False

    watch = Watch(Options, Half(torch.device('cpu')), nn.Linear(2, 2), None)
    with pytest.raises(Diverged):
        watch.weights(0, 0)


def test_masks_may_be_infinite_and_running_statistics_may_not():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer('mask', torch.tensor([0.0, float('-inf')]))
    assert are_finite(model)
    model[1].running_var[0] = float('nan')
    assert not are_finite(model)
    model[1].running_var[0] = 1.0
    model[0].weight.data[0, 0] = float('inf')
    assert not are_finite(model)


def test_watching_changes_nothing(run_train):
    assert run_train(f'--epochs 2 {SAM_ON}').code == 0
    done = run_train(f'--epochs 2 {SAM_ON} --allow-nonfinite --experiment other')
    assert differences(done.checkpoint()['state_dict'], done.checkpoint('other')['state_dict']) == []
