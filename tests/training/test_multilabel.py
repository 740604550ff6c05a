"""Targets with several classes: metrics as scikit-learn defines them, on one to three ranks, with SAM, EMA, resume."""
import functools
import json
import shlex

import numpy as np
import pytest
import timm
import torch
from support.images import write_image_folder
from support.models import assert_identical
from support.multilabel import CLASSES, FIELDS, install, multi_hot, write_labelled_tree
from support.processes import run_in_turn
from support.running import in_process, quiet_about_timm
from support.states import differences, summary
from support.validating import preprocessed

from timm_sam import train, validate

SAM_ON = '--sam-variant layerwise_l2 --sam-rho 0.05'
METRICS = ('loss', 'map', 'micro_f1', 'macro_f1', 'sample_f1')


@pytest.fixture(scope='module')
def labelled(tmp_path_factory):
    return write_labelled_tree(tmp_path_factory.mktemp('labelled'))


@pytest.fixture(scope='module')
def data(labelled):
    """The part of both command lines that says what is read."""
    return (f'--device cpu --data-dir {labelled} --dataset hfds/tree --task multilabel --num-classes {CLASSES} '
            f'--model test_vit --img-size 32 -j 0')


@pytest.fixture(scope='module')
def command(data):
    return (f'{data} --target-key labels -b 8 --epochs 2 --warmup-epochs 0 --opt adamw --lr 0.003 --no-aug '
            f'--output out --experiment run')


@pytest.fixture
def run(command, tmp_path, monkeypatch):
    """Runs train.py in process: ``run('--epochs 3')``."""
    install(monkeypatch.setattr)

    def train_with(options=''):
        with quiet_about_timm():
            done = in_process(train.main, shlex.split(f'{command} {options}'), tmp_path)
        assert done.code == 0, done.err[-3000:]
        return done
    return train_with


def logits(folder, name, labelled, key='state_dict'):
    """Of the validation images, by the weights of a checkpoint."""
    model = timm.create_model('test_vit', num_classes=CLASSES, img_size=32).eval()
    model.load_state_dict(torch.load(folder / name, weights_only=False)[key])
    paths = [labelled / 'validation' / f'{i}.png' for i in range(len(multi_hot(labelled, 'validation')))]
    with torch.no_grad():
        return model(preprocessed(paths, model))


def by_definition(outputs, targets, threshold=0.5):
    """The metrics by scikit-learn's functions, in percent; classes without a positive target have AP 0."""
    from sklearn.metrics import average_precision_score, f1_score  # takes seconds

    predicted = (torch.sigmoid(outputs) >= threshold).numpy()
    scores = [average_precision_score(t, o) if t.any() else 0.0 for t, o in zip(targets.T, outputs.numpy().T)]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(outputs, torch.tensor(targets, dtype=torch.float32))
    f1 = {f'{kind}_f1': 100 * f1_score(targets, predicted, average={'sample': 'samples'}.get(kind, kind),
                                       zero_division=0) for kind in ('micro', 'macro', 'sample')}
    return {'loss': loss.item(), 'map': 100 * float(np.mean(scores)), **f1}


def metrics(row):
    return {name: float(row[f'eval_{name}']) for name in METRICS}


@pytest.mark.parametrize('options', ['', SAM_ON, f'{SAM_ON} --model-ema --model-ema-decay 0.5',
                                     '--multilabel-threshold 0.3', '--no-prefetcher'])
def test_summary_has_the_metrics_of_the_whole_split_by_their_definitions(run, labelled, options):
    done = run(options)
    rows = done.summary()
    key = 'state_dict_ema' if 'ema' in options else 'state_dict'
    expected = by_definition(logits(done.folder(), 'last.pth.tar', labelled, key), multi_hot(labelled, 'validation'),
                             0.3 if 'threshold' in options else 0.5)
    assert metrics(rows[-1]) == pytest.approx(expected, rel=1e-4)
    assert not {'eval_top1', 'eval_top5'} & set(rows[0]) and float(rows[1]['train_loss']) < float(rows[0]['train_loss'])
    best = max(rows, key=lambda row: float(row['eval_map']))
    assert done.checkpoint(name='model_best')['epoch'] == int(best['epoch'])


@pytest.mark.parametrize('field', ['--target-key hot --target-format multihot', f'--target-key {FIELDS}'])
def test_a_target_is_the_same_in_every_format(run, field):
    first = run('--epochs 1').summary()
    assert run(f'--epochs 1 --experiment other {field}').summary('other') == first


