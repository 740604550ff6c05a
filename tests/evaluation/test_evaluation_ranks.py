"""validate.py under torchrun, on two gloo processes: the files and numbers of one process, whatever the shares."""
import gc
import json
import shutil
import weakref

import pytest
import torch
from PIL import Image
from support.places import ROOT
from support.processes import RANKS, errors, run, run_in_turn, torchrun
from support.validating import labelled, result, run_validate

import timm_sam.evaluation.attack.robustness
import timm_sam.evaluation.ranks
from timm_sam.cli.errors import OptionError
from timm_sam.evaluation.ranks import Ranks, batches_of
from timm_sam.evaluation.session import check_same
from timm_sam.evaluation.sets.label_spaces import LabelSpace
from timm_sam.evaluation.sets.suites import Suite
from timm_sam.evaluation.single import with_smaller_batches


def commands(fitted, real):
    """name -> options after the base."""
    data = f'--data-dir {fitted.data}'
    suites = f'--eval validation={fitted.data}/validation train={fitted.data}/train'
    attack = '--attack l2=0.05 linf=0.5/255 --attack-steps 3 --attack-num-samples 17'
    return {
        'single': f'{data} --metrics-avg macro --results-file single.csv',
        'one_batch': f'{data} -b 100 -j 1',  # the second rank has nothing to do
        'no_prefetcher': f'{data} -b 100 --no-prefetcher',
        'class_map': f'{data} --valid-labels valid.txt',
        'real': f'--data-dir {real} --real-labels {real}/real.json',
        'folder': f'{data} --checkpoint folder --results-file folder.csv',
        'suites': f'{suites} {attack} --calibration --save-outputs logits --results-file suites',
        'one_batch_attacked': f'{suites} {attack} -b 100 --results-file one_batch',
        'continued': f'{suites} {attack} --results-file continued --skip-existing',
        'memory': f'{data} --retry',
        'memory_folder': f'{data} --checkpoint folder -b 4',
    }


@pytest.fixture(scope='module')
def real(fitted, tmp_path_factory):
    """Images with the names of ImageNet's, and their real labels."""
    folder = tmp_path_factory.mktemp('real')
    paths, _ = labelled(fitted.data / 'validation')
    for i, path in enumerate(paths):
        to = folder / 'validation' / f'n{i % 5}' / f'ILSVRC2012_val_{i + 1:08d}.JPEG'
        to.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.save(to, 'JPEG')
    (folder / 'real.json').write_text(json.dumps([[i % 6, 5] if i % 4 else [] for i in range(len(paths))]))
    return folder


def prepare(folder, fitted):
    """What the commands need in their working directory."""
    (folder / 'folder').mkdir()
    shutil.copy(fitted.checkpoint, folder / 'folder' / 'a.pth')
    state = fitted.model.state_dict()
    torch.save({'state_dict': {**state, 'fc.bias': state['fc.bias'] + torch.arange(6.0)}}, folder / 'folder' / 'b.pth')
    (folder / 'valid.txt').write_text('5\n4\n3\n2\n1\n0\n')
    return folder


@pytest.fixture(scope='module')
def alone(fitted, real, tmp_path_factory):
    """The folder and the results of one process."""
    folder = prepare(tmp_path_factory.mktemp('alone'), fitted)
    return folder, {name: run_validate(folder, command, fitted.base)
                    for name, command in commands(fitted, real).items()}


@pytest.fixture(scope='module')
def together(fitted, real, tmp_path_factory):
    """The folder and, per rank, (code, stdout, stderr) of two processes."""
    folder = prepare(tmp_path_factory.mktemp('together'), fitted)
    runs = commands(fitted, real)
    # what one process has begun: three of its attacked batches
    attack, calls = timm_sam.evaluation.attack.robustness.attack, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return attack(*args, **kwargs)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(timm_sam.evaluation.attack.robustness, 'attack', stopping)
        run_validate(folder, runs['continued'], fitted.base)
    run_in_turn('support.evaluations', {name: f'{fitted.base} {command}' for name, command in runs.items()}, folder)
    return folder, {name: [json.loads((folder / f'{name}.{rank}.log').read_text()) for rank in range(RANKS)]
                    for name in runs}


SINGLE = ['single', 'one_batch', 'no_prefetcher', 'class_map', 'real', 'folder']
SUITES = ['suites', 'one_batch_attacked', 'continued']


@pytest.mark.parametrize('name', SINGLE + SUITES)
def test_two_processes_print_what_one_prints_and_the_second_prints_nothing(alone, together, name):
    first, second = together[1][name]
    one = alone[1][name]
    assert one.code == 0, one.err
    assert first[:2] == [0, one.out] and second[:2] == [0, '']
    assert '--result' in one.out


