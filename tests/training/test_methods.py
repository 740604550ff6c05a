"""Methods on the command line: their flags, what is refused, and runs with them."""
import pytest
import torch
import yaml
from support.command_lines import AOT, VIT
from support.loop import CPU, run_around
from support.models import TinyNet, one_step, sam_on
from support.slots import Residual
from support.states import differences, finite
from timm.task import ClassificationTask

from timm_sam.cli.parser import OptionParser
from timm_sam.methods import METHODS, Method
from timm_sam.training.checkpoint import resume_methods
from timm_sam.training.engine import checkpoint_extras
from timm_sam.training.sam_options import add_sam_flags

SAM_ON = '--sam-variant sam --sam-rho 0.05'
GSAM = f'{SAM_ON} --sam-method gsam --sam-gsam-alpha 0.4'


def test_run_with_gsam_says_so_and_ends_with_other_weights_than_sam(run_train):
    gsam = run_train(f'{GSAM} --epochs 2 --experiment gsam')
    sam = run_train(f'{SAM_ON} --epochs 2 --experiment sam')
    assert gsam.code == 0, gsam.err[-2000:]
    line, = gsam.log('SAM sam')
    assert 'gsam(alpha=0.4, rho_min=0): perturbs 30 of 47 tensors' in line
    line, = gsam.log('SAM forward: ')
    assert line == 'SAM forward: two full forwards per update: the method needs a whole pass at w'
    assert all(finite(row) for row in gsam.summary('gsam'))
    assert differences(gsam.checkpoint('gsam')['state_dict'], sam.checkpoint('sam')['state_dict'])
    assert 'sam_methods' not in gsam.checkpoint('gsam')
    assert yaml.safe_load((gsam.folder('gsam') / 'args.yaml').read_text())['sam_method'] == ['gsam']


def test_radius_falls_with_the_learning_rate_of_the_run(run_train):
    done = run_train(f'{GSAM} --sam-gsam-rho-min 0.01 --epochs 4 --lr 0.04 --min-lr 0.02 --sched step --decay-epochs 2 '
                     '--decay-rate 0.75')  # 0.04, 0.04, 0.03, 0.03
    norms = [float(row['train_sam_eps_norm']) for row in done.summary()]
    assert norms == pytest.approx([0.05, 0.05, 0.03, 0.03], rel=1e-4)


@pytest.mark.parametrize('options', [
    '--sam-m 4', '--grad-accum-steps 2', '--grad-accum-steps 3 --sam-every 2', '--model-ema', '--mixup 0.2',
    '--clip-grad 0.5', '--amp --amp-dtype bfloat16', '--model-dtype bfloat16', '--sam-params all --sam-m 4',
    '--sam-variant fisher', '--sam-filter layer4', '--sam-bn-stats both', '--sam-start-epoch 1', '--layer-decay 0.7',
    '--opt lion --lr 0.001', VIT, '--grad-checkpointing', '--channels-last', '--sam-sync'])
def test_gsam_trains_with(run_train, options):
    done = run_train(f'{GSAM} --epochs 2 {options}')
    assert done.code == 0, done.err[-2000:]
    assert all(finite(row) for row in done.summary()[int('start' in options):])


def test_compiled_run_gives_the_weights_of_the_eager_one(run_train):
    eager = run_train(f'{GSAM} --epochs 1 --experiment eager')
    compiled = run_train(f'{GSAM} --epochs 1 {AOT} --experiment compiled')
    assert compiled.code == 0, compiled.err[-2000:]
    first, second = (done.checkpoint(name)['state_dict'] for done, name in ((eager, 'eager'), (compiled, 'compiled')))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize('start, first', [('checkpoint-0', 1), ('recovery-2-1', 2)])
