"""Four experiments on what normalization does in SAM: their thresholds, and that they run timm_sam's own updates."""
import csv
import math
import sys

import pytest
import torch
from support.places import ROOT
from torch import nn

sys.path.insert(0, str(ROOT / 'benchmarks'))  # scripts, no part of the package

import normalization
import normalization_networks as networks
import normalization_sensing as sensing
import normalization_toys as toys

from timm_sam import SAM, methods, train
from timm_sam.paper.archive import unpack
from timm_sam.training.options import parse_args

# ---- the quadratic


@pytest.mark.parametrize('lr', toys.LEARNING_RATES)
def test_usam_diverges_above_its_threshold_and_not_below(lr):
    t = toys.threshold(lr)
    below, above = toys.quadratic([(lr, 0.98 * t), (lr, 1.02 * t)], 'usam')
    assert above.diverged and not below.diverged


def test_thresholds_are_those_of_the_formula():
    assert [round(toys.threshold(lr), 4) for lr in toys.LEARNING_RATES] == [3, 1, 0.3333, 0.0526]


def test_sam_ends_in_a_cycle_of_known_radius():
    cases = [(lr, rho) for lr in toys.LEARNING_RATES for rho in toys.radii(lr)]
    # from 1 a run may step on the minimum itself, and stays there
    for run in toys.quadratic(cases, 'sam', curvatures=(1.0,), start=(0.7371,)):
        assert run.norm == pytest.approx(toys.cycle(run.lr, run.rho), rel=1e-10)
    (run,) = toys.quadratic([(0.6, 0.3)], 'sam', curvatures=(2.0,), start=(0.7371,))
    assert run.norm == pytest.approx(toys.cycle(0.6, 0.3, beta=2.0), rel=1e-10)


def test_sam_and_gradient_descent_stay_bounded_at_every_radius():
    cases = [(lr, rho) for lr in toys.LEARNING_RATES for rho in toys.radii(lr)]
    for run in toys.quadratic(cases, 'sam'):
        assert run.norm <= toys.cycle(run.lr, run.rho) * (1 + 1e-9)
    assert all(run.norm < 1e-40 for run in toys.quadratic(cases, 'gd'))


# ---- the neuron

ENDS = {0: (4.563, 4.1e-4, 3.237), 1: (4.361, 4.0e-4, 3.033), 2: (24.93, 4.81, 15.57)}


@pytest.mark.parametrize('number', ENDS)
def test_sam_alone_drifts_below_the_bounds(number):
    neuron = toys.NEURONS[number]
    bounds = neuron.bounds
    ends = [neuron.path(method, 1000)[-1] for method in toys.METHODS]
    assert [end[1].item() ** 2 for end in ends] == [pytest.approx(value, rel=0.012) for value in ENDS[number]]
    gd, sam, usam = (end[1].item() ** 2 for end in ends)
    assert gd < bounds['gd'] and usam < bounds['usam'] * (1 + 1e-9) and sam < usam < gd
    assert ends[0][0].abs() < 1e-12 and ends[2][0].abs() < 1e-2  # they rest at a minimum, or nearly do


def test_bounds_are_those_of_the_formulas():
    assert toys.NEURONS[0].bounds == {'gd': pytest.approx(5), 'usam': pytest.approx(3.660, abs=1e-3)}
    assert toys.NEURONS[2].bounds == {'gd': pytest.approx(40), 'usam': pytest.approx(15.62, abs=1e-2)}


@pytest.mark.full
def test_sam_drifts_until_nothing_is_left():
    assert toys.NEURONS[0].path('sam', 10_000)[-1, 1].item() ** 2 < 1e-30


# ---- the same updates by timm_sam.SAM

class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(toys.START, dtype=torch.float64))

    def forward(self):
        return (torch.tensor(toys.CURVATURES, dtype=torch.float64) * self.w ** 2).sum() / 2


class OneNeuron(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(toys.NEURONS[0].start, dtype=torch.float64))

    def forward(self):
        return torch.sqrt(1 + self.w.prod() ** 2) - 1


@pytest.mark.parametrize('method', ['sam', 'usam'])
@pytest.mark.parametrize('module', [Quadratic, OneNeuron])
def test_row_moves_as_sam_moves_a_module(module, method):
    model, lr, rho = module(), 0.4, 0.1
    row = model.w.detach().clone()[None]
    curvatures = torch.tensor(toys.CURVATURES, dtype=torch.float64)
    gradient = toys.NEURONS[0].gradient if module is OneNeuron else lambda w: curvatures * w
    sam = SAM(torch.optim.SGD(model.parameters(), lr=lr), model, params='all', rho=rho,
              method=methods.usam() if method == 'usam' else None)
    for _ in range(60):
        sam.minimize(model)
        row = toys.step(row, gradient, lr, rho, method)
        torch.testing.assert_close(model.w.detach(), row[0], rtol=1e-10, atol=1e-14)