@pytest.mark.parametrize('options', ['', '--metrics-avg macro'])
def test_validate_py_prints_the_metrics_of_a_checkpoint(run, data, labelled, tmp_path, options):
    done = run(SAM_ON)
    with quiet_about_timm():
        found = in_process(validate.main, shlex.split(
            f"{data} -b 3 --checkpoint {done.folder() / 'last.pth.tar'} {options}"), tmp_path)
    assert found.code == 0, found.err[-3000:]
    printed = json.loads(found.out.split('--result\n')[1])
    outputs, targets = logits(done.folder(), 'last.pth.tar', labelled), multi_hot(labelled, 'validation')
    expected = by_definition(outputs, targets)
    assert {name: printed[name] for name in METRICS[1:]} == pytest.approx(
        {name: expected[name] for name in METRICS[1:]}, abs=1e-3)
    assert 'top1' not in printed and 'loss' not in printed
    if options:
        assert printed['macro_f1_score'] == pytest.approx(printed['macro_f1'], abs=1e-3)


def test_run_that_stopped_goes_on_as_if_it_had_not(run):
    options = f'{SAM_ON} --model-ema --mixup 0.2 --smoothing 0.1 --resume auto'
    run(f'{options} --epochs 3 --experiment whole')
    run(f'{options} --epochs 3 --stop-epoch 1 --experiment parts')
    done = run(f'{options} --epochs 3 --experiment parts')
    whole, parts = (done.checkpoint(name) for name in ('whole', 'parts'))
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'metric'):
        assert differences(whole[key], parts[key]) == []
    assert done.summary('whole') == done.summary('parts')


# On ranks

RUNS = {
    'several': '--model-ema --model-ema-decay 0.5 --opt momentum --lr 1e-30 --sched none --epochs 1',
    'sam': f'{SAM_ON} --model-ema --model-ema-decay 0.5',
}
ONE_CLASS = ('--device cpu --data-dir {images} --num-classes 4 --model test_vit --img-size 32 -j 0 -b 4 --no-aug '
             '--epochs 1 --warmup-epochs 0 --opt momentum --lr 1e-30 --sched none --output out '
             '--experiment one_class')


@pytest.fixture(scope='module')
def on_ranks(command, tmp_path_factory):
    """Number of ranks -> the folder in which they run train.py, once; the weights hardly move where lr is 1e-30."""
    images = write_image_folder(tmp_path_factory.mktemp('images'), splits={'train': 6, 'validation': 1})
    more = tmp_path_factory.mktemp('more')
    write_image_folder(more, splits={'validation': 3}, seed=1)
    for i in range(3):  # 7 images to validate
        (more / 'validation' / 'red' / f'{i}.png').rename(images / 'validation' / 'red' / f'more{i}.png')
    commands = {name: f'{command} {options} --experiment {name}' for name, options in RUNS.items()}
    commands['one_class'] = ONE_CLASS.format(images=images)

    @functools.cache
    def folder(ranks):
        made = tmp_path_factory.mktemp(f'ranks{ranks}')
        run_in_turn('support.multilabel', commands, made, ranks)
        return made
    return folder


RANKS = pytest.mark.parametrize('ranks', [2, pytest.param(3, marks=pytest.mark.slow)])


@pytest.mark.parametrize('name, columns', [('several', METRICS), ('one_class', ('loss', 'top1', 'top5'))])
@RANKS
def test_ranks_give_the_metrics_of_one_process(on_ranks, ranks, name, columns):
    one, more = (summary(on_ranks(n) / 'out' / name)[0] for n in (1, ranks))
    for column in columns:
        assert float(more[f'eval_{column}']) == pytest.approx(float(one[f'eval_{column}']), rel=1e-5)


def test_metrics_on_ranks_would_differ_if_samples_counted_twice(on_ranks, labelled):
    """What two ranks add to seven images is the first one: the metrics tell that it is not among them."""
    outputs = logits(on_ranks(2) / 'out' / 'sam', 'last.pth.tar', labelled, 'state_dict_ema')
    targets = multi_hot(labelled, 'validation')
    row = metrics(summary(on_ranks(2) / 'out' / 'sam')[-1])
    padded = by_definition(torch.cat([outputs, outputs[:1]]), np.concatenate([targets, targets[:1]]))
    assert row == pytest.approx(by_definition(outputs, targets), rel=1e-4)
    assert row['loss'] != pytest.approx(padded['loss'], rel=1e-3)


@RANKS
def test_sam_on_ranks_leaves_the_same_weights_on_all(on_ranks, ranks):
    states = [torch.load(on_ranks(ranks) / f'sam-rank{i}.pt') for i in range(ranks)]
    for state in states[1:]:
        assert_identical(state['weights'], states[0]['weights'])
        assert differences(state['optimizer'], states[0]['optimizer']) == []
    assert len({state['stats']['grad_norm'].item() for state in states}) == ranks  # of its own images
    for row in summary(on_ranks(ranks) / 'out' / 'sam'):
        assert float(row['train_sam_eps_norm']) > 0 and float(row['train_sam_loss']) > float(row['train_loss'])
