"""How long a run is, what it keeps and from where it goes on: --stop-epoch, --save-epochs, --resume auto, --sched."""
import shlex

import pytest
import timm
import torch
from support.running import in_process, quiet_about_timm
from support.states import differences, tree
from timm.models import resolve_pretrained_cfg

from timm_sam import train
from timm_sam.cli.device import Process
from timm_sam.cli.errors import OptionError
from timm_sam.runs.checkpoints import newest_checkpoint
from timm_sam.training import engine, factory
from timm_sam.training.options import parse_args, read_args
from timm_sam.training.schedule import create_schedule

SAM_ON = '--sam-variant sam --sam-rho 0.05'


def epochs(rows):
    return [int(row['epoch']) for row in rows]


def names(folder, start):
    return sorted(path.name for path in folder.glob(f'{start}*'))


# --stop-epoch and --save-epochs

@pytest.mark.parametrize('sam', ['', SAM_ON])
def test_run_stops_early_with_the_rates_of_the_whole_schedule(run_train, sam):
    whole = run_train(f'--epochs 3 {sam}').summary()
    done = run_train(f'--epochs 3 --stop-epoch 2 --experiment early {sam}')
    assert done.code == 0 and done.summary('early') == whole[:2]
    assert done.checkpoint('early')['epoch'] == 1


def test_milestones_and_the_stop_are_evaluated_between_the_intervals(run_train):
    done = run_train('--epochs 6 --stop-epoch 5 --save-epochs 2 3 6 --val-interval 4 --checkpoint-hist 1')
    assert done.code == 0 and epochs(done.summary()) == [1, 2, 3, 4]
    assert names(done.folder(), 'milestone') == ['milestone-2.pth.tar', 'milestone-3.pth.tar']
    assert [done.checkpoint(name=f'milestone-{n}')['epoch'] for n in (2, 3)] == [1, 2]
    assert len(names(done.folder(), 'checkpoint')) == 1


def test_milestone_is_a_start_for_another_run(run_train):
    run_train('--epochs 3 --save-epochs 1 --model-ema')
    milestone = 'out/run/milestone-1.pth.tar'
    done = run_train(f'--epochs 3 --model-ema --experiment branch --resume {milestone}')
    assert done.code == 0 and epochs(done.summary('branch')) == [1, 2]
    for key in ('state_dict', 'state_dict_ema', 'optimizer'):
        assert differences(done.checkpoint()[key], done.checkpoint('branch')[key]) == []


@pytest.mark.parametrize('options, words', [
    ('--epochs 2 --stop-epoch 3', ['--stop-epoch 3', 'from 1 to 2']),
    ('--epochs 2 --stop-epoch 0', ['--stop-epoch 0', '>= 1']),
    ('--epochs 2 --save-epochs 1 3 4', ['--save-epochs 3 4', 'from 1 to 2']),
    ('--epochs 2 --cooldown-epochs 1 --stop-epoch 4', ['--stop-epoch 4', 'from 1 to 3']),
    ('--sched wsd --epochs 10 --warmup-epochs 0 --decay-epochs 11', ['--sched wsd', '--decay-epochs']),
    ('--sched wsd --epochs 10 --lr-decay-fn steep', ['--sched wsd', 'steep', '--lr-decay-fn']),
    ('--sched rsqrt --warmup-epochs 0', ['--sched rsqrt', '--lr-stable-timescale']),
    ('--sched steps', ['--sched steps']),
    ('--resume auto --experiment ""', ['--resume auto', '--experiment']),
])
def test_mistake_is_found_before_anything_is_built(run_train, options, words):
    done = run_train(options)
    assert done.code == 2 and done.err.count('\n') == 1 and not done.folder().exists()
    assert [word for word in words if word not in done.err] == []


def test_sam_and_the_stop_count_the_epochs_of_the_schedule(run_train):
    done = run_train(f'--epochs 4 --stop-epoch 2 {SAM_ON} --sam-start-epoch 1')
    first, second = done.summary()
    assert first['train_sam_eps_norm'] == 'nan' and float(second['train_sam_eps_norm']) == pytest.approx(0.05, rel=1e-4)