def test_point_without_gradient_stays():
    w = torch.zeros(1, 2, dtype=torch.float64)
    assert torch.equal(toys.step(w, lambda w: w, 1.0, 1.0, 'sam'), w)


# ---- matrix sensing

@pytest.fixture(scope='module')
def problem():
    return sensing.Sensing(dtype=torch.float64)


def setting(steps, wide=True, start=sensing.UNIT, lr=0.05):
    return sensing.Setting(wide, start, lr, 0.05, steps, ())


@pytest.mark.full
def test_unit_columns_end_usam_within_three_steps(problem):
    for rho in (0.1, 1.0):
        losses, norm = sensing.losses(problem, setting(3), 'usam', rho)
        assert norm > 40 and not losses[-1] < 1e30
    losses, _ = sensing.losses(problem, setting(3), 'sam', 1.0)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_unit_columns_let_sam_descend_at_every_radius(problem):
    for method, rho in (('gd', 0.0), ('sam', 0.001), ('sam', 0.1), ('sam', 1.0), ('usam', 0.01)):
        losses, _ = sensing.losses(problem, setting(150), method, rho)
        assert 0.03 <= losses[-1] < (0.1 if rho == 1 else 0.04), (method, rho)  # at 1 it goes up and down in the end


@pytest.mark.slow
def test_shape_and_learning_rate_decide_what_usam_survives(problem):
    narrow = {rho: sensing.losses(problem, setting(150, wide=False), 'usam', rho)[0][-1] for rho in (0.1, 1.0)}
    assert narrow[0.1] < 0.3 and not narrow[1.0] < 1e30
    fast = {(method, rho): sensing.losses(problem, setting(10, wide=False, lr=0.5), method, rho)[0][-1]
            for method in ('sam', 'usam') for rho in (0.1, 1.0)}
    assert fast['sam', 0.1] < 2
    assert not any(fast[key] < 1e30 for key in fast if key != ('sam', 0.1))


@pytest.mark.slow
def test_small_start_turns_it_round(problem):
    """At equal rho the larger eps loses, and the length of the gradient says whose that is."""
    small = setting(150, start=sensing.SMALL)
    usam, norm = sensing.losses(problem, small, 'usam', 2.0)
    sam, _ = sensing.losses(problem, small, 'sam', 2.0)
    assert norm < 1 and usam[-1] <= usam[0] and not sam[-1] < 1e30


# ---- networks

def test_grid_of_networks_is_eleven_radii_of_two_methods():
    jobs = networks.over_radius([0, 1, 2])
    assert len(jobs) == len({job.name for job in jobs}) == 3 * (1 + 2 * 11)
    assert sorted({job.rho for job in jobs if job.rho}) == [2.0 ** k for k in range(-8, 3)]
    assert len({job.name for job in networks.from_minimum([0, 1, 2])}) == 9


def test_runs_of_networks_have_the_options_of_their_names(tmp_path):
    on = networks.from_minimum([1])
    (tmp_path / on[0].data).mkdir()
    path = tmp_path / 'runs' / networks.plain(1).name / 'last.pth.tar'
    path.parent.mkdir(parents=True)
    path.touch()
    for job in (*networks.over_radius([1])[::8], *on):
        args = parse_args(train.build_parser(), job.argv(str(tmp_path)))
        assert args.sam_method == (['usam'] if job.variant and job.method == 'usam' else None)
        assert (args.sam_rho, args.seed, args.experiment) == (job.rho, 1, job.name)
        assert (args.initial_checkpoint, args.sched) == ((str(path), 'none') if job in on else ('', 'cosine'))


def test_curve_is_mean_and_deviation_over_seeds():
    rows = [networks.Row('', 'sam', rho, seed, 0, top1, math.nan)
            for rho, seed, top1 in ((1.0, 0, 60.0), (0.5, 0, 50.0), (0.5, 1, 54.0))]
    assert networks.curve(rows, 'sam', 'rho', 'top1') == [
        (0.5, 52.0, pytest.approx(8 ** 0.5)), (1.0, 60.0, None)]
    assert networks.curve(rows, 'usam', 'rho', 'top1') == networks.curve(rows, 'sam', 'rho', 'perturbed_loss') == []


