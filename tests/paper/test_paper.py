"""The paper's tables by one command: what each needs, what it says of mistakes, and one from its line to the print."""
import csv
import re
import shlex
import sys

import numpy as np
import pytest
import timm
from PIL import Image, ImageOps
from support.images import write_image_folder
from support.paper import SETTINGS, paper_tables
from support.places import ROOT
from support.reports import checkpoint, rows, sam, write_results, write_run
from support.running import in_process
from timm.data import create_transform

from timm_sam.analyze.options import build_parser as build_analysis_parser
from timm_sam.cli.errors import OptionError
from timm_sam.paper import numbers
from timm_sam.paper.__main__ import main
from timm_sam.paper.catalogue import EXHIBITS
from timm_sam.paper.drawing import norms_job
from timm_sam.paper.exhibits import CIFAR100, TABLE, Config
from timm_sam.paper.plan import Plan
from timm_sam.paper.results import Line, collect
from timm_sam.paper.show import overview, table_text
from timm_sam.report.__main__ import main as report
from timm_sam.training.options import build_train_parser, read_args

sys.path.insert(0, str(ROOT / 'examples'))
import cifar_folders  # noqa: E402

HPARAMS = ROOT / 'hparams'


def test_every_table_and_figure_is_there():
    assert list(EXHIBITS) == [f'table{i}' for i in range(1, 20)] + [f'figure{i}' for i in range(1, 12)]
    assert all(exhibit.configs or exhibit.missing or numbers.read(name).cells for name, exhibit in EXHIBITS.items())


def test_every_number_of_the_paper_has_its_runs_or_a_reason():
    for name, exhibit in EXHIBITS.items():
        printed = numbers.read(name).cells
        if exhibit.kind == TABLE and printed:
            assert {entry.labels for entry in exhibit.entries} == set(printed), name
            assert len(exhibit.entries) == len(printed)
            without = [entry for entry in exhibit.entries if entry.config is None]
            assert not without or exhibit.missing, name


def test_show_prints_the_numbers_of_the_paper_under_their_labels(tmp_path):
    plan, read = Plan(str(tmp_path), str(HPARAMS)), paper_tables()
    assert sum(map(len, read.values())) == 604 + 72 + 39  # results, Table 7, Table 8
    assert set(read) == {name for name in EXHIBITS if numbers.read(name).cells}
    for name, cells in read.items():
        exhibit, labels = EXHIBITS[name], len(numbers.read(name).header)
        text = table_text(exhibit, collect(plan, exhibit))
        rows = [line[2:-2].split(' | ') for line in text.splitlines() if line.startswith('| ')][1:]
        # a note stands behind its number in brackets
        shown = [(frozenset(row[:labels]) - {'', '–'}, row[labels].partition(' (')[0]) for row in rows]
        assert shown == cells, name
        assert all(row[labels + 1:] == (['–', '0', ''] if exhibit.kind == TABLE else []) for row in rows)


def test_radii_that_are_lost_are_marked(tmp_path):
    plan = Plan(str(tmp_path), str(HPARAMS))
    shown = {name: table_text(EXHIBITS[name], collect(plan, EXHIBITS[name])).splitlines() for name in (
        'table7', 'table8')}
    assert '| sam | onlynorm | CIFAR-100 RN | chosen | 1. |' in shown['table7']
    assert '| sam | all | CIFAR ViT | tried | 0.025 0.05 0.1 0.25 0.5 |' in shown['table7']
    lost = [line for lines in shown.values() for line in lines if 'not legible' in line]
    assert sum('(a reading: seven values' in line for line in shown['table8']) == 12
    assert len(lost) == 5 and sum('fisher | onlynorm' in line and 'chosen' in line for line in lost) == 3
    assert '| ViT-S FT | layerwise_l2 | onlynorm | reported | not legible (a cell is missing in the text) |' in lost
    # Table 7 as the recipes have it, but where the text is ambiguous
    for network, setting, data in (('resnet56', 'CIFAR-10 RN', 'cifar10'), ('resnet56', 'CIFAR-100 RN', 'cifar100'),
                                   ('vit_small', 'CIFAR ViT', 'cifar100')):
        for (variant, selection, place, what), number in numbers.read('table7').cells.items():
            if (place, what) == (setting, 'chosen') and number.mean:
                assert float(number.mean) == SETTINGS[f'cifar/{network}/{data}'].rows[f'{variant}_{selection}'].rho


