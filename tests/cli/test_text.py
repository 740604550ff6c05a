"""Text that commands write: one function per format."""
import csv
import io
import os
import statistics

import pytest

from timm_sam.cli.errors import OptionError
from timm_sam.cli.text import csv_text, markdown, replace_file, sample_std, spread, write_text


def test_mean_and_standard_deviation():
    values = [90.0, 95.0, 97.0]
    assert sample_std(values) == statistics.stdev(values) and sample_std([90.0]) is None
    assert spread(95.1, 0.204) == '95.10 ± 0.20' and spread(95.1, None) == '95.10'
    assert spread(95.1234, 0.0, digits=3) == '95.123 ± 0.000'


def test_markdown():
    rows = [['a|b', '1'], ['two\nlines', '']]
    assert markdown(['x', 'y'], rows).splitlines() == [
        '| x | y |', '|---|---|', '| a\\|b | 1 |', '| two lines |  |']
    assert markdown(['x', 'y'], rows, left=1).splitlines()[1] == '|---|---:|'


def test_csv_is_read_back_as_it_was():
    rows = [['a,b', 'say "x"', '1'], ['two\nlines', '', '2.5']]
    text = csv_text(['x', 'y', 'z'], rows)
    assert list(csv.reader(io.StringIO(text))) == [['x', 'y', 'z'], *rows]
    assert text.startswith('x,y,z\n') and csv_text(['x'], [[1]], line_end='\r\n') == 'x\r\n1\r\n'


def test_file_is_replaced_in_one_piece(tmp_path, monkeypatch):
    path = tmp_path / 'r.md'
    path.write_text('before')

    def interrupted(source, target):
        assert path.read_text() == 'before'
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', interrupted)
        with pytest.raises(KeyboardInterrupt):
            replace_file(str(path), 'after\r\n')
    assert path.read_text() == 'before'
    replace_file(str(path), 'after\r\n')
    assert path.read_bytes() == b'after\r\n' and [p.name for p in tmp_path.iterdir()] == ['r.md']


def test_file_that_cannot_be_written_is_named_with_its_flag(tmp_path):
    with pytest.raises(OptionError, match='^--out: .*nowhere/r.md cannot be written .No such file or directory.; '
                                          'make room, or name another file'):
        write_text(str(tmp_path / 'nowhere' / 'r.md'), 'x', '--out')
