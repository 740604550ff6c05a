"""report.html: the same numbers as report.md, ways from each to its runs and back, and figures inside."""
import pytest
from support.pages import Page
from support.reports import checkpoint, write_results, write_run

from timm_sam.report import __main__ as command


def made(root, *options):
    """The page of all runs below ``root / 'runs'``, and report.md."""
    assert command.main([str(root / 'runs'), '--out', str(root / 'out'), *map(str, options)]) == 0
    found = Page((root / 'out' / 'report.html').read_text(encoding='utf-8'))
    found.assert_alone()
    return found, (root / 'out' / 'report.md').read_text(encoding='utf-8')


def folders(page, anchors):
    """The names of the folders that the anchors of runs stand for."""
    return [page.row(anchor)[1].rpartition('/')[2] for anchor in anchors]


def test_every_number_leads_to_its_runs_and_they_lead_back(grid):
    write_run(grid / 'runs' / 'half', (1.0,), sam_variant='sam', sam_rho=0.1, seed=7)
    page, text = made(grid, '--no-plots')
    paper, radii, differences, left_out, runs = page.tables
    assert [cell['text'] for cell in paper[2]] == ['sam', '94.00 ± 1.00 (3, ρ 0.1†)', '97.33 ± 0.58 (3, ρ 2†)']
    assert folders(page, paper[2][2]['all']) == ['on-2-0', 'on-2-1', 'on-2-2']
    assert folders(page, radii[2][3]['all']) == ['all-.1-0', 'all-.1-1', 'all-.1-2']
    assert radii[2][4]['text'].startswith('3 #')
    # a difference has two sides
    assert folders(page, differences[1][3]['all']) == [f'{name}-{seed}' for name in ('all-.1', 'plain')
                                                       for seed in (0, 1, 2)]
    assert folders(page, left_out[1][0]['links']) == ['half']
    for table in (paper, radii, differences):
        for cell in (cell for row in table[1:] for cell in row if '±' in cell['text'] or ' to ' in cell['text']):
            assert cell['links'] and cell['key'] is not None, cell
    back = {row[1]['text'].rpartition('/')[2]: row[-1]['links'] for row in runs[1:]}
    assert len(back) == 17 and back['half'] == []
    choice, radius = back['on-2-1']
    assert page.row(choice)[2] == '97.33 ± 0.58 (3, ρ 2†)' and page.row(radius)[:3] == ['sam', 'onlynorm', '2']
    assert len(back['on-1-1']) == 1  # not the chosen radius
    # what is in the page is in report.md, but for the list of runs
    for title in ('1. resnet10t on digits', 'Not averaged'):
        assert title in page.text and f'## {title}' in text
    assert 'arguments that differ' not in text


def test_runs_say_what_tells_them_apart(grid):
    page, _ = made(grid, '--no-plots')
    rows = {row[1]['text'].rpartition('/')[2]: [cell['text'] for cell in row] for row in page.tables[-1][1:]}
    assert rows['plain-1'][2:5] == ['finished', 'seed 1', '91.00']
    assert rows['on-2-0'][3] == 'seed 0, sam_variant sam, sam_rho 2, sam_params onlynorm'


def test_names_from_files_are_only_text(tmp_path):
    write_run(tmp_path / 'runs' / 'plain')
    acting = write_run(tmp_path / 'runs' / '<script>alert(1)<' / 'script>', model='<img src=x onerror=alert(1)>')
    file = write_results(tmp_path / 'r"\'<b>.json', [checkpoint(acting)], [0])
    file.write_text(file.read_text().replace('"imagenet-r"', '"<b>\\" onclick=\\"alert(1)"'))
    page, _ = made(tmp_path, '--no-plots', '--evaluations', file)
    assert page.raw['script'] and 'alert' not in page.raw['script'][0] and not {'b', 'img'} & set(page.tags)
    for name in ('<script>alert(1)</script>', '<img src=x onerror=alert(1)>', '<b>" onclick="alert(1)'):
        assert name in page.text
    (evaluated,) = [row for table in page.tables for row in table if row[0]['text'] == 'OOD']
    assert folders(page, evaluated[-1]['all']) == ['script>']


@pytest.mark.full
def test_figures_are_inside(grid):
    pytest.importorskip('matplotlib')
    page, text = made(grid)
    assert [words for _, words in page.images] == [
        f'{what}: resnet10t on digits' for what in command.PICTURES.values()]
    assert all(source.startswith('data:image/png;base64,') and len(source) > 10_000 for source, _ in page.images)
    assert text.count('.png)') == 3
