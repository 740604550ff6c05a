"""train.py on a CUDA device: its flags there, precisions, graphs, going on bit for bit, and one-line errors."""
import csv
import math

import pytest
import torch
from support.gpu import DEVICE, repeatable
from support.places import ROOT
from support.processes import python, run, torchrun
from support.states import differences

from timm_sam.training.preemption import EXIT_PREEMPTED, Preemption

pytestmark = pytest.mark.gpu

SAM_ON = '--sam-variant sam --sam-rho 0.1'
VIT = '--model test_vit --model-kwargs img_size=32 --opt adamw --lr 0.001'
ALL_AUGMENTATIONS = '--mixup 0.2 --cutmix 1.0 --reprob 0.5 --remode pixel --aa rand-m9-mstd0.5-inc1 --smoothing 0.1'


@pytest.fixture
def train(run_train):
    return lambda options='': run_train(f'--device {DEVICE} {options}')


def results(done, experiment='run'):
    assert done.code == 0, done.err[-3000:]
    rows = done.summary(experiment)
    assert all(math.isfinite(float(row[name])) for row in rows for name in ('train_loss', 'eval_loss'))
    return rows


@pytest.mark.parametrize('options', [
    '--amp', '--amp --amp-dtype bfloat16', '--model-dtype bfloat16', '--channels-last --amp',
    '--no-prefetcher --pin-mem', f'--amp {ALL_AUGMENTATIONS}', '--model-ema --model-ema-decay 0.9 --amp',
    '--model-ema --model-ema-force-cpu', '--clip-grad 1.0 --amp', '--grad-accum-steps 2 --amp', '--sam-m 4 --amp',
    '--sam-ascent-fraction 0.5 --amp', '--sam-params all --sam-variant elementwise_linf --amp',
    '--sam-filter layer4 --amp', '--synchronize-step --amp', '--opt lookahead_sgd', f'{VIT} --amp -j 2',
    '--aug-splits 3 --jsd-loss --aa rand-m9-mstd0.5-inc1 --split-bn', '--fast-norm --amp', '--torchscript',
    f'{VIT} --amp --drop-path 0.2 --grad-checkpointing', '--bce-loss --amp'])
def test_run_with_sam_on_goes_to_its_end(train, options):
    [row] = results(train(f'{SAM_ON} {options}'))
    assert float(row['train_sam_nonfinite']) == 0
    assert float(row['train_sam_eps_norm']) > 0.01


METHODS = {
    'usam': '', 'msam': '--sam-start-epoch 0', 'friendly': '', 'stable': '',
    'looksam': '--sam-looksam-k 3 --sam-looksam-alpha 0.7', 'gsam': '--sam-gsam-alpha 0.4',
    'late': '--sam-late-start 0.5', 'random_mask': '--sam-random-mask-sparsity 0.5',
    'ssam_dynamic': '--sam-ssam-dynamic-sparsity 0.5',
    'ssam_fisher': '--sam-ssam-fisher-sparsity 0.5 --sam-ssam-fisher-samples 4',
    'esam': '--sam-esam-beta 0.6 --sam-esam-gamma 0.5'}


@pytest.mark.parametrize('method', METHODS)
def test_methods_go_to_their_end_with_a_loss_scale(train, method):
    [row] = results(train(f'{SAM_ON} --amp --sam-method {method} {METHODS[method]}'))
    assert float(row['train_sam_nonfinite']) < 2  # the scale begins at 65536, which one batch may find too large


@pytest.mark.parametrize('options', ['', f'--amp {SAM_ON}'])
def test_epochs_are_those_of_the_cpu_but_for_rounding(train, run_train, options):
    losses = []
    for device in ('cuda', 'cpu'):
        [row] = results(run_train(f'--device {device} --experiment {device} {options}'), device)
        losses.append(float(row['train_loss']))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize('options', [
    '', f'--amp --model-ema --model-ema-decay 0.9 {ALL_AUGMENTATIONS} --drop 0.2',
    f'--amp {VIT} --drop-path 0.2 -j 2 --sam-method friendly',
    f'--amp --sam-method looksam {METHODS["looksam"]} --grad-accum-steps 2 --no-prefetcher'])
def test_run_that_is_stopped_within_an_epoch_goes_on_bit_for_bit(train, monkeypatch, options):
    options = f'{SAM_ON} {options} --epochs 3'
    with repeatable():
        whole = train(f'{options} --experiment whole')
        assert whole.code == 0, whole.err[-3000:]
        for place in (2, 4):
            with monkeypatch.context() as patch:
                patch.setattr(Preemption, 'should_stop', lambda self, updates, place=place: updates == place)
                assert train(f'{options} --resume auto').code == EXIT_PREEMPTED
        again = train(f'{options} --resume auto')
    assert again.code == 0, again.err[-3000:]
    first, second = whole.checkpoint('whole'), again.checkpoint()
    for entry in ('state_dict', 'optimizer', 'state_dict_ema', 'amp_scaler', 'sam_methods', 'random_state'):
        assert (entry in first) == (entry in second)
        assert differences(first.get(entry, {}), second.get(entry, {})) == [], entry
    assert whole.summary('whole') == again.summary()


