"""Our surface beside what the installed timm reads and offers: what is missing is named.

`make test-newest` runs this with the newest timm. A failure here says which flag, loss, schedule or task timm has and
train.py has not.
"""
import argparse
import ast
import inspect

import pytest
import timm.loss
import timm.optim
import timm.scheduler.scheduler_factory as schedulers
import timm.task
import torch
from timm.data import create_dataset, create_loader, create_naflex_loader
from timm.data.readers import targets
from timm.loss import create_classification_loss
from timm.optim import optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask

from timm_sam import train, validate
from timm_sam.cli.tasks import EVALUATORS
from timm_sam.training.losses import criterion_kwargs
from timm_sam.training.options import read_args
from timm_sam.training.schedule import create_schedule

DESTS = {action.dest for action in train.build_parser()._actions}


class Asked(argparse.Namespace):
    """Options that note which of them are read, those that are not there too."""

    def __init__(self, args):
        super().__init__(**vars(args))
        object.__setattr__(self, 'names', set())

    def __getattribute__(self, name):
        if not name.startswith('__') and name != 'names':
            object.__getattribute__(self, 'names').add(name)
        return super().__getattribute__(name)


def options(*argv):
    return read_args(train.build_parser(), argv)


# what a factory reads, and flags of another name that give it
ELSEWHERE = {
    'opt_args': 'opt_kwargs',  # train.py gives them to create_optimizer_v2 itself
    'opt_foreach': 'opt_kwargs',  # --opt-kwargs foreach=True
}


@pytest.mark.parametrize('read', [scheduler_kwargs, optimizer_kwargs])
def test_every_option_that_timm_reads_is_a_flag(read):
    asked = Asked(options())
    read(asked)
    assert len(asked.names) > 5
    assert sorted(name for name in asked.names if ELSEWHERE.get(name, name) not in DESTS) == []


def test_schedule_gets_every_argument_that_timm_has():
    given = {*scheduler_kwargs(options()), 'optimizer', 'updates_per_epoch'}
    assert sorted(set(inspect.signature(create_scheduler_v2).parameters) - given) == []


