"""Does flatness tell? Cards joined with runs by hash; orders that agree, are reversed, or that nobody can know."""
import csv
import json
import sys

import pytest
from support.places import ROOT
from support.reports import checkpoint, sam, sha256, write_results, write_run

from timm_sam.report import __main__ as command

sys.path.insert(0, str(ROOT / 'benchmarks'))  # scripts, no part of the package

import flatness

ACCURACIES = tuple(60.0 + 2 * i for i in range(8))


def write_card(path, checkpoints, images='train', **measures):
    """A table as `analyze card` writes it: name of a measure -> its values."""
    rows = [dict(group='line' if name == 'loss' else 'sharpness', dataset=images, measure=name, unit='', values=values,
                 non_finite=[int(value is None) for value in values]) for name, values in measures.items()]
    protocol = dict(checkpoints=[dict(path=str(c), sha256=sha256(c)) for c in checkpoints],
                    datasets=[dict(name=images, folder=f'/data/{images}')])
    path.write_text(json.dumps(dict(results=rows, protocol=protocol)))
    return path


@pytest.fixture
def runs(tmp_path):
    options = [dict(seed=0), dict(seed=1), *(sam(rho, params=params) for params in ('all', 'onlynorm')
                                             for rho in (0.1, 0.2, 0.5))]
    return [checkpoint(write_run(tmp_path / 'runs' / str(i), (1.0, 2.0, accuracy), **option))
            for i, (accuracy, option) in enumerate(zip(ACCURACIES, options))]


@pytest.fixture
def report(tmp_path, capsys):
    def make(*options, code=0):
        assert command.main([str(tmp_path / 'runs'), '--out', str(tmp_path / 'out'), *map(str, options)]) == code
        shown = capsys.readouterr()
        return (tmp_path / 'out' / 'report.md').read_text() if code == 0 else shown.err
    return make


@pytest.mark.full
def test_measures_that_order_runs_as_accuracy_does_or_the_other_way_round(runs, report, tmp_path):
    card = write_card(tmp_path / 'card.json', runs, loss=[8.0, 7, 6, 5, 4, 3, 2, 1], sharp=[8.0, 7, 6, 5, 4, 3, 2, 1],
                      flat=[1.0, 2, 3, 4, 5, 6, 7, 8], same=[1.0] * 8, mixed=[1.0, 3, 2, 5, 4, 7, 6, 8],
                      lost=[1.0, None, 3, *[None] * 5], few=[1.0, 2, 3, *[None] * 5])
    evaluation = write_results(tmp_path / 'r.json', runs, range(8))
    text = report('--cards', card, '--evaluations', evaluation)
    assert 'Does flatness tell?' in text and 'over 2 to 8 runs' in text
    with open(tmp_path / 'out' / 'flatness.csv', newline='') as f:
        found = {(row['measure'], row['target']): row for row in csv.DictReader(f)}
    for target in ('validation accuracy', 'ID accuracy', 'OOD accuracy', 'adversarial accuracy'):
        assert float(found['sharp', target]['tau']) == -1 and float(found['flat', target]['tau']) == 1
        assert found['sharp', target]['high'] == '-1' and found['sharp', target]['runs'] == '8'
        assert found['same', target]['tau'] == ''
        assert float(found['mixed', target]['tau']) == pytest.approx(22 / 28, abs=1e-5)
        assert found['few', target] == {**found['few', target], 'runs': '3', 'tau': '1', 'low': '', 'high': ''}
        assert found['lost', target] == {**found['lost', target], 'runs': '2', 'tau': '', 'low': '', 'high': ''}
    with open(tmp_path / 'out' / 'flatness_runs.csv', newline='') as f:
        rows = {row['path'].rsplit('/', 1)[1]: row for row in csv.DictReader(f)}
    assert [rows[str(i)]['sharp'] for i in range(8)] == [str(8 - i) for i in range(8)] and rows['3']['lost'] == ''
    assert {rows['5'][key] for key in ('variant', 'selection', 'rho', 'seed')} == {'sam', 'onlynorm', '0.1', '0'}
    assert [float(rows[str(i)]['validation accuracy']) for i in range(8)] == list(ACCURACIES)
    # and nothing else is needed to say it again
    assert flatness.main([str(tmp_path / 'out' / 'flatness_runs.csv'), '--figure', str(tmp_path / 'again.png')]) == 0
    assert (tmp_path / 'again.png').read_bytes() == (tmp_path / 'out' / 'table1-flatness.png').read_bytes()
    # the validation loss is 1 throughout, so the gap rises as the loss on training images falls
    assert float(found['flat', 'generalization gap']['tau']) == 1
    assert '| sharp | **-1.00 [-1.00, -1.00]** |' in text.replace('\\', '')
    assert (tmp_path / 'out' / 'table1-flatness.png').read_bytes().startswith(b'\x89PNG')
    assert 'Kendall' in (tmp_path / 'out' / 'report.html').read_text()


