"""Runs put into the paper's tables: what is averaged, what is not and why."""

import pytest
from support.reports import sam, tables_of, write_run

from timm_sam.report import __main__ as command
from timm_sam.report.runs import (
    DUPLICATE,
    FINISHED,
    default_args,
)
from timm_sam.runs.sameness import NOT_COMPARED


def test_mean_std_and_number_of_seeds(grid):
    (table,), _ = tables_of(grid / 'runs')
    cells = {(c.row.name, c.selection, c.rho): (c.mean, c.std, len(c.runs)) for c in table.cells}
    assert cells == {
        ('plain', None, None): (91.0, 1.0, 3),
        ('sam', 'all', 0.1): (94.0, 1.0, 3),
        ('sam', 'all', 0.2): (94.0, 3.0, 3),
        ('sam', 'all', 0.4): (99.0, None, 1),
        ('sam', 'onlynorm', 1.0): (95.5, 0.5, 3),
        ('sam', 'onlynorm', 2.0): (pytest.approx(97 + 1 / 3), pytest.approx(3 ** -0.5), 3),
    }
    assert table.title == 'resnet10t on digits' and table.optimizer == 'sgd'


def test_radius_of_highest_mean_is_chosen_among_those_with_most_seeds(grid):
    (table,), _ = tables_of(grid / 'runs')
    chosen = {(c.row.name, c.selection): (c.rho, c.at_edge) for c in table.cells if c.chosen}
    # 0.4 has one seed only; the first of two equal means
    assert chosen == {('plain', None): (None, False), ('sam', 'all'): (0.1, True), ('sam', 'onlynorm'): (2.0, True)}


def test_run_time_is_relative_to_plain(grid):
    (table,), _ = tables_of(grid / 'runs')
    assert [c.relative_time for c in table.cells] == [1.0, 2.0, 2.0, 2.0, 1.5, 1.5]


def test_radius_with_a_diverged_run_is_shown_but_not_chosen(grid, capsys):
    write_run(grid / 'runs' / 'on-2-3', (1.0, 2.0, 10.0), loss='nan', seconds=1.5, **sam(2, 3, params='onlynorm'))
    (table,), runs = tables_of(grid / 'runs')
    cell = next(c for c in table.cells if c.rho == 2.0)
    assert (len(cell.runs), len(cell.diverged), cell.chosen) == (3, 1, False)
    assert next(c for c in table.cells if c.rho == 1.0).chosen
    assert command.main([str(grid / 'runs'), '--out', str(grid / 'out'), '--no-plots']) == 0
    out = capsys.readouterr().out
    assert '| sam | onlynorm | 2 | 97.33 ± 0.58, 1 diverged | 3 | 1.50 |' in out
    assert '95.50 ± 0.50**</u> (3, ρ 1†; 1 diverged at other ρ)' in out
    assert 'on-2-3` | diverged |' in out


def test_cell_of_diverged_runs_only_says_so(tmp_path, capsys):
    write_run(tmp_path / 'runs' / 'plain')
    write_run(tmp_path / 'runs' / 'sam', loss='nan', **sam(5))
    assert command.main([str(tmp_path / 'runs'), '--out', str(tmp_path / 'out'), '--no-plots']) == 0
    out = capsys.readouterr().out
    assert '| sam | diverged |' in out and '| sam | all | 5 | 1 diverged | 0 |' in out


def test_same_seed_twice_counts_once(tmp_path):
    for name, accuracy in (('a', 90.0), ('b', 90.0), ('c', 80.0)):
        write_run(tmp_path / name, (1.0, 2.0, accuracy))
    (table,), runs = tables_of(tmp_path)
    assert [run.status for run in runs] == [FINISHED, DUPLICATE, DUPLICATE]
    assert 'same result' in runs[1].reason and 'another result' in runs[2].reason
    assert (table.plain.mean, table.plain.std) == (90.0, None)


