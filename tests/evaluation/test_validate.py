"""validate.py on one data set: the numbers of timm's script, and its bulk evaluations."""
import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.validating import BASE, GREYS, constant_checkpoint, labelled, preprocessed, result, run_validate
from torch.nn.functional import cross_entropy

import timm_sam.evaluation.single
import timm_sam.evaluation.subject

CLASSES = len(GREYS)


@pytest.fixture
def run(fitted, tmp_path):
    """Runs validate.py on the fitted model and its validation images."""
    return lambda command='': run_validate(tmp_path, f'--data-dir {fitted.data} {command}', fitted.base)


def outputs_of(fitted, **options):
    """Outputs and labels of the validation images, one image at a time."""
    paths, labels = labelled(fitted.data / 'validation')
    with torch.inference_mode():
        return torch.cat([fitted.model(x[None]) for x in preprocessed(paths, fitted.model, **options)]), labels


def percent(outputs, labels, k=1):
    """Share of the images whose label is among the k largest outputs."""
    right = sum(int(label in row.sort(descending=True).indices[:k].tolist()) for row, label in zip(outputs, labels))
    return 100 * right / len(labels)


def expected(outputs, labels, **other):
    top1, top5 = round(percent(outputs, labels), 4), round(percent(outputs, labels, 5), 4)
    entries = dict(model='test_resnet', top1=top1, top1_err=round(100 - top1, 4), top5=top5,
                   top5_err=round(100 - top5, 4), param_count=0.37, img_size=32, crop_pct=0.95,
                   interpolation='bilinear')
    return {**entries, **other}


@pytest.mark.parametrize('command, options', [
    ('', {}),
    ('-b 24', {}),
    ('-b 7 -j 1', {}),
    ('--no-prefetcher', {}),
    ('--channels-last --log-freq 1', {}),
    ('--crop-pct 0.7', {'crop_pct': 0.7}),
    ('--crop-mode squash --crop-pct 0.8', {'crop_mode': 'squash', 'crop_pct': 0.8}),
    ('--crop-border-pixels 3', {'crop_border_pixels': 3}),
    ('--interpolation bicubic', {'interpolation': 'bicubic'}),
    ('--mean 0.48 --std 0.5 0.55 0.45', {'mean': [0.48], 'std': [0.5, 0.55, 0.45]}),
    ('--img-size 40', {'img_size': 40}),
])
def test_numbers_are_those_of_a_loop_over_single_images(run, fitted, command, options):
    outputs, labels = outputs_of(fitted, **options)
    done = run(command)
    shown = {key: options[key] for key in ('img_size', 'crop_pct', 'interpolation') if key in options}
    assert result(done) == expected(outputs, labels, **shown)
    assert 20 < percent(outputs, labels) < 80 < percent(outputs, labels, 5) <= 100
    loss = float(done.log('Test')[-1].split('Loss: ')[1].split()[0])
    assert loss == pytest.approx(cross_entropy(outputs, labels).item(), abs=2e-4)


def test_numbers_of_other_options_differ_from_those_of_the_default(fitted):
    """Or the test above could not tell whether an option has an effect."""
    default = outputs_of(fitted)[0]
    for options in ({'crop_pct': 0.7}, {'crop_border_pixels': 3}, {'interpolation': 'bicubic'}, {'mean': [0.48]}):
        assert (outputs_of(fitted, **options)[0] - default).abs().max() > 0.01


def test_split_names_another_folder(run, fitted):
    with torch.inference_mode():
        paths, labels = labelled(fitted.data / 'train')
        outputs = fitted.model(preprocessed(paths, fitted.model))
    assert result(run('--split train')) == expected(outputs, labels)


