"""Evaluations that are stopped, and gone on with by --skip-existing: nothing is done twice, and nothing changes."""
import csv
import json
import os
import shutil
import signal

import pytest
import timm
import torch
from support.processes import Process, python
from support.validating import BASE, result, run_validate, sha256

import timm_sam.evaluation.attack.robustness
import timm_sam.evaluation.protocol
from timm_sam.cli.errors import OptionError
from timm_sam.evaluation.results import check_kept
from timm_sam.evaluation.tables import Measure, as_markdown, short_names

# 24 images in batches of 5, two radii: ten attacked batches
ATTACK = '--attack l2=0.05 linf=0.5/255 --attack-steps 3 --results-file r'
BATCHES = 10


@pytest.fixture
def command(fitted):
    return f'{fitted.base} --eval validation={fitted.data}/validation {ATTACK}'


@pytest.fixture
def counted(monkeypatch):
    """Counts the attacked batches and the scored sets; ``fail_at`` raises at that batch."""
    class Counted:
        attacks, scores, fail_at = 0, [], None
    attack, score = timm_sam.evaluation.attack.robustness.attack, timm_sam.evaluation.protocol.score

    def counting_attack(*args, **kwargs):
        if Counted.attacks == Counted.fail_at:
            raise KeyboardInterrupt
        Counted.attacks += 1
        return attack(*args, **kwargs)

    def counting_score(subject, loaded, places, space, title, **kwargs):
        Counted.scores.append(title)
        return score(subject, loaded, places, space, title, **kwargs)
    monkeypatch.setattr(timm_sam.evaluation.attack.robustness, 'attack', counting_attack)
    monkeypatch.setattr(timm_sam.evaluation.protocol, 'score', counting_score)
    return Counted


@pytest.fixture
def stop_after(counted, command, tmp_path):
    """Runs the evaluation until so many batches are attacked."""
    def run(count):
        counted.fail_at = count
        with pytest.raises(KeyboardInterrupt):
            run_validate(tmp_path, '', command)
        counted.fail_at, counted.attacks, counted.scores[:] = None, 0, []
    return run


