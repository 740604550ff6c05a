"""Rows of a run's table: of an earlier start, dropped from an epoch on or half written; with new columns."""
import os

import pytest

from timm_sam.runs.summary import add, trim

HEADER = 'epoch,loss\n'


@pytest.mark.parametrize('before, after', [
    (HEADER + '0,1.5\n1,1.4\n2,1.3\n', HEADER + '0,1.5\n1,1.4\n'),
    (HEADER + '0,1.5\n1,1.4\n', HEADER + '0,1.5\n1,1.4\n'),
    (HEADER + '0,1.5\n1,1.', HEADER + '0,1.5\n'),  # killed within a row
    (HEADER + '0,1.5\n1', HEADER + '0,1.5\n'),  # of epoch 10, say
    (HEADER + '0,1.5\nepoch,loss\n1,1.4\n\n', HEADER + '0,1.5\n1,1.4\n'),
    (HEADER + '0,1.5\n\x00\x00\x00\n', HEADER + '0,1.5\n'),  # blocks that never came to the disk
    (HEADER + '2,1.5\n', ''), (HEADER[:4], ''), ('', ''), (HEADER, HEADER)])
def test_rows_that_stay(tmp_path, before, after):
    path = tmp_path / 'summary.csv'
    path.write_text(before)
    trim(str(path), 2)
    assert path.read_text().replace('\r\n', '\n') == after
    assert os.listdir(tmp_path) == ['summary.csv']


def test_file_that_has_nothing_to_drop_is_not_written(tmp_path):
    path = tmp_path / 'summary.csv'
    path.write_text(HEADER + '0,1.5\n')
    before = path.stat()
    trim(str(path), 1)
    assert path.stat() == before
    trim(str(tmp_path / 'none.csv'), 1)
    assert not (tmp_path / 'none.csv').exists()


@pytest.mark.parametrize('before, row, after', [
    (None, {'epoch': 0, 'loss': 1.5}, HEADER + '0,1.5\n'),
    ('', {'epoch': 0, 'loss': 1.5}, HEADER + '0,1.5\n'),
    (HEADER + '0,1.5\n', {'epoch': 1, 'loss': 1.4}, HEADER + '0,1.5\n1,1.4\n'),
    (HEADER + '0,1.5\n', {'epoch': 1}, HEADER + '0,1.5\n1,nan\n'),
    (HEADER + '0,1.5\n', {'epoch': 1, 'sam': 2, 'loss': 1.4}, 'epoch,sam,loss\n0,nan,1.5\n1,2,1.4\n'),
    (HEADER + '0,1.5\n', {'epoch': 1, 'sam': 2}, 'epoch,sam,loss\n0,nan,1.5\n1,2,nan\n'),
    (HEADER + '0,1.5\n1,1.4,3\n', {'epoch': 2, 'sam': 2}, 'epoch,sam,loss\n0,nan,1.5\n1,nan,1.4\n2,2,nan\n')])
def test_table_has_the_columns_of_all_its_rows(tmp_path, before, row, after):
    path = tmp_path / 'summary.csv'
    if before is not None:
        path.write_text(before)
    add(str(path), row)
    assert path.read_bytes().decode().replace('\r\n', '\n') == after
    assert os.listdir(tmp_path) == ['summary.csv']
