"""Parts of an evaluation by themselves: batches to scores, tables, names of columns, the journal."""
import csv
import io
import json
import logging
import statistics

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from timm_sam.cli.errors import OptionError
from timm_sam.evaluation import results, tables
from timm_sam.evaluation.journal import Journal, key_of
from timm_sam.evaluation.scoring import Batch, mean_of, score
from timm_sam.evaluation.sets.label_spaces import LabelSpace
from timm_sam.evaluation.subject import Subject
from timm_sam.evaluation.tables import Measure, short_names

# Scores


def subject(model):
    return Subject('name', None, None, model.eval(), 8, 0, {}, 1.0, torch.device('cpu'), None, torch.no_grad)


def batches(count=23, size=5):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 8, generator=generator), torch.randint(4, (count,), generator=generator)
    return x, y, list(zip(x.split(size), y.split(size)))


@pytest.mark.parametrize('log_freq', [1, 2, 3, 100])
@pytest.mark.parametrize('groups', [None, ((0,), (3,), (5, 6), (1,))])
def test_scores_are_those_of_all_images_at_once(groups, log_freq):
    x, y, loader = batches()
    space = LabelSpace('space', groups)
    found = score(subject(nn.Identity()), loader, range(5), space, 'Test', prefetcher=True, channels_last=False,
                  log_freq=log_freq)
    assert [(batch.index, batch.size) for batch in found] == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 3)]
    scores = mean_of(found)
    outputs = x if groups is None else torch.stack([x[:, list(group)].amax(dim=1) for group in groups], dim=1)
    right = [sum(int(label in row.topk(min(k, len(row))).indices) for row, label in zip(outputs, y)) for k in (1, 5)]
    assert (scores.images, scores.right1, scores.right5) == (23, *right)
    assert scores.top1 == pytest.approx(100 * right[0] / 23) and scores.top5 == pytest.approx(100 * right[1] / 23)
    assert scores.loss == pytest.approx(cross_entropy(outputs, y).item(), rel=1e-6)
    owner = {output: c for c, group in enumerate(groups or [(i,) for i in range(8)]) for output in group}
    plain = sum(owner.get(int(row.argmax())) == int(label) for row, label in zip(x, y))
    assert scores.right1_all == plain
    assert groups is None or plain != right[0]  # or the two could be mixed up


def test_log_lines_come_at_the_first_batch_every_so_many_and_the_last(caplog):
    caplog.set_level(logging.INFO, 'timm_sam.evaluation.scoring')
    for count, shown in ((5, [1, 3, 5]), (4, [1, 3, 4]), (1, [1])):
        caplog.clear()
        _, _, loader = batches(count * 5)
        score(subject(nn.Identity()), loader, range(count), LabelSpace('x'), 'Test', prefetcher=True,
              channels_last=False, log_freq=2)
        assert [int(line.split('[')[1].split('/')[0]) for line in caplog.messages] == shown


def test_batches_keep_their_place_in_the_data_set():
    _, _, loader = batches()
    mine = score(subject(nn.Identity()), loader[1::2], [1, 3], LabelSpace('x'), 'Test', prefetcher=True,
                 channels_last=False, log_freq=10)
    assert [batch.index for batch in mine] == [1, 3]
    assert score(subject(nn.Identity()), [], [], LabelSpace('x'), 'Test', prefetcher=True, channels_last=False,
                 log_freq=10) == []


def test_first_of_several_outputs_counts():
    class Two(nn.Module):
        def forward(self, x):
            return x, -x
    _, _, loader = batches()
    one, two = (mean_of(score(subject(model), loader, range(5), LabelSpace('x'), 'Test', prefetcher=True,
                              channels_last=False, log_freq=10)) for model in (nn.Identity(), Two()))
    assert one == two


def test_small_last_batch_counts_by_its_images():
    scores = mean_of([Batch(0, 9, 1.0, 100.0, 100.0), Batch(1, 1, 3.0, 0.0, 100.0)])
    assert (scores.images, scores.loss, scores.top1, scores.right1, scores.right5) == (
        10, pytest.approx(1.2), pytest.approx(90), 9, 10)