def test_valid_labels_are_the_outputs_that_count_in_the_order_of_the_labels(run, fitted, tmp_path):
    three = tmp_path / 'three' / 'validation'
    three.mkdir(parents=True)
    for name in ('grey0', 'grey3', 'grey5'):
        (three / name).symlink_to(fitted.data / 'validation' / name)
    (tmp_path / 'valid.txt').write_text('5\n0\n3\n')
    paths, labels = labelled(three)
    with torch.inference_mode():
        outputs = fitted.model(preprocessed(paths, fitted.model))
    mine = outputs[:, [5, 0, 3]]
    assert result(run(f'--data-dir {three.parent} --valid-labels valid.txt')) == expected(mine, labels)
    (tmp_path / 'valid.txt').write_text('0\n3\n5')  # no line break at the end
    right = outputs[:, [0, 3, 5]]
    assert result(run(f'--data-dir {three.parent} --valid-labels valid.txt')) == expected(right, labels)
    assert percent(right, labels) > percent(mine, labels)


def test_class_map_numbers_the_folders(run, fitted, tmp_path):
    outputs, labels = outputs_of(fitted)
    (tmp_path / 'map.txt').write_text('\n'.join(reversed(list(GREYS))))
    assert result(run('--class-map map.txt')) == expected(outputs, CLASSES - 1 - labels)
    assert percent(outputs, CLASSES - 1 - labels) < percent(outputs, labels)


def test_real_labels_are_looked_up_by_the_names_of_the_files(run, fitted, tmp_path):
    folder = tmp_path / 'imagenet' / 'validation'
    # the order of loading is by folder, that of the labels by number
    paths = [path for path in labelled(fitted.data / 'validation')[0] if path.stem in '01']
    for i, path in enumerate(paths):
        to = folder / f'n{i % 5}' / f'ILSVRC2012_val_{i + 1:08d}.JPEG'
        to.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.save(to, 'JPEG')
    real = [[i % CLASSES] if i % 3 else [] for i in range(len(paths))]
    real[1] = [0, 3, 4, 5]
    (tmp_path / 'real.json').write_text(json.dumps(real))
    loaded = sorted(folder.glob('*/*'), key=lambda path: path.name)
    with torch.inference_mode():
        outputs = fitted.model(preprocessed(loaded, fitted.model))
    for k, name in ((1, 'top1'), (5, 'top5')):
        hits = [bool(set(row.topk(k).indices.tolist()) & set(labels)) for row, labels in zip(outputs, real) if labels]
        expected_percent = round(100 * sum(hits) / len(hits), 4)
        assert expected_percent > 0 and len(hits) == 8
        found = result(run(f'--data-dir {folder.parent} --real-labels real.json'))
        assert found[name] == expected_percent and found[f'{name}_err'] == round(100 - expected_percent, 4)


@pytest.mark.parametrize('average', ['micro', 'macro', 'weighted'])
def test_metrics_are_averages_over_classes(run, fitted, average):
    outputs, labels = outputs_of(fitted)
    guesses = outputs.argmax(dim=1)
    values = []
    for c in range(CLASSES):
        hits = int(((guesses == c) & (labels == c)).sum())
        guessed, there = int((guesses == c).sum()), int((labels == c).sum())
        precision, recall = hits / guessed if guessed else 0, hits / there
        f1 = 2 * precision * recall / (precision + recall) if hits else 0
        values.append((precision, recall, f1))
    if average == 'micro':
        wanted = [percent(outputs, labels)] * 3
    else:  # there are four images of each class, so that weights change nothing
        wanted = [100 * sum(column) / CLASSES for column in zip(*values)]
    found = result(run(f'--metrics-avg {average}'))
    names = [f'{average}_{name}' for name in ('precision', 'recall', 'f1_score')]
    assert [found[name] for name in names] == pytest.approx(wanted, abs=1e-4)
    assert list(found)[5:8] == names  # where timm's script has them


