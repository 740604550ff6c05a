"""Evaluations joined with runs: by hash, in the paper's layouts; differences from a baseline; what is left over."""
import json
import os

import numpy as np
import pytest
from support.reports import ROWS, checkpoint, rows, sam, sha256, write_results, write_run

from timm_sam.report import __main__ as command


@pytest.fixture
def runs(tmp_path):
    """Two seeds each of plain, and of SAM on all and on normalization layers only; their checkpoints."""
    found = {}
    for name, options, accuracy in (('plain', {}, 70.0), ('all', sam(0.1), 72.0),
                                    ('on', sam(1, params='onlynorm'), 74.0)):
        found[name] = []
        for seed in (0, 1):
            run = write_run(tmp_path / 'runs' / f'{name}-{seed}', (1.0, 2.0, accuracy + 0.1 * seed),
                            **{**options, 'seed': seed})
            found[name].append(checkpoint(run))
    return found


@pytest.fixture
def report(tmp_path, capsys):
    def make(*options, code=0):
        assert command.main([str(tmp_path / 'runs'), '--out', str(tmp_path / 'out'), '--no-plots',
                             *map(str, options)]) == code
        shown = capsys.readouterr()
        return (tmp_path / 'out' / 'report.md').read_text() if code == 0 else shown.err
    return make


def test_tables_in_the_layouts_of_the_paper(runs, report, tmp_path):
    files = [write_results(tmp_path / f'{name}.json', runs[name], [step, step])
             for name, step in (('plain', 0), ('all', 1), ('on', 2))]
    text = report('--evaluations', *files)
    for line in (
            # Table 4
            '|  | data set | plain | sam all | sam onlynorm |',
            '| ID | imagenet | 70.05 ± 0.07 | 72.05 ± 0.07 | **74.05 ± 0.07** |',
            '| OOD | imagenet-r | 25.05 ± 0.07 | **25.05 ± 0.07** ≈ | **25.05 ± 0.07** ≈ |',
            '| adversarial | ℓ₂, ε = 0.25 | 20.05 ± 0.07 | 29.05 ± 0.07 | **38.05 ± 0.07** |',
            # Tables 14 and 15
            '| threat model | ε | plain | sam all | sam onlynorm |',
            '| ℓ∞ | 0.5/255 | 15.05 ± 0.07 | 22.05 ± 0.07 | **29.05 ± 0.07** |',
            '| Clean acc. |  | 71.05 ± 0.07 | 73.05 ± 0.07 | **75.05 ± 0.07** |',
            # calibration: less is better
            '| calibration | imagenet | ece_mass | 5.05 ± 0.07 | 4.05 ± 0.07 | **3.05 ± 0.07** |',
            '| calibration | imagenet | nll (nats) | 1.5500 ± 0.0707 | 1.4500 ± 0.0707 | **1.3500 ± 0.0707** |'):
        assert line in text.replace('\\_', '_').replace('&#95;', '_'), line
    assert 'without a run' not in text and 'without an evaluation' not in text
    found = {(r['variant'], r['selection'], r['dataset'], r['measure']): r
             for r in rows(tmp_path / 'out' / 'evaluations.csv')}
    line = found['sam', 'onlynorm', 'imagenet', 'l2 0.25']
    assert (line['mean'], line['n'], line['of'], line['chosen'], line['group']) == (
        '38.0500', '2', '2', '1', 'adversarial')
    assert len(found) == 3 * len(ROWS)


@pytest.mark.parametrize('folder, options, words', [
    ('/data/imagenet', {}, 'by their folders none of these data sets is that'),
    ('/elsewhere/digits/val', {}, 'Radii were chosen on imagenet, on what is reported here'),
    ('/elsewhere/digits/val', dict(holdout=0.1), 'Radii were chosen on held-out training images, on none of these'),
    ('/elsewhere/digits/test', {}, 'by their folders none of these data sets is that')])
def test_table_that_chose_on_what_it_reports_says_so(report, tmp_path, folder, options, words):
    checkpoints = [checkpoint(write_run(tmp_path / 'runs' / f'{rho}', **sam(rho), **options)) for rho in (0.1, 0.2)]
    file = write_results(tmp_path / 'r.json', checkpoints, [0, 0])
    file.write_text(file.read_text().replace('"/data/imagenet"', f'"{folder}"'))
    text = report('--evaluations', file)
    assert words in text and ('Validated on 10 % of the training images' in text) == bool(options)


def test_table_that_had_nothing_to_choose_from_says_so(runs, report, tmp_path):
    file = write_results(tmp_path / 'r.json', [path for paths in runs.values() for path in paths], [0] * 6)
    file.write_text(file.read_text().replace('"/data/imagenet"', '"/elsewhere/digits/val"'))
    text = report('--evaluations', file)
    assert text.count('No variant and selection has several radii: none was chosen here.') == 2
    assert 'chosen on' not in text and 'highest mean' not in text


