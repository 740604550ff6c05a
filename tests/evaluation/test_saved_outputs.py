"""validate.py --save-outputs: a file per checkpoint and data set, whole at any time, the same on any ranks."""
import json
import os

import numpy as np
import pytest
import torch
from support.processes import run_in_turn
from support.validating import labelled, preprocessed, result, run_validate, sha256

from timm_sam.evaluation.outputs import Outputs, read
from timm_sam.evaluation.sets.label_spaces import LabelSpace
from timm_sam.evaluation.sets.suites import Suite

KEEP = '--calibration --save-outputs logits --results-file r'


@pytest.fixture(scope='module')
def command(fitted):
    return f'{fitted.base} --eval validation={fitted.data}/validation a/b={fitted.data}/train {KEEP}'


@pytest.fixture(scope='module')
def saved(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')
    result(run_validate(folder, '', command))
    return folder


def content(path):
    with np.load(path) as found:
        return dict(found)


def details(folder):
    rows = json.loads((folder / 'r.json').read_text())['results']
    return {row['dataset']: row['details'] for row in rows if row['measure'] == 'top1'}


def test_outputs_are_those_of_the_model_image_by_image(fitted, saved):
    short = sha256(fitted.checkpoint)[:12]
    assert details(saved) == {'validation': [f'r.outputs/{short}-validation.npz'],
                              'a/b': [f'r.outputs/{short}-a%2Fb.npz']}
    paths, targets = labelled(fitted.data / 'validation')
    with torch.no_grad():
        logits = fitted.model(preprocessed(paths, fitted.model))
    found = content(saved / 'r.outputs' / f'{short}-validation.npz')
    assert found['names'].tolist() == [f'{path.parent.name}/{path.name}' for path in paths]
    assert found['targets'].tolist() == targets.tolist()
    assert found['predictions'].tolist() == logits.argmax(1).tolist()
    assert found['right'].tolist() == (logits.argmax(1) == targets).tolist() and 0 < found['right'].mean() < 1
    assert found['logits'].dtype == np.float16
    np.testing.assert_allclose(found['logits'], logits, rtol=2e-3, atol=2e-3)
    rows = json.loads((saved / 'r.json').read_text())['results']
    assert rows[0]['values'] == [pytest.approx(100 * found['right'].mean())]
    read_again = read(str(saved / 'r.outputs' / f'{short}-validation.npz'))
    assert read_again.names == found['names'].tolist() and (read_again.right == found['right']).all()


def test_what_is_missing_or_torn_is_done_again_and_nothing_else(saved, command, monkeypatch):
    import timm_sam.evaluation.protocol as protocol
    score, scored = protocol.score, []

    def noting(subject, loaded, places, space, title, **kwargs):
        scored.append(title)
        return score(subject, loaded, places, space, title, **kwargs)
    monkeypatch.setattr(protocol, 'score', noting)
    files = sorted((saved / 'r.outputs').iterdir())
    before = {path: path.read_bytes() for path in [*files, saved / 'r.json']}
    result(run_validate(saved, '--skip-existing', command))
    assert scored == []
    os.truncate(files[0], 100)
    result(run_validate(saved, '--skip-existing', command))
    assert scored == ['a/b']
    files[1].unlink()
    result(run_validate(saved, '--skip-existing', command))
    assert scored == ['a/b', 'validation'] and {path: path.read_bytes() for path in before} == before
    # predictions are in what has logits; logits of other images are others
    result(run_validate(saved, '--skip-existing --save-outputs predictions', command))
    assert len(scored) == 2


def test_file_that_cannot_be_written_is_one_line_and_leaves_nothing(fitted, command, tmp_path):
    (tmp_path / 'r.outputs').write_text('mine')
    done = run_validate(tmp_path, '', command)
    assert done.code == 2 and '--results-file r: r.outputs exists' in done.last_line
    done = run_validate(tmp_path, '--overwrite', command)
    assert done.code == 2 and '--save-outputs: r.outputs/' in done.last_line and done.err.count('error:') == 1
    assert (tmp_path / 'r.outputs').read_text() == 'mine'


@pytest.mark.parametrize('options, words', [
    ('--save-outputs logits --eval v={data}/validation', '--save-outputs logits needs --results-file'),
    ('--save-outputs logits --data-dir {data}', '--save-outputs has no effect without --eval')])
def test_outputs_need_suites_and_a_place(fitted, tmp_path, options, words):
    done = run_validate(tmp_path, options.format(data=fitted.data), fitted.base)
    assert done.code == 2 and words in done.last_line


@pytest.fixture
def keeper(tmp_path):
    suite = Suite('x', '/x', [('/x/a/1.png', 0), ('/x/b/\udcff.png', 1)], LabelSpace('x'), 'id', 2)
    return Outputs(str(tmp_path / 'r'), 'logits'), suite


def test_odd_names_and_numbers_beyond_float16(keeper):
    outputs, suite = keeper
    logits = torch.tensor([[1e6, -1e6], [torch.nan, torch.inf]])
    kept = {name: value.numpy() for name, value in outputs.look(
        logits, logits, torch.tensor([0, 1]), suite.space).items()}
    path = outputs.path('a' * 64, suite)
    outputs.write(path, suite, 'key', kept)
    assert outputs.holds(path, 'key') and not outputs.holds(path, 'other') and not outputs.holds('nothing', 'key')
    assert content(path)['logits'].tolist()[0] == [65504, -65504]
    assert np.isnan(content(path)['logits'][1, 0]) and np.isposinf(content(path)['logits'][1, 1])
    assert read(path).names == ['a/1.png', 'b/\udcff.png'] and read(path).right[0]
    assert sorted(os.listdir(outputs.folder)) == [os.path.basename(path)]


@pytest.mark.parametrize('made', ['missing', 'torn', 'foreign'])
def test_file_of_another_kind_is_said_to_be_one(keeper, tmp_path, made):
    path = tmp_path / 'x.npz'
    if made == 'torn':
        path.write_bytes(b'PK')
    if made == 'foreign':
        np.savez(path, names=np.array(['a']), right=np.array([1.5]))
    with pytest.raises(ValueError, match=r'x\.npz'):
        read(str(path))


@pytest.mark.slow
def test_three_processes_write_the_files_of_one_byte_for_byte(command, saved, tmp_path):
    run_in_turn('support.evaluations', {'three': command}, tmp_path, ranks=3)
    assert json.loads((tmp_path / 'three.0.log').read_text())[0] == 0
    kept = [{path.relative_to(folder): path.read_bytes() for path in [
        *(folder / 'r.outputs').iterdir(), *(folder / f'r.{kind}' for kind in ('json', 'csv', 'md'))]}
        for folder in (saved, tmp_path)]
    assert kept[0] == kept[1] and len(kept[0]) == 5