@pytest.mark.parametrize('name, value', [
    ('output', 'elsewhere'), ('experiment', 'x'), ('log_interval', 7), ('workers', 9), ('device', 'cuda:1'),
    ('data_dir', '/other/place/digits/'), ('checkpoint_hist', 2), ('wandb_tags', ['a'])])
def test_runs_that_differ_in_where_and_what_is_logged_are_one_cell(tmp_path, name, value):
    write_run(tmp_path / 'a', seed=0)
    write_run(tmp_path / 'b', **{'seed': 1, name: value})
    (table,), _ = tables_of(tmp_path)
    assert len(table.plain.runs) == 2


@pytest.mark.parametrize('name, value, shown', [
    ('lr', 0.2, 'lr 0.2'), ('batch_size', 64, 'batch_size 64'), ('opt', 'adamw', 'opt adamw'),
    ('weight_decay', 0.5, 'weight_decay 0.5'), ('model_kwargs', {'depth': 3}, 'model_kwargs depth=3'),
    ('aa', 'rand-m9', 'aa rand-m9'), ('mixup', 0.1, 'mixup 0.1'), ('ranks', 8, 'ranks 8')])
def test_runs_that_differ_in_anything_else_are_not_mixed_and_the_titles_say_in_what(tmp_path, name, value, shown):
    write_run(tmp_path / 'a', seed=0, seconds=1)
    write_run(tmp_path / 'b', **{'seed': 1, 'seconds': 1, name: value})
    tables, _ = tables_of(tmp_path)
    assert [len(table.plain.runs) for table in tables] == [1, 1]
    assert any(table.title.endswith(f'resnet10t on digits, {shown}') for table in tables)


@pytest.mark.parametrize('name, value, title', [
    ('data_dir', 'data/cifar', 'resnet10t on cifar'), ('dataset', 'torch/cifar10', 'resnet10t on torch/cifar10'),
    ('model', 'resnet18', 'resnet18 on digits')])
def test_other_data_or_model_is_another_table(tmp_path, name, value, title):
    write_run(tmp_path / 'a')
    write_run(tmp_path / 'b', **{name: value})
    tables, _ = tables_of(tmp_path)
    assert {table.title for table in tables} == {'resnet10t on digits', title}


def test_other_options_of_sam_are_rows_of_the_same_table(tmp_path):
    write_run(tmp_path / 'plain')
    write_run(tmp_path / 'whole', **sam(0.1, variant='fisher', params='onlynorm'))
    write_run(tmp_path / 'late', **sam(0.1, variant='fisher', params='onlynorm', sam_filter='layer4', sam_every=2))
    write_run(tmp_path / 'eta', **sam(0.1, 1, variant='fisher', params='onlynorm', sam_eta=1.0))  # its own default
    (table,), _ = tables_of(tmp_path)
    assert [row.name for row in table.rows] == ['plain', 'fisher', 'fisher, every 2, filter layer4']
    assert len(table.of(table.rows[1], 'onlynorm')[0].runs) == 2


def test_rows_stand_in_the_order_of_the_paper(tmp_path):
    for variant in ('layerwise_l2', 'elementwise_linf', 'sam', 'fisher', 'elementwise_l2_orig', 'elementwise_l2'):
        write_run(tmp_path / variant, **sam(0.1, variant=variant))
    write_run(tmp_path / 'z')
    (table,), _ = tables_of(tmp_path)
    assert [row.name for row in table.rows][:5] == [
        'plain', 'sam', 'elementwise_l2', 'elementwise_l2_orig', 'elementwise_linf']


def test_every_option_that_is_not_compared_exists_and_has_a_reason():
    assert set(NOT_COMPARED) - {'config'} <= set(default_args()) and all(NOT_COMPARED.values())
    assert not set(NOT_COMPARED) & {'lr', 'epochs', 'batch_size', 'model', 'data_dir', 'val_interval', 'opt', 'amp'}
