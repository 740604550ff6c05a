"""Fields of named data sets that are not there or hold something else: one line with the flags, from any process."""
import pickle

import pytest
import torch
from timm.data import MultiLabelTarget

from timm_sam.cli.errors import OptionError, WorkerError
from timm_sam.cli.fields import CheckedReader, CheckedTarget, FieldError
from timm_sam.cli.image_folders import EightBitReader

ORIGIN = '--train-split train of --data-dir x --dataset hfds/y'


class Rows:
    """A reader of two samples, the second without its field."""

    name = 'rows'

    def __init__(self, error):
        self.error = error

    def __getitem__(self, index):
        if index:
            raise self.error
        return 'file', 3

    def __iter__(self):
        return (self[i] for i in range(2))

    def __len__(self):
        return 2


@pytest.mark.parametrize('error', [KeyError('labels'), ValueError('no key\nlabels.'), TypeError('not a list')])
def test_missing_field_is_one_line_by_index_and_one_after_the_other(error):
    reader = CheckedReader(Rows(error), ORIGIN)
    assert len(reader) == 2 and reader.name == 'rows' and reader[0] == ('file', 3)
    for read in (lambda: reader[1], lambda: list(reader)):
        with pytest.raises(FieldError) as caught:
            read()
        line = str(caught.value)
        assert line.startswith(f'{ORIGIN}: ') and line.endswith('; check --input-key, --target-key and --class-map')
        assert '\n' not in line and '.;' not in line


def test_mistakes_that_are_said_already_and_faults_of_files_pass_through():
    for error in (OptionError('said'), WorkerError('said'), OSError('no image')):
        with pytest.raises(type(error)) as caught:
            CheckedReader(Rows(error), ORIGIN)[1]
        assert caught.value is error


def test_readers_around_readers_travel_to_workers():
    reader = pickle.loads(pickle.dumps(CheckedReader(EightBitReader(Rows(KeyError('a')), 'RGB'), ORIGIN)))
    assert reader.name == 'rows' and reader.origin == ORIGIN and reader.img_mode == 'RGB'


@pytest.mark.parametrize('dense, target', [(False, [0, 4]), (False, 2), (False, [0.5]), (True, [1, 0]), (True, ['a'])])
def test_target_that_fits_no_classes_is_one_line(dense, target):
    with pytest.raises(FieldError) as caught:
        CheckedTarget(MultiLabelTarget(4, dense=dense), 4, ORIGIN)(target)
    line = str(caught.value)
    assert line.startswith(f'{ORIGIN}: ') and '--target-format' in line and '--num-classes' in line and '\n' not in line


def test_targets_that_fit_are_those_of_the_transform():
    checked = CheckedTarget(MultiLabelTarget(4), 4, ORIGIN)
    assert torch.equal(checked([1, 3]), torch.tensor([0.0, 1, 0, 1]))
    assert [CheckedTarget(None, 4, ORIGIN)(k) for k in (0, 3)] == [0, 3]


@pytest.mark.parametrize('target', [4, -2])
def test_class_that_the_model_has_not_is_one_line(target):
    with pytest.raises(FieldError, match=f'has the class {target}, the model 4 outputs: mend --num-classes'):
        CheckedTarget(None, 4, ORIGIN)(target)
    with pytest.raises(FieldError, match=f'has the class {target}, the model 4 outputs: mend --valid-labels'):
        CheckedTarget(None, 4, ORIGIN, '--valid-labels')(target)


@pytest.mark.parametrize('target', ['cat', '1', 1.5, float('nan'), float('inf'), [1, 2], {}, torch.ones(2)])
def test_target_that_is_no_number_of_a_class_is_one_line(target):
    with pytest.raises(FieldError, match='hfds/y has the target .*which is no number of a class: .*--target-key') as e:
        CheckedTarget(None, 4, ORIGIN)(target)
    assert '\n' not in str(e.value)
    assert [CheckedTarget(None, 4, ORIGIN)(k) for k in (2.0, True, torch.tensor(3))] == [2, 1, 3]


def test_image_without_a_class_is_one_line():
    """No loss takes -1: it was an error of torch's, on a GPU one that ends the process. timm makes it of None, too."""
    with pytest.raises(FieldError, match=r'hfds/y has images without a class \(-1\): name a split with labels'):
        CheckedTarget(None, 4, ORIGIN)(-1)
    for read in (lambda reader: reader[0], list):
        with pytest.raises(FieldError, match='hfds/y has images without a target: name a split with labels'):
            read(CheckedReader([('file', None)], ORIGIN))