@pytest.mark.parametrize('size', [1, 3, 7, 256, 1000, 3001])
def test_percentages_are_turned_into_numbers_of_images_exactly(size):
    for right in {0, 1, size // 3, size - 1, size}:
        percent = (torch.tensor(float(right)) * 100. / size).item()  # as timm rounds it, in float32
        assert mean_of([Batch(0, size, 0.0, percent, percent)]).right1 == right


# Tables

def measures(value, flags=()):
    return [Measure('OOD', 'a|b', 'top1', 1234, flags, [value]),
            Measure('adversarial', 'val', 'l2 0.5', 5, (), [value]),
            Measure('ID', 'val', 'top1', 7, (), [value / 3])]


def test_checkpoints_are_put_side_by_side_in_the_order_of_groups():
    merged = tables.merge([measures(30.0, ['partial']), measures(60.0, ['partial', 'odd'])])
    assert [m.group for m in merged] == ['ID', 'OOD', 'adversarial']
    assert [m.values for m in merged] == [[10.0, 20.0], [30.0, 60.0], [30.0, 60.0]]
    assert merged[1].flags == ['partial', 'odd'] and merged[0].flags == []
    assert merged[1].mean == 45 and merged[1].std == pytest.approx(statistics.stdev([30, 60]))
    assert measures(1.0)[0].std is None


def test_table_in_every_format():
    merged = tables.merge([measures(30.0, ['partial']), measures(60.0)])
    text = tables.as_text(merged, ['x', 'y']).splitlines()
    assert text[0].split() == ['data', 'set', 'measure', 'images', 'x', 'y', 'mean', '±', 'std']
    assert text[3].split() == ['OOD', 'a|b', '(partial)', 'top1', '1,234', '30.00', '60.00', '45.00', '±', '21.21']
    assert len({len(line) for line in text}) == 1 and set(text[1]) == {'-'}
    rows = tables.as_markdown(merged, ['x', 'y']).splitlines()
    assert rows[3] == '| OOD | a&#124;b (partial) | top1 | 1,234 | 30.00 | 60.00 | 45.00 ± 21.21 |'
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(merged, ['x', 'y']))))
    assert rows[1] == dict(group='OOD', dataset='a|b', measure='top1', images='1234', x='30.0000', y='60.0000',
                           mean='45.0000', std='21.2132', flags='partial')
    content = json.loads(tables.as_json(merged, ['x', 'y'], {'seed': 1}))
    assert content['checkpoints'] == ['x', 'y'] and content['protocol'] == {'seed': 1}
    assert content['results'][0] == dict(group='ID', dataset='val', measure='top1', unit='%', images=7,
                                         values=[10.0, 20.0], non_finite=[0, 0], n=2, mean=15.0,
                                         std=statistics.stdev([10, 20]), flags=[])


def test_measures_have_units_digits_and_details_of_their_own():
    one, two = ([Measure('calibration', 'val', 'nll', 7, (), [value], [broken], 'nats', 4, [[broken]])]
                for value, broken in ((0.5, 0), (float('nan'), 7)))
    merged = tables.merge([one, two])
    assert merged[0].details == [[0], [7]] and merged[0].mean == 0.5
    assert '| calibration | val | nll (nats) | 7 | 0.5000 | nan non-finite |' in tables.as_markdown(merged, ['x', 'y'])
    text = tables.as_json(merged, ['x', 'y'], {})
    row = json.loads(text)['results'][0]
    assert (row['unit'], row['values'], row['details']) == ('nats', [0.5, None], [[0], [7]])
    assert 'NaN' not in text  # which is no JSON


@pytest.mark.parametrize('name, kind, expected', [
    ('', None, {}), ('', 'csv', {}),
    ('r.json', None, {'json': 'r.json'}),
    ('r', 'csv', {'csv': 'r'}),
    ('r.json', 'md', {'md': 'r.json'}),
    ('a.b/r', None, {'md': 'a.b/r.md', 'csv': 'a.b/r.csv', 'json': 'a.b/r.json'}),
])
def test_names_of_result_files(name, kind, expected):
    assert results.result_files(name, kind) == expected


@pytest.mark.parametrize('paths, names', [
    (['out/a/last.pth.tar'], ['out/a/last.pth.tar']),
    ([None], ['resnet']),
    (['out/a/last.pth', 'out/b/last.pth'], ['a', 'b']),
    (['out/a/last.pth', 'out/a/best.pth'], ['last.pth', 'best.pth']),
    (['out/a/1/last.pth', 'out/b/2/last.pth'], ['a/1', 'b/2']),
    (['out/last.pth', 'out/b/last.pth'], ['last.pth', 'b/last.pth']),
    (['a.pth', './a.pth'], ['a.pth', './a.pth']),
    (['/x/a.pth', 'x/a.pth'], ['/x/a.pth', 'x/a.pth']),
])
def test_columns_are_named_by_what_tells_checkpoints_apart(paths, names):
    assert short_names(paths, 'resnet') == names


# Journal

def test_keys_are_equal_if_all_that_they_are_made_of_is():
    base = dict(part='attack', radius=0.5, mean=(0.5, 0.5), place=3)
    assert key_of(**base) == key_of(**dict(reversed(base.items()))) == key_of(**{**base, 'mean': [0.5, 0.5]})
    changed = [key_of(**{**base, **change}) for change in (
        dict(radius=0.5 + 1e-15), dict(place=4), dict(part='scores'), dict(mean=(0.5, 0.25)), dict(more=None))]
    assert len({key_of(**base), *changed}) == 6


def test_journal_without_results_file_keeps_nothing_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal('', 0)
    journal.add('a', {'x': 1})
    journal.load()
    journal.remove()
    assert journal.done == {'a': {'x': 1}} and list(tmp_path.iterdir()) == []


def test_journals_of_all_ranks_are_read_and_removed_and_no_others(tmp_path):
    for name in ('r[1]', 'r1', 'r[1].more'):
        for rank in (0, 3):
            Journal(str(tmp_path / name), rank).add(f'{name} {rank}', {'x': rank / 7})
    journal = Journal(str(tmp_path / 'r[1]'), 1)
    journal.load()
    assert journal.done == {'r[1] 0': {'x': 0.0}, 'r[1] 3': {'x': 3 / 7}}
    journal.remove()
    assert len(list(tmp_path.iterdir())) == 4 and journal.files() == []


def test_journal_that_cannot_be_read_is_a_mistake(tmp_path):
    (tmp_path / 'r.journal.0.jsonl').write_bytes(b'\xff\xfe\n')
    with pytest.raises(OptionError, match=r'r\.journal\.0\.jsonl cannot be read .*--overwrite'):
        Journal(str(tmp_path / 'r'), 0).load()