def test_cards_of_other_images_are_measures_of_their_own(runs, report, tmp_path):
    up = [1.0, 2, 3, 4, 5, 6, 7, 8]
    cards = [write_card(tmp_path / f'{images}.json', runs, images, sharp=values, loss=values)
             for images, values in (('validation', up), ('train', up[::-1]))]
    report('--no-plots', '--cards', *cards)
    with open(tmp_path / 'out' / 'flatness.csv', newline='') as f:
        found = {(row['measure'], row['target']): float(row['tau']) for row in csv.DictReader(f)}
    assert found['sharp (train)', 'validation accuracy'] == -1
    assert found['sharp (validation)', 'validation accuracy'] == 1
    assert found['loss (train)', 'generalization gap'] == -1  # the validation loss is 1 throughout


def test_data_sets_of_another_table_are_not_waited_for(runs, report, tmp_path):
    other = checkpoint(write_run(tmp_path / 'runs' / 'other', model='resnet18'))
    results = [write_results(tmp_path / 'r.json', runs, range(8)), write_results(tmp_path / 's.json', [other], [0])]
    results[1].write_text(results[1].read_text().replace('"imagenet"', '"cifar10"'))
    report('--no-plots', '--cards', write_card(tmp_path / 'card.json', runs, sharp=[1.0, 2, 3, 4, 5, 6, 7, 8]),
           '--evaluations', *results)
    with open(tmp_path / 'out' / 'flatness.csv', newline='') as f:
        assert {row['target']: row['tau'] for row in csv.DictReader(f)} == dict.fromkeys(
            ('validation accuracy', 'ID accuracy', 'OOD accuracy', 'adversarial accuracy'), '1')


def test_cards_of_other_runs_and_runs_without_one_are_named(runs, report, tmp_path):
    other = tmp_path / 'other.pth'
    other.write_bytes(b'other')
    text = report('--no-plots', '--cards', write_card(tmp_path / 'card.json', [*runs[:3], other], sharp=[1.0, 2, 3, 4]))
    assert 'other.pth in ' in text and 'is of none of these runs' in text and text.count('has no card') == 5
    text = report('--no-plots', '--cards', write_card(tmp_path / 'card.json', [other], sharp=[1.0]))
    assert 'no card is of a finished run' in text and 'Does flatness' not in text
    assert not (tmp_path / 'out' / 'flatness.csv').exists()


@pytest.mark.parametrize('content', [None, '', '{}', '[]', '{"results": 1, "protocol": {}}'])
def test_what_is_no_card_is_one_line(runs, report, tmp_path, content):
    if content is not None:
        (tmp_path / 'card.json').write_text(content)
    said = report('--cards', tmp_path / 'card.json', code=2)
    assert said.count('\n') == 1 and '--cards ' in said and 'card.json' in said


def test_docs_say_what_the_command_prints(capsys):
    assert flatness.main([str(ROOT / 'benchmarks' / 'results' / 'flatness_runs.csv')]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    section = (ROOT / 'docs' / 'report.md').read_text().split('## Does flatness tell?')[1].split('\n## ')[0]
    assert [line for line in section.splitlines() if line.startswith('|')] == printed
    assert len(printed) == 22
    of_accuracy = [line.split('|')[2] for line in printed[2:]]
    assert not any('**' in cell for cell in of_accuracy) and sum('**' in line.split('|')[4] for line in printed) == 1
    assert min(printed[2:], key=lambda line: float(line.split('|')[5].strip(' *').split()[0])).startswith('| loss |')


@pytest.mark.parametrize('content', [None, '', 'a,b\n1,2\n', 'table,path,loss\nt,p,x\n', 'table,path,loss\nt,p,1\n'])
def test_file_that_is_no_table_of_runs_is_one_line(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / 'r.csv').write_text(content)
    assert flatness.main([str(tmp_path / 'r.csv')]) == 2
    message = capsys.readouterr().err
    assert message.count('\n') == 1 and 'r.csv' in message and 'flatness_runs.csv' in message
