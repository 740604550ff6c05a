"""The grid of runs on digits: what it holds, that warm processes change nothing, that it survives crashes."""
import multiprocessing
import sys
from collections import Counter

import pytest
import yaml
from support.places import ROOT
from support.processes import python, run
from support.running import quiet_about_timm, working_directory

sys.path.insert(0, str(ROOT / 'benchmarks'))  # scripts, no part of the package

import digits_table

from timm_sam import train
from timm_sam.digits import __main__ as digits
from timm_sam.jobs.job import Job
from timm_sam.jobs.pool import locked
from timm_sam.jobs.worker import run_job
from timm_sam.perturbation import VARIANTS
from timm_sam.training.options import parse_args


def whole_grid():
    return digits_table.grid(list(digits_table.RADII), digits_table.VARIANTS, digits_table.SEEDS)


def test_grid_is_plain_and_six_variants_with_3_radii_and_3_seeds():
    jobs = whole_grid()
    assert len(jobs) == len({job.name for job in jobs}) == 258
    for model in ('resnet10t', 'vit_tiny'):
        cells = Counter((job.variant, job.selection) for job in jobs if job.model == model)
        assert cells.pop((None, None)) == 3
        assert set(cells.values()) == {9}
        expected = {(v, s) for v in VARIANTS for s in ('all', 'onlynorm')}
        assert set(cells) == expected | {('sam', 'nonorm'), ('elementwise_l2', 'nonorm')}
    assert {job.seed for job in jobs} == {0, 1, 2}
    assert all(len(set(radii)) == 3 and list(radii) == sorted(radii)
               for cells in digits_table.RADII.values() for radii in cells.values())


@pytest.mark.full
def test_every_run_has_the_options_of_its_name(tmp_path):
    for job in whole_grid():
        if job.seed:
            continue
        (tmp_path / job.data).mkdir(exist_ok=True)
        args = parse_args(train.build_parser(), job.argv(str(tmp_path)))
        assert (args.sam_variant, args.sam_rho, args.seed, args.workers) == (job.variant, job.rho, job.seed, 0)
        assert job.variant is None or args.sam_params == job.selection
        assert args.experiment == job.name and args.model.startswith(job.model)


@pytest.fixture
def small(monkeypatch):
    """A grid of plain training and one radius, of one epoch each."""
    pytest.importorskip('sklearn.datasets')
    argv = digits_table.Job.argv
    monkeypatch.setattr(digits_table, 'RADII', {'vit_tiny': {('sam', 'onlynorm'): (0.1,)}})
    monkeypatch.setattr(digits_table, 'DATA', {'vit_tiny': (40, 0.2)})
    monkeypatch.setattr(digits_table.Job, 'argv', lambda self, out: [
        *argv(self, out), '--epochs', '1', '--warmup-epochs', '0', '--val-interval', '1'])


@pytest.mark.slow
def test_run_in_a_warm_process_is_that_of_a_fresh_one(small, tmp_path):
    first, second = digits_table.grid(['vit_tiny'], ['sam'], [3])
    digits.export(str(tmp_path / first.data), train_size=40, label_noise=0.2)
    with quiet_about_timm():
        for job in (second, first, second):
            folder = tmp_path / 'runs' / job.name
            if folder.exists():
                folder.rename(tmp_path / 'before')
            assert run_job(Job(job.name, None, str(folder), tuple(job.argv(str(tmp_path))))) is None
    fresh = run(python(ROOT / 'train.py', *second.argv(str(tmp_path)), '--experiment', 'fresh'), tmp_path)
    assert fresh.code == 0, fresh.err
    summaries = [(path / 'summary.csv').read_bytes()
                 for path in (tmp_path / 'runs' / second.name, tmp_path / 'before', tmp_path / 'runs' / 'fresh')]
    assert summaries[0] == summaries[1] == summaries[2] and summaries[0].count(b'\n') == 2
    assert {path.name for path in folder.iterdir()} == {'args.yaml', 'summary.csv', 'timing.csv', 'log.txt'}


@pytest.mark.slow
def test_grid_survives_crashes_and_goes_on(small, tmp_path, monkeypatch, capfd):
    """Three seeds: one as it should be, one whose process dies, one whose options are refused."""
    (tmp_path / 'dies.py').write_text('import os\nos._exit(9)\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    argv = digits_table.Job.argv
    broken = {1: ['--device-modules', 'dies'], 2: ['--lr', '-1']}

    def with_faults(self, out):
        return argv(self, out) + (broken.get(self.seed, []) if self.variant else [])

    def table(*arguments):
        with working_directory(tmp_path):
            code = digits_table.main(['--out', 'out', '--seeds', '0', '1', '2', *arguments])
        return code, capfd.readouterr()

    monkeypatch.setattr(digits_table.Job, 'argv', with_faults)
    code, shown = table()
    lines = shown.out.splitlines()
    assert code == 1 and '6 runs, 0 of them finished before' in lines
    assert len([line for line in lines if line.startswith('[') and line.endswith(' left')]) == 6
    name = 'vit_tiny/sam-onlynorm-0.1-seed'
    assert f'failed: {name}1: its process ended with code 9' in lines
    assert any(line.startswith(f'failed: {name}2: train.py returned 2') for line in lines)
    assert '4 finished' in shown.out and '40 training images, 20% of them under a wrong digit' in shown.out
    assert '| plain (adamw) |' in (tmp_path / 'out' / 'report' / 'report.md').read_text()
    assert '--lr -1.0 must be' in (tmp_path / 'out' / 'runs' / f'{name}2' / 'log.txt').read_text()
    kept = tmp_path / 'out' / 'runs' / 'vit_tiny' / 'plain-seed0' / 'summary.csv'
    before = kept.stat().st_mtime_ns

    monkeypatch.setattr(digits_table.Job, 'argv', argv)
    code, shown = table()
    assert code == 0 and '6 runs, 4 of them finished before' in shown.out and '[2/2]' in shown.out
    assert kept.stat().st_mtime_ns == before and '6 runs: 6 finished.' in shown.out
    assert not list((tmp_path / 'out').rglob('*.pth.tar'))

    # nothing left to do: no process is started
    monkeypatch.setattr(multiprocessing.context.ForkServerContext, 'Process', None)
    code, shown = table()
    assert code == 0 and '6 runs, 6 of them finished before' in shown.out

    # a finished run of other options is not taken for the wanted one
    args = kept.with_name('args.yaml')
    args.write_text(yaml.safe_dump({**yaml.safe_load(args.read_text()), 'lr': 0.25}))
    code, shown = table()
    assert code == 2 and 'lr 0.25' in shown.err and shown.err.count('\n') == 1

    with locked(str(tmp_path / 'out')):
        code, shown = table()
    assert code == 2 and 'in use' in shown.err


@pytest.mark.parametrize('argv', [['--jobs', '0'], ['--models', 'resnet50'], ['--variants', 'asam'], ['--seeds', 'x']])
def test_impossible_options_are_refused(tmp_path, capsys, argv):
    try:
        code = digits_table.main(['--out', str(tmp_path / 'out'), *argv])
    except SystemExit as e:
        code = e.code
    shown = capsys.readouterr()
    assert code == 2 and argv[0] in shown.err and shown.err.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_out_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    assert digits_table.main(['--out', str(tmp_path / 'file' / 'out')]) == 2
    assert '--out' in capsys.readouterr().err