@pytest.mark.parametrize('file', [
    'single.csv', 'folder.csv', *(f'{name}.{kind}' for name in ('suites', 'one_batch', 'continued')
                                  for kind in ('json', 'csv', 'md'))])
def test_two_processes_write_the_files_of_one_byte_for_byte(alone, together, file):
    assert (together[0] / file).read_bytes() == (alone[0] / file).read_bytes()


def test_two_processes_keep_the_outputs_of_one_byte_for_byte(alone, together):
    kept = [{path.name: path.read_bytes() for path in (folder / 'suites.outputs').iterdir()}
            for folder, _ in (alone, together)]
    assert kept[0] == kept[1] and len(kept[0]) == 2


def test_nothing_else_is_written_by_two_processes_but_a_second_journal(alone, together):
    def names(folder):
        return {path.name for path in folder.iterdir() if path.suffix != '.log'} - {'runs.json'}
    assert names(together[0]) - names(alone[0]) == {'suites.journal.1.jsonl', 'continued.journal.1.jsonl'}


def entries(folder, name, rank):
    return [json.loads(line) for line in (folder / f'{name}.journal.{rank}.jsonl').read_text().splitlines()]


def test_attacked_batches_are_shared_and_none_is_attacked_twice(alone, together):
    shares = [entries(together[0], 'suites', rank) for rank in range(RANKS)]
    # 17 images in four batches, two radii; the first rank writes down the scores of the two sets too
    assert [len(share) for share in shares] == [2 + 4, 4]
    # the same floats too: averages are taken in the order of the data set
    assert {e['key']: e['value'] for share in shares for e in share} == {
        e['key']: e['value'] for e in entries(alone[0], 'suites', 0)}


def test_two_processes_go_on_with_what_one_has_begun(alone, together):
    shares = [entries(together[0], 'continued', rank) for rank in range(RANKS)]
    # three of eight were done: the second radius of the second batch is left, and two batches
    assert [len(share) for share in shares] == [2 + 3 + 1 + 2, 2]
    keys = [entry['key'] for share in shares for entry in share]
    assert len(set(keys)) == len(keys) == 10


def test_one_process_goes_on_with_what_two_have_begun(alone, together, fitted, real, tmp_path, monkeypatch):
    for rank in range(RANKS):
        lines = (together[0] / f'suites.journal.{rank}.jsonl').read_text().splitlines(keepends=True)
        (tmp_path / f'suites.journal.{rank}.jsonl').write_text(''.join(lines[:-1]))
    attack, calls = timm_sam.evaluation.attack.robustness.attack, []
    monkeypatch.setattr(
        timm_sam.evaluation.attack.robustness, 'attack', lambda *a, **kw: calls.append(1) or attack(*a, **kw))
    result(run_validate(tmp_path, f'{commands(fitted, real)["suites"]} --skip-existing', fitted.base))
    assert len(calls) == 2
    for kind in ('json', 'csv', 'md'):
        assert (tmp_path / f'suites.{kind}').read_text() == (alone[0] / f'suites.{kind}').read_text()


def test_memory_that_is_short_on_one_rank_makes_batches_smaller_on_all(alone, together):
    for rank, (code, out, err) in enumerate(together[1]['memory']):
        assert code == 0
        assert out == (alone[1]['memory'].out if rank == 0 else '')
        tried = [line.split('trying --batch-size ')[1] for line in err.splitlines() if 'trying' in line]
        assert tried == ['4', '3']
    assert together[1]['memory_folder'][0][1] == alone[1]['memory_folder'].out


def ends_with_one_line(done, words):
    """The two processes have ended by a mistake in the options, and one of them has said so."""
    lines = errors(done, 'validate.py')
    assert done.code != 0 and done.out == '' and len(lines) == 1 and words in lines[0], done.err[-3000:]
    # torchrun's own report of the exit codes
    assert 'exitcode  : 2' in done.err and 'exitcode  : 1' not in done.err


@pytest.mark.parametrize('mode', [pytest.param('single', marks=pytest.mark.slow), 'suites'])
def test_unreadable_image_of_the_second_rank_is_one_line_and_code_2(fitted, tmp_path, mode):
    data = tmp_path / 'data'
    shutil.copytree(fitted.data, data)
    images, _ = labelled(data / 'validation')
    broken = images[7]  # of the second batch
    broken.write_bytes(b'no image')
    options = {'single': f'--data-dir {data} -j 1',
               'suites': f'--eval validation={data}/validation --attack l2=1 --results-file r'}[mode]
    done = run(torchrun(ROOT / 'validate.py', *fitted.base.split(), *options.split()), tmp_path)
    ends_with_one_line(done, str(broken))
    assert 'validate.py", line' not in done.err
    assert not list(tmp_path.glob('r*'))


