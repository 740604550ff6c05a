"""Writing checkpoints: killed in front of any operation on files, with damaged and unreadable files, beside another."""
import errno
import json
import os
import random
import shutil
import struct
import zipfile

import pytest
import torch
from support.killed_saves import HISTORY, METRICS, save_all
from support.places import TESTS
from support.processes import python, run
from timm.utils import CheckpointSaver

from timm_sam.cli.device import Process
from timm_sam.cli.errors import OptionError
from timm_sam.runs import checkpoints, files
from timm_sam.runs.checkpoints import NotWhole, Unreadable, check_records, newest_checkpoint, read
from timm_sam.training.output import Output


def epochs(folder):
    """What each checkpoint of a folder is of: its epoch, and its weight, which is to be the epoch's."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(files.ENDING) and not path.name.startswith('recovery'):
            saved = read(str(path))
            assert saved['state_dict']['weight'][0, 0] == saved['epoch'], path
            found[path.name.removesuffix(files.ENDING)] = saved['epoch']
    return found


class Options:
    """What `Output` asks for."""
    resume = 'auto'

    def __init__(self, folder):
        self.output, self.experiment = os.path.split(folder)


def auto(folder):
    with Output(Options(folder), Process(torch.device('cpu'))) as output:
        return output.resolve_resume()


WHOLE = {'checkpoint-0': 0, 'checkpoint-2': 2, 'last': 2, 'model_best': 2}


def test_three_epochs_leave_the_newest_and_the_best(tmp_path):
    save_all(tmp_path)
    assert epochs(tmp_path) == WHOLE and HISTORY == 2


@pytest.mark.full
def test_save_killed_in_front_of_any_operation_on_files_loses_nothing_that_was_written(tmp_path):
    done = run(python('-m', 'support.killed_saves', tmp_path), TESTS)
    assert done.code == 0, done.err[-3000:]
    cases = sorted(tmp_path.glob('*.json'), key=lambda path: int(path.stem))
    seen, newest = set(), (-1.0, 0)
    assert len(cases) > 30
    for case in cases:
        folder, (event, name) = case.with_suffix(''), json.loads(case.read_text())
        seen.add((event, name))
        path = auto(folder)
        if not path:
            assert newest == (-1.0, 0), case
            start = 0
        else:
            saved = read(path)
            place = saved.get('position')
            weight = saved['state_dict']['weight'][0, 0].item()
            assert weight >= newest[0], (case, event, name)  # never older than in the case before
            newest = (weight, 0)
            assert not files.is_being_written(path)
            start = saved['epoch'] + (0 if place else 1)
        made = save_all(folder, range(start, len(METRICS)), path or None)
        assert epochs(folder) == WHOLE, (case, event, name)
        assert made.save(3, 1.0, {}) == (60.0, 2)
        left = {p.name for p in folder.iterdir()}
        assert not {n for n in left if n.startswith(('tmp', 'link', 'recovery_tmp'))}, (case, left)
    assert newest[0] == 2
    assert {('os.rename', files.TMP), ('fsync', files.TMP), ('os.rename', 'link.tmp')} <= seen


def test_folder_of_timms_saver_killed_between_unlink_and_rename_goes_on_from_what_it_had_written(tmp_path):
    save_all(tmp_path)
    (tmp_path / files.LAST).rename(tmp_path / files.TMP)
    (tmp_path / 'checkpoint-2.pth.tar').unlink()
    (tmp_path / files.BEST).unlink()
    path = auto(tmp_path)
    assert path == str(tmp_path / files.LAST) and not (tmp_path / files.TMP).exists()
    save_all(tmp_path, (), path)
    assert epochs(tmp_path) == WHOLE


def test_recovery_that_had_no_name_yet_gets_it(tmp_path):
    save_all(tmp_path)
    made = save_all(tmp_path, ())
    made.save_recovery(3, 4, {'position': {'epoch': 3, 'batch': 5}})
    (tmp_path / 'recovery-3-4.pth.tar').rename(tmp_path / files.RECOVERY_TMP)
    assert auto(tmp_path) == str(tmp_path / 'recovery-3-4.pth.tar')


def test_recoveries_of_earlier_starts_make_room_for_newer_ones(tmp_path):
    """A run that is stopped again and again would fill the disk."""
    def begin(path, *places):
        made = save_all(tmp_path, (), path and str(tmp_path / path))
        for epoch, update in places:
            made.save_recovery(epoch, update, {'position': {'epoch': epoch, 'batch': update + 1}})
        return {path.name.removeprefix('recovery-').split('.')[0] for path in tmp_path.glob('recovery*')}

    save_all(tmp_path)
    assert begin(None, (3, 4), (3, 6), (3, 10)) == {'1-0', '2-0', '3-6', '3-10'}
    # what is further than the checkpoint that is gone on with is not this start's to remove
    assert begin('recovery-3-6.pth.tar', (3, 8)) == {'3-6', '3-8', '3-10'}
    assert begin('recovery-3-10.pth.tar', (3, 12)) == {'3-10', '3-12'}
    assert begin('last.pth.tar', (3, 2)) == {'3-2', '3-10', '3-12'}


def test_list_of_checkpoints_is_timms(tmp_path):
    """What timm's saver goes on with after ours, and ours after it."""
    save_all(tmp_path)
    theirs = CheckpointSaver(torch.nn.Linear(2, 2), None, checkpoint_dir=str(tmp_path), max_history=HISTORY)
    theirs.load_state_dict_from_checkpoint(str(tmp_path / files.LAST))
    assert [os.path.basename(f) for f, _ in theirs.checkpoint_files] == ['checkpoint-2.pth.tar', 'checkpoint-0.pth.tar']
    assert (theirs.best_metric, theirs.best_epoch) == (60.0, 2)


