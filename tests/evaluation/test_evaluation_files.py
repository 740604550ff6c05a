"""Where results go, what data sets are called, and what cannot be read: nothing is replaced, no name acts."""
import csv
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from support.processes import python
from support.processes import run as run_command
from support.running import in_process
from support.states import tree
from support.validating import result, run_validate

from timm_sam import validate


@pytest.fixture
def command(fitted):
    """``command('suite')``, ``command('single')``: of an evaluation that works."""
    return {'suite': f'--eval validation={fitted.data}/validation', 'single': f'--data-dir {fitted.data}'}.get


@pytest.mark.parametrize('kind', ['suite', 'single'])
@pytest.mark.parametrize('overwrite', ['', '--overwrite'])
def test_device_pipe_or_folder_is_not_replaced(tmp_path, fitted, command, kind, overwrite):
    os.mkfifo(tmp_path / 'pipe.csv')
    (tmp_path / 'null.csv').symlink_to('/dev/null')
    (tmp_path / 'folder.csv').mkdir()
    before = tree(tmp_path)
    for name, reason in [('pipe', 'it is no regular file'), ('null', 'it is no regular file'),
                         ('folder', 'is a folder')]:
        done = run_validate(tmp_path, f'{command(kind)} --results-file {name}.csv {overwrite}', fitted.base)
        assert done.code == 2 and f'--results-file {name}.csv' in done.last_line and reason in done.last_line
        assert done.out == '' and 'Loaded' not in done.err  # nothing is computed first
    assert tree(tmp_path) == before and (tmp_path / 'pipe.csv').is_fifo() and (tmp_path / 'null.csv').is_symlink()


def test_one_of_three_files_or_a_journal_that_is_a_device_is_refused_too(tmp_path, fitted, command):
    for name in ('r.csv', 'q.journal.0.jsonl'):
        os.mkfifo(tmp_path / name)
    for name, named in (('r', 'r.csv'), ('q', 'q.journal.0.jsonl')):
        done = run_validate(tmp_path, f'{command("suite")} --results-file {name} --overwrite', fitted.base)
        assert done.code == 2 and f'{named} cannot be written: it is no regular file' in done.last_line


@pytest.mark.parametrize('kind', ['suite', 'single'])
def test_results_are_written_through_links(tmp_path, fitted, command, kind):
    (tmp_path / 'elsewhere').mkdir()
    link, target = tmp_path / 'r.json', tmp_path / 'elsewhere' / 'real.json'
    link.symlink_to(target)
    options = '' if kind == 'suite' else '--results-format json'
    for overwrite in ('', '--overwrite'):
        done = run_validate(tmp_path, f'{command(kind)} --results-file r.json {options} {overwrite}', fitted.base)
        assert result(done)
        assert link.is_symlink() and json.loads(target.read_text())
    assert sorted(p.name for p in target.parent.iterdir()) == ['real.json']


def test_full_disk_is_one_line_and_leaves_the_results_of_before(tmp_path, fitted, command, monkeypatch):
    assert result(run_validate(tmp_path, f'{command("suite")} --results-file r.json', fitted.base))
    before = (tmp_path / 'r.json').read_text()

    def full(descriptor):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    for kind in ('suite', 'single'):
        done = run_validate(tmp_path, f'{command(kind)} --results-file r.json --overwrite', fitted.base)
        assert done.code == 2 and 'cannot be written (No space left on device); make room' in done.last_line
        assert done.last_line.startswith('validate.py: error: --results-file: r.j') and 'Traceback' not in done.err
    assert (tmp_path / 'r.json').read_text() == before
    assert not list(tmp_path.glob('*.part'))


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_stdout_on_a_full_disk_is_one_line_and_the_file_is_written(tmp_path, fitted, command):
    script = ('import sys; from timm_sam import validate; sys.stdout = open("/dev/full", "w"); '
              'sys.exit(validate.main(sys.argv[1:]))')
    arguments = f'{fitted.base} {command("suite")} --results-file r.json'.split()
    done = run_command(python('-c', script, *arguments), tmp_path)
    assert done.code == 2, done.err
    assert done.last_line == ('validate.py: error: stdout cannot be written (No space left on device); make room, or '
                              'send it elsewhere') and 'Traceback' not in done.err
    assert json.loads((tmp_path / 'r.json').read_text())['results']


# --- names ------------------------------------------------------------------------------------------------------------

ACTING = '=cmd|x\x1b[2J\n`<b>'