@pytest.mark.full
def test_docs_have_the_table_of_the_stored_runs_of_networks(tmp_path, capsys):
    unpack(str(ROOT / 'benchmarks' / 'results' / 'normalization_networks_packed.csv'), str(tmp_path / 'runs'))
    seeds = [0, 1, 2]
    networks.write_results(networks.over_radius(seeds), networks.from_minimum(seeds), str(tmp_path))
    printed = capsys.readouterr().out.splitlines()
    table = [line for line in printed if line.startswith('|')]
    section = (ROOT / 'docs' / 'normalization.md').read_text().split('## Networks')[1].splitlines()
    assert len(table) == 2 + len(networks.RADII)
    assert [line for line in section if line.startswith('|')] == table
    onward = [line for line in printed if line.startswith('On from a minimum')]
    assert len(onward) == 3 and [line.removeprefix('- ') for line in section if line.startswith('- On')] == onward
    assert not [line for line in printed if line.startswith('no accuracy')]
    rows = networks.read(networks.OVER_RADIUS, networks.over_radius(seeds), str(tmp_path))[0]
    ((_, plain, std),) = networks.curve(rows, 'plain', 'rho', 'top1')
    sam, usam = (min(rho for rho, mean, _ in networks.curve(rows, method, 'rho', 'top1') if mean < plain - 5 * std)
                 for method in networks.METHODS)
    assert usam < sam  # falls off earlier


# ---- the command

def records(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


@pytest.mark.full
def test_experiment_is_a_file_of_numbers_and_a_figure(tmp_path, capsys):
    assert normalization.main(['quadratic', '--out', str(tmp_path / 'out')]) == 0
    assert '| 1.9 | 0.0526 |' in capsys.readouterr().out
    rows = records(tmp_path / 'out' / 'quadratic.csv')
    assert len(rows) == 3 * sum(len(toys.radii(lr)) for lr in toys.LEARNING_RATES)
    for row in rows:
        assert (row['diverged'] == 'True') == (
            row['method'] == 'usam' and float(row['rho']) > float(row['threshold'])
            or row['method'] == 'sam' and float(row['cycle']) > 2 ** 0.5)
    assert (tmp_path / 'out' / 'quadratic.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.slow
def test_captions_name_shape_and_learning_rate(tmp_path, capsys):
    assert normalization.main(['drift', '--steps', '20', '--out', str(tmp_path)]) == 0
    assert normalization.main(['sensing', '--side', '8', '--rank', '2', '--out', str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for setting in sensing.SETTINGS:
        assert setting.name in shown
    assert 'U d x r, unit columns, lr 0.5 (gd 0.05), 10 steps' in shown and 'd = 8, r = 2, m = 80' in shown
    assert len(records(tmp_path / 'drift.csv')) == 3 * 3 * 21
    assert {(row['shape'], row['lr']) for row in records(tmp_path / 'sensing.csv')} == {
        ('d x d', '0.05'), ('d x r', '0.05'), ('d x r', '0.5')}
    for name in ('drift', 'sensing'):
        assert (tmp_path / f'{name}.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.slow
def test_networks_go_on_from_a_minimum_and_survive_a_second_start(tmp_path, monkeypatch, capfd):
    pytest.importorskip('sklearn.datasets')
    argv = networks.digits_table.Job.argv
    monkeypatch.setattr(networks.digits_table, 'DATA', {'resnet10t': (40, 0.2)})
    monkeypatch.setattr(networks, 'RADII', (0.1, 1.0))
    monkeypatch.setattr(networks, 'DRIFT_EPOCHS', 2)
    monkeypatch.setattr(networks.digits_table.Job, 'argv', lambda self, out: [
        *argv(self, out), '--epochs', '1', '--warmup-epochs', '0', '--val-interval', '1'])
    command = ['networks', '--seeds', '0', '--jobs', '1', '--out', str(tmp_path)]
    assert normalization.main(command) == 0
    shown = capfd.readouterr().out
    assert '8 runs, 0 of them finished before' in shown and 'On from a minimum, usam' in shown
    rows = records(tmp_path / 'networks.csv')
    assert len(rows) == 5 + 3 * 2
    assert {row['method'] for row in rows if row['perturbed_loss'] != 'nan'} == {'sam', 'usam'}
    assert (tmp_path / 'networks.png').exists()
    assert normalization.main(command) == 0
    assert '8 runs, 8 of them finished before' in capfd.readouterr().out


@pytest.mark.parametrize('argv, text', [
    (['drift', '--steps', '0'], '--steps 0 must be 1 or more'), (['sensing', '--side', '0'], '--side 0'),
    (['networks', '--jobs', '0'], '--jobs 0 runs nothing'), (['momentum'], 'momentum'), ([], 'EXPERIMENT')])
def test_impossible_commands_end_in_one_line(tmp_path, capsys, monkeypatch, argv, text):
    monkeypatch.chdir(tmp_path)
    try:
        code = normalization.main(argv)
    except SystemExit as e:
        code = e.code
    shown = capsys.readouterr()
    assert code == 2 and text in shown.err and shown.err.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    assert normalization.main(['drift', '--steps', '1', '--out', str(tmp_path / 'file' / 'out')]) == 2
    assert '--out' in capsys.readouterr().err