# --resume auto

@pytest.mark.parametrize('sam', ['', f'{SAM_ON} --model-ema'])
def test_stopped_run_goes_on_in_place_to_the_end_of_one_that_was_not(run_train, sam):
    options = f'--epochs 4 --resume auto --checkpoint-hist 2 --save-epochs 1 4 {sam}'
    whole = run_train(f'{options} --experiment whole')
    first = run_train(f'{options} --stop-epoch 2 --experiment parts')
    assert epochs(first.summary('parts')) == [0, 1]
    second = run_train(f'{options} --experiment parts')
    assert second.summary('parts') == whole.summary('whole')
    assert tree_names(second.folder('parts')) == tree_names(whole.folder('whole'))  # and no args-before-epoch-2.yaml
    assert 'other options than before' not in second.err
    for name in ('last', 'model_best'):
        one, other = (second.checkpoint(run, name) for run in ('whole', 'parts'))
        for key in ('state_dict', 'optimizer', 'epoch', 'metric', *(['state_dict_ema'] if 'ema' in sam else [])):
            assert differences(one[key], other[key]) == [], (name, key)
    assert len(names(second.folder('parts'), 'checkpoint')) == 2


def tree_names(folder):
    return {path.name for path in folder.iterdir()}


def test_finished_run_is_left_as_it_is(run_train):
    options = '--epochs 2 --resume auto --save-epochs 2'
    done = run_train(options)
    before = {path: entry for path, entry in tree(done.folder()).items() if not path.endswith('args.yaml')}
    again = run_train(options)
    after = {path: entry for path, entry in tree(again.folder()).items() if not path.endswith('args.yaml')}
    assert again.code == 0 and after == before
    assert '--result\n[]' in again.out


def test_run_that_went_back_goes_on_from_there_and_not_from_what_it_left(run_train, script):
    options = '--epochs 3 --recovery-interval 4'
    run_train(options)
    script(stop=2)
    back = run_train(f'{options} --resume out/run/checkpoint-0.pth.tar')
    assert back.code == 0 and back.checkpoint()['epoch'] == 1 and epochs(back.summary()) == [0, 1]
    assert {'checkpoint-2.pth.tar', 'recovery-2-3.pth.tar'} <= tree_names(back.folder())  # of later epochs
    assert newest_checkpoint(str(back.folder())) == str(back.folder() / 'last.pth.tar')
    trained = script()
    again = run_train(f'{options} --resume auto')
    assert again.code == 0 and trained == [2] and epochs(again.summary()) == [0, 1, 2]
    assert again.checkpoint()['saver']['branch'] == 1


def test_stop_before_what_is_done_is_the_end_of_the_run(run_train):
    run_train('--epochs 3 --resume auto --stop-epoch 2')
    again = run_train('--epochs 3 --resume auto --stop-epoch 1')
    assert again.code == 0 and epochs(again.summary()) == [0, 1]


def test_results_of_a_run_without_checkpoints_are_not_written_over(run_train):
    done = run_train('--epochs 2 --resume auto')
    for path in done.folder().glob('*.pth.tar'):
        path.unlink()
    before = tree(done.folder())
    for options in ('--epochs 2', '--epochs 3 --lr 0.01'):
        again = run_train(f'{options} --resume auto')
        assert again.code == 2 and 'summary.csv, 2 epochs' in again.last_line and 'no checkpoint' in again.last_line
        assert tree(done.folder()) == before


def test_run_that_was_killed_in_front_of_its_first_checkpoint_starts_anew(run_train):
    done = run_train('--epochs 1 --resume auto')
    for path in done.folder().glob('*.pth.tar'):
        path.unlink()
    assert run_train('--epochs 1 --resume auto').code == 0 and epochs(done.summary()) == [0]


# Schedules

