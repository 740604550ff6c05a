"""Files of the translation example: parallel text, batches, options, two Bibles, and the table of runs."""
import json
import re
import shutil
import subprocess
import time
from types import SimpleNamespace

import pytest
from support.places import ROOT
from support.running import in_process
from support.translation import LANGUAGES, bible_es_en, data, examples, table, train, write_toy

from timm_sam.cli.errors import OptionError


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp('toy') / 'data')


# ---- batches and files

def test_batches_hold_every_example_once_and_no_more_tokens():
    found = examples(50)
    plans = [data.plan(found, 40, seed) for seed in (None, 0, 1)]
    for batches in plans:
        assert sorted(i for rows in batches for i in rows) == list(range(50))
        for rows in batches:
            batch = data.collate([found[i] for i in rows])
            assert max(batch.source.numel(), batch.target_in.numel()) <= 40 or len(rows) == 1
    assert len({len(batches) for batches in plans}) == 1 and plans[1] != plans[2]
    assert data.plan(found, 40, 0) == plans[1]
    assert data.plan(found, 1) and all(len(rows) == 1 for rows in data.plan(found, 1))


def test_batch_is_shifted_and_ended():
    batch = data.collate([data.Example([5, 6], [7]), data.Example([8], [9, 10])])
    assert batch.source.tolist() == [[5, 6, data.END], [8, data.END, data.PAD]]
    assert batch.target_in.tolist() == [[data.BEGIN, 7, data.PAD], [data.BEGIN, 9, 10]]
    assert batch.target_out.tolist() == [[7, data.END, data.PAD], [9, 10, data.END]]


def spoiled(toy, tmp_path, change):
    folder = shutil.copytree(toy, tmp_path / 'spoiled')
    change(folder)
    return folder


@pytest.mark.parametrize('change, text', [
    (lambda folder: (folder / 'valid.yy').unlink(), 'valid.yy cannot be read'),
    (lambda folder: (folder / 'test.yy').write_text('one\n'), 'test.xx has 25 lines and test.yy 1'),
    (lambda folder: [path.write_text('') for path in folder.glob('train.*')], 'not none'),
    (lambda folder: (folder / 'train.yy').write_bytes(b'\xff\n'), 'train.yy cannot be read'),
    (lambda folder: (folder / 'train.yy').unlink(), '--source and --target')])
def test_data_that_cannot_be_used_ends_in_one_line(change, text, toy, tmp_path):
    folder = spoiled(toy, tmp_path, change)
    done = in_process(train.main, [str(folder), *LANGUAGES, '--out', 'out'], tmp_path)
    assert done.code == 2 and text in done.err and done.err.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_languages_are_the_suffixes(tmp_path):
    for name in ('train.es', 'train.en'):
        (tmp_path / name).touch()
    assert data.languages(tmp_path, None, None) == ('es', 'en')
    assert data.languages(tmp_path, 'en', None) == ('en', 'es') == data.languages(tmp_path, None, 'es')
    (tmp_path / 'train.de').touch()
    assert data.languages(tmp_path, 'de', 'en') == ('de', 'en')
    for given in ((None, None), ('de', None), ('en', 'en'), ('fr', 'en')):
        with pytest.raises(OptionError, match='train.de, train.en, train.es'):
            data.languages(tmp_path, *given)


@pytest.mark.parametrize('flags, text', [
    ('--sam-rho 0.1', '--sam-rho 0.1 has no effect without --sam-variant'),
    ('--sam-params onlynorm', '--sam-params onlynorm has no effect without --sam-variant'),
    ('--sam-variant sam', '--sam-variant sam needs --sam-rho'),
    ('--sam-variant sam --sam-rho 0.1 --sam-m 4', '--sam-m'),
    ('--sam-variant sam --sam-rho 0.1 --sam-method esam --sam-esam-beta 1 --sam-esam-gamma 0.5', 'single samples'),
    ('--sam-variant sam --sam-rho 0.1 --sam-start-epoch 10', 'not before the end of training, which has 10'),
    ('--dropout 1', '--dropout 1.0 must be'), ('--lr nan', '--lr nan'), ('--epochs 0', '--epochs 0 must be'),
    ('--device tpu', '--device tpu')])
def test_options_that_cannot_be_end_in_one_line(flags, text, tmp_path):
    done = in_process(train.main, [str(tmp_path), *flags.split()], tmp_path)
    assert done.code == 2 and text in done.err and done.err.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


def test_folder_of_results_is_not_overwritten(toy, tmp_path):
    done = in_process(train.main, [str(toy), *LANGUAGES, '--out', str(tmp_path)], tmp_path)
    assert done.code == 2 and f'--out {tmp_path} exists' in done.err


# ---- the table