@pytest.mark.parametrize('entry', ['{outside}', '../outside.pth.tar', 'sub/../../outside.pth.tar', 'args.yaml',
                                   'last.pth.tar', 5, None, ['a'], 'checkpoint-9.pth.tar\0'])
def test_list_of_checkpoints_never_names_files_elsewhere(tmp_path, entry):
    folder, outside = tmp_path / 'run', tmp_path / 'outside.pth.tar'
    folder.mkdir()
    outside.write_text('mine')
    (folder / files.ARGS).write_text('mine')
    save_all(folder, (0,))
    entry = entry.format(outside=outside) if isinstance(entry, str) else entry
    saved = torch.load(folder / files.LAST, weights_only=False)
    saved['saver']['checkpoint_files'] = [(entry, 1e-3), entry, (entry, 'x')]
    torch.save(saved, folder / files.LAST)
    save_all(folder, (1, 2), str(folder / files.LAST))
    assert outside.read_text() == 'mine' and (folder / files.ARGS).read_text() == 'mine'
    assert epochs(folder) == WHOLE


def test_metric_that_is_not_a_number_is_worse_than_all(tmp_path, monkeypatch):
    monkeypatch.setattr('support.killed_saves.METRICS', [float('nan'), 40.0, float('nan')])
    made = save_all(tmp_path)
    assert epochs(tmp_path) == {'checkpoint-0': 0, 'checkpoint-1': 1, 'last': 2, 'model_best': 1}
    assert made.save(3, 30.0, {}) == (40.0, 1)