def test_optimizers_stand_side_by_side(runs, report, tmp_path):
    lion = checkpoint(write_run(tmp_path / 'runs' / 'lion', opt='lion', lr=0.01))
    files = [write_results(tmp_path / f'{i}.json', c, [i] * len(c)) for i, c in enumerate((runs['plain'], [lion]))]
    text = report('--evaluations', *files)
    assert '|  | data set | lion: plain | sgd: plain | sgd: sam all | sgd: sam onlynorm |' in text
    assert '| ID | imagenet | 72.00 | 70.05 ± 0.07 | – | – |' in text


def test_what_has_no_counterpart_is_listed(runs, report, tmp_path):
    foreign = tmp_path / 'foreign.pth'
    foreign.write_bytes(b'of nobody')
    file = write_results(tmp_path / 'r.json', [runs['plain'][0], foreign], [0, 1])
    text = report('--evaluations', file)
    without_run = text.split('## Evaluations without a run')[1].split('##')[0]
    assert 'foreign.pth' in without_run and sha256(foreign)[:12] in without_run
    without = text.split('## Runs without an evaluation')[1].split('##')[0]
    assert all(f'{name}-{seed}' in without for name, seed in (('plain', 1), ('all', 0), ('on', 1)))
    assert 'plain-0' not in without and '70.00 (1 of 2)' in text


def test_checkpoint_that_the_accuracy_is_of_counts(runs, report, tmp_path):
    run = runs['plain'][0].parent
    best, older = checkpoint(run, 'model_best.pth.tar'), checkpoint(run, 'checkpoint-0.pth.tar')
    os.link(runs['plain'][0], run / 'checkpoint-2.pth.tar')  # the last one has two names
    file = write_results(tmp_path / 'r.json', [best, older, runs['plain'][0]], [1, 2, 3])
    text = report('--evaluations', file)
    assert '| ID | imagenet | 76.20 (1 of 2) |' in text and f'{best}' in text.split('## Notes on evaluations')[1]
    assert '| ID | imagenet | 72.00 (1 of 2) |' in report('--evaluations', file, '--epoch', 'best')
    assert 'without a run' not in text
    checkpoint(run, 'recovery-1-3.pth.tar', 'other')
    only = write_results(tmp_path / 'r.json', [run / 'recovery-1-3.pth.tar'], [1])
    assert 'recovery-1-3' in report('--evaluations', only).split('## Evaluations without a run')[1]


def test_run_whose_checkpoint_is_gone_has_the_evaluations_in_its_folder(runs, report, tmp_path):
    files = [write_results(path.parent / 'evaluation.json', [path], [step])
             for step, name in enumerate(runs) for path in runs[name]]
    whole = report('--evaluations', *files)
    for path in (path for paths in runs.values() for path in paths):
        path.unlink()
    assert report('--evaluations', *files) == whole and '74.00 ± 0.00' in whole
    # of a checkpoint that lay elsewhere, and beside one that is there and is another
    first, second = runs['plain']
    files[0].write_text(files[0].read_text().replace('plain-0', 'older'))
    checkpoint(second.parent, content='trained anew')
    text = report('--evaluations', *files)
    assert all(str(path.parent) in text.split('## Runs without an evaluation')[1].split('##')[0]
               for path in (first, second))
    assert 'older' in text.split('## Evaluations without a run')[1]


def test_run_of_which_another_checkpoint_was_evaluated_is_named(runs, report, tmp_path):
    run = runs['plain'][0].parent
    best = checkpoint(run, 'model_best.pth.tar')
    file = write_results(tmp_path / 'r.json', [best, runs['plain'][1]], [1, 2])
    notes = report('--evaluations', file).split('## Notes on evaluations')[1]
    assert notes.count('is not among the results') == 1 and f'{run} model_best.pth.tar counts' in notes
    notes = report('--evaluations', file, '--epoch', 'best').split('## Notes on evaluations')[1]
    assert notes.count('is not among the results') == 1 and f'{runs["plain"][1].parent} last.pth.tar counts' in notes


def test_files_that_contradict_each_other_are_named(runs, report, tmp_path):
    first = write_results(tmp_path / 'a.json', runs['plain'][:1], [0])
    other = write_results(tmp_path / 'b.json', runs['plain'][:1], [1])
    text = report('--evaluations', first, other)
    assert '| ID | imagenet | 70.00 (1 of 2) |' in text
    notes = text.split('## Notes on evaluations')[1]
    assert 'is 70 in' in notes and 'and 72 in' in notes and 'imagenet-r' not in notes


def test_numbers_of_outputs_that_are_not_finite_are_left_out(runs, report, tmp_path):
    file = write_results(tmp_path / 'r.json', runs['plain'], [0, 0], non_finite=[3, 0])
    content = json.loads(file.read_text())
    assert content['results'][0]['non_finite'] == [3, 0]
    assert '| ID | imagenet | 70.10 (1 of 2) |' in report('--evaluations', file)


# Differences