def test_every_run_is_a_recipe_whose_row_is_that_of_the_table():
    configs = {config for exhibit in EXHIBITS.values() for config in exhibit.configs}
    # a folder is that of one run
    folders = {config.name: (config.recipe, config.flags) for config in configs}
    assert len(folders) == len({(config.recipe, config.flags) for config in configs}) > 500
    for config in configs:
        assert (HPARAMS / f'{config.recipe}.yaml').is_file(), config.recipe
    # entries by the labels of the tables, recipes by the data that the tests have of them
    for name in ('table1', 'table3', 'table10', 'table11'):
        for entry in EXHIBITS[name].entries:
            folder, _, recipe = entry.config.recipe.rpartition('/')
            row = SETTINGS[folder].rows[recipe]
            text = row.with_aa if entry.config.flags else row.accuracy
            number = numbers.read(name).cells[entry.labels]
            assert text == f'{number.mean} +- {number.std}', entry.labels


@pytest.mark.full
def test_train_takes_every_run_of_every_exhibit(tmp_path):
    plan = Plan(str(tmp_path), str(HPARAMS), str(tmp_path))
    seen = {}
    for exhibit in EXHIBITS.values():
        for config in exhibit.configs:
            seen.setdefault((config.flags, config.recipe.rpartition('/')[0]), config)
    assert len(seen) > 100
    for config in seen.values():
        argv = [*plan.train(config, 2).argv, *(['--sam-rho', '1'] if config.needs else [])]
        args = read_args(build_train_parser(), argv)
        assert args.seed == 2 and args.experiment == f'{config.name}/seed2' and args.resume == 'auto'
        wanted = config.data.classes
        assert (args.num_classes or timm.get_pretrained_cfg(args.model).num_classes) == wanted, config


@pytest.mark.full
def test_costs_are_counted(tmp_path):
    text = overview(Plan(str(tmp_path), str(HPARAMS), seeds=2), [EXHIBITS['figure8'], EXHIBITS['table13']], 1e12)
    row = next(line for line in text.splitlines() if line.startswith('| figure8 ')).split(' | ')
    assert row[2:6] == ['12', '24', '0', '']
    # ResNet-18 has 0.5554 GMAC: forward and backward are 6 FLOPs per multiplication less those of the first input; 12
    # runs of which one is plain, and one perturbs normalization layers only
    unit = 6 * 0.5554e9 * 49_920 * 200
    assert 2 * (1 + 10 * 2 + 5 / 3) * unit == pytest.approx(float(row[6]), rel=0.03)
    assert float(row[7].replace(',', '')) == pytest.approx(float(row[6]) / 1e12 / 3600, rel=0.01)
    assert 'not legible in Table 8: give --sam-rho' in text


@pytest.mark.parametrize('line, said', [
    ('show table20', 'table20 is none of table1'),
    ('run table7 --data-dir data', 'there is nothing to run'),
    ('run table1 --data-dir nowhere', '--data-dir nowhere does not exist'),
    ('run table1 --data-dir data', '--data-dir data: train has 3 class folders, and the recipe 100 classes'),
    ('run table1 --data-dir empty', '--data-dir empty: train has no such folder'),
    ('run table1 --data-dir data --only asam', '--only asam: table1 has plain, sam, '),
    ('run table4 --data-dir data', '--eval-root is missing'),
    ('run table4 --data-dir data --eval-root empty', '--eval-root empty: table4 needs ImageNet'),
    ('run table13 --data-dir data --only layerwise_l2', 'not legible in Table 8'),
    ('run table1 --data-dir data --lr -1', 'sgd: error: --lr -1.0'),
    ('run table1 --data-dir data --hparams nowhere', '--hparams nowhere is not a folder'),
    ('run table1 --data-dir data --devices 0', '--devices'),
    ('list --tflops 0', '--tflops 0'),
    ('list table1 --hparams nowhere', '--hparams nowhere is not a folder'),
    ('show table1 --hparams nowhere', '--hparams nowhere is not a folder'),
    ('show table1 table2 --csv x.csv', '--csv x.csv takes one table'),
    ('show table1 --lr 1', 'unrecognized arguments: --lr'),
    ('pack data --to x.csv', 'data holds no run'),
    ('unpack data x', 'data cannot be read'),
])
def test_mistake_is_one_line_and_nothing_is_written(tmp_path, line, said):
    for split in ('train', 'validation'):
        for name in 'abc':
            (tmp_path / 'data' / split / name).mkdir(parents=True)
    (tmp_path / 'empty').mkdir()
    more = ' --out out --device cpu' if line.startswith('run') else ''
    done = in_process(main, shlex.split(line + more), tmp_path)
    assert done.code == 2 and said in done.err and done.err.count('\n') == 1, done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'empty']