def test_write_that_fails_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch):
    made = save_all(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', full)
    for save in (lambda: made.save(3, 70.0, {}), lambda: made.save_recovery(3, 1, {})):
        with pytest.raises(OptionError, match=r'No space left on device.*last\.pth\.tar is whole, go on with --resume'):
            save()
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# Damaged files

def damage(path, position, chance):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << chance.randrange(8)
    path.unlink()  # it has other names
    path.write_bytes(data)


def records_of(path):
    """Where the bytes of each record of a zip file are: name -> range."""
    data, found = path.read_bytes(), {}
    with zipfile.ZipFile(path) as records:
        for info in records.infolist():
            lengths = struct.unpack_from('<HH', data, info.header_offset + 26)  # of name and padding
            start = info.header_offset + 30 + sum(lengths)
            found[info.filename.split('/', 1)[1]] = range(start, start + info.file_size)
    return found


def test_every_flipped_bit_of_a_record_is_found(tmp_path):
    """Of tensors and of the structure; what zip writes between records says nothing of them."""
    save_all(tmp_path)
    whole = tmp_path / files.LAST
    places = [place for record in records_of(whole).values() for place in {*record[:1], *record[-1:]}]
    chance = random.Random(0)
    assert check_records(str(whole)) and len(places) > 14
    for place in places * 4:
        other = tmp_path / 'other'
        shutil.copy(whole, other)
        damage(other, place, chance)
        with pytest.raises(NotWhole, match='damaged'):
            check_records(str(other))


def test_damage_anywhere_in_a_file_is_found_or_harmless(tmp_path):
    save_all(tmp_path)
    whole = tmp_path / files.LAST
    expected = read(str(whole))['state_dict']['weight']
    chance, size, found = random.Random(1), whole.stat().st_size, 0
    for number in range(150):
        other = tmp_path / 'other'
        shutil.copy(whole, other)
        if number % 3:
            damage(other, chance.randrange(size), chance)
        else:
            data, start = bytearray(other.read_bytes()), chance.randrange(size)
            data[start:start + 512] = bytes(len(data[start:start + 512]))
            other.write_bytes(data if number % 2 else data[:start])
        try:
            assert check_records(str(other))
            assert torch.equal(read(str(other))['state_dict']['weight'], expected)
        except NotWhole:
            found += 1
    assert found > 75


@pytest.mark.parametrize('how', ['bit', 'zeros', 'half', 'empty', 'folder', 'pickle'])
def test_damaged_newest_is_skipped_with_a_warning_for_the_next_newest(tmp_path, caplog, how):
    save_all(tmp_path)
    last = tmp_path / files.LAST
    data = bytearray(last.read_bytes())
    last.unlink()
    if how == 'bit':
        data[records_of(tmp_path / files.BEST)['data/0'][0]] ^= 1
    if how == 'zeros':
        data[:4096] = bytes(4096)
    if how == 'folder':
        last.mkdir()
    elif how == 'pickle':
        last.write_bytes(b'\x80\x04garbage')
    else:
        last.write_bytes({'half': data[:len(data) // 2], 'empty': b''}.get(how, data))
    found = newest_checkpoint(str(tmp_path))
    assert os.path.basename(found) in ('checkpoint-2.pth.tar', files.BEST)
    (message,) = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    assert 'last.pth.tar is not a whole checkpoint' in message and 'skipped' in message


def test_names_of_one_damaged_file_are_all_skipped(tmp_path):
    """last, checkpoint-2 and model_best are one file: what is left is the epoch before that is kept."""
    save_all(tmp_path)
    place = records_of(tmp_path / files.LAST)['data/0'][0]
    with open(tmp_path / files.LAST, 'r+b') as f:
        f.seek(place)
        byte = f.read(1)[0]
        f.seek(place)
        f.write(bytes([byte ^ 4]))
    for path in tmp_path.glob('recovery*'):
        path.unlink()
    assert os.path.basename(newest_checkpoint(str(tmp_path))) == 'checkpoint-0.pth.tar'


# Files that cannot be read

@pytest.mark.parametrize('error', [
    PermissionError(errno.EACCES, 'Permission denied'), OSError(errno.EIO, 'Input/output error'),
    OSError(errno.ESTALE, 'Stale file handle'), MemoryError()])
@pytest.mark.parametrize('when', ['open', 'index', 'records'])
def test_file_that_cannot_be_read_is_an_error_and_nothing_starts_anew(tmp_path, monkeypatch, error, when):
    save_all(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    fails, opened = [], open

    class Failing:
        def __init__(self, file):
            self.file = file

        def read(self, n):
            if fails and os.path.basename(self.file.name) == files.LAST:
                raise error
            return self.file.read(n)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

    check = checkpoints.check_records

    def checked(path, only_index=False):
        if os.path.basename(path) == files.LAST and when == 'open':
            raise error
        fails[:] = [1] if only_index == (when == 'index') else []
        return check(path, only_index)

    monkeypatch.setattr(checkpoints, 'open', lambda *args: Failing(opened(*args)), raising=False)
    monkeypatch.setattr(checkpoints, 'check_records', checked)
    with pytest.raises(Unreadable, match=r'last\.pth\.tar cannot be read'):
        newest_checkpoint(str(tmp_path))
    with pytest.raises(OptionError, match='--resume auto: .*last.pth.tar cannot be read.*nothing is started anew'):
        auto(tmp_path)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr(os, 'listdir', denied)
    with pytest.raises(Unreadable, match='Permission denied'):
        newest_checkpoint(str(tmp_path))


def test_dangling_link_is_an_error(tmp_path):
    (tmp_path / files.LAST).symlink_to(tmp_path / 'nowhere')
    with pytest.raises(Unreadable, match='No such file'):
        newest_checkpoint(str(tmp_path))


def test_whole_file_of_ours_that_holds_objects_is_an_error_that_names_them(tmp_path):
    save_all(tmp_path, (0,))
    torch.save({'epoch': 3, 'state_dict': {}, 'chance': random.Random(0)}, tmp_path / 'checkpoint-3.pth.tar')
    with pytest.raises(Unreadable, match=r'checkpoint-3.*random\.Random'):
        newest_checkpoint(str(tmp_path))
    (tmp_path / 'checkpoint-3.pth.tar').rename(tmp_path / 'foreign.pth.tar')
    assert os.path.basename(newest_checkpoint(str(tmp_path))) in (files.LAST, files.BEST, 'checkpoint-0.pth.tar')