def test_run_goes_on_bit_for_bit_between_and_within_epochs(run_train, start, first):
    options = f'{GSAM} --sam-gsam-rho-min 0.01 --drop 0.1 --recovery-interval 2 --epochs 3'
    whole = run_train(f'{options} --experiment whole')
    on = run_train(f'{options} --resume out/whole/{start}.pth.tar --experiment on')
    assert on.code == 0, on.err[-2000:]
    assert on.summary('on') == whole.summary('whole')[first:]
    for entry in ('state_dict', 'optimizer'):
        assert differences(on.checkpoint('on')[entry], whole.checkpoint('whole')[entry]) == []


METHODS_TRAINED = {
    'usam': '--sam-method usam --sam-usam-lam 1-1/t', 'msam': '--sam-method msam --warmup-epochs 1',
    'friendly': '--sam-method friendly', 'stable': '--sam-method stable',
    'looksam': '--sam-method looksam --sam-looksam-k 3 --sam-looksam-alpha 0.3',
    'late': '--sam-method late --sam-late-start 1', 'late share': '--sam-method late --sam-late-start 0.5',
    'random_mask': '--sam-method random_mask --sam-random-mask-sparsity 0.5 --sam-random-mask-every 1',
    'ssam_dynamic': '--sam-method ssam_dynamic --sam-ssam-dynamic-sparsity 0.5',
    'esam': '--sam-method esam --sam-esam-beta 0.6 --sam-esam-gamma 0.5 --sam-params all',
    'ssam_fisher': '--sam-method ssam_fisher --sam-ssam-fisher-sparsity 0.5 --sam-ssam-fisher-samples 4',
    'three at once': '--sam-method usam friendly stable --sam-usam-lam 0.5',
}


@pytest.mark.parametrize('start, first', [('checkpoint-0', 1), ('recovery-2-1', 2)])
@pytest.mark.parametrize('name', METHODS_TRAINED)
def test_run_with_any_method_goes_on_bit_for_bit_with_its_state(run_train, name, start, first):
    options = f'{SAM_ON} {METHODS_TRAINED[name]} --drop 0.1 --recovery-interval 2 --epochs 3'
    whole = run_train(f'{options} --experiment whole')
    assert whole.code == 0, whole.err[-2000:]
    on = run_train(f'{options} --resume out/whole/{start}.pth.tar --experiment on')
    assert on.code == 0, on.err[-2000:]
    assert on.summary('on') == whole.summary('whole')[first:]
    for entry in ('state_dict', 'optimizer'):
        assert differences(on.checkpoint('on')[entry], whole.checkpoint('whole')[entry]) == []
    saved = [done.checkpoint(run).get('sam_methods') for done, run in ((on, 'on'), (whole, 'whole'))]
    assert differences(*({'methods': state} for state in saved)) == []


@pytest.mark.parametrize('methods', [
    'usam friendly stable ssam_fisher --sam-ssam-fisher-sparsity 0.5 --sam-ssam-fisher-samples 4',
    'looksam ssam_dynamic --sam-looksam-k 2 --sam-looksam-alpha 0.3 --sam-ssam-dynamic-sparsity 0.5',
    'msam late --sam-late-start 1'])
def test_methods_train_with_chunks_accumulation_autocast_and_an_average_at_once(run_train, methods):
    done = run_train(f'{SAM_ON} --sam-method {methods} --sam-m 4 --grad-accum-steps 2 --amp --amp-dtype bfloat16 '
                     '--model-ema --clip-grad 1 --epochs 2')
    assert done.code == 0, done.err[-2000:]
    assert all(finite(row) for row in done.summary()[1:])


def test_msam_begins_where_another_method_says(run_train, updates):
    done = run_train(f'{SAM_ON} --sam-method msam late --sam-late-start 2 --no-sam-late-ramp --epochs 3 '
                     '--warmup-epochs 1')
    assert done.code == 0, done.err[-1000:]
    assert [perturbed for perturbed, _ in updates] == [0] * 10 + [1] * 5


