"""Files that train.py did not write: old formats, Lightning's names, averages only, objects, another architecture."""
import copy
import random

import pytest
import timm
import torch
from support.states import differences

from timm_sam import train

RESUME = '--epochs 2 --resume foreign.pth.tar'


@pytest.fixture
def saved(run_train, tmp_path):
    """A checkpoint of one epoch, changed and written anew as `foreign.pth.tar`; gives what was changed."""
    def write(change, **options):
        done = run_train('--model-ema --experiment old')
        assert done.code == 0
        state = done.checkpoint('old')
        torch.save(change(copy.deepcopy(state)), tmp_path / 'foreign.pth.tar', **options)
        return state
    return write


@pytest.fixture
def at_start(monkeypatch):
    """What a run goes on with, in front of its first epoch."""
    found = {}

    def look(run, epoch, *place):
        found.update(epoch=epoch, weights=copy.deepcopy(run.task.get_trainable_module().state_dict()),
                     momenta=len(run.optimizer.state))
        raise KeyboardInterrupt

    def begin():
        monkeypatch.setattr(train, 'train_one_epoch', look)
        return found
    return begin


def test_file_of_torch_before_1_6_resumes_with_a_warning(run_train, saved, at_start):
    state = saved(lambda s: s, _use_new_zipfile_serialization=False)
    found = at_start()
    done = run_train(RESUME)
    assert done.code == 0 and found['epoch'] == 1 and found['momenta'] > 0
    assert differences(dict(found['weights']), dict(state['state_dict'])) == []
    assert any('has no checksums' in line for line in done.log('WARNING'))


def test_names_of_lightning_are_understood(run_train, saved, at_start):
    def change(s):
        return {'epoch': 1, 'state_dict': {f'model.{k}': v for k, v in s['state_dict'].items()},
                'pytorch-lightning_version': '2.0', 'optimizer_states': [s['optimizer']]}

    state = saved(change)
    found = at_start()
    done = run_train(RESUME)
    assert done.code == 0 and found['momenta'] == 0
    assert differences(dict(found['weights']), dict(state['state_dict'])) == []
    assert any('has no state of the optimizer' in line for line in done.log('WARNING'))


def test_weights_alone_start_at_epoch_0(run_train, saved, at_start):
    state = saved(lambda s: s['state_dict'])
    found = at_start()
    assert run_train(RESUME).code == 0 and found['epoch'] == 0
    assert differences(dict(found['weights']), dict(state['state_dict'])) == []


@pytest.mark.parametrize('change, words', [
    (lambda s: {'state_dict_ema': s['state_dict_ema'], 'epoch': 0}, ['averaged weights only', '--initial-checkpoint']),
    (lambda s: {**s, 'chance': random.Random(0)}, ['random.Random', 'never loaded']),
    (lambda s: [s['state_dict']], ['holds a list']),
    (lambda s: {**s, 'state_dict': timm.create_model('test_vit').state_dict()}, ['whole checkpoint of this model']),
    (lambda s: {**s, 'epoch': 'x'}, ['cannot be resumed']),
])
def test_what_cannot_be_resumed_is_one_line(run_train, saved, change, words):
    saved(change)
    done = run_train(RESUME)
    assert done.code == 2 and 'Traceback' not in done.err
    assert all(word in done.last_line for word in ['--resume foreign.pth.tar', *words]), done.last_line
    assert not done.folder().exists()


def test_damaged_file_is_not_started_from(run_train, saved, tmp_path):
    saved(lambda s: s)
    data = bytearray((tmp_path / 'foreign.pth.tar').read_bytes())
    data[len(data) // 2] ^= 16
    (tmp_path / 'foreign.pth.tar').write_bytes(data)
    for flag in ('--resume', '--initial-checkpoint', '--pretrained --pretrained-path'):
        done = run_train(f'{flag} foreign.pth.tar')
        assert done.code == 2 and f'{flag.split()[-1]} foreign.pth.tar is not whole: it is damaged' in done.last_line


def test_pretrained_path_of_another_architecture_is_an_error(run_train, tmp_path):
    torch.save(timm.create_model('test_vit').state_dict(), tmp_path / 'vit.pth')
    done = run_train('--pretrained --pretrained-path vit.pth')
    assert done.code == 2 and '--pretrained-path vit.pth' in done.last_line and 'test_resnet' in done.last_line
    assert not done.folder().exists()


def test_pretrained_path_of_the_model_fits_another_number_of_classes(run_train, tmp_path, at_start):
    torch.manual_seed(5)
    weights = timm.create_model('test_resnet', num_classes=10).state_dict()
    torch.save(weights, tmp_path / 'resnet.pth')
    found = at_start()
    assert run_train('--pretrained --pretrained-path resnet.pth').code == 0
    first = next(iter(weights))
    assert torch.equal(found['weights'][first], weights[first]) and found['weights']['fc.weight'].shape[0] == 4


def test_pretrained_path_that_lacks_a_layer_of_the_model_is_taken_with_a_warning(run_train, tmp_path, at_start):
    torch.manual_seed(5)
    weights = timm.create_model('test_vit', num_classes=10).state_dict()  # pools by its class token: norm, no fc_norm
    torch.save(weights, tmp_path / 'vit.pth')
    found = at_start()
    done = run_train('--model test_vit --gp avg --pretrained --pretrained-path vit.pth')
    name = 'blocks.5.mlp.fc1.weight'
    assert done.code == 0 and torch.equal(found['weights'][name], weights[name])
    [warning] = [line for line in done.log('WARNING') if '--pretrained-path' in line]
    assert 'vit.pth lacks 2 of the weights of test_vit (fc_norm.weight, fc_norm.bias), which begin' in warning
    done = run_train('--model test_vit --model-kwargs depth=8 --pretrained --pretrained-path vit.pth')
    assert done.code == 2 and 'blocks.6.norm1.weight' in done.last_line and 'would be random' in done.last_line


def test_pretrained_path_alone_is_an_error_as_it_would_do_nothing(run_train, tmp_path):
    torch.save({}, tmp_path / 'x.pth')
    done = run_train('--pretrained-path x.pth')
    assert done.code == 2 and '--pretrained-path x.pth is not loaded without --pretrained' in done.last_line


@pytest.mark.full
@pytest.mark.parametrize('ema', [False, True])
def test_names_of_lightning_are_understood_where_a_run_starts(run_train, saved, at_start, ema):
    def change(s):
        entries = {'state_dict': s['state_dict'], 'state_dict_ema': s['state_dict_ema']} if ema else {
            'state_dict': s['state_dict']}
        return {key: {f'model.{name}': 2 * weight for name, weight in weights.items()}
                for key, weights in entries.items()}

    state = saved(change)
    found = at_start()
    assert run_train('--epochs 2 --initial-checkpoint foreign.pth.tar').code == 0 and found['epoch'] == 0
    expected = state['state_dict_ema' if ema else 'state_dict']  # as in timm
    assert differences(dict(found['weights']), {name: 2 * weight for name, weight in expected.items()}) == []


@pytest.mark.full
def test_safetensors_are_started_from(run_train, tmp_path, at_start):
    import safetensors.torch
    torch.manual_seed(7)
    weights = timm.create_model('test_resnet', num_classes=4).state_dict()
    safetensors.torch.save_file(weights, tmp_path / 'w.safetensors')
    found = at_start()
    assert run_train('--initial-checkpoint w.safetensors').code == 0
    assert differences(dict(found['weights']), dict(weights)) == []