def test_difference_is_ours_minus_the_papers():
    line = Line(('x',), numbers.Number('83.11', '0.3'), (83.0, 84.0))
    assert (line.mean, line.difference) == (83.5, pytest.approx(0.39)) and line.std == pytest.approx(0.5 ** 0.5)
    assert Line(('x',), numbers.Number('', '', 'lost'), (83.0,)).difference is None
    assert numbers.Number('', '', 'lost').shown == 'not legible (lost)'


def test_folder_of_a_run_is_named_by_what_is_not_its_recipes():
    assert Config('cifar/x/sgd', CIFAR100, 'plain').name == 'cifar/x/sgd'
    assert Config('cifar/x/sgd', CIFAR100, 'plain', ('--aa', 'cifar10')).name == 'cifar/x/sgd__aa_cifar10'


@pytest.mark.parametrize('flags, passed', [
    ('--device cpu --workers 2 --batch-size 64', ['--device', 'cpu', '--workers', '2']),
    ('--device=cpu --workers=2 --batch-size=64', ['--device', 'cpu', '--workers', '2']),
    ('-j2 -b64', ['--workers', '2']),
    ('--lr -1 --opt-betas 0.9 0.99', [])])
def test_flags_of_execution_are_found_however_they_are_written(flags, passed):
    plan = Plan('out', 'hparams', flags=tuple(flags.split()))
    config = next(config for config in EXHIBITS['table2'].configs if config.variant == 'plain')
    argv = plan.train(config, 0).argv
    assert plan.passed_on() == passed
    # who says how large batches are says all of it: the paper's eight devices are not accumulated on top
    assert ('--grad-accum-steps' in argv) == (not passed)
    assert argv.index('--checkpoint-hist') < argv.index(flags.split()[0])  # the last one wins


def test_evaluation_reads_the_sets_of_its_table_and_no_others(tmp_path):
    for name in ('imagenet/val', 'imagenet-r', 'imagenet-c', 'objectnet-1.0'):
        (tmp_path / name).mkdir(parents=True)
    config, evaluation = EXHIBITS['table4'].evaluations[0]
    plan = Plan('out', 'hparams', eval_root=str(tmp_path))
    argv = plan.evaluate(config, evaluation, plan.train(config, 0)).argv
    place = argv.index('--eval')
    assert argv[place + 1:place + 5] == (f'imagenet={tmp_path}/imagenet/val', f'imagenet-r={tmp_path}/imagenet-r',
                                         f'objectnet={tmp_path}/objectnet-1.0', '--results-file')


def test_training_images_are_measured_without_the_pixels_around_them():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    padded = ImageOps.expand(Image.fromarray(pixels), cifar_folders.PADDING)
    plan = Plan('out', str(HPARAMS))

    def seen(recipe, **options):
        transform = create_transform((3, recipe.img_size, recipe.img_size), interpolation=recipe.interpolation,
                                     mean=(0, 0, 0), std=(1, 1, 1), **options)
        return np.asarray(transform(padded).permute(1, 2, 0) * 255).round()

    analyses = [pair for name in ('table6', 'table18', 'table19') for pair in EXHIBITS[name].evaluations]
    assert len(analyses) == 25
    for config, evaluation in analyses:
        recipe = read_args(build_train_parser(), plan.recipe(config))
        args = build_analysis_parser(evaluation.words[0]).parse_args(evaluation.flags)
        assert np.array_equal(
            seen(recipe, crop_pct=recipe.crop_pct, crop_border_pixels=args.crop_border_pixels), pixels), evaluation
    assert np.array_equal(seen(recipe, crop_pct=0.8), pixels)  # as the recipes say for --holdout


def test_run_whose_recipe_is_gone_is_not_shown_as_if_it_had_the_papers_options(tmp_path):
    plan = Plan(str(tmp_path / 'out'), str(tmp_path), seeds=1)
    write_run(plan.folder(EXHIBITS['table10'].configs[0], 0))
    with pytest.raises(OptionError, match='sgd.yaml: No such file'):
        collect(plan, EXHIBITS['table10'])


def test_distributions_are_those_of_finished_runs(tmp_path):
    exhibit, plan = EXHIBITS['figure5'], Plan(str(tmp_path), 'hparams', seeds=3)
    folders = [write_run(plan.folder(exhibit.configs[0], seed), accuracies, loss=loss) for seed, (accuracies, loss) in
               enumerate([((1.0, 2.0), '0.5'), ((1.0, 2.0, 3.0), 'nan'), ((1.0, 2.0, 3.0), '0.5')])]
    for folder in folders:  # the first stopped, and the second diverged
        (folder / 'last.pth.tar').write_bytes(b'')
    taken = [word for word in norms_job(plan, exhibit).argv if word.endswith('.pth.tar')]
    assert taken == [str(folders[2] / 'last.pth.tar')]
    (folders[2] / 'last.pth.tar').unlink()
    with pytest.raises(OptionError, match='^figure5: none of its runs has finished'):
        norms_job(plan, exhibit)