@pytest.mark.parametrize('options, rates', [
    # 2 epochs of warm-up, then constant, then 2 (of 8, or of a quarter of 8) epochs of decay
    ('--sched wsd --decay-epochs 2 --lr-decay-fn linear', [0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 0.5]),
    ('--sched wsd --decay-epochs 0.25 --lr-decay-fn linear', [0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 0.5]),
    ('--sched wsd --decay-epochs 2', [0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1 - 0.5 ** 0.5]),
    ('--sched rsqrt --decay-epochs 1 --lr-stable-timescale 3', [0.5, 0.75, *((1 + t / 3) ** -0.5 for t in range(8))]),
    ('--sched constant', [0.5, 0.75, *[1] * 8]),
    ('--sched none', [1] * 10),
])
def test_rates_of_the_newer_schedules(options, rates):
    args = read_args(train.build_parser(), shlex.split(
        f'--epochs 10 --warmup-epochs 2 --warmup-lr 0.5 --min-lr 0 {options}'))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, num_epochs = create_schedule(args, optimizer, 1, False)
    assert num_epochs == 10
    seen = []
    for epoch in range(10):
        seen.append(optimizer.param_groups[0]['lr'])
        if scheduler is not None:
            scheduler.step(epoch + 1)
    assert seen == pytest.approx(rates)


def test_length_of_the_final_decay_is_that_of_the_schedule():
    assert [read_args(train.build_parser(), ['--sched', name]).decay_epochs for name in ('wsd', 'rsqrt', 'step')] == [
        0.2, 0.2, 90]


# --pretrained-cfg-overlay, image sizes

@pytest.mark.parametrize('options, expected', [
    ('', {'file': 'w.npz', 'num_classes': -1}),
    ('--pretrained-cfg-overlay custom_load=True', {'file': 'w.npz', 'num_classes': -1, 'custom_load': True}),
    ('--pretrained-cfg-overlay num_classes=10', {'file': 'w.npz', 'num_classes': 10}),
])
def test_entries_of_the_pretrained_configuration_are_replaced_in_turn(monkeypatch, options, expected):
    given = {}
    monkeypatch.setattr(factory, 'create_model', lambda **kwargs: given.update(kwargs) or timm.create_model('test_vit'))
    args = read_args(train.build_parser(), shlex.split(f'--model vit_tiny_patch16_224 --pretrained '
                                                       f'--pretrained-path w.npz {options}'))
    factory.build_model(args, Process(torch.device('cpu')))
    assert {key: given['pretrained_cfg'][key] for key in expected} == expected
    own = resolve_pretrained_cfg('vit_tiny_patch16_224').to_dict()
    assert given['pretrained_cfg']['mean'] == own['mean'] and given['pretrained']


def test_pretrained_path_is_read_with_the_overlay(run_train, tmp_path):
    torch.manual_seed(3)
    donor = timm.create_model('test_resnet', num_classes=7)
    torch.save(donor.state_dict(), tmp_path / 'donor.pth')
    done = run_train('--pretrained --pretrained-path donor.pth --pretrained-cfg-overlay num_classes=7 --num-classes 4 '
                     '--lr 1e-30 --opt momentum --sched none')
    assert done.code == 0, done.err[-2000:]
    state = done.checkpoint()['state_dict']
    kept = {name: value for name, value in donor.state_dict().items()
            if name.endswith('weight') and not name.startswith('fc.')}
    torch.testing.assert_close({name: state[name] for name in kept}, kept, rtol=0, atol=1e-25)


def test_model_of_a_fixed_size_is_built_for_the_images(run_train):
    done = run_train(f'--model test_vit --img-size 48 {SAM_ON}')
    assert done.code == 0 and done.checkpoint()['state_dict']['pos_embed'].shape[1] == 3 * 3 + 1


