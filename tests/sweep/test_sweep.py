"""A sweep from its line to the printed table: what it refuses, what it runs, what it goes on with."""
import errno
import fcntl
import shlex

import pytest
from support.reports import rows
from support.running import in_process

from timm_sam.jobs.pool import locked
from timm_sam.sweep.__main__ import jobs, main
from timm_sam.sweep.grid import cells
from timm_sam.training.options import build_train_parser


def test_cells_are_all_combinations_in_the_order_of_the_line():
    found = cells(['sam_rho=0.05,0.1', 'sam-params=all,onlynorm', 'sam_sync=true,false'], plain=True)
    assert [cell.name for cell in found][:3] == [
        'plain', 'sam_rho=0.05,sam_params=all,sam_sync=true', 'sam_rho=0.05,sam_params=all,sam_sync=false']
    assert len(found) == 1 + 2 * 2 * 2 and found[0].flags == ()
    assert found[1].flags == ('--sam-rho', '0.05', '--sam-params', 'all', '--sam-sync')
    assert found[2].flags == ('--sam-rho', '0.05', '--sam-params', 'all')
    assert cells(['lr=0.1,0.1,1'], plain=False) == cells(['lr=0.1,1'], plain=False)
    assert [cell.flags for cell in cells(['sam_method=gsam usam,late', 'pin_mem=false'], plain=False)] == [
        ('--sam-method', 'gsam', 'usam'), ('--sam-method', 'late')]
    # switches that have a flag for on and one for off
    assert [cell.flags for cell in cells(['persistent-workers=true,false'], plain=False)] == [
        ('--persistent-workers',), ('--no-persistent-workers',)]
    assert [cell.flags for cell in cells(['sam_late_ramp=true,false'], plain=False)] == [
        ('--sam-late-ramp',), ('--no-sam-late-ramp',)]


def test_plain_training_has_all_combinations_of_what_is_not_sams():
    found = cells(['lr=0.1,0.2', 'sam_rho=1,2,3'], plain=True)
    assert [cell.name for cell in found if 'sam' not in cell.name] == ['lr=0.1', 'lr=0.2'] and len(found) == 8


@pytest.mark.parametrize('line, said', [
    ('--grid sam_rho', '--grid sam_rho is not KEY=VALUE'),
    ('--grid sam_rho=0.1,,1', 'is not KEY=VALUE'),
    ('--grid sam_rh=0.1', 'no flag --sam-rh'),
    ('--grid seed=1,2', 'use --seeds N'),
    ('--grid lr=1 lr=2', 'names lr twice'),
    ('--grid amp=yes', 'its values are true and false'),
    ('--grid lr=1 --lr 2', '--lr is in --grid too'),
    ('--grid lr=0.1,1e-1 --holdout 0.1', 'lr=1e-1: error: it is the same training as lr=0.1: leave one out'),
    ('--grid lr=1 --experiment x', 'use --out DIR'),
    ('--grid sam_rho=0.1,-1 --sam-variant sam', 'sam_rho=-1: error: argument --sam-rho'),
    ('--grid sam_params=all --sam-variant sam', 'sam_params=all: error: --sam-variant sam needs --sam-rho'),
    ('--grid sam_params=all --sam-rho 1 --sam-variant sam --plain',
     'plain: error: the recipe or a flag sets --sam-variant sam'),
    ('--grid lr=1,2 sam_params=all --sam-rho 1 --sam-variant sam --plain',
     'lr=1: error: the recipe or a flag sets --sam-variant sam'),
    ('--grid lr=1 --data-dir nowhere', 'lr=1: error: --data-dir nowhere does not exist'),
    ('--grid lr=1 --devices 0', '--devices'),
    ('--grid lr=1 --seeds 0', '--seeds'),
    ('--grid lr=1 --epoch 3', 'did you mean'),
])
def test_mistake_is_one_line_that_names_the_cell_and_nothing_is_written(tmp_path, line, said):
    (tmp_path / 'images').mkdir()
    done = in_process(main, shlex.split(f'--out out --data-dir images --device cpu {line}'), tmp_path)
    assert done.code == 2 and said in done.err and done.err.count('\n') == 1, done.err
    assert not (tmp_path / 'out').exists()


def test_switch_that_the_recipe_sets_cannot_be_off(tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'recipe.yaml').write_text('no_prefetcher: true\n')
    done = in_process(main, shlex.split(
        '-c recipe.yaml --grid no_prefetcher=false --out out --data-dir images --device cpu'), tmp_path)
    assert done.code == 2 and 'no_prefetcher=false: error: the recipe sets --no-prefetcher, which no flag' in done.err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('flags, kept', [
    ([], 1), (['--checkpoint-hist=3'], 3), (['--checkpoint-hist', '3'], 3)])
def test_runs_keep_one_checkpoint_unless_more_are_asked_for(flags, kept):
    job, = jobs(cells(['lr=0.1'], plain=False), flags, 1, 'out')
    assert build_train_parser().parse_args(job.argv).checkpoint_hist == kept


def test_file_system_without_locks_is_no_other_process(monkeypatch, tmp_path, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(fcntl, 'flock', no_locks)
    with locked(str(tmp_path)):
        pass
    assert 'has no locks (No locks available)' in capsys.readouterr().out


@pytest.mark.full
def test_sweep_on_two_devices_with_a_run_that_fails(image_folder, tmp_path):
    line = shlex.split(f'--out out --devices 2 --seeds 2 --plain --grid sam_variant=sam sam_filter=bn1,nothing '
                       f'--sam-rho 0.1 --device cpu --data-dir {image_folder} --num-classes 4 --model test_resnet '
                       f'--img-size 32 -b 8 -j 0 --epochs 1 --warmup-epochs 0 --lr 0.05 --holdout 0.2')
    refused = in_process(main, line, tmp_path)
    # rho without a variant: plain training would have it, too
    assert refused.code == 2 and 'plain: error: --sam-rho 0.1 has no effect' in refused.err
    line[line.index('--sam-rho'):line.index('--device')] = []
    line.insert(line.index('sam_variant=sam'), 'sam_rho=0.1')

    done = in_process(main, line, tmp_path)
    lines = done.out.splitlines()
    assert done.code == 1, done.err
    assert lines[0] == '6 runs, 0 of them finished before'
    assert [text.split(']')[0] for text in lines if text.startswith('[')] == [f'[{i}/6' for i in range(1, 7)]
    assert all(text.endswith(' left') for text in lines if text.startswith('['))
    name = 'sam_rho=0.1,sam_variant=sam,sam_filter='
    failed = [text for text in lines if text.startswith('failed: ')]
    assert [text.split(': ')[1] for text in failed] == [f'{name}nothing/seed0', f'{name}nothing/seed1']
    assert 'matches none of' in (tmp_path / 'out' / 'runs' / f'{name}nothing' / 'seed0' / 'log.txt').read_text()
    assert 'Validated on 20 % of the training images' in done.out and '| plain (sgd) |' in done.out
    found = {row['variant']: row for row in rows(tmp_path / 'out' / 'report' / 'report.csv')}
    assert found['plain']['n'] == found['sam']['n'] == '2'
    assert (tmp_path / 'out' / 'runs' / 'plain' / 'seed1' / 'last.pth.tar').exists()

    with locked(str(tmp_path / 'out')):
        done = in_process(main, line, tmp_path)
    assert done.code == 2 and '--out out is in use' in done.err and done.err.count('\n') == 1