def test_figure_that_cannot_be_written_is_a_mistake(tmp_path):
    plan = Plan(str(tmp_path / 'out'), str(HPARAMS))
    write_run(plan.folder(EXHIBITS['figure1'].configs[0], 0))
    (tmp_path / 'out' / 'figure1').mkdir()
    (tmp_path / 'out' / 'figure1' / 'report.md').write_text('mine')
    done = in_process(main, shlex.split('show figure1 --seeds 1 --out out'), tmp_path)
    assert done.code == 2 and 'holds report.md, which no report wrote' in done.last_line
    assert (tmp_path / 'out' / 'figure1' / 'report.md').read_text() == 'mine'


@pytest.mark.parametrize('name, content', [
    ('args.yaml', b'- model'), ('args.yaml', b'model: x\nmean: 2020-01-01\n'), ('summary.csv', b'\xff\n'),
    ('summary.csv', b'epoch,train_loss\n0,1'), ('args-before-epoch-1.yaml', b'- model'), ('attack.json', b'{'),
    ('attack.outputs/test.npz', b'PK')])
def test_run_that_cannot_be_packed_is_named(tmp_path, name, content):
    folder = write_run(tmp_path / 'runs' / 'a')
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    done = in_process(main, shlex.split('pack runs --to runs.csv'), tmp_path)
    assert done.code == 2 and f'runs/a: {name} cannot be read' in done.err and done.err.count('\n') == 1, done.err
    assert [path.name for path in tmp_path.iterdir()] == ['runs']


def test_report_with_evaluations_is_drawn_again_from_one_file(tmp_path):
    for name, options, accuracy in (('plain', {}, 70.0), ('on', sam(1, params='onlynorm'), 74.0)):
        for seed in (0, 1):
            run = write_run(tmp_path / 'out' / 'runs' / f'{name}-{seed}', (1.0, 2.0, accuracy + seed),
                            **{**options, 'seed': seed})
            path = checkpoint(run)
            write_results(run / 'evaluation.json', [path], [seed + (name == 'on')], outputs=True)
    line = 'runs {} --out report --no-plots'.format('--evaluations ' + ' '.join(
        f'runs/{name}-{seed}/evaluation.json' for name in ('plain', 'on') for seed in (0, 1)))
    assert in_process(report, shlex.split(line), tmp_path / 'out').code == 0
    packed = in_process(main, shlex.split('pack out/runs --to runs.csv'), tmp_path)
    assert packed.code == 0 and (tmp_path / 'runs.csv').read_text().count('a/0001.png') == 1, packed.err
    assert in_process(main, shlex.split('unpack runs.csv again/runs'), tmp_path).code == 0
    assert in_process(report, shlex.split(line), tmp_path / 'again').code == 0
    for name in ('evaluations.csv', 'differences.csv'):
        assert (tmp_path / 'again' / 'report' / name).read_text() == (tmp_path / 'out' / 'report' / name).read_text()
    compared = [row for row in rows(tmp_path / 'again' / 'report' / 'differences.csv') if row['images_low']]
    assert [(row['variant'], row['dataset'], row['measure']) for row in compared] == [('sam', 'imagenet', 'top1')]


@pytest.mark.parametrize('line', ['a,summary.csv,0', 'a,summary.csv,0,x,y', 'a,args.yaml,model,{',
                                  'a,e.outputs/i.npz,right,ff', 'a,e.outputs/i.npz,names,none'])
def test_torn_file_is_not_unpacked(tmp_path, line):
    (tmp_path / 'runs.csv').write_text(f'run,file,key,value\nb,args.yaml,seed,1\n{line}\n')
    done = in_process(main, shlex.split('unpack runs.csv runs'), tmp_path)
    assert done.code == 2 and 'pack has written' in done.err and done.err.count('\n') == 1, done.err
    assert [path.name for path in tmp_path.iterdir()] == ['runs.csv']


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """Table 6 in small: two networks of the three of its variants, one of which cannot be trained."""
    folder = tmp_path_factory.mktemp('paper')
    write_image_folder(folder / 'cifar100', splits={'train': 32, 'validation': 4})
    blocked = folder / 'out' / 'runs' / 'cifar' / 'wrn28_10' / 'cifar100' / 'sam_onlynorm'
    blocked.parent.mkdir(parents=True)
    blocked.write_text('no folder can be here')
    line = ('run table6 --data-dir . --out out --seeds 1 --devices 2 --only plain sam --device cpu --num-classes 4 '
            '--model test_resnet --img-size 16 -b 32 --workers 0 --epochs 1')
    return folder, in_process(main, shlex.split(line), folder), line