def test_results_file_holds_what_is_printed(run, tmp_path):
    printed = result(run('--results-file r.csv'))
    with open(tmp_path / 'r.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert rows == [{key: str(value) for key, value in printed.items()}]
    assert result(run('--results-file r.json --results-format json')) == printed
    assert json.loads((tmp_path / 'r.json').read_text()) == printed
    assert run('--results-file r.csv').code == 2
    assert result(run('--results-file r.csv --overwrite --crop-pct 0.7'))['crop_pct'] == 0.7
    assert '0.7' in (tmp_path / 'r.csv').read_text()
    assert sorted(os.listdir(tmp_path)) == ['r.csv', 'r.json']


@pytest.mark.parametrize('path', ['c.pth', 'folder'])
def test_plain_weights_are_taken_with_a_warning_where_there_are_no_averaged_ones(run, tmp_path, path):
    (tmp_path / 'folder').mkdir()
    for name in ('c.pth', 'folder/c.pth'):
        constant_checkpoint(tmp_path / name, [0, 1, 2, 3, 4], CLASSES)
    done = run(f'--checkpoint {path} --use-ema')
    found = result(done)
    assert (found if path == 'c.pth' else found[0])['top1'] == 16.6667
    assert len([line for line in done.err.splitlines() if 'c.pth has no averaged weights' in line]) == 1
    assert 'averaged' not in run('--use-ema').err


# Many evaluations

@pytest.fixture
def folder(fitted, tmp_path):
    """Two checkpoints: the second in the order of names is the better one."""
    folder = tmp_path / 'run'
    folder.mkdir()
    constant_checkpoint(folder / 'checkpoint-2.pth.tar', [0, 1, 2, 3, 4], CLASSES)
    shutil.copy(fitted.checkpoint, folder / 'checkpoint-10.pth')
    return folder


def test_folder_of_checkpoints_is_evaluated_one_by_one_and_sorted_by_accuracy(run, fitted, folder, tmp_path):
    outputs, labels = outputs_of(fitted)
    good = expected(outputs, labels, checkpoint=f'{folder}/checkpoint-10.pth')
    # every image is taken for class 0; class 5 is never among the best five; there are four of each
    constant = expected(outputs, labels, top1=16.6667, top1_err=83.3333, top5=83.3333, top5_err=16.6667,
                        checkpoint=f'{folder}/checkpoint-2.pth.tar')
    assert good['top1'] > 16.6667
    assert result(run(f'--checkpoint {folder} --results-file all.csv')) == [good, constant]
    with open(tmp_path / 'all.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert rows == [{key: str(value) for key, value in row.items()} for row in (good, constant)]
    assert list(rows[0])[-1] == 'checkpoint'


def test_checkpoint_that_does_not_fit_is_left_out_of_a_folder_and_named(run, folder):
    constant_checkpoint(folder / 'checkpoint-3.pth.tar', [0], CLASSES + 1)
    done = run(f'--checkpoint {folder}')
    printed = json.loads(done.out.split('--result\n')[1])
    assert [Path(row['checkpoint']).name for row in printed] == ['checkpoint-10.pth', 'checkpoint-2.pth.tar']
    assert done.code == 2 and done.last_line.startswith('validate.py: error: 1 of 3 evaluations')
    assert [line for line in done.err.splitlines() if 'checkpoint-3.pth.tar left out' in line] != []
    assert 'Traceback' not in done.err


@pytest.mark.parametrize('after', [0, 1])
def test_interrupted_folder_gives_what_is_finished(run, folder, tmp_path, monkeypatch, after):
    score, calls = timm_sam.evaluation.single.score, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return score(*args, **kwargs)
    monkeypatch.setattr(timm_sam.evaluation.single, 'score', interrupted)
    done = run(f'--checkpoint {folder} --results-file r.json --results-format json')
    printed = result(done)
    assert [Path(row['checkpoint']).name for row in printed] == ['checkpoint-2.pth.tar'][:after]
    assert json.loads((tmp_path / 'r.json').read_text()) == printed
    left_out = ['checkpoint-2.pth.tar', 'checkpoint-10.pth'][after]
    assert len([line for line in done.err.splitlines() if f'Interrupted: {folder}/{left_out}' in line]) == 1


@pytest.mark.parametrize('command', ['', '--checkpoint {folder}', '--eval validation={data}/validation'])
def test_results_that_cannot_be_written_are_printed(run, fitted, folder, tmp_path, command):
    (tmp_path / 'r.json.part').mkdir()
    done = run(f'{command.format(folder=folder, data=fitted.data)} --results-file r.json --results-format json'
               .replace('--eval', '--data-dir "" --eval'))
    assert done.code == 2 and 'Traceback' not in done.err
    assert '--results-file: r.json cannot be written (Is a directory)' in done.last_line
    assert 'top1' in done.out.split('--result\n')[1]


@pytest.fixture
def downloaded(fitted, tmp_path):
    """A command line for which timm's weights are those of the fitted model."""
    path = tmp_path / 'weights.pth'
    shutil.copy(fitted.checkpoint, path)
    kwargs = f'''"pretrained_cfg_overlay={{'file': '{path}', 'num_classes': {CLASSES}}}"'''
    return f'{BASE} --num-classes {CLASSES} --data-dir {fitted.data} --model-kwargs {kwargs}'


def test_list_of_models_and_wildcard_take_timms_weights(fitted, downloaded, tmp_path):
    (tmp_path / 'models.txt').write_text('test_resnet\n\ntest_resnet.r160_in1k\n')
    once = expected(*outputs_of(fitted))
    printed = result(run_validate(tmp_path, '--model models.txt', downloaded))
    assert printed == [once, {**once, 'model': 'test_resnet.r160_in1k'}]
    printed = result(run_validate(tmp_path, '--model test_resne*', downloaded))
    assert printed == [{**once, 'model': 'test_resnet.r160_in1k'}]
    assert result(run_validate(tmp_path, '--model test_resnet', downloaded)) == once


def test_wildcard_without_a_match_is_a_mistake(downloaded, tmp_path):
    done = run_validate(tmp_path, '--model test_quux*', downloaded)
    assert done.code == 2 and done.out == ''
    assert done.last_line == ('validate.py: error: --model test_quux* matches no model of timm with weights: see '
                              'timm.list_models()')


# Memory

@pytest.fixture
def small_memory(monkeypatch):
    """Models fail with more than three images at once; gives the sizes that they were asked for."""
    seen = []
    create = timm_sam.evaluation.subject.create_model

    def with_limit(*args, **kwargs):
        model = create(*args, **kwargs)

        def limit(module, inputs):
            if len(inputs[0]) > 1:  # the first image only tries the size
                seen.append(len(inputs[0]))
            if len(inputs[0]) > 3:
                raise RuntimeError('CUDA out of memory.\nTried to allocate 2 GiB')
        model.register_forward_pre_hook(limit)
        return model
    monkeypatch.setattr(timm_sam.evaluation.subject, 'create_model', with_limit)
    return seen


def test_retry_makes_batches_smaller_until_they_fit(run, fitted, small_memory):
    done = run('--retry -b 12')
    assert result(done) == expected(*outputs_of(fitted))
    assert small_memory == [12, 8, 6, 4, *[3] * 8]
    tried = [line.split('trying --batch-size ')[1] for line in done.err.splitlines() if 'trying' in line]
    assert tried == ['8', '6', '4', '3']


def test_error_that_no_batch_size_mends_is_the_result_of_a_retry(run, small_memory, monkeypatch):
    monkeypatch.setattr('timm.utils.check_batch_size_retry', lambda text: False)
    assert result(run('--retry -b 12')) == {
        'model': 'test_resnet', 'error': 'CUDA out of memory. Tried to allocate 2 GiB'}
    assert small_memory == [12]


def test_folder_goes_on_after_a_checkpoint_for_which_memory_is_short(run, folder, small_memory):
    printed = result(run(f'--checkpoint {folder} -b 4'))
    assert [Path(row['checkpoint']).name for row in printed] == ['checkpoint-10.pth', 'checkpoint-2.pth.tar']
    assert [size for size in small_memory if size > 3] == [4, 4]  # each begins with the size that was asked for


def test_memory_that_is_short_without_retry_is_one_line(run, monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')
    monkeypatch.setattr('timm_sam.evaluation.single.score', no_memory)
    done = run('-b 12')
    assert done.code == 2 and done.out == '' and 'Traceback' not in done.err
    assert done.last_line.startswith('validate.py: error: --batch-size 12 is too large for the memory of cpu')
