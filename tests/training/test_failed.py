"""Failures in the middle of a run that the options are to blame for are one line; all others keep their traceback."""
import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from torch import _dynamo

from timm_sam import train


def raising(error):
    def fail(*args, **kwargs):
        raise error
    return fail


def refused(done):
    assert done.code == 2 and 'Traceback' not in done.err and done.out == '', done.err[-2000:]
    return done.last_line


@pytest.mark.full
@pytest.mark.parametrize('function', ['create_data', 'train_one_epoch'])
@pytest.mark.parametrize('error, where', [
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), 'cpu'),
    (RuntimeError('DefaultCPUAllocator: not enough memory'), 'this machine')], ids=['device', 'host'])
def test_short_memory_names_the_batch_size(run_train, monkeypatch, function, error, where):
    monkeypatch.setattr(train, function, raising(error))
    message = refused(run_train())
    assert f'--batch-size 8 is too large for the memory of {where}' in message and '--grad-accum-steps' in message
    assert str(error)[:20] in message


@pytest.mark.full
@pytest.mark.parametrize('options', ['--img-size 2', '--img-size 32 --train-img-sizes 32 2'])
def test_images_that_the_model_does_not_take_name_it_and_their_size(run_train, options):
    message = refused(run_train(f'--model test_convnext {options}'))
    assert '--model test_convnext cannot be run on images of 3x2x2: ' in message and 'Kernel size' in message


@pytest.mark.full
def test_images_that_the_teacher_does_not_take_name_it(run_train, tmp_path):
    save_for_hf(timm.create_model('test_convnext', num_classes=4), tmp_path / 'teacher')
    message = refused(run_train('--kd-model-name local-dir:teacher --img-size 2'))
    assert '--kd-model-name local-dir:teacher cannot be run on images of 3x2x2: ' in message


@pytest.mark.full
def test_compiler_that_fails_is_named(run_train, monkeypatch):
    _dynamo.list_backends()  # they are registered when somebody asks, and would be in the copy alone
    monkeypatch.setattr(_dynamo.backends.registry, '_COMPILER_FNS', dict(_dynamo.backends.registry._COMPILER_FNS))
    monkeypatch.setattr(_dynamo.backends.registry, '_BACKENDS', dict(_dynamo.backends.registry._BACKENDS))
    _dynamo.register_backend(raising(FileNotFoundError('there is no g++')), name='broken')
    try:
        message = refused(run_train('--torchcompile broken'))
    finally:
        _dynamo.reset()
    assert '--torchcompile broken: compiling has failed' in message and 'there is no g++' in message
    assert 'TORCHDYNAMO' not in message


@pytest.mark.full
def test_other_failures_are_not_explained_away(run_train, monkeypatch):
    monkeypatch.setattr(train, 'train_one_epoch', raising(RuntimeError('of the program')))
    with pytest.raises(RuntimeError, match='^of the program$'):
        run_train()
