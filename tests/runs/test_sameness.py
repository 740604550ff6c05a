"""Which options make two trainings different ones."""
import pytest

from timm_sam.runs.sameness import changed_options


@pytest.mark.parametrize('name, here, elsewhere, other', [
    ('data_dir', 'data/digits', '/disk/digits/', '/disk/cifar10'),
    ('initial_checkpoint', 'out/run-0/last.pth.tar', '/disk/out/run-0/last.pth.tar', '/disk/out/run-1/last.pth.tar'),
    ('pretrained_path', 'weights/vit.safetensors', '/disk/weights/vit.safetensors', 'weights/resnet.safetensors'),
    ('class_map', 'maps/a.txt', '/disk/maps/a.txt', ''),
])
def test_paths_are_the_same_by_their_last_names(name, here, elsewhere, other):
    assert changed_options({name: here}, {name: elsewhere}) == []
    assert changed_options({name: here}, {name: other}) == changed_options({name: other}, {name: here}) == [name]


def test_folder_without_a_flag_is_the_data_sets():
    timms = dict(data='/disk/cifar10', data_dir=None)
    assert changed_options(timms, dict(data='', data_dir='data/cifar10')) == []
    assert changed_options(timms, dict(data='', data_dir='data/cifar100')) == ['data_dir']


def test_what_changes_nothing_is_not_compared_and_seeds_are():
    before = dict(seed=1, output='a', workers=4, lr=0.1, opt='sgd')
    assert changed_options(before, {**before, 'output': 'b', 'workers': 8}) == []
    assert changed_options(before, {**before, 'seed': 2, 'lr': 0.2}) == ['seed', 'lr']
    assert changed_options(before, {**before, 'sam_variant': 'sam', 'of_newer_timm': 1}) == ['sam_variant']
