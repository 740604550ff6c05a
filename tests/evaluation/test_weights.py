"""Files of weights: read once, told apart by their content, checked before anything long begins."""
import argparse
import builtins
import hashlib
import os
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from support.validating import BASE, GREYS, constant_checkpoint, model_of, result, run_validate, sha256

from timm_sam import validate
from timm_sam.cli.errors import OptionError
from timm_sam.evaluation import weights
from timm_sam.evaluation.options import parse_validate_args
from timm_sam.evaluation.weights import Hashes, check_weights, load_weights

CLASSES = len(GREYS)


@pytest.fixture
def folder(tmp_path):
    """The checkpoints of a run as timm's saver leaves them: the last one is a hard link, the best one a copy."""
    folder = tmp_path / 'run'
    folder.mkdir()
    for epoch in (1, 2):
        constant_checkpoint(folder / f'checkpoint-{epoch}.pth.tar', [epoch], CLASSES)
    (folder / 'last.pth.tar').hardlink_to(folder / 'checkpoint-2.pth.tar')
    shutil.copy(folder / 'checkpoint-1.pth.tar', folder / 'model_best.pth.tar')
    return folder


@pytest.fixture
def hashed(monkeypatch):
    """Sizes of what is hashed, one entry a file."""
    sizes = []

    class Counting:
        def __init__(self):
            self.digest = hashlib.sha256()
            sizes.append(0)

        def update(self, chunk):
            sizes[-1] += len(chunk)
            self.digest.update(chunk)

        def hexdigest(self):
            return self.digest.hexdigest()
    monkeypatch.setattr(weights, 'hashlib', SimpleNamespace(sha256=Counting))
    return lambda: sorted(size for size in sizes if size)


@pytest.fixture
def suites(fitted):
    return f'{BASE} --num-classes {CLASSES} --eval validation={fitted.data}/validation --results-file r'


def test_parsing_opens_no_checkpoint(folder, monkeypatch):
    opened, open_file = [], builtins.open
    monkeypatch.setattr(builtins, 'open', lambda file, *args, **kwargs: opened.append(file) or open_file(
        file, *args, **kwargs))
    (folder / 'args.yaml').write_text('model: test_resnet\n')
    args, _ = parse_validate_args(validate.build_parser(), [
        '--device', 'cpu', '--checkpoint', str(folder), '--eval', f'x={folder}'])
    assert len(args.checkpoint) == 4 and str(folder / 'args.yaml') in opened
    assert [file for file in opened if str(file).endswith('.pth.tar')] == []


def test_each_file_is_hashed_once(folder, suites, hashed, tmp_path):
    sizes = [os.path.getsize(folder / name) for name in (
        'checkpoint-1.pth.tar', 'checkpoint-2.pth.tar', 'model_best.pth.tar')]
    for option in ('', '--skip-existing'):
        before = len(hashed())
        assert len(result(run_validate(tmp_path, f'--checkpoint {folder} {option}', suites))) == 2
        assert len(hashed()) - before == 3
    assert hashed() == sorted([*sizes, *sizes])


def test_weights_are_read_into_one_model_each(folder, suites, tmp_path, monkeypatch):
    """The check before takes a model that has no memory for them."""
    loaded, load = [], torch.nn.Module.load_state_dict

    def watched(self, *args, **kwargs):
        loaded.append(next(self.parameters()).device.type)
        return load(self, *args, **kwargs)
    monkeypatch.setattr(torch.nn.Module, 'load_state_dict', watched)
    result(run_validate(tmp_path, f'--checkpoint {folder}', suites))
    assert loaded == ['meta', 'meta', 'cpu', 'cpu']
    loaded.clear()
    result(run_validate(tmp_path, f'--checkpoint {folder}/last.pth.tar --overwrite', suites))
    assert loaded == ['cpu']


def test_hash_is_of_the_content_and_kept_for_the_file(folder, hashed):
    hashes = Hashes()
    first, last = folder / 'checkpoint-1.pth.tar', folder / 'last.pth.tar'
    expected = sha256(first), sha256(last)
    assert (hashes.of_file(str(first)), hashes.of_file(str(last))) == expected
    assert hashes.of_file(str(folder / 'checkpoint-2.pth.tar')) == expected[1] and len(hashed()) == 2
    os.replace(first, last)  # as a training does that goes on meanwhile
    assert hashes.of_file(str(last)) == expected[0] and len(hashed()) == 2
    first.write_bytes(b'other')
    assert hashes.of_file(str(first)) == hashlib.sha256(b'other').hexdigest()


def test_copies_are_told_apart_in_folders_only(folder, tmp_path):
    names = [f'{folder}/{name}' for name in (
        'checkpoint-1.pth.tar', 'checkpoint-2.pth.tar', 'last.pth.tar', 'model_best.pth.tar')]
    assert Hashes().distinct(names, names) == (names[:2], names[2:])
    assert Hashes().distinct(names, []) == (names, [])
    assert Hashes().distinct(names, names[2:]) == (names, [])  # copies of what is named, not of each other
    for twice in ([names[0], names[0]], [names[0], f'{folder}/../run/checkpoint-1.pth.tar']):
        with pytest.raises(OptionError, match='--checkpoint .*checkpoint-1.pth.tar is given twice: leave one out'):
            Hashes().distinct(twice, [])