@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """Command lines of the trainings that the table starts, none of which trains."""
    calls = []

    def stand_in(command):
        calls.append(command)
        out = tmp_path / command[command.index('--out') + 1]
        out.mkdir()
        (out / 'result.json').write_text(json.dumps(
            dict(test_bleu=10.0 + len(calls), valid_bleu=9.0 + len(calls), updates=20, epochs=2)))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(table.subprocess, 'run', stand_in)
    monkeypatch.chdir(tmp_path)
    return calls


def test_table_goes_on_where_it_was(tmp_path, trainings, capsys):
    assert table.main(['corpus', '--out', 'out', '--seeds', '0', '1']) == 0
    assert len(trainings) == 6
    text = (tmp_path / 'out' / 'table.md').read_text()
    assert "not IWSLT'14, not the paper's numbers" in text
    assert '| vanilla |  | 2 | 12.50 ± 2.12 | 2 |  | 34.56 ± .11 |' in text
    # t of two degrees of freedom is 4.303, and the difference has the standard error 2.121
    assert '| SAM-ON | 0.5 | 2 | 14.50 ± 2.12 | 2 | +2.00 (-7.13 to +11.13) |' in text
    assert [argument for argument in trainings[2] if argument.startswith('--sam')] == [
        '--sam-variant', '--sam-params', '--sam-rho']
    shutil.rmtree(tmp_path / 'out' / 'SAM-ON-seed1')
    assert table.main(['corpus', '--out', 'out', '--seeds', '0', '1']) == 0 and len(trainings) == 7
    capsys.readouterr()
    assert table.main(['corpus', '--out', 'out', '--seeds', '0', '--rho-on', '1']) == 2
    assert 'was run with other flags' in capsys.readouterr().err


def test_table_by_two_processes_is_in_order_and_goes_on_with_one(tmp_path, trainings):
    assert table.main(['corpus', '--out', 'out', '--jobs', '2']) == 0 and len(trainings) == 9
    assert all('--threads' in command for command in trainings)
    names = [line.split(',')[0] for line in (tmp_path / 'out' / 'runs.csv').read_text().splitlines()[1:]]
    assert names == ['vanilla', 'SAM-all', 'SAM-ON'] * 3
    assert table.main(['corpus', '--out', 'out']) == 0 and len(trainings) == 9


def test_runs_that_were_finished_elsewhere_are_not_run(tmp_path, trainings, capsys):
    assert table.main(['corpus', '--out', 'out', '--seeds', '0']) == 0 and len(trainings) == 3
    (tmp_path / 'out').rename('there')
    some = (tmp_path / 'there' / 'runs.csv').read_text().splitlines(keepends=True)
    (tmp_path / 'some.csv').write_text(''.join(some[:3]))
    line = ['corpus', '--out', 'out', '--done', 'some.csv', '--seeds', '0']
    assert table.main(line) == 0 and len(trainings) == 4
    again = (tmp_path / 'out' / 'runs.csv').read_text().splitlines(keepends=True)
    assert again[:3] == some[:3] and again[3].startswith('SAM-ON,0.5,0,') and len(again) == 4
    assert table.main([*line, '1']) == 0 and len(trainings) == 7
    assert table.main(['corpus', '--out', 'all', '--done', 'there/runs.csv', '--seeds', '0']) == 0
    assert len(trainings) == 7
    capsys.readouterr()
    for wrong, said in ((['--rho-all', '0.2'], 'SAM-all, seed 0, has rho 0.1'), (['--epochs', '7'], 'vanilla, seed 0'),
                        (['--done', 'none.csv'], '--done none.csv cannot be read')):
        assert table.main([*line, *wrong]) == 2 and len(trainings) == 7
        assert said in capsys.readouterr().err


def test_table_of_runs_is_drawn_again_without_training(tmp_path, trainings, capsys):
    assert table.main(['corpus', '--out', 'out']) == 0
    rows = [line for line in (tmp_path / 'out' / 'table.md').read_text().splitlines() if line.startswith('|')]
    capsys.readouterr()
    assert table.main(['--show', 'out/runs.csv']) == 0 and len(trainings) == 9
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')] == rows
    (tmp_path / 'other.csv').write_text('row,rho\nvanilla,0\n')
    for wrong, said in ((['--show', 'other.csv'], 'is no file of runs'), (['--show', 'none.csv'], 'cannot be read'),
                        ([], 'Name either'), (['corpus', '--show', 'out/runs.csv'], 'Name either')):
        assert table.main(wrong) == 2
        assert said in capsys.readouterr().err