def test_table_from_its_line_to_the_print(finished):
    folder, done, line = finished
    lines = done.out.splitlines()
    assert done.code == 1, done.err
    assert lines[0] == '9 runs, 0 of them finished before'
    failed = [text for text in lines if text.startswith('failed: ')]
    assert [text.split(': ')[1] for text in failed] == [
        f'cifar/wrn28_10/cifar100/sam_onlynorm/seed0{more}' for more in ('', ' sharpness', ' rank')]
    row = {tuple(cells[:3]): cells[3:] for cells in (
        text[2:-2].split(' | ') for text in lines if text.startswith('| '))}
    paper, here, n, difference = row['accuracy', 'sam', 'all']
    assert (paper, n) == ('83.11 ± 0.3', '1') and float(difference) == pytest.approx(float(here) - 83.11, abs=0.006)
    assert row['accuracy', 'sam', 'onlynorm'] == ['84.19 ± 0.2', '–', '0', '']
    paper, here, n, difference = row['worst-linf 0.003', 'plain', '–']
    assert (paper, n) == ('0.071 ± 0.000', '1') and 0 <= float(here) < 1.869
    assert row['feature rank', 'plain', '–'][0] == '4004 ± 12' and 1 <= int(row['feature rank', 'plain', '–'][1]) <= 128
    assert "**Not the paper's setting**" in done.out and 'epochs 1' in done.out and 'model test_resnet' in done.out
    # what is there is not run again
    again = in_process(main, shlex.split(line), folder)
    assert '9 runs, 6 of them finished before' in again.out and again.code == 1


def test_table_is_drawn_again_from_one_file(finished, tmp_path):
    folder, done, _ = finished
    shown = in_process(main, shlex.split('show table6 --seeds 1 --csv table6.csv --out out'), folder)
    assert shown.code == 0, shown.err
    assert shown.out.strip() == done.out[done.out.index('## table6'):done.out.index('failed: ')].strip()
    text = (folder / 'table6.csv').read_text()
    assert 'measure,variant,selection,paper_mean,paper_std,mean,std,n,difference,note' in text
    packed = in_process(main, ['pack', str(folder / 'out' / 'runs'), '--to', 'runs.csv'], tmp_path)
    assert packed.code == 0 and '2 runs in runs.csv' in packed.out, packed.err
    assert not re.search(r'/tmp|/home', (tmp_path / 'runs.csv').read_text())
    limit = csv.field_size_limit()
    unpacked = in_process(main, shlex.split('unpack runs.csv again/runs'), tmp_path)
    assert unpacked.code == 0, unpacked.err
    assert csv.field_size_limit() == limit  # is of the whole process
    again = in_process(main, shlex.split('show table6 --seeds 1 --out again'), tmp_path)
    assert again.out == shown.out
    refused = in_process(main, shlex.split('unpack runs.csv again/runs'), tmp_path)
    assert refused.code == 2 and 'again/runs is in use' in refused.err


def test_figures_are_drawn_of_the_same_runs(finished):
    folder, _, line = finished
    done = in_process(main, shlex.split(line.replace('run table6', 'run figure5')), folder)
    assert done.code == 1 and '3 runs, 2 of them finished before' in done.out, done.err
    assert '1 runs, 0 of them finished before' in done.out and 'norm weight' in done.out
    assert {'norms-a.png', 'norms-b.png', 'norms.csv'} <= {path.name for path in (folder / 'out' / 'figure5').iterdir()}
    shown = in_process(main, shlex.split('show figure5 figure1 --seeds 1 --out out'), folder)
    assert shown.code == 0 and 'norm weight' in shown.out, shown.err
    assert '1 run: 1 finished.' in shown.out  # of Figure 1 only plain training is there
    assert (folder / 'out' / 'figure1' / 'table1-loss.png').exists()


def test_list_says_what_is_there(finished):
    folder, _, _ = finished
    text = overview(Plan(str(folder / 'out'), str(HPARAMS), seeds=1), [EXHIBITS['table6']], 5e13)
    assert text.splitlines()[2].split(' | ')[2:6] == ['5', '5', '2', '4 of 10']
