"""Text that commands write: one function per format."""
import csv
import io
import os
import statistics
import sys

import pytest

from timm_sam.cli.errors import OptionError
from timm_sam.cli.text import (
    csv_text,
    markdown,
    replace_file,
    sample_std,
    say,
    spread,
    why_not_writable,
    write_table,
    write_text,
)


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


def test_what_the_encoding_of_stdout_lacks_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, encoding='latin-1'))
    say('ρ = 1 ± 2')
    assert written.getvalue() == b'\\u03c1 = 1 \xb1 2\n'


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
    with pytest.raises(OptionError, match='^--out: .*nowhere/r.md cannot be written .there is no folder .*nowhere.; '
                                          'make room, or name another file'):
        write_text(str(tmp_path / 'nowhere' / 'r.md'), 'x', '--out')


@pytest.mark.parametrize('content, replaced', [
    (b'', True), (b'a,b\n1,2\n', True), (b'a,c\n1,2\n', False), (b'mine', False), (b'\xff\n', False)])
def test_table_takes_the_place_of_its_like_only(tmp_path, content, replaced):
    path = tmp_path / 'x.csv'
    path.write_bytes(content)
    if replaced:
        write_table(str(path), 'a,b\n3,4\n', '--csv')
        assert path.read_text() == 'a,b\n3,4\n'
    else:
        with pytest.raises(OptionError, match='^--csv: .*x.csv is there, and is no earlier table'):
            write_table(str(path), 'a,b\n3,4\n', '--csv')
        assert path.read_bytes() == content


def test_file_is_written_through_a_link(tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    link, target = tmp_path / 'r.md', tmp_path / 'elsewhere' / 'real.md'
    link.symlink_to(target)  # to nothing yet
    replace_file(str(link), 'first')
    assert link.is_symlink() and target.read_text() == 'first'
    replace_file(str(link), 'second')
    assert link.is_symlink() and target.read_text() == 'second'
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['elsewhere', 'r.md', 'real.md']


def test_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'null').symlink_to('/dev/null')
    for name, reason in [('folder', 'it is a folder'), ('pipe', 'it is no regular file'),
                         ('null', 'it is no regular file'), ('nowhere/x', 'there is no folder ')]:
        path = str(tmp_path / name)
        assert why_not_writable(path).startswith(reason), name
        with pytest.raises(OptionError, match=f'^--out: .*{name} cannot be written .{reason}'):
            write_text(path, 'x', '--out')
    assert why_not_writable(str(tmp_path / 'new')) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ['folder', 'null', 'pipe']
    assert (tmp_path / 'pipe').is_fifo() and (tmp_path / 'null').is_symlink()


def test_temporary_file_is_nobody_elses(tmp_path):
    """A link under its name, as an attacker would put it there, is not followed."""
    victim = tmp_path / 'victim'
    victim.write_text('mine')
    (tmp_path / 'r.md.part').symlink_to(victim)
    replace_file(str(tmp_path / 'r.md'), 'x')
    assert victim.read_text() == 'mine' and (tmp_path / 'r.md').read_text() == 'x'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['r.md', 'victim']


def test_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / 'r.md'
    path.write_text('before')

    def full(descriptor):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OptionError, match='^--out: .*r.md cannot be written .No space left on device.; make room'):
        write_text(str(path), 'after', '--out')
    assert path.read_text() == 'before' and [p.name for p in tmp_path.iterdir()] == ['r.md']