@pytest.mark.parametrize('model', ['test_resnet', 'test_vit'])
def test_images_need_not_be_square(base, tmp_path, monkeypatch, model):
    command = base.replace('--img-size 32', '--input-size 3 32 48').replace('test_resnet', model)
    sizes = set()
    real = train.evaluate
    monkeypatch.setattr(train, 'evaluate', lambda run, net, *rest: [
        sizes.add(tuple(batch.shape[1:])) for batch, _ in run.data.eval] and real(run, net, *rest))
    with quiet_about_timm():
        done = in_process(
            train.main, shlex.split(f'{command} {SAM_ON} --reprob 0.5 --aa rand-m9 --mixup 0.2'), tmp_path)
    assert done.code == 0, done.err[-2000:]
    assert sizes == {(3, 32, 48)}


@pytest.mark.parametrize('options', ['--img-size 40 --model test_vit --model-kwargs img_size=32', '--in-chans 1 '
                                     '--input-size 3 32 32'])
def test_sizes_that_contradict_each_other_are_refused(run_train, options):
    done = run_train(options)
    assert done.code == 2 and 'Conflicting input' in done.err and done.err.strip().count('\n') < 8


# Averages of low precision

@pytest.mark.parametrize('options, dtype', [
    ('--model-dtype bfloat16', torch.bfloat16), ('--model-dtype bfloat16 --model-ema-force-fp32', torch.float32),
    ('', torch.float32)])
@pytest.mark.parametrize('sam', ['', SAM_ON])
def test_average_of_the_weights_is_of_its_type_and_evaluated(run_train, options, dtype, sam):
    done = run_train(f'--model-ema --model-ema-decay 0.5 {options} {sam}')
    assert done.code == 0, done.err[-2000:]
    average = done.checkpoint()['state_dict_ema']
    assert {value.dtype for name, value in average.items() if name.endswith('weight')} == {dtype}
    assert 0 <= float(done.summary()[0]['eval_top1']) <= 100


def test_average_in_bfloat16_is_rounded_on_after_a_restart(run_train):
    options = f'--epochs 3 --resume auto --model-dtype bfloat16 --model-ema --model-ema-decay 0.9 {SAM_ON}'
    run_train(f'{options} --experiment whole')
    run_train(f'{options} --stop-epoch 1 --experiment parts')
    done = run_train(f'{options} --experiment parts')
    whole, parts = done.checkpoint('whole'), done.checkpoint('parts')
    for key in ('state_dict', 'state_dict_ema', 'ema_rounding'):
        assert differences(whole[key], parts[key]) == []
    assert 'ema_rounding' not in run_train('--model-ema --experiment wide').checkpoint('wide')


def test_config_takes_values_as_the_command_line_does(tmp_path):
    path = tmp_path / 'run.yaml'
    path.write_text("task: multilabel\ndataset: hfds/several\nnum_classes: 3\nloss: asl\nlr: '3e-4'\n"
                    "save_epochs: [4, '8']\nstop_epoch: 9\n"
                    'pretrained_cfg_overlay: {custom_load: true}\npersistent_workers: false\nloss_pos_weight: 2\n')
    args = parse_args(train.build_parser(), ['-c', str(path), '--device', 'cpu', '--data-dir', str(tmp_path)])
    assert (args.lr, args.save_epochs, args.persistent_workers, args.loss_pos_weight) == (3e-4, [4, 8], False, '2')
    for wrong in ('loss: focal', 'task: [multilabel]', 'save_epochs: 3', 'save_epochs: [x]', 'stop_epoch: 1.5'):
        path.write_text(wrong)
        with pytest.raises(OptionError, match=wrong.partition(':')[0]):
            read_args(train.build_parser(), ['-c', str(path)])


# --mixup-mode half

def test_halves_of_a_batch_are_mixed_into_one(run_train, monkeypatch):
    seen = []

    class Spy(engine.Weigher):
        def __init__(self, data, process, batch_size, accum_steps):
            seen.append(batch_size)
            super().__init__(data, process, batch_size, accum_steps)
    monkeypatch.setattr(engine, 'Weigher', Spy)
    assert run_train(f'--mixup 0.2 --mixup-mode half {SAM_ON} --sam-m 2').code == 0
    assert seen == [4] * 5
