"""The table of methods on digits: what its grid holds, a grid of a few runs, and the report of it."""
import sys

import pytest
from support.places import ROOT
from support.running import working_directory

sys.path.insert(0, str(ROOT / 'benchmarks'))  # scripts, no part of the package

import digits_table
import methods_table
import step_cost

from timm_sam import train
from timm_sam.methods import METHODS
from timm_sam.paper.archive import unpack
from timm_sam.training.options import parse_args


def test_grid_is_every_method_with_two_selections_three_radii_and_three_seeds():
    assert set(methods_table.FLAGS) == {'sam', *METHODS}
    jobs = methods_table.grid(list(methods_table.FLAGS), digits_table.SEEDS)
    assert len(jobs) == len({job.name for job in jobs}) == 3 + 12 * 2 * 3 * 3
    assert {job.selection for job in jobs} == {None, 'all', 'onlynorm'}


def test_benchmark_of_steps_takes_every_method():
    assert set(step_cost.METHODS) == set(METHODS)


@pytest.mark.full
def test_every_run_has_the_options_of_its_name(tmp_path):
    for job in methods_table.grid(list(methods_table.FLAGS), [0]):
        (tmp_path / job.data).mkdir(exist_ok=True)
        args = parse_args(train.build_parser(), job.argv(str(tmp_path)))
        wanted = None if job.variant is None or job.method == 'sam' else [job.method]
        assert (args.sam_method, args.sam_rho, args.experiment) == (wanted, job.rho, job.name)


@pytest.fixture
def small(monkeypatch):
    """Runs of one epoch on 40 images, two radii."""
    pytest.importorskip('sklearn.datasets')
    argv = digits_table.Job.argv
    monkeypatch.setattr(digits_table, 'DATA', {'resnet10t': (40, 0.2)})
    monkeypatch.setattr(digits_table, 'RADII', {'resnet10t': {('sam', 'all'): (0.1,), ('sam', 'onlynorm'): (0.5,)}})
    monkeypatch.setattr(digits_table.Job, 'argv', lambda self, out: [
        *argv(self, out), '--epochs', '1', '--warmup-epochs', '0', '--val-interval', '1'])


@pytest.mark.slow
def test_grid_of_a_few_runs_goes_on_and_is_reported(small, tmp_path, capfd):
    def table(*arguments):
        with working_directory(tmp_path):
            code = methods_table.main(['--out', 'out', '--methods', 'sam', 'msam', '--seeds', '0', '--jobs', '1',
                                       *arguments])
        return code, capfd.readouterr()

    code, shown = table()
    assert code == 0, shown.err
    assert '5 runs, 0 of them finished before' in shown.out and '5 cells of 5 runs' in shown.out
    text = (tmp_path / 'out' / 'report' / 'report.md').read_text()
    for row in ('| plain |  | 1.00 |', '| msam | all | 1.00 | 1† |', '| sam | onlynorm | 1.66 |'):
        assert row in text
    assert 'python benchmarks/methods_table.py --out out --methods sam msam --seeds 0 --jobs 1' in text
    picture = tmp_path / 'out' / 'report' / 'accuracy_over_cost.png'
    assert picture.read_bytes()[:4] == b'\x89PNG'
    picture.unlink()
    code, shown = table()
    assert code == 0 and '5 runs, 5 of them finished before' in shown.out and picture.exists()
    code, shown = table('--jobs', '0')
    assert code == 2 and '--jobs 0 runs nothing' in shown.err


class Ran:
    def __init__(self, accuracy):
        self.status, self.value = ('diverged', 0) if accuracy is None else ('finished', accuracy)

    def accuracy(self):
        return self.value


def test_radius_is_that_with_the_highest_mean_among_those_with_most_seeds(monkeypatch):
    accuracies = {'plain-seed0': 50.0, 'plain-seed1': 60.0, 'sam-all-0.03-seed0': 70.0, 'sam-all-0.03-seed1': 72.0,
                  'sam-all-0.1-seed0': 71.0, 'sam-all-0.1-seed1': 73.0, 'sam-all-0.3-seed0': 90.0,
                  'sam-all-0.3-seed1': None}
    monkeypatch.setattr(methods_table, 'read_run', lambda folder: Ran(accuracies[folder.rsplit('/', 1)[1]]))
    jobs = [job for job in methods_table.grid(['sam'], [0, 1]) if job.selection != 'onlynorm']
    plain, sam = methods_table.points(jobs, 'out', {('plain', ''): 1.0, ('sam', 'all'): 2.0})
    assert plain.accuracies == (50.0, 60.0) and plain.rho is None and not plain.edge
    assert (sam.rho, sam.edge, sam.accuracies, sam.unfinished) == (0.1, False, (71.0, 73.0), 1)
    assert sam.mean == 72.0 and sam.std == pytest.approx(2 ** 0.5)
    text = methods_table.report_text([sam, plain], 'command')
    lines = [line for line in text.splitlines() if line.startswith('| ')]
    assert lines[1] == '| plain |  | 1.00 |  | 55.00 ± 7.07 | 2 |  |'
    assert lines[2] == '| sam | all | 2.00 | 0.1 | 72.00 ± 1.41 | 2 | 1 |'


@pytest.mark.slow
def test_docs_have_the_table_of_the_stored_runs(tmp_path):
    unpack(str(ROOT / 'benchmarks' / 'results' / 'methods_table_packed.csv'), str(tmp_path / 'runs'))
    methods = list(methods_table.FLAGS)
    jobs = methods_table.grid(methods, digits_table.SEEDS)
    found = methods_table.points(jobs, str(tmp_path), methods_table.costs(methods))
    printed = [line for line in methods_table.report_text(found, 'command').splitlines() if line.startswith('|')]
    section = (ROOT / 'docs' / 'methods.md').read_text().split('## Evidence in small')[1].split('\n## ')[0]
    assert len(printed) == 2 + 1 + 2 * len(methods)
    assert [line for line in section.splitlines() if line.startswith('|')] == printed


def test_names_of_points_keep_apart_in_order_and_in_the_middle():
    heights = [1.0, 1.1, 1.15, 5.0]
    moved = methods_table.apart(heights, 0.5)
    assert all(b - a >= 0.5 - 1e-9 for a, b in zip(moved, moved[1:]))
    assert sum(moved) == pytest.approx(sum(heights))
    assert methods_table.apart([1.0, 2.0], 0.5) == [1.0, 2.0]
    points = [methods_table.Point(str(cost), 'all', cost, 0.1, False, (mean,), 0)
              for cost, mean in ((2.0, 70.0), (1.0, 60.0), (1.95, 80.0), (2.05, 60.0))]
    groups = methods_table.alike(points)
    assert [[point.mean for point in group] for group in groups] == [[60.0], [60.0, 70.0, 80.0]]


@pytest.mark.parametrize('argv', [['--jobs', '0'], ['--methods', 'asam'], ['--seeds', 'x']])
def test_impossible_options_are_refused(tmp_path, capsys, argv):
    try:
        code = methods_table.main(['--out', str(tmp_path / 'out'), *argv])
    except SystemExit as e:
        code = e.code
    shown = capsys.readouterr()
    assert code == 2 and argv[0] in shown.err and shown.err.count('\n') == 1
    assert not (tmp_path / 'out').exists()