def test_differences_over_images_and_over_seeds(runs, report, tmp_path):
    files = [write_results(tmp_path / f'{name}.json', runs[name], [step, step], outputs=True)
             for name, step in (('plain', 0), ('all', 1))]
    for path in (tmp_path / 'all.outputs').iterdir():  # the same images in another order
        with np.load(path) as content:
            names, right = content['names'][::-1], content['right'][::-1]
        np.savez(path, names=names, right=right)
    text = report('--evaluations', *files)
    found = {(r['selection'], r['dataset'], r['measure']): r for r in rows(tmp_path / 'out' / 'differences.csv')}
    line = found['all', 'imagenet', 'top1']
    assert line['difference'] == '2.0000' and line['verdict'] == 'better'
    # 8 of 400 images are right now: a share of 2 % with the interval of its binomial distribution
    assert 0.5 <= float(line['images_low']) <= 1 and 3 <= float(line['images_high']) <= 3.75
    assert float(line['seeds_low']) == pytest.approx(2 - 4.3027 * 0.0707, abs=0.01)
    assert found['all', 'imagenet-r', 'top1']['verdict'] == 'not distinguishable'
    assert found['all', 'imagenet-r', 'top1']['images_low'] == ''
    assert found['all', 'validation', 'top1']['verdict'] == 'better'  # of the runs' own validation
    assert found['onlynorm', 'validation', 'top1']['difference'] == '4.0000'
    assert '| sam all | 0.1 | imagenet | +2.00 |' in text and '| not distinguishable |' in text


def test_another_baseline(runs, report, tmp_path):
    text = report('--baseline', 'sam:all')
    assert 'Minus sam:all' in text and "| plain |  | runs' validation | -2.00 | – |" in text and '| worse |' in text
    assert report('--baseline', 'sam:nonorm', code=2).endswith('use one of plain, sam:all, sam:onlynorm\n')


def test_single_seeds_without_outputs_say_nothing(tmp_path, report):
    write_run(tmp_path / 'runs' / 'a')
    write_run(tmp_path / 'runs' / 'b', **sam(1))
    text = report()
    assert "| sam all | 1 | runs' validation | +0.00 | – | – | no interval |" in text
    for name, options in (('a', {}), ('b', sam(1))):  # of two that came out alike nothing says how others would
        write_run(tmp_path / 'runs' / f'{name}-again', **{**options, 'seed': 1})
    assert "| sam all | 1 | runs' validation | +0.00 | – | – | no interval |" in report()


@pytest.mark.parametrize('odd', ['torn', 'missing', 'others'])
def test_outputs_that_cannot_be_compared_are_named(runs, report, tmp_path, odd):
    files = [write_results(tmp_path / f'{name}.json', runs[name], [0, 0], outputs=True) for name in ('plain', 'all')]
    path = tmp_path / 'all.outputs' / '1.npz'
    if odd == 'torn':
        path.write_bytes(path.read_bytes()[:50])
    elif odd == 'missing':
        path.unlink()
    else:
        np.savez(path, names=np.array(['x']), right=np.array([True]))
    notes = report('--evaluations', *files).split('## Notes on evaluations')[1]
    assert 'not of the same images' in notes if odd == 'others' else '1.npz' in notes
    # the other seed's alone are not those of the difference
    assert odd == 'others' or 'outputs on imagenet are not those of all runs' in notes
    assert {row['images_low'] for row in rows(tmp_path / 'out' / 'differences.csv')} == {''}


# Mistakes

@pytest.mark.parametrize('content', [None, '', '[1]', '{"results": []}', '{"top1": 70}', '[' * 100_000,
                                     '{"results": [{}], "protocol": {"checkpoints": [], "datasets": []}}'])
def test_file_that_holds_no_suites_is_one_line(runs, report, tmp_path, content):
    if content is not None:
        (tmp_path / 'r.json').write_text(content)
    message = report('--evaluations', tmp_path / 'r.json', code=2)
    assert message.count('\n') == 1 and f"--evaluations {tmp_path / 'r.json'}: " in message
    assert not (tmp_path / 'out').exists()


def test_names_from_files_are_no_markup(runs, report, tmp_path):
    file = write_results(tmp_path / 'r.json', runs['plain'], [0, 0])
    file.write_text(file.read_text().replace('"imagenet-r"', '"<b>|x"'))
    text = report('--evaluations', file)
    assert '<b>|x' not in text and '<b>' not in text


@pytest.mark.full
def test_reliability_figure(runs, report, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    files = [write_results(tmp_path / f'{name}.json', runs[name], [1, 1]) for name in runs]
    argv = [str(tmp_path / 'runs'), '--out', str(tmp_path / 'out'), '--evaluations', *map(str, files)]
    assert command.main(argv) == 0
    assert (tmp_path / 'out' / 'table1-reliability.png').stat().st_size > 10_000
    assert (tmp_path / 'out' / 'report.md').read_text().count('](table1-reliability.png)') == 1
    report('--evaluations', *files)
    assert not list((tmp_path / 'out').glob('*.png'))
