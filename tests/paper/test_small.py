"""Rows of the paper's tables in small: radii by held-out images, then a second round that knows no test image."""
import shlex

import pytest
import yaml
from support.fashion import write_files
from support.places import ROOT
from support.reports import write_run
from support.running import in_process

from timm_sam.fashion import __main__ as fashion
from timm_sam.paper import small
from timm_sam.paper.__main__ import main
from timm_sam.report.runs import FINISHED
from timm_sam.training.options import build_train_parser, read_args

HPARAMS = str(ROOT / 'hparams')


class Ran:
    def __init__(self, accuracy):
        self.status, self.value = ('diverged', 0) if accuracy is None else (FINISHED, accuracy)

    def accuracy(self):
        return self.value


def test_radius_is_the_best_on_held_out_images_and_variants_follow(monkeypatch):
    what = small.Small('fashion', ('resnet10t',), 'out', HPARAMS, seeds=2)
    first = what.first()
    assert len(first) == 6 * 2 * 3 and all('--holdout' in job.argv for job in first)

    def read(folder):
        variant, selection, rho = folder.rsplit('/', 1)[1].removesuffix('-seed0').split('-')
        if (variant, selection, rho) == ('sam', 'all', '0.3'):
            return Ran(None)  # would have been the best
        return Ran({'fisher': 60, 'layerwise_l2': 59 if selection == 'all' else 70}.get(variant, 50) + float(rho) / 100)

    monkeypatch.setattr(small, 'read_run', read)
    chosen = what.chosen()
    assert chosen['resnet10t']['sam', 'all'] == (0.1, pytest.approx(50.001))
    assert small.best(chosen['resnet10t']) == ['layerwise_l2', 'fisher']
    second = what.second(chosen)
    names = [job.name.removeprefix('final/resnet10t/') for job in second if job.command == 'train']
    assert names[:7] == ['plain-seed0', 'sam-all-0.1-seed0', 'sam-onlynorm-1-seed0', 'layerwise_l2-all-0.02-seed0',
                         'layerwise_l2-onlynorm-0.2-seed0', 'fisher-all-0.3-seed0', 'fisher-onlynorm-1-seed0']
    assert len(names) == 14 and not any('--holdout' in job.argv for job in second)
    assert all(job.after in second for job in second if job.command == 'validate')


def test_report_has_no_run_of_a_radius_that_an_earlier_start_chose(monkeypatch, tmp_path, capsys):
    what = small.Small('fashion', ('resnet10t',), str(tmp_path), HPARAMS, seeds=1)
    monkeypatch.setattr(small, 'read_run', lambda folder: Ran(None if '-0.3-' in folder or '-1-' in folder else 50))
    now = {job.folder for job in what.second(what.chosen()) if job.command == 'train'}
    earlier = what.job('final', 'resnet10t', 'sam', 'all', 0.3, 0).folder
    assert earlier not in now
    for folder in (earlier, *now):
        write_run(folder)
    given = []
    monkeypatch.setattr(small, 'write_report', lambda argv: given.extend(argv) or 0)
    assert small.report(what) == 0
    assert set(given[:given.index('--out')]) == now
    assert '| resnet10t | sam | all | 0.03 | 50.00 | 2 of 3 |' in capsys.readouterr().out


@pytest.mark.parametrize('images', ['digits', 'fashion'])
@pytest.mark.parametrize('model', small.MODELS.values())
def test_train_takes_every_run(images, model):
    what = small.Small(images, (model,), 'out', HPARAMS)
    for job in (*what.first()[:1], what.job('final', model, None, '', None, 2)):
        args = read_args(build_train_parser(), job.argv)
        assert args.num_classes == 10 and args.img_size == 32 and args.model.startswith(model)
        assert (args.holdout, args.sam_variant) == ((0.2, 'sam') if 'radii' in job.name else (None, None))
    recipe = yaml.safe_load((ROOT / 'hparams' / 'fashion' / f'{model}.yaml').read_text())
    assert recipe['val_interval'] == recipe['epochs']  # 10,000 images, once


@pytest.mark.parametrize('line, said', [
    ('run table1 table2 --preset small', '--preset small has table1 and table3, and not table2'),
    ('run table1 --preset small --data-dir x', '--data-dir: --preset small has none'),
    ('run table1 --preset small --only sam', '--only: --preset small has none'),
    ('run table1 --set fashion', '--set fashion chooses images of --preset small'),
    ('run table1', '--data-dir is missing'),
])
def test_mistake_is_one_line(tmp_path, line, said):
    done = in_process(main, shlex.split(line), tmp_path)
    assert done.code == 2 and said in done.err and done.err.count('\n') == 1, done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('images', ['digits', 'fashion'])
def test_both_rounds_from_their_line_to_the_report(tmp_path, monkeypatch, images):
    pytest.importorskip('sklearn.datasets')
    monkeypatch.setattr(small, 'DATA', {'vit_tiny': (50, 0.2)})
    monkeypatch.setattr(small, 'RADII', {'vit_tiny': {
        (variant, selection): radii for variant, radii in (('sam', (0.1, -1.0)), ('fisher', (0.1,)))
        for selection in small.SELECTIONS}})
    monkeypatch.setattr(small, 'FASHION_SIZE', 50)
    if images == 'fashion':
        fashion.export(str(tmp_path / 'out' / 'fashion-50'), 50, str(write_files(tmp_path / 'source', 60, 20)))
    line = shlex.split(f'run table3 --preset small --set {images} --out out --seeds 2 --devices 2 --epochs 1 '
                       '--warmup-epochs 0 --val-interval 1 --batch-size 16')
    done = in_process(main, line, tmp_path)
    assert done.code == 1, done.err  # two radii that train.py refuses
    assert '6 runs, 0 of them finished before' in done.out and '20 runs, 0 of them finished before' in done.out
    assert done.out.count('failed: radii/vit_tiny/sam-') == 2
    assert '| vit_tiny | fisher | onlynorm | 0.1 |' in done.out
    assert '10 runs: 10 finished.' in done.out and 'over images' in done.out
    again = in_process(main, line, tmp_path)
    assert '6 runs, 4 of them finished before' in again.out and '20 runs, 20 of them finished before' in again.out