@pytest.fixture(scope='module')
def whole(fitted, tmp_path_factory):
    """The folder of the evaluation that nothing interrupts."""
    folder = tmp_path_factory.mktemp('whole')
    result(run_validate(folder, f'--eval validation={fitted.data}/validation {ATTACK}', fitted.base))
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it, as the working directory."""
    return shutil.copytree(whole, tmp_path, dirs_exist_ok=True)


def files(folder):
    return {kind: (folder / f'r.{kind}').read_text() for kind in ('json', 'csv', 'md')}


def forget_tables(folder):
    """Leaves the journal, as an interrupted evaluation does."""
    for kind in ('json', 'csv', 'md'):
        (folder / f'r.{kind}').unlink()


def journal(folder):
    return sorted(line for path in folder.glob('r.journal.*.jsonl') for line in path.read_text().splitlines())


def test_attack_goes_on_at_the_first_unfinished_batch(counted, command, stop_after, whole, tmp_path):
    stop_after(3)
    assert [path.name for path in tmp_path.iterdir()] == ['r.journal.0.jsonl']
    assert len(journal(tmp_path)) == 1 + 3
    result(run_validate(tmp_path, '--skip-existing', command))
    assert counted.attacks == BATCHES - 3 and counted.scores == []
    assert files(tmp_path) == files(whole) and len(journal(tmp_path)) == 1 + BATCHES


def test_finished_evaluation_is_only_read(counted, command, whole, finished):
    before = journal(finished)
    result(run_validate(finished, '--skip-existing', command))
    assert counted.attacks == 0 and counted.scores == []
    assert files(finished) == files(whole) and journal(finished) == before


@pytest.mark.parametrize('torn', ['{"key": "0123', '{"key": "0123"}\n', '[1]\n', '\n', '{"value": {}}\n', 'null\n'])
def test_line_that_was_torn_is_done_again(counted, command, stop_after, whole, tmp_path, torn):
    stop_after(3)
    path = tmp_path / 'r.journal.0.jsonl'
    path.write_text(path.read_text() + torn)
    result(run_validate(tmp_path, '--skip-existing', command))
    assert counted.attacks == BATCHES - 3 and files(tmp_path) == files(whole)
    counted.attacks = 0
    run_validate(tmp_path, '--skip-existing', command)  # what was written after the torn line can be read too
    assert counted.attacks == 0


def test_half_of_the_last_line_is_done_again(counted, command, stop_after, whole, tmp_path):
    stop_after(3)
    path = tmp_path / 'r.journal.0.jsonl'
    os.truncate(path, path.stat().st_size - 7)
    result(run_validate(tmp_path, '--skip-existing', command))
    assert counted.attacks == BATCHES - 2 and files(tmp_path) == files(whole)


@pytest.mark.parametrize('change, attacks, scores', [
    ('--attack l2=0.05 linf=0.25/255', 5, 0),  # a radius is new, the other is kept
    ('--attack l2=0.06 linf=0.25/255', 10, 0),
    ('--attack l2=5e-2', 0, 0),  # the same radius
    ('--attack linf=0.05', 5, 0),  # the same number in another norm
    ('--attack-steps 2', 10, 0),
    ('--attack-targets 2', 10, 0),
    ('--attack-num-samples 12', 6, 0),
    ('--seed 3', 10, 0),
    ('-b 6', 8, 1),
    ('--channels-last', 10, 1),
    ('--no-prefetcher', 10, 1),
    ('--torchcompile eager', 10, 1),
    ('--img-size 40', 10, 1),
    ('--crop-pct 0.8', 10, 1),
    ('--use-ema', 10, 1),
    ('--log-freq 1 -j 1', 0, 0),  # changes no number
])
def test_what_changes_the_numbers_is_done_again_and_nothing_else(
        counted, command, finished, change, attacks, scores):
    forget_tables(finished)  # some of these would replace a row of them
    result(run_validate(finished, f'--skip-existing {change}', command))
    assert (counted.attacks, len(counted.scores)) == (attacks, scores)


@pytest.mark.parametrize('package', [timm, torch])
def test_other_version_of_what_computes_is_evaluated_again(counted, command, finished, package, monkeypatch):
    monkeypatch.setattr(package, '__version__', '99.0')
    result(run_validate(finished, '--skip-existing', command))
    assert (counted.attacks, counted.scores) == (BATCHES, ['validation'])


def test_weights_of_timm_are_told_apart_by_their_values(counted, fitted, tmp_path):
    path = tmp_path / 'weights.pth'
    shutil.copy(fitted.checkpoint, path)
    kwargs = f'''"pretrained_cfg_overlay={{'file': '{path}', 'num_classes': 6}}"'''
    command = (f'{BASE} --num-classes 6 --model-kwargs {kwargs} --eval validation={fitted.data}/validation '
               f'--results-file r --skip-existing')
    for _ in range(2):
        result(run_validate(tmp_path, '', command))
    assert counted.scores == ['validation']
    before = json.loads((tmp_path / 'r.json').read_text())['protocol']['checkpoints'][0]
    assert before['path'] is None and len(before['sha256']) == 64
    state = fitted.model.state_dict()
    torch.save({'state_dict': {**state, 'fc.bias': state['fc.bias'] + 0.1}}, path)
    assert 'r.json holds None (SHA-256' in run_validate(tmp_path, '', command).last_line
    forget_tables(tmp_path)
    result(run_validate(tmp_path, '', command))
    assert counted.scores == ['validation'] * 2


def test_other_weights_under_the_same_name_are_evaluated(counted, command, finished, fitted, tmp_path):
    path = tmp_path / 'weights.pth'
    command = f'{command} --checkpoint {path} --skip-existing'
    shutil.copy(fitted.checkpoint, path)
    result(run_validate(finished, '', command))
    assert (counted.attacks, counted.scores) == (0, [])  # the content counts, not the name
    state, before = fitted.model.state_dict(), sha256(path)
    torch.save({'state_dict': {**state, 'fc.bias': state['fc.bias'] + 0.1}}, path)
    assert f'r.json holds {path} (SHA-256 {before[:12]}), which is not' in run_validate(finished, '', command).last_line
    assert (counted.attacks, counted.scores) == (0, [])
    forget_tables(finished)
    result(run_validate(finished, '', command))
    assert (counted.attacks, counted.scores) == (BATCHES, ['validation'])


@pytest.mark.parametrize('kinds', ['json csv md', 'csv md', 'md'])
@pytest.mark.parametrize('change, lost', [
    ('--eval other={data}/validation --attack-set other', 'top1 of validation, ...'),
    ('--attack l2=0.05', 'linf 0.5/255 of validation,'),
    ('--checkpoint {other}', '{checkpoint}'),
])
def test_rows_of_an_existing_table_are_not_lost(
        counted, command, finished, fitted, tmp_path, tmp_path_factory, kinds, change, lost):
    for kind in {'json', 'csv', 'md'} - set(kinds.split()):
        (finished / f'r.{kind}').unlink()
    other = tmp_path_factory.mktemp('other') / 'other.pth'
    torch.save({'state_dict': {**fitted.model.state_dict(), 'fc.bias': torch.zeros(6)}}, other)
    before = {path.name: path.read_text() for path in finished.iterdir()}
    change = change.format(data=fitted.data, other=other)
    done = run_validate(finished, f'--skip-existing {change}', command)
    assert done.code == 2 and done.out == '' and (counted.attacks, counted.scores) == (0, [])
    lost = lost.format(checkpoint=fitted.checkpoint)
    assert f'--skip-existing: r.{kinds.split()[0]} holds {lost}' in done.last_line and '--overwrite' in done.last_line
    assert {path.name: path.read_text() for path in finished.iterdir()} == before


@pytest.mark.parametrize('kinds', ['json', 'json csv'])
def test_csv_or_markdown_alone_may_get_one_more_checkpoint_and_no_less(
        command, finished, fitted, tmp_path_factory, kinds):
    def leave():
        for kind in kinds.split():
            (finished / f'r.{kind}').unlink()

    leave()
    other = tmp_path_factory.mktemp('other') / 'other.pth'
    torch.save({'state_dict': {**fitted.model.state_dict(), 'fc.bias': torch.zeros(6)}}, other)
    both = f'--skip-existing --checkpoint {fitted.checkpoint} {other}'
    assert len(result(run_validate(finished, both, command))) == 2
    leave()
    assert len(result(run_validate(finished, both, command))) == 2
    leave()
    kept = 'md' if 'csv' in kinds else 'csv'
    assert f'r.{kept} holds' in run_validate(finished, '--skip-existing', command).last_line


@pytest.mark.parametrize('text', ['', '[]', '{"results": 5}', '{"key": "mine"}'])
def test_file_that_is_no_table_is_not_replaced_by_skip_existing(command, finished, text):
    (finished / 'r.json').write_text(text)
    done = run_validate(finished, '--skip-existing', command)
    assert done.code == 2 and '--skip-existing: r.json is no table of validate.py' in done.last_line
    assert (finished / 'r.json').read_text() == text


@pytest.mark.parametrize('text', ['', 'mine', '| a | b |\n|---|---|\n| 1 | 2 |\n'])
def test_page_that_is_no_table_is_not_replaced_by_skip_existing(command, finished, text):
    for kind in ('json', 'csv'):
        (finished / f'r.{kind}').unlink()
    (finished / 'r.md').write_text(text)
    done = run_validate(finished, '--skip-existing', command)
    assert done.code == 2 and '--skip-existing: r.md is no table of validate.py' in done.last_line
    assert (finished / 'r.md').read_text() == text


@pytest.mark.parametrize('name', ['plain', 'a|b_c', '_x_ & <y> &amp; `z` \\*', '#1 [x]$', 'tab\there', 'v (1)'])
def test_rows_of_markdown_are_known_again(tmp_path, name):
    flags = ['partial: 4 of 5 classes', 'seed 3']
    measures = [Measure('ID', name, 'top1', 5, flags, [1.0, 2.0]), Measure('ID', name, 'top5', 5, (), [1.0, 2.0]),
                Measure('calibration', name, 'nll', 5, (), [1.0, 2.0], unit='nats'),
                Measure('adversarial', name, 'l2 0.25 (standard)', 5, (), [1.0, 2.0])]
    rows = {(name, measure.name) for measure in measures}
    paths = ['runs/_a/#1.pth', 'runs/b|c/2.pth']
    (tmp_path / 'r.md').write_text(as_markdown(measures, short_names(paths, '')))
    kept = {'md': str(tmp_path / 'r.md')}
    check_kept(kept, paths, [], rows)
    for lost in rows:
        with pytest.raises(OptionError, match='which is not evaluated now'):
            check_kept(kept, paths, [], {('other', 'top1'), (name, 'l2 0.25'), *rows} - {lost})
    for lost in paths:
        with pytest.raises(OptionError, match='which is not evaluated now'):
            check_kept(kept, [path for path in paths if path != lost], [], rows)


def test_quote_that_never_ends_is_no_table(tmp_path):
    path = tmp_path / 'r.csv'
    path.write_text('group,dataset,measure\na,"' + 'x' * csv.field_size_limit())
    with pytest.raises(OptionError, match='--skip-existing: .*r.csv is no table of validate.py'):
        check_kept({'csv': str(path)}, [], [], [])


def test_other_images_under_the_same_name_of_the_set_are_evaluated(counted, command, finished, fitted, tmp_path):
    data = shutil.copytree(fitted.data / 'validation', tmp_path / 'copy')
    command = f'{command} --eval validation={data} --skip-existing'
    result(run_validate(finished, '', command))
    assert (counted.attacks, counted.scores) == (0, [])  # the folder may move
    shutil.copy(fitted.data / 'train' / 'grey0' / '7.png', data / 'grey0' / '7.png')
    result(run_validate(finished, '', command))
    assert (counted.attacks, counted.scores) == (BATCHES, ['validation'])


def test_one_more_set_is_added_to_what_is_done(counted, command, finished, whole, fitted):
    more = f'--eval validation={fitted.data}/validation more={fitted.data}/train --skip-existing'
    result(run_validate(finished, more, command))
    assert (counted.attacks, counted.scores) == (0, ['more'])
    before, after = (json.loads((folder / 'r.json').read_text())['results'] for folder in (whole, finished))
    assert [row for row in after if row['dataset'] != 'more'] == before and len(after) == len(before) + 2


def test_one_more_checkpoint_is_added_to_what_is_done(counted, command, finished, fitted, tmp_path):
    state = fitted.model.state_dict()
    torch.save({'state_dict': {**state, 'fc.bias': state['fc.bias'] + 0.1}}, tmp_path / 'second.pth')
    both = f'--checkpoint {fitted.checkpoint} {tmp_path}/second.pth --skip-existing'
    assert len(result(run_validate(finished, both, command))) == 2
    assert (counted.attacks, counted.scores) == (BATCHES, ['validation'])


def test_overwrite_starts_anew(counted, command, finished, whole):
    result(run_validate(finished, '--overwrite', command))
    assert (counted.attacks, counted.scores) == (BATCHES, ['validation'])
    assert files(finished) == files(whole) and len(journal(finished)) == 1 + BATCHES


@pytest.mark.parametrize('left', ['r.json', 'r.md', 'r.journal.0.jsonl', 'r.journal.5.jsonl'])
def test_existing_results_are_refused_and_kept_without_either_flag(counted, command, tmp_path, left):
    (tmp_path / left).write_text('{"key": "mine"}\n')
    done = run_validate(tmp_path, '', command)
    assert done.code == 2 and done.out == '' and 'Traceback' not in done.err
    assert f'{left} exists; add --skip-existing' in done.last_line and '--overwrite' in done.last_line
    assert [path.name for path in tmp_path.iterdir()] == [left]
    assert (tmp_path / left).read_text() == '{"key": "mine"}\n' and counted.scores == []


def test_mistake_beside_overwrite_removes_nothing(command, finished, whole):
    before = journal(finished)
    for mistake in ('--attack-set nosuch', '--eval validation=nowhere', '--checkpoint nowhere.pth', '--num-classes 7'):
        assert run_validate(finished, f'--overwrite {mistake}', command).code == 2
        assert files(finished) == files(whole) and journal(finished) == before


def test_unreadable_image_in_the_attacked_set_keeps_what_was_done(counted, command, fitted, tmp_path):
    """Scoring sees all images, so that only an image that breaks meanwhile is met by the attack first."""
    data = shutil.copytree(fitted.data / 'validation', tmp_path / 'data')
    attack = timm_sam.evaluation.attack.robustness.attack
    broken = data / 'grey5' / '0.png'
    content = broken.read_bytes()

    def breaking_attack(*args, **kwargs):
        broken.write_bytes(b'\0' * len(content))  # the size is part of the set's fingerprint
        return attack(*args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_sam.evaluation.attack.robustness, 'attack', breaking_attack)
        done = run_validate(tmp_path, f'--eval validation={data}', command)
    assert done.code == 2 and f'cannot read the image {broken}' in done.last_line and 'Traceback' not in done.err
    broken.write_bytes(content)
    done_before, counted.attacks = counted.attacks, 0
    assert 0 < done_before < BATCHES
    result(run_validate(tmp_path, f'--eval validation={data} --skip-existing', command))
    assert counted.attacks == BATCHES - done_before


HANGS = """
import sys, time
import timm_sam.evaluation.attack.robustness as robustness
from timm_sam import validate
attack, calls = robustness.attack, []
def hanging(*args, **kwargs):
    calls.append(1)
    if len(calls) == 4:
        print('the fourth attack hangs', flush=True)
        time.sleep(600)
    return attack(*args, **kwargs)
robustness.attack = hanging
validate.main(sys.argv[1:])
"""


def test_killed_process_is_gone_on_with(counted, command, whole, tmp_path):
    with Process(python('-c', HANGS, *command.split()), tmp_path) as process:
        process.wait_for('the fourth attack hangs')
        process.signal(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ['r.journal.0.jsonl'] and len(journal(tmp_path)) == 4
    result(run_validate(tmp_path, '--skip-existing', command))
    assert counted.attacks == BATCHES - 3 and files(tmp_path) == files(whole)