FAILS = """
import os, sys, torch
import timm_sam.evaluation.session as session
from timm_sam import validate
from timm_sam.cli.errors import OptionError
def failing(*args, **kwargs):
    if os.environ['RANK'] == '1':
        raise {error}
    return done(*args, **kwargs)
done, session.{function} = session.{function}, failing
sys.exit(validate.main(sys.argv[1:]))
"""


@pytest.mark.parametrize('function, error, words', [
    ('build_subject', 'torch.OutOfMemoryError("CUDA out of memory")', '--batch-size 5 is too large'),
    pytest.param('open_suites', 'OptionError("mine")', 'error: mine', marks=pytest.mark.slow)])
def test_mistake_that_only_the_second_rank_meets_is_printed(fitted, tmp_path, function, error, words):
    (tmp_path / 'run.py').write_text(FAILS.format(function=function, error=error))
    ends_with_one_line(run(torchrun(
        'run.py', *fitted.base.split(), '--eval', f'validation={fitted.data}/validation'), tmp_path), words)


# Ranks without processes

def test_ranks_that_see_other_files_are_an_error_on_all(monkeypatch):
    def suite(name, fingerprint):
        made = Suite(name, f'/{name}', [], LabelSpace('x'), 'id', 4)
        made.__dict__['samples_sha256'] = fingerprint
        return made
    here = [suite('a', '1'), suite('b', '2')]
    for there, named in (([('a', '1'), ('b', '2')], None), ([('a', '1'), ('b', '3')], 'b'), ([('a', '1')], 'b'),
                         ([('a', '1'), ('b', '2'), ('c', '3')], 'c')):
        ranks = Ranks()
        monkeypatch.setattr(ranks, 'gather', lambda mine, there=there: [mine, mine, (dict(there), None)])
        if named is None:
            check_same(here, ranks)
            continue
        with pytest.raises(OptionError, match=f'--eval {named}: rank 2 does not see the files that rank 0 sees; give'):
            check_same(here, ranks)


SEES = """
import os, sys
import timm_sam.evaluation.session as session
from timm_sam import validate
opened = session.open_suites
def other(*args, **kwargs):
    suites = opened(*args, **kwargs)
    if os.environ['RANK'] == '1':
        del suites[0].samples[-1]
    return suites
session.open_suites = other
sys.exit(validate.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_second_rank_with_one_file_less_ends_the_evaluation(fitted, tmp_path):
    (tmp_path / 'run.py').write_text(SEES)
    ends_with_one_line(run(torchrun(
        'run.py', *fitted.base.split(), '--eval', f'validation={fitted.data}/validation'), tmp_path),
        'rank 1 does not see')


def test_every_batch_is_in_one_share():
    batches = batches_of(range(23), 5)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3] and sum(batches, []) == list(range(23))
    assert batches_of([], 5) == []
    for count in (1, 2, 3, 7):
        ranks = [Ranks() for _ in range(count)]
        for i, r in enumerate(ranks):
            r.count, r.rank = count, i
        shares = [r.share(range(5)) for r in ranks]
        assert sorted(sum(shares, [])) == list(range(5)) and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_attempt_that_ran_out_of_memory_leaves_nothing_behind_for_the_next():
    models, alive = [], []

    def share():
        model = torch.nn.Linear(2, 2)
        alive.append(sum(other() is not None for other in models))
        models.append(weakref.ref(model))
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')

    ranks = Ranks()
    gc.disable()  # which would find them some time
    try:
        result = with_smaller_batches(lambda batch_size: ranks.run(share), 'some model', 16, 1, torch.device('cpu'))
    finally:
        gc.enable()
    assert 'out of memory' in result['error'] and len(alive) > 3
    assert set(alive) == {0}


@pytest.mark.parametrize('raised', [OptionError('mine'), torch.OutOfMemoryError('mine'), RuntimeError('mine')])
def test_error_of_another_rank_is_raised_here_as_it_was_there(monkeypatch, raised):
    """A rank that has none itself must not go on."""
    def fail():
        raise raised
    with pytest.raises(type(raised), match='mine'):
        Ranks().run(fail)
    there = Ranks()
    sent = []
    monkeypatch.setattr(there, 'gather', lambda mine: sent.append(mine) or [mine])
    with pytest.raises(type(raised)):
        there.run(fail)
    here = Ranks()
    here.rank, here.count = 1, 2
    monkeypatch.setattr(here, 'gather', lambda mine: [sent[0], mine])
    with pytest.raises(type(raised), match='^mine$') as caught:
        here.run(lambda: 5)
    assert type(caught.value) is type(raised) and caught.value is not raised
