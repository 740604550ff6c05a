"""The flatness card: its price, its pages, what it takes from validate.py, and going on with it."""
import json
import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
from support.running import in_process
from support.validating import BASE, run_validate

from timm_sam.analyze import __main__ as analyze
from timm_sam.analyze import hessian, options
from timm_sam.analyze.card import Card, images_for, per_image
from timm_sam.analyze.inputs import IMAGES
from timm_sam.evaluation.evaluated import read_cards

SMALL = ('--m 6 --num-images 12 --rank-images 18 --measure worst-linf=0.003 average-l2=0.1 --steps 2 --draws 2 '
         '--probes 2 --iterations 20 --tolerance 0.3 --rho 0.2')


def run(cwd, fitted, more):
    line = (f'card {BASE.replace(" -b 5", "")} --num-classes 6 --data-dir {fitted.data} '
            f'--checkpoint {fitted.checkpoint} --out out {more}')
    return in_process(analyze.main, shlex.split(line), cwd)


def defaults():
    args = options.build_parser('card').parse_args([])
    options.COMMANDS['card'].settle(args)
    return args


class Passes:
    """Images that pass through a model while a card is measured, in forward passes: 3 of a gradient, 7 of a product."""

    def __init__(self):
        self.count = 0

    def measure(self, measures):
        def measured(card, subject, number):
            # hooked where every forward comes by, of which some leave the model's own out
            with subject.model.bn1.register_forward_pre_hook(lambda module, inputs: self.add(len(inputs[0]))):
                return measures(card, subject, number)
        return measured

    def add(self, images):
        self.count += images * (3 if torch.is_grad_enabled() else 1)

    def product(self, product):
        def counted(*args):
            before = self.count
            found = product(*args)
            self.count = before + (self.count - before) // 3 * 7
            return found
        return counted


@pytest.fixture(scope='module')
def made(fitted, tmp_path_factory):
    """A card, with results of validate.py."""
    folder, passes = tmp_path_factory.mktemp('card'), Passes()
    done = run_validate(folder, f'--num-classes 6 --checkpoint {fitted.checkpoint} --eval val={fitted.data}/train '
                                f'--results-file results.json')
    assert done.code == 0, done.err[-3000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Card, 'measures', passes.measure(Card.measures))
        patch.setattr(hessian, 'product', passes.product(hessian.product))
        done = run(folder, fitted, f'{SMALL} --evaluations results.json')
    assert done.code == 0, done.err[-3000:]
    page, = (folder / 'out').glob('card-*.json')
    return SimpleNamespace(folder=folder, done=done, page=page, content=json.loads(page.read_text()), passes=passes)


def test_price_that_is_said_is_the_price(made):
    said = int(re.search(r'at most ([\d,]+) forward passes', made.done.err)[1].replace(',', ''))
    top = made.content['details']['top eigenvalue']
    assert said == made.content['protocol']['analysis']['forwards'] == 12 * (3 * 3 + 2 + 3 + 21 + 7 * 22) + 18
    assert made.passes.count == said - 12 * 7 * (20 - top['steps'])
    assert f'as many as {said / 180:.2f} epochs of training on the 60 images of train, which take 180' in made.done.err
    assert made.done.err.index('at most') < made.done.err.index('Left: ')


def test_page_has_what_the_table_has(made):
    table = json.loads((made.folder / 'out/card.json').read_text())
    assert made.content['measures'] == {row['measure']: row['values'][0] for row in table['results']}
    names = list(made.content['measures'])
    assert names[:4] == ['worst-linf 0.003', 'average-l2 0.1', 'loss', 'rise sam-all rho=0.2']
    assert {'rank layer3 0.99', 'top eigenvalue', 'trace', 'standard error of the trace', 'norm weight mean',
            'norm bias max_abs'} <= {*names}
    losses = dict(made.content['details']['rise sam-all rho=0.2']['losses'])
    assert len(losses) == 21 and losses[0] == made.content['measures']['loss']
    assert losses[1] - losses[0] == made.content['measures']['rise sam-all rho=0.2'] > 0
    markdown, html = (made.page.with_suffix(ending).read_text() for ending in ('.md', '.html'))
    assert all(name in markdown and name in html for name in names if name != 'standard error of the trace')
    assert f']({made.page.stem}.png)' in markdown and 'data:image/png;base64,' in html
    assert made.page.with_suffix('.png').read_bytes().startswith(b'\x89PNG')