def test_part_of_the_batch_gives_the_perturbation_under_a_random_mask(run_train):
    done = run_train(f'{SAM_ON} --sam-method random_mask --sam-random-mask-sparsity 0.5 --sam-ascent-fraction 0.5')
    assert done.code == 0 and all(finite(row) for row in done.summary())


def test_msam_begins_after_the_warm_up_and_says_so(run_train, updates):
    done = run_train(f'{SAM_ON} --sam-method msam --epochs 3 --warmup-epochs 1 --warmup-lr 0.01')
    assert done.log('SAM begins after the warm-up, with epoch 1; --sam-start-epoch sets another')
    assert done.log('SAM method msam(): one pass an update')
    assert [perturbed for perturbed, _ in updates] == [0] * 5 + [1] * 10


@pytest.mark.parametrize('options, message', [
    (f'{SAM_ON} --sam-method gsam', '--sam-method gsam needs --sam-gsam-alpha: add --sam-gsam-alpha X, share of'),
    (f'{SAM_ON} --sam-gsam-alpha 0.4', '--sam-gsam-alpha 0.4 has no effect without --sam-method gsam: add it'),
    (f'{SAM_ON} --sam-method random_mask --sam-random-mask-sparsity 0.99999',
     '--sam-random-mask-sparsity 0.99999 leaves none of '),
    (f'{SAM_ON} --sam-gsam-rho-min 0', '--sam-gsam-rho-min 0.0 has no effect without --sam-method gsam'),
    ('--sam-method gsam', '--sam-method gsam has no effect without --sam-variant'),
    (f'{GSAM} --sam-gsam-alpha -1', '--sam-gsam-alpha -1.0 must be a finite number >= 0'),
    (f'{GSAM} --sam-gsam-alpha nan', '--sam-gsam-alpha nan must be a finite number >= 0'),
    (f'{GSAM} --sam-gsam-alpha much', "argument --sam-gsam-alpha: invalid float value: 'much'"),
    (f'{GSAM} --sam-gsam-rho-min 0.1', '--sam-gsam-rho-min 0.1 is above --sam-rho 0.05: lower it'),
    (f'{GSAM} --min-lr 1', '--min-lr 1 is above --lr 0.05: lower it'),
    (f'{GSAM} --sam-ascent-fraction 0.5', '--sam-ascent-fraction 0.5: --sam-method gsam needs the gradient of the'),
    (f'{SAM_ON} --sam-method gsam gsam --sam-gsam-alpha 0.1', '--sam-method gsam gsam names a method twice'),
    (f'{GSAM} --sam-method gsam stable', '--sam-method: gsam(alpha=0.4, rho_min=0) and stable() both decide'),
    (f'{SAM_ON} --sam-method looksam --sam-looksam-k 2 --sam-looksam-alpha 1 --sam-every 3',
     '--sam-every 3: looksam(k=2, alpha=1) decides how often it perturbs; leave it out'),
    (f'{SAM_ON} --sam-method looksam --sam-looksam-k 0 --sam-looksam-alpha 1', '--sam-looksam-k 0 must be an integer'),
    (f'{SAM_ON} --sam-method late --sam-late-start 9', '--sam-method late: it begins with epoch 9'),
    (f'{SAM_ON} --sam-method late --sam-late-start 2 --sam-start-epoch 1 --epochs 3', '--sam-start-epoch 1: late('),
    (f'{SAM_ON} --sam-method late --sam-late-start 2 --sam-end-epoch 1 --epochs 3',
     '--sam-end-epoch 1 is not after the beginning of --sam-method late, epoch 2: raise it'),
    (f'{SAM_ON} --sam-method late --sam-late-start 0.5 --sam-end-epoch 1 --epochs 3',
     '--sam-end-epoch 1 is not after the beginning of --sam-method late, epoch 1.5: raise it'),
    (f'{SAM_ON} --sam-method msam --sam-end-epoch 2 --epochs 3 --warmup-epochs 2',
     '--sam-end-epoch 2 is not after the beginning of --sam-method msam, epoch 2: raise it'),
    (f'{SAM_ON} --sam-method msam --epochs 2 --warmup-epochs 2', '--sam-method msam: it begins with epoch 2, which is'),
    (f'{SAM_ON} --sam-method msam --opt momentum --momentum 0', '--sam-method msam: SGD keeps no first moment'),
    (f'{SAM_ON} --sam-method usam --sam-usam-lam 2', "--sam-usam-lam '2' must be a number from 0 to 1, or 1-1/t"),
    (f'{SAM_ON} --sam-variant elementwise_linf --sam-method usam --model nowhere',
     '--sam-method: usam(lam=0) with --sam-variant'),
    (f'{SAM_ON} --sam-method friendly --sam-ascent-fraction 0.5',
     '--sam-ascent-fraction 0.5: --sam-method friendly needs the gradient of the whole batch'),
    (f'{SAM_ON} --sam-method msam --sam-ascent-fraction 0.5',
     '--sam-ascent-fraction 0.5: --sam-method msam has no pass at w'),
    (f'{SAM_ON} --sam-method msam --sam-sync', '--sam-sync has no effect with --sam-method msam'),
    (f'{SAM_ON} --sam-method lookahead', "argument --sam-method: invalid choice: 'lookahead'")])