def test_names_of_data_sets_and_checkpoints_do_nothing(tmp_path, fitted):
    folder = tmp_path / ACTING.replace('/', '')
    shutil.copytree(fitted.data / 'validation', folder / 'set')
    for name in ('=1', '@2'):
        (folder / name).mkdir()
        shutil.copy(fitted.checkpoint, folder / name / 'last.pth')
    arguments = [*fitted.base.split()[:-2], '--checkpoint', str(folder / '=1' / 'last.pth'),
                 str(folder / '@2' / 'last.pth'), '--eval', f'{ACTING}={folder}/set', '--results-file', 'r']
    arguments[arguments.index(f'{ACTING}={folder}/set')] = f'x{ACTING[1:]}={folder}/set'
    done = in_process(validate.main, arguments, tmp_path)
    assert done.code == 0, done.err
    for text in (done.err, done.out.split('--result')[0], *((tmp_path / f'r.{kind}').read_text() for kind in
                                                            ('md', 'csv', 'json'))):
        assert '\x1b' not in text
    assert [line for line in done.err.splitlines() if line.startswith(('`', '<b>'))] == []
    table = (tmp_path / 'r.md').read_text()
    assert '<b>' not in table and 'x' + r'cmd&#124;x\\x1b\[2J\\n\`&lt;b&gt;' in table and len(table.splitlines()) == 4
    with open(tmp_path / 'r.csv', newline='') as f:
        head, *rows = csv.reader(f)
    assert head[4:6] == ["'=1", "'@2"] and all(not cell.startswith(('=', '@', '+')) for row in rows for cell in row)
    # the table is known again, whatever its names are
    (tmp_path / 'r.json').unlink()
    again = in_process(validate.main, [*arguments, '--skip-existing'], tmp_path)
    assert again.code == 0, again.err


# --- what cannot be read ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('kind', ['single', 'suite', 'attack'])
def test_decompression_bomb_is_one_line(tmp_path, fitted, kind, workers, monkeypatch):
    data = tmp_path / 'data'
    shutil.copytree(fitted.data / 'validation', data / 'validation')
    Image.new('1', (3000, 3000)).save(data / 'validation' / 'grey2' / 'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1_000_000)
    suite = f'--eval validation={data}/validation'
    options = {'single': f'--data-dir {data}', 'suite': suite,
               'attack': f'{suite} --attack l2=1 --attack-steps 1'}[kind]
    done = run_validate(tmp_path, f'{options} -j {workers} --results-file r.csv', fitted.base)
    assert done.code == 2 and 'Traceback' not in done.err
    assert 'cannot read the image' in done.last_line and 'grey2/bomb.png (Image size (9000000 pixels)' in done.last_line
    assert not (tmp_path / 'r.csv').exists()


def test_all_images_unreadable_is_one_line(tmp_path, fitted):
    data = tmp_path / 'data'
    shutil.copytree(fitted.data / 'validation', data / 'validation')
    for path in data.rglob('*.png'):
        path.write_bytes(b'')
    for options in (f'--data-dir {data}', f'--eval validation={data}/validation'):
        done = run_validate(tmp_path, options, fitted.base)
        assert done.code == 2 and 'cannot read the image' in done.last_line and 'Traceback' not in done.err


def test_sixteen_bit_images_score_as_their_eight_bit_copies(tmp_path, fitted):
    """Pillow makes 255 of them all, and then every image is the same one."""
    for i, name in enumerate(sorted(p.name for p in (fitted.data / 'validation').iterdir())):
        for bits, kind in ((8, np.uint8), (16, np.uint16)):
            (tmp_path / str(bits) / name).mkdir(parents=True)
            for place in range(4):
                values = np.random.default_rng((i, place)).integers(0, 256, (20, 20)).astype(kind)
                image = Image.fromarray(values * kind(257 if bits == 16 else 1))
                image.save(tmp_path / str(bits) / name / f'{place}.png')
    rows = {}
    for bits in (8, 16):
        done = run_validate(tmp_path, f'--eval validation={bits} --attack linf=1/255 --attack-steps 2 '
                                      f'--attack-targets 1 --results-file r{bits}.json', fitted.base)
        single = run_validate(tmp_path, f'--data-dir {bits}', fitted.base)
        loss = single.log('Test')[-1].split('Loss: ')[1].split()[0]
        assert result(done)
        rows[bits] = [row['values'] for row in json.loads((tmp_path / f'r{bits}.json').read_text())['results']], loss
    assert rows[8] == rows[16]