def test_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(OptionError, match='--checkpoint .*nowhere.pth cannot be read .No such file'):
        Hashes().of_file(str(tmp_path / 'nowhere.pth'))


@pytest.mark.parametrize('change', [
    lambda state: state.pop('fc.bias'),
    lambda state: state.pop('bn1.running_mean'),
    lambda state: state.update({'more': torch.zeros(2)}),
    lambda state: state.update({'fc.weight': torch.zeros(7, 96)}),
    lambda state: state.update({'bn1.running_var': torch.zeros(1, 2)}),
], ids=['parameter missing', 'buffer missing', 'one more', 'other shape', 'other shape of a buffer'])
def test_what_does_not_fit_is_found_before_and_while_loading(tmp_path, change):
    state = dict(model_of(6).state_dict())
    path = str(tmp_path / 'c.pth')
    torch.save(state, path)
    assert check_weights(model_of(6), 'test_resnet', [path, path], use_ema=False) is None
    change(state)
    torch.save(state, path)
    messages = []
    for work in (lambda: load_weights(model_of(6), 'test_resnet', path, False),
                 lambda: check_weights(model_of(6), 'test_resnet', [path], False)):
        with pytest.raises(OptionError, match='c.pth cannot be loaded into test_resnet with 6 outputs') as caught:
            work()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize('name, save', [
    ('c.pth', torch.save),
    ('old.pth', lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False)),
    ('c.safetensors', lambda content, path: safetensors.torch.save_file(content['state_dict'], path)),
])
def test_every_format_gives_the_same_weights(tmp_path, name, save):
    source, model = model_of(6), timm.create_model('test_resnet', num_classes=6)
    path = str(tmp_path / name)
    content = {'state_dict': source.state_dict(), 'optimizer': {'state': {}}}
    if not name.endswith('safetensors'):
        content['args'] = argparse.Namespace(model='test_resnet')  # as timm writes it
    save(content, path)
    assert load_weights(model, 'test_resnet', path, False) == ('' if name.endswith('safetensors') else 'state_dict')
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values()))
    check_weights(timm.create_model('test_resnet', num_classes=6), 'test_resnet', [path], False)


def test_prefixes_of_wrappers_are_taken_off(tmp_path):
    source, model = model_of(6), timm.create_model('test_resnet', num_classes=6)
    path = str(tmp_path / 'c.pth')
    torch.save({'model': {f'module._orig_mod.{key}': value for key, value in source.state_dict().items()}}, path)
    assert load_weights(model, 'test_resnet', path, False) == 'model'
    assert torch.equal(model.fc.weight, source.fc.weight)


# Damaged and foreign files

@pytest.fixture
def named(tmp_path):
    """Writes a file; its path."""
    def write(content, name='foreign.pth'):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)
    return write


def test_one_flipped_bit_is_found(folder, suites, fitted, tmp_path):
    path = folder / 'last.pth.tar'
    data = bytearray(path.read_bytes())
    place = data.index(model_of(CLASSES).state_dict()['conv1.0.weight'].numpy().tobytes()[:16])
    data[place + 2] ^= 1
    (tmp_path / 'flipped.pth.tar').write_bytes(data)
    single = f'{BASE} --num-classes {CLASSES} --data-dir {fitted.data}'
    for command, base in (('--checkpoint flipped.pth.tar', single), ('--checkpoint flipped.pth.tar', suites),
                          (f'--checkpoint {path} flipped.pth.tar', suites)):
        done = run_validate(tmp_path, command, base)
        assert done.code == 2 and '--checkpoint flipped.pth.tar cannot be loaded' in done.last_line
        assert 'it is damaged: Bad CRC-32' in done.last_line and 'Traceback' not in done.err
        assert not list(tmp_path.glob('r*.csv'))
    # torch itself reads it without a word
    assert torch.load(tmp_path / 'flipped.pth.tar', weights_only=True)


@pytest.mark.parametrize('change', [
    lambda s: {'state_dict': {f'model.{k}': v for k, v in s.items()}},
    lambda s: {f'model.{k}': v for k, v in s.items()},
    lambda s: {'model': s}])
def test_names_of_lightning_are_understood(named, change):
    torch.manual_seed(3)
    state = timm.create_model('test_resnet', num_classes=CLASSES).state_dict()
    path = named(change(state))
    model = model_of(CLASSES)
    load_weights(model, 'test_resnet', path, use_ema=False)
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())


def test_averaged_weights_alone_name_the_flag(named):
    path = named({'state_dict_ema': model_of(CLASSES).state_dict()})
    with pytest.raises(OptionError, match='it has averaged weights only; add --use-ema'):
        load_weights(model_of(CLASSES), 'test_resnet', path, use_ema=False)
    assert load_weights(model_of(CLASSES), 'test_resnet', path, use_ema=True) == 'state_dict_ema'


def test_each_file_is_compared_with_its_checksums_once(folder, monkeypatch):
    from timm_sam.runs import checkpoints
    seen, real = [], checkpoints.check_records

    def count(path, only_index=False):
        seen.append(path) if not only_index else None
        return real(path, only_index)
    monkeypatch.setattr(checkpoints, 'check_records', count)
    names = [f'{folder}/{name}' for name in ('checkpoint-2.pth.tar', 'last.pth.tar', 'checkpoint-2.pth.tar')]
    check_weights(model_of(CLASSES), 'test_resnet', names, use_ema=False)
    assert len(seen) == 1