def test_readme_says_what_the_stored_runs_came_to():
    text = (ROOT / 'examples' / 'translation' / 'README.md').read_text()
    runs = table.read_runs('--show', ROOT / 'benchmarks' / 'results' / 'translation_runs.csv')
    assert sorted((run.row, run.seed) for run in runs) == [
        (name, seed) for name in sorted(table.PAPER) for seed in range(3)]
    rows = [line for line in table.table(runs, 'command').splitlines() if line.startswith('|')]
    assert '\n'.join(rows) in text
    assert {run.updates for run in runs} == {runs[0].epochs * 287} and 'An epoch is 287 updates' in text


def test_table_does_not_begin_further_runs_after_one_that_failed(tmp_path, trainings, monkeypatch, capsys):
    def stand_in(command):
        trainings.append(command)
        time.sleep(len(trainings) - 1)  # the next one may begin before the failure is seen
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(table.subprocess, 'run', stand_in)
    assert table.main(['corpus', '--out', 'out']) == 2 and len(trainings) <= 2
    assert 'vanilla-seed0 ended with code 3' in capsys.readouterr().err


def test_second_start_of_a_table_says_that_the_folder_is_in_use(trainings, capsys):
    with table.locked('out'):
        assert table.main(['corpus', '--out', 'out']) == 2 and not trainings
    assert '--out out is in use by another process' in capsys.readouterr().err


# ---- the Bibles

VERSE = ('<w lemma="x">In</w> the beginning, God<note placement="foot"><reference type="a">1:1 </reference>A note.'
         '</note><w>created</w> <title type="x">Title</title>the heavens &amp; <w>earth</w>.')


def test_markup_is_left_out():
    assert bible_es_en.plain(VERSE) == 'In the beginning, God created the heavens & earth.'
    assert bible_es_en.plain('Amen. <div eID="1"/> <div sID="2" type="glossary"/> Abba is Father.') == 'Amen.'


def test_pairs_are_aligned_by_name_and_chapters_are_whole():
    english = {f'Book {c}:{v}': f'verse {c} {v}' for c in range(1, 101) for v in range(1, 4)}
    spanish = {key: text for key, text in english.items() if key != 'Book 1:1'} | {'Other 1:1': 'x'}
    aligned = bible_es_en.pairs(spanish, english)
    assert len(aligned) == len(english) - 1 and aligned[0][0] == 'Book 1:2'
    splits = bible_es_en.split(aligned, 0)
    assert {name: len(found) // 3 for name, found in splits.items()}['valid'] == 5
    chapters = [{target.split()[1] for _, target in found} for found in splits.values()]
    assert sum(map(len, chapters)) == 100 == len(set().union(*chapters))
    assert splits == bible_es_en.split(aligned, 0) != bible_es_en.split(aligned, 1)
    assert bible_es_en.fits('a b c', 'd') and not bible_es_en.fits('a b c d', 'e')
    assert not bible_es_en.fits('a ' * 101, 'b ' * 101) and not bible_es_en.fits('a', '')


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(SystemExit) as e:
        bible_es_en.main([str(tmp_path / 'out')])
    assert e.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert 'apt install sword-text-web sword-text-sparv libsword-utils' in line and not (tmp_path / 'out').exists()
    with pytest.raises(SystemExit):
        bible_es_en.main([str(tmp_path)])
    assert 'exists: name another folder' in capsys.readouterr().err


def bibles_are_there():
    return shutil.which('mod2imp') and all(
        subprocess.run(['mod2imp', module], capture_output=True).stdout for module in bible_es_en.MODULES.values())


@pytest.mark.full
def test_bibles_become_the_same_files_every_time(tmp_path, capsys):
    if not bibles_are_there():
        pytest.skip('needs Debian\'s sword-text-web, sword-text-sparv and libsword-utils')
    for name in ('once', 'again'):
        assert bible_es_en.main([str(tmp_path / name)]) == 0
    count, = {int(found) for found in re.findall(r'(\d+) verses that both have', capsys.readouterr().out)}
    assert count > 31_000
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ('once', 'again')]
    assert files[0] == files[1] and set(files[0]) == {
        f'{split}.{language}' for split in ('train', 'valid', 'test') for language in ('es', 'en')}
    pairs = {split: list(zip(*(files[0][f'{split}.{language}'].decode().splitlines() for language in ('es', 'en'))))
             for split in ('train', 'valid', 'test')}
    assert all(len(found) > 1000 for found in pairs.values())
    # Genesis 1:1 begins the split that its chapter is in
    assert ('EN el principio crió Dios los cielos y la tierra.',
            'In the beginning, God created the heavens and the earth.') in [found[0] for found in pairs.values()]
    for split, found in pairs.items():
        assert len(found) == files[0][f'{split}.es'].count(b'\n') == files[0][f'{split}.en'].count(b'\n')
        assert not any('<' in text or '  ' in text or not text for pair in found for text in pair)
