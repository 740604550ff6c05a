"""The command that says which differences of a stored table are distinguishable, and what the docs say of it."""
import csv
import re
import sys

import pytest
from support.places import ROOT
from support.reports import rows

sys.path.insert(0, str(ROOT / 'benchmarks'))  # scripts, no part of the package

import differences

from timm_sam.report.statistics import welch

STORED = ROOT / 'benchmarks' / 'results' / 'digits_table.csv'
DOCS = (ROOT / 'docs' / 'report.md').read_text()


def said(capsys, path, code=0):
    assert differences.main([str(path)]) == code
    shown = capsys.readouterr()
    return shown.err if code else shown.out


def test_docs_say_what_the_command_prints(capsys):
    out = said(capsys, STORED)
    counted = re.findall('^Of .*', out, re.MULTILINE)
    assert len(counted) == 2 and re.findall('^> (Of .*)', DOCS, re.MULTILINE) == counted
    assert re.findall(r'\| (\w+ \w+) - plain .* not distinguishable', out.split('vit_tiny')[0]) == [
        'elementwise_l2 all', 'layerwise_l2 all', 'layerwise_l2 onlynorm']
    # all of the table in the docs is what is stored
    stored = {f'{float(row["top1_mean"]):.2f} ± {float(row["top1_std"]):.2f}' for row in rows(STORED)}
    table = DOCS.split('| | ResNet')[1].split('\n\n')[0]
    assert set(re.findall(r'[\d.]+ ± [\d.]+', table)) == stored and table.count('±') == len(rows(STORED))


@pytest.mark.full
def test_stored_table_is_that_of_the_packed_runs(tmp_path, capsys):
    from timm_sam.paper.__main__ import main as paper
    from timm_sam.report.__main__ import main as report
    packed = ROOT / 'benchmarks' / 'results' / 'digits_table_packed.csv'
    assert paper(['unpack', str(packed), str(tmp_path / 'runs')]) == 0
    assert report([str(tmp_path / 'runs'), '--out', str(tmp_path / 'out'), '--no-plots']) == 0
    drawn = [row for row in rows(tmp_path / 'out' / 'report.csv') if row['chosen'] == '1']
    stored = rows(STORED)
    assert [{name: row[name] for name in stored[0]} for row in drawn] == stored


def test_of_a_report(grid, tmp_path, capsys):
    from timm_sam.report.__main__ import main
    assert main([str(grid / 'runs'), '--out', str(tmp_path / 'out'), '--no-plots']) == 0
    capsys.readouterr()
    out = said(capsys, tmp_path / 'out' / 'report.csv')
    expected = welch([97.0, 97.0, 98.0], [93.0, 94.0, 95.0])
    assert (f'| sam onlynorm - sam all | {expected.difference:+.2f} | {expected.low:+.2f} to {expected.high:+.2f} | '
            f'above |') in out and 'Of 2 cells 2 are above plain training, 0 below; of 1 variants' in out


@pytest.mark.parametrize('content', [None, '', 'a,b\n1,2\n', 'title,variant,options,selection,n,top1_mean,top1_std,'
                                     'chosen\nt,sam,,all,3,x,1,1\n'])
def test_file_that_is_no_table_is_one_line(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / 'r.csv').write_text(content)
    message = said(capsys, tmp_path / 'r.csv', 2)
    assert message.count('\n') == 1 and 'r.csv' in message and 'report.csv' in message


def test_columns_are_those_of_the_report():
    with open(STORED, newline='') as f:
        needed = set(next(csv.reader(f)))
    from timm_sam.report.run_tables import grid_csv
    assert needed <= set(grid_csv([]).strip().split(','))