def test_what_does_not_fit_is_one_line_and_writes_nothing(run_train, options, message):
    done = run_train(options)
    assert done.code == 2 and done.err.count('Traceback') == 0
    assert f'train.py: error: {message}' in done.last_line
    assert not done.folder().exists()


def test_resuming_with_another_method_is_another_run(run_train):
    assert run_train(f'{GSAM} --epochs 2').code == 0
    done = run_train(f'{SAM_ON} --epochs 2 --resume auto')
    assert done.code == 2 and 'had another --sam-gsam-alpha than None' in done.last_line


def test_every_argument_of_a_method_is_a_flag_with_help():
    parser = OptionParser(prog='p')
    add_sam_flags(parser)
    flags = {action.dest: action for action in parser._actions}
    assert {'gsam', 'usam', 'msam', 'friendly', 'stable', 'looksam', 'late'} <= METHODS.keys()
    assert all(action.help for action in flags.values())
    assert flags['sam_gsam_alpha'].help == 'share of g_perp that is taken away, >= 0 (required with --sam-method gsam)'
    assert flags['sam_gsam_rho_min'].help.endswith('(default with --sam-method gsam: 0.0)')
    assert not {'sam_gsam_lr_max', 'sam_gsam_lr_min'} & flags.keys()


def run_with(sam, model):
    return run_around(None, ClassificationTask(model, criterion=None, verbose=False), None, sam.optimizer, sam)


def test_what_a_method_keeps_goes_into_checkpoints_under_one_key_and_comes_back():
    model, direction = TinyNet(), Residual()
    sam = sam_on(model, method=Method(name='residual', direction=direction))
    one_step('minimize', sam, model)
    saved = checkpoint_extras(run_with(sam, model))
    assert saved['sam_methods'].keys() == {'direction'}
    fresh = Residual()
    resume_methods(saved, sam_on(TinyNet(), method=Method(name='residual', direction=fresh)), False)
    assert all(torch.equal(a, b) for a, b in zip(fresh.m, direction.m))


def test_what_a_checkpoint_lacks_of_a_method_starts_as_new_and_is_said(caplog):
    fresh = Residual()
    sam = sam_on(TinyNet(), method=Method(name='residual', direction=fresh))
    with caplog.at_level('INFO'):
        resume_methods({}, sam, True)
    assert fresh.m is None and 'starts as new' in caplog.text


def test_plain_runs_have_no_such_key():
    model = TinyNet()
    sam = sam_on(model)
    assert 'sam_methods' not in checkpoint_extras(run_with(sam, model)) and CPU.primary
