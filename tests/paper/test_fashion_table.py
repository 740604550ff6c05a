"""The tables of Fashion-MNIST in the docs are those of the runs in the repository, to their last digit."""
import re

import pytest
from support.places import ROOT
from support.reports import rows

from timm_sam.paper import archive, small
from timm_sam.report.__main__ import main as report
from timm_sam.report.runs import read_run

TEXT = (ROOT / 'docs' / 'paper.md').read_text().split('### Fashion-MNIST')[1]
TABLES = [part for part in TEXT.split('\n\n') if part.startswith('| ')]
NETWORKS = {'1': 'ResNet', '2': 'ViT'}  # tables of the report


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('fashion')
    archive.unpack(str(ROOT / 'benchmarks' / 'results' / 'fashion_table_packed.csv'), str(folder / 'runs'))
    return folder / 'runs'


@pytest.fixture(scope='module')
def drawn(runs):
    evaluations = map(str, sorted((runs / 'final').glob('*/*/evaluation.json')))
    out = runs.parent / 'report'
    assert report([str(runs / 'final'), '--evaluations', *evaluations, '--out', str(out), '--no-plots']) == 0
    return out


def cells(text):
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.split('\n') if line.startswith('| ')]


@pytest.mark.full
def test_accuracies_are_those_of_the_packed_runs(drawn):
    expected = {}
    for number, part in enumerate(re.split(r'\n## \d\. ', (drawn / 'report.md').read_text())[1:], 1):
        for name, *line in cells(part.split('\n\n')[1])[1:]:
            for selection, cell in zip(small.SELECTIONS, line):
                if cell:  # such as <u>**81.61 ± 0.64**</u> (3, ρ 0.0003)
                    accuracy, n, rho = re.fullmatch(r'([\d.]+ ± [\d.]+) \((\d)(?:, ρ ([\d.]+))?\)',
                                                    re.sub('<.*?>|[*]', '', cell)).groups()
                    assert n == '3'
                    expected[NETWORKS[f'{number}'], name.split()[0].replace('\\', ''), selection] = (
                        accuracy if rho is None else f'{accuracy} ({rho})')
    _, *table = cells(TABLES[0])
    columns = [(network, selection) for network in NETWORKS.values() for selection in small.SELECTIONS]
    found = {(network, variant.strip('`'), selection): cell
             for variant, *line in table for (network, selection), cell in zip(columns, line) if cell}
    assert found == expected and len(found) == 14


@pytest.mark.full
def test_differences_are_those_of_the_packed_runs(drawn):
    expected = [[NETWORKS[row['table']], f'`{row["variant"]}` `{row["selection"]}`', f'{float(row["difference"]):+.2f}',
                 *(f'{float(row[f"{over}_low"]):+.2f} to {float(row[f"{over}_high"]):+.2f}'
                   for over in ('seeds', 'images'))]
                for row in rows(drawn / 'differences.csv') if row['group'] == 'ID' and row['measure'] == 'top1']
    _, *table = cells(TABLES[1])
    assert table == expected and len(table) == 12
    assert {row['verdict'] for row in rows(drawn / 'differences.csv') if row['images_low']} == {'not distinguishable'}
    assert 'nothing here can be told apart' in TEXT


@pytest.mark.full
def test_radii_are_those_that_were_best_on_held_out_images(runs, drawn):
    what = small.Small('fashion', tuple(small.MODELS.values()), str(runs.parent), str(ROOT / 'hparams'))
    chosen = what.chosen()
    trained = {read_run(job.folder).args['sam_rho'] for job in what.second(chosen) if job.command == 'train'}
    assert None in trained and {row['rho'] for row in rows(drawn / 'report.csv') if row['rho']} == {
        f'{rho:g}' for rho in trained if rho is not None}
    smallest = [rho == min(small.RADII[model][cell]) for model, found in chosen.items()
                for cell, (rho, _) in found.items()]
    assert f'in {sum(smallest)} of {len(smallest)} cells' in ' '.join(TEXT.split())
    seconds = sum(float(row['seconds']) for path in runs.rglob('timing.csv') for row in rows(path))
    assert float(re.search(r'trained for ([\d.]+) hours', TEXT.replace('\n', ' '))[1]) == round(seconds / 3600, 1)
    assert f'Its {len(list(runs.rglob("args.yaml")))} runs' in TEXT