@pytest.mark.parametrize('options', [
    '', '--sam-filter layer4', '--sam-m 4 --torchcompile-mode reduce-overhead', '--torchcompile-mode reduce-overhead',
    '--torchcompile-mode reduce-overhead --sam-filter layer4', '--model-ema --grad-accum-steps 2'])
def test_compiled_run_has_the_loss_of_one_that_is_not(train, options):
    losses = []
    for compiled in ('--torchcompile', ''):
        torch._dynamo.reset()
        # graphs of parts of a batch are compiled anew: whole batches only
        chosen = options if compiled else ' '.join(options.replace('--torchcompile-mode reduce-overhead', '').split())
        name = f'run{bool(compiled)}'
        [row] = results(train(f'{SAM_ON} {compiled} {chosen} --experiment {name}'), name)
        losses.append(float(row['train_loss']))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.fixture(scope='module')
def on_one_rank(image_folder, tmp_path_factory):
    """The command of a run; two ranks would need two devices."""
    folder = tmp_path_factory.mktemp('ranks')
    return folder, (f'--data-dir {image_folder} --num-classes 4 --model test_resnet --img-size 32 -b 8 -j 0 --epochs 1 '
                    f'--warmup-epochs 0 --lr 0.05 --output out {SAM_ON} --amp').split()


@pytest.mark.parametrize('name, options', [
    ('plain', []), ('synchronized', ['--sync-bn', '--sam-sync', '--sam-params', 'all']),
    ('accumulated', ['--grad-accum-steps', '2', '--model-ema']),
    ('compiled', ['--torchcompile', '--sam-filter', 'layer4'])])
def test_run_under_torchrun_has_the_device_that_is_there(on_one_rank, name, options):
    folder, command = on_one_rank
    done = run(torchrun(ROOT / 'train.py', *command, '--experiment', name, *options, ranks=1), folder)
    assert done.code == 0, done.err[-3000:]
    assert '1 process(es), one device each, this one on cuda' in done.err
    with open(folder / 'out' / name / 'summary.csv', newline='') as f:
        [row] = csv.DictReader(f)
    assert math.isfinite(float(row['train_loss']))
    assert torch.cuda.get_device_name() in (folder / 'out' / name / 'timing.csv').read_text()


def test_more_ranks_than_devices_are_one_line(on_one_rank):
    folder, command = on_one_rank
    ranks = torch.cuda.device_count() + 1
    done = run(torchrun(ROOT / 'train.py', *command, '--experiment', 'many', ranks=ranks), folder)
    assert done.code != 0
    said = [line for line in done.err.splitlines() if 'train.py: error' in line]
    assert len(said) == 1 and 'devices here' in said[0] and not (folder / 'out' / 'many').exists()
    assert 'Traceback' not in done.err.split('torch.distributed.elastic')[0]


def test_memory_that_does_not_suffice_is_one_line_with_what_to_do(train):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(300e6 / torch.cuda.get_device_properties(0).total_memory)
    try:
        done = train(f'{SAM_ON} -b 40 --img-size 512')
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert done.code == 2 and 'Traceback' not in done.err
    assert '--batch-size' in done.last_line and 'memory' in done.last_line


def test_sweep_gives_its_runs_the_device(image_folder, tmp_path):
    done = run(python('-m', 'timm_sam.sweep', '--data-dir', image_folder, '--num-classes', 4, '--model', 'test_resnet',
                      '--img-size', 32, '-b', 8, '-j', 0, '--epochs', 1, '--warmup-epochs', 0, '--lr', 0.05, '--amp',
                      '--sam-variant', 'sam', '--grid', 'sam_rho=0.1,0.5', '--devices', 1, '--out', 'sweep'), tmp_path)
    assert done.code == 0, done.err[-3000:]
    found = list((tmp_path / 'sweep').rglob('timing.csv'))
    assert len(found) == 2 and all(torch.cuda.get_device_name() in path.read_text() for path in found)
    done = run(python('-m', 'timm_sam.sweep', '--data-dir', image_folder, '--num-classes', 4, '--model', 'test_resnet',
                      '--sam-variant', 'sam', '--grid', 'sam_rho=0.1,0.5', '--devices', 9, '--out', 'more'), tmp_path)
    assert done.code == 2 and '--devices 9' in done.last_line and not (tmp_path / 'more').exists()