def names_compared_with(function, variable):
    """The texts with which a function compares one of its variables."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(function))):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == variable:
            for other in node.comparators:
                found |= {leaf.value for leaf in ast.walk(other) if isinstance(leaf, ast.Constant)}
    return {name for name in found if isinstance(name, str)}


SCHEDULES = sorted(names_compared_with(schedulers.create_scheduler_v2, 'sched'))


def test_schedules_are_found():
    assert {'cosine', 'wsd', 'none'} <= set(SCHEDULES)


@pytest.mark.filterwarnings('ignore:PlateauLRScheduler is deprecated:FutureWarning')
@pytest.mark.parametrize('name', SCHEDULES)
def test_every_schedule_of_timm_is_accepted(name):
    args = options('--sched', name, '--epochs', '20')
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler, epochs = create_schedule(args, optimizer, 10, False)
    assert epochs == 20 and (scheduler is None) == (name == 'none')
    (action,) = [a for a in train.build_parser()._actions if a.dest == 'sched']
    assert name in action.help


def test_every_loss_of_timm_is_a_choice_of_its_flag():
    (action,) = [a for a in train.build_parser()._actions if a.dest == 'loss']
    assert tuple(action.choices) == tuple(timm.loss.LOSS_TYPES)


def test_every_argument_of_timms_losses_is_given_by_a_flag(tmp_path):
    stats = tmp_path / 'stats.json'
    stats.write_text('{"pos_counts": [1, 2], "num_samples": 3}')
    given = set()
    for loss in timm.loss.LOSS_TYPES:
        argv = ['--loss', loss]
        if loss in timm.loss.MULTI_LABEL_LOSS_TYPES:
            argv += ['--task', 'multilabel', '--dataset', 'hfds/several', '--num-classes', '2']
        if loss == 'db':
            argv += ['--class-stats', str(stats)]
        if loss == 'jsd':
            argv += ['--aug-splits', '2']
        given |= set(criterion_kwargs(options(*argv)))
    assert sorted(set(inspect.signature(create_classification_loss).parameters) - given) == []


def test_every_method_of_weights_of_timm_is_named_in_the_help():
    shown = train.build_parser().format_help()
    assert [method for method in timm.loss.CLASS_WEIGHT_METHODS if method not in shown] == []


def test_every_task_of_timm_can_be_asked_for():
    tasks = {value for value in vars(timm.task).values() if isinstance(value, type) and issubclass(value, TrainingTask)}
    known = {'TrainingTask', 'ClassificationTask', 'MultiLabelClassificationTask', 'LogitDistillationTask',
             'FeatureDistillationTask', 'TokenDistillationTask'}
    assert sorted(task.__name__ for task in tasks if task.__name__ not in known) == []


TASK_FLAGS = {
    'student_model': 'model', 'model': 'model', 'teacher_model': 'kd_model_name', 'criterion': 'loss',
    'criterion_kwargs': 'loss', 'device': 'device', 'dtype': 'model_dtype', 'threshold': 'multilabel_threshold',
    'loss_type': 'kd_loss_type', 'temperature': 'kd_temperature', 'distill_type': 'kd_token_distill_type',
    'student_feature_dim': 'kd_student_feature_dim', 'teacher_feature_dim': 'kd_teacher_feature_dim',
}
# of a teacher that is no model of timm's registry with its own weights: timm's script has no flag for them either
NO_FLAG = {'self', 'verbose', 'teacher_pretrained_path', 'teacher_pretrained_cfg_overlay', 'teacher_model_kwargs'}


@pytest.mark.parametrize('name', ['ClassificationTask', 'MultiLabelClassificationTask', 'LogitDistillationTask',
                                  'FeatureDistillationTask', 'TokenDistillationTask'])
def test_every_argument_of_timms_tasks_is_given_by_a_flag(name):
    arguments = set(inspect.signature(getattr(timm.task, name).__init__).parameters) - NO_FLAG
    assert sorted(a for a in arguments if TASK_FLAGS.get(a, a) not in DESTS) == []


def test_every_evaluator_of_timm_belongs_to_a_task():
    evaluators = {value for name, value in vars(timm.task).items() if name.endswith('Evaluator')}
    assert evaluators == set(EVALUATORS.values())
    for build in (train.build_parser, validate.build_parser):
        (action,) = [a for a in build()._actions if a.dest == 'task']
        assert set(action.choices) == set(EVALUATORS)


def test_every_metric_of_timm_ranks_checkpoints():
    for task, evaluator in EVALUATORS.items():
        targets = ['--task', task, '--dataset', 'hfds/some', '--num-classes', '3']
        for metric in evaluator.metric_names:
            assert options(*targets, '--eval-metric', metric).eval_metric == metric
        assert options(*targets).eval_metric == evaluator.default_metric


# Arguments of timm's factories of data -> flags of another name; None: what it is for is another flag's or the run's
DATA_FLAGS = {
    'name': 'dataset', 'root': 'data_dir', 'split': 'train_split', 'download': 'dataset_download',
    'num_samples': 'train_num_samples', 'repeats': 'epoch_repeats', 'trust_remote_code': 'dataset_trust_remote_code',
    'search_split': None, 'load_bytes': None, 'is_training': None, 'dataset': 'dataset', 're_prob': 'reprob',
    're_mode': 'remode', 're_count': 'recount', 're_split': 'resplit', 'auto_augment': 'aa',
    'num_aug_repeats': 'aug_repeats', 'num_aug_splits': 'aug_splits', 'num_workers': 'workers',
    'distributed': None, 'crop_mode': None, 'crop_border_pixels': None, 'collate_fn': None, 'pin_memory': 'pin_mem',
    'fp16': None, 'img_dtype': 'model_dtype', 'use_prefetcher': 'no_prefetcher', 'tf_preprocessing': None,
    'input_size_choices': 'train_img_sizes', 'batch_size_choices': 'train_batch_sizes',
    'batch_choice_weights': 'train_size_probs', 'batch_choice_seed': 'seed',
    'batch_choice_schedule': 'train_size_schedule', 'batch_schedule_epochs': 'epochs',
    'batch_schedule_spread': 'train_size_schedule_spread', 'batch_schedule_random_mix': 'train_size_random_mix',
    'num_batches': 'train_batches_per_epoch', 'patch_size': 'naflex_patch_sizes',
    'patch_size_choices': 'naflex_patch_sizes', 'patch_size_choice_probs': 'naflex_patch_size_probs',
    'train_seq_lens': 'naflex_train_seq_lens', 'max_seq_len': 'naflex_max_seq_len', 'mixup_fn': 'mixup',
    'channels': 'in_chans', 'rank': None, 'world_size': None, 'epoch': None,
    'patchify_channels_last': 'naflex_patchify_channels_first', 'kwargs': None,
}


@pytest.mark.parametrize('factory', [create_dataset, create_loader, create_naflex_loader], ids=lambda f: f.__name__)
def test_every_argument_of_timms_data_is_given_by_a_flag(factory):
    arguments = inspect.signature(factory).parameters
    missing = [a for a in arguments if DATA_FLAGS.get(a, a) is not None and DATA_FLAGS.get(a, a) not in DESTS]
    assert missing == []


def test_every_format_of_targets_of_timm_is_a_choice_of_its_flag():
    (action,) = [a for a in train.build_parser()._actions if a.dest == 'target_format']
    assert tuple(action.choices) == tuple(targets.TARGET_FORMATS)


@pytest.mark.filterwarnings('ignore:It is highly recommended to have .opt_einsum.:UserWarning')  # Kron
@pytest.mark.full
def test_every_optimizer_of_timm_is_made_by_its_name():
    model = torch.nn.Linear(4, 4)
    for name in timm.optim.list_optimizers(exclude_filters=('bnb*', 'fused*')):
        args = options('--opt', name, '--lr', '0.1')
        assert isinstance(timm.optim.create_optimizer_v2(model, **optimizer_kwargs(args)), torch.optim.Optimizer)