def test_table_is_what_the_report_reads(made):
    card, = read_cards([str(made.folder / 'out/card.json')])
    assert card.sha256 == made.content['sha256']
    assert {key.measure: number.value for key, number in card.numbers.items()} == made.content['measures']


def test_norm_layers_are_those_of_the_weights(made, fitted):
    gamma = torch.cat([p.detach() for name, p in fitted.model.named_parameters()  # no others here
                       if name.endswith('weight') and p.ndim == 1]).double()
    found = made.content['measures']
    assert found['norm weight mean'] == pytest.approx(float(gamma.mean()))
    assert found['norm weight max_abs'] == pytest.approx(float(gamma.abs().max()))
    assert sum(made.content['details']['norm weight mean']['shares']) == pytest.approx(1)


def test_evaluations_are_joined_by_the_checkpoint(made, fitted, tmp_path):
    results = json.loads((made.folder / 'results.json').read_text())
    assert made.content['sha256'] == results['protocol']['checkpoints'][0]['sha256'] in made.page.with_suffix(
        '.md').read_text()
    expected = {row['measure']: row['values'][0] for row in results['results'] if row['group'] == 'ID'}
    assert made.content['evaluations'] == {'ID': {'val': expected}} and 'top1' in expected
    # of another checkpoint: nothing is taken, and that is said; nothing is measured again
    results['protocol']['checkpoints'][0]['sha256'] = '0' * 64
    (tmp_path / 'others.json').write_text(json.dumps(results))
    shutil.copytree(made.folder / 'out', tmp_path / 'out')
    done = run(tmp_path, fitted, f'{SMALL} --evaluations others.json --skip-existing')
    assert done.code == 0 and '--evaluations: none is of ' in done.err and 'Left: ' not in done.err
    page = json.loads((tmp_path / 'out' / made.page.name).read_text())
    assert page == {**made.content, 'evaluations': {}}


def test_interrupted_card_goes_on(made, fitted, tmp_path):
    shutil.copytree(made.folder / 'out', tmp_path / 'out')
    journal = tmp_path / 'out/card.journal.0.jsonl'
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * 2 + 2 + 2 + 3  # batches of sharpness and of the line, layers, eigenvalue and probes
    journal.write_text(''.join(lines[:-2]))
    done = run(tmp_path, fitted, f'{SMALL} --evaluations {made.folder}/results.json --skip-existing')
    assert done.code == 0 and 'Hessian' in done.err and 'Sharpness: ' not in done.err
    for path in (made.folder / 'out').iterdir():
        if path.suffix in ('.json', '.md', '.csv', '.html'):
            assert (tmp_path / 'out' / path.name).read_text() == path.read_text()


def test_defaults_take_no_more_than_an_epoch():
    args = defaults()
    each = per_image(args)
    assert each == 3 * 21 + 20 + 3 + 21 + 7 * 60
    for there, spent, expected in ((1_281_167, IMAGES, IMAGES), (50_000, IMAGES, 256), (100_000, 5 * IMAGES, 512)):
        images = images_for(there, spent, each, args.m)
        assert images == expected and images * each + spent <= 3 * there
        assert images == IMAGES or (images + args.m) * each + spent > 3 * there
    assert images_for(20_000, IMAGES, each, args.m) == 0 == images_for(60, 200, each, 6)


@pytest.mark.parametrize('more, words', [
    ('--m 6', '--m 6: with 527 passes over a batch and 60 for the rank, a card takes more than an epoch over the 60'),
    ('--rank-images 61 --num-images 128', '--rank-images 61: train has 60 images'),
    ('--evaluations nothing.json', '--evaluations nothing.json: there is no such file'),
    ('--probes 1', '--probes 1 must be >= 2'), ('--rank-images 0', '--rank-images 0 must be >= 1'),
    ('--variant sam fisher --rho 0.1 0.2 0.3', '--rho 0.1 0.2 0.3: give one, or one for each of sam fisher'),
])
def test_mistakes_of_card(fitted, tmp_path, more, words):
    done = run(tmp_path, fitted, more)
    assert done.code == 2 and done.out == '' and 'Traceback' not in done.err
    assert words in done.err.strip().splitlines()[-1], done.err[-500:]
    assert not [path for path in tmp_path.glob('out/*') if path.suffix != '.txt']
