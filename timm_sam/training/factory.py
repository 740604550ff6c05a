"""Options -> model, loss, task, optimizer, SAM and schedule, through timm's factories."""
import argparse
import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from timm import utils
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from ..cli.errors import OptionError, one_line
from ..cli.models import check_model_name
from ..runs.checkpoints import why_unreadable
from ..split import WHOLE_GRAPHS_WORK, compile_split
from .data import Data, mixup_active

_logger = logging.getLogger("train")


_WITHOUT_CUDA_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


class LossScaler(torch.amp.GradScaler):
    """torch's GradScaler under the checkpoint key of timm's, so that checkpoints move between the two."""

    state_dict_key = "amp_scaler"


def precision(args: argparse.Namespace, device: torch.device) -> tuple[
        torch.dtype | None, Callable[[], AbstractContextManager], LossScaler | None]:
    """The type of the weights (None: float32), the autocast context of a forward pass, and the loss scaler.

    Only float16 needs a scaler: bfloat16 has the exponents of float32.
    """
    model_dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    if model_dtype == torch.float16:
        _logger.warning("float16 weights are not recommended for training; bfloat16 is safer.")
    if not args.amp:
        return model_dtype, nullcontext, None
    amp_dtype = getattr(torch, args.amp_dtype)
    scaler = LossScaler(device.type) if device.type == "cuda" and amp_dtype == torch.float16 else None
    return model_dtype, partial(torch.autocast, device_type=device.type, dtype=amp_dtype), scaler


def build_model(args: argparse.Namespace) -> nn.Module:
    """timm's model on the CPU, with ``args.num_classes`` resolved to its number of outputs.

    Raises:
        OptionError: The name is unknown, a keyword does not fit, or a checkpoint cannot be read.
    """
    in_chans = 3
    if args.in_chans is not None:
        in_chans = args.in_chans
    elif args.input_size is not None:
        in_chans = args.input_size[0]
    overlay = {}
    if args.pretrained_path:
        # num_classes -1 makes timm fit the classifier of the file to ours
        overlay = dict(pretrained_cfg_overlay=dict(file=args.pretrained_path, num_classes=-1))
    check_model_name("--model", args.model)
    try:
        model = create_model(
            args.model,
            pretrained=args.pretrained,
            in_chans=in_chans,
            num_classes=args.num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            drop_block_rate=args.drop_block,
            global_pool=args.gp,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
            scriptable=args.torchscript,
            checkpoint_path=args.initial_checkpoint,
            **overlay,
            **args.model_kwargs,
        )
    except Exception as e:  # the name, its keywords and the files: all of it comes from the options
        for flag, path in (("--initial-checkpoint", args.initial_checkpoint),
                           ("--pretrained-path", args.pretrained_path)):
            if path and not isinstance(e, TypeError):
                raise OptionError(f"{flag} {path} cannot be loaded into {args.model}: {why_unreadable(e)}; give a "
                                  f"checkpoint of this model") from e
        if args.pretrained and not isinstance(e, TypeError):
            raise OptionError(f"--pretrained: the weights of {args.model} cannot be had: {one_line(e)}; check the "
                              f"network, or give a file by --pretrained-path") from e
        raise OptionError(
            f"--model {args.model} cannot be built: {one_line(e)}; check --model-kwargs{_set_model_flags(args)}") from e
    if args.head_init_scale is not None:
        with torch.no_grad():
            model.get_classifier().weight.mul_(args.head_init_scale)
            model.get_classifier().bias.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        nn.init.constant_(model.get_classifier().bias, args.head_init_bias)
    if args.num_classes is None:
        args.num_classes = model.num_classes
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    if utils.is_primary(args):
        count = sum(p.numel() for p in model.parameters())
        _logger.info(f"Model {safe_model_name(args.model)} created, {count:,} parameters")
    return model


def _set_model_flags(args: argparse.Namespace) -> str:
    """The flags that the model's constructor was given, for a message."""
    given = {"--gp": args.gp, "--drop-path": args.drop_path, "--drop-block": args.drop_block,
             "--bn-momentum": args.bn_momentum, "--bn-eps": args.bn_eps, "--in-chans": args.in_chans}
    return "".join(f", {flag} {value}" for flag, value in given.items() if value is not None)


def place_model(args: argparse.Namespace, model: nn.Module, device: torch.device,
                dtype: torch.dtype | None) -> nn.Module:
    """Splits, moves, synchronises and scripts the model, as the options say.

    Raises:
        OptionError: The device cannot do it.
    """
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=device, dtype=dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if args.distributed and args.sync_bn:
        if device.type == "cpu":
            raise OptionError("--sync-bn: torch synchronizes batch normalization on accelerators only; leave it out "
                              "with --device cpu")
        args.dist_bn = ""  # statistics are the same on all ranks already
        model = convert_sync_batchnorm(model)
        if utils.is_primary(args):
            _logger.info("Batch normalization is synchronized over all ranks.")
    if args.torchscript:
        model = torch.jit.script(model)
    return model


def create_loss(args: argparse.Namespace) -> nn.Module:
    """The training loss that augmentation and loss options ask for."""
    if args.jsd_loss:
        return JsdCrossEntropy(num_splits=args.aug_splits, smoothing=args.smoothing)
    bce = dict(target_threshold=args.bce_target_thresh, sum_classes=args.bce_sum, pos_weight=args.bce_pos_weight)
    if mixup_active(args):  # targets are soft, and smoothed where they are mixed
        return BinaryCrossEntropy(**bce) if args.bce_loss else SoftTargetCrossEntropy()
    if args.smoothing:
        if args.bce_loss:
            return BinaryCrossEntropy(smoothing=args.smoothing, **bce)
        return LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    return nn.CrossEntropyLoss()


def create_task(args: argparse.Namespace, model: nn.Module, loss: nn.Module, device: torch.device,
                dtype: torch.dtype | None) -> TrainingTask:
    """The classification task, or one of timm's distillation tasks.

    Raises:
        OptionError: The teacher is unknown, or does not fit the student.
    """
    common: dict[str, Any] = dict(criterion=loss, device=device, dtype=dtype, verbose=utils.is_primary(args))
    if args.kd_model_name is None:
        return ClassificationTask(model=model, **common)
    check_model_name("--kd-model-name", args.kd_model_name)
    common.update(student_model=model, teacher_model=args.kd_model_name,
                  distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    try:
        if args.kd_distill_type == "logit":
            return LogitDistillationTask(loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common)
        if args.kd_distill_type == "feature":
            return FeatureDistillationTask(student_feature_dim=args.kd_student_feature_dim,
                                           teacher_feature_dim=args.kd_teacher_feature_dim, **common)
        return TokenDistillationTask(distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common)
    except (ValueError, AssertionError, RuntimeError, OSError) as e:
        raise OptionError(f"--kd-model-name {args.kd_model_name} with --kd-distill-type {args.kd_distill_type}: "
                          f"{one_line(e)}; choose another teacher, student or type") from e


def resolve_lr(args: argparse.Namespace, data: Data) -> None:
    """Sets ``args.lr`` from --lr-base and the global batch size, where --lr is not given."""
    if args.lr:
        return
    global_batch_size = data.reference_batch_size * args.world_size * args.grad_accum_steps
    ratio = global_batch_size / args.lr_base_size
    if not args.lr_base_scale:
        adaptive = any(name in args.opt.lower() for name in ("ada", "lamb"))
        args.lr_base_scale = "sqrt" if adaptive else "linear"
    if args.lr_base_scale == "sqrt":
        ratio = ratio ** 0.5
    args.lr = args.lr_base * ratio
    if utils.is_primary(args):
        _logger.info(f"Learning rate {args.lr} from base {args.lr_base}, global batch size {global_batch_size:g}, "
                     f"{args.lr_base_scale} scaling.")


def create_optimizer(args: argparse.Namespace, module: nn.Module) -> torch.optim.Optimizer:
    """The base optimizer, of timm's factory.

    Raises:
        OptionError: The factory does not know the name or refuses an option.
    """
    try:
        optimizer = create_optimizer_v2(module, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except (ValueError, TypeError, AssertionError) as e:
        raise OptionError(f"--opt {args.opt}: {one_line(e)}; see timm.optim.list_optimizers() for the names, and check "
                          f"--opt-kwargs") from e
    if utils.is_primary(args):
        defaults = dict(copy.deepcopy(optimizer.defaults), weight_decay=args.weight_decay)
        values = ", ".join(f"{k}: {v}" for k, v in defaults.items())
        _logger.info(f"Optimizer {type(optimizer).__name__} ({args.opt}): {values}")
    return optimizer


def compile_task(args: argparse.Namespace, task: TrainingTask) -> None:
    """Compiles the task's model: as a whole, or in two parts where the passes of SAM have something to share.

    Raises:
        OptionError: The backend cannot do it.
    """
    mode, sam = args.torchcompile_mode, args.sam_variant is not None
    accumulates = args.sam_m or args.grad_accum_steps > 1
    if sam and args.torchcompile == "cudagraphs" and (accumulates or not WHOLE_GRAPHS_WORK):
        raise OptionError("--torchcompile cudagraphs: with --sam-m, --grad-accum-steps or torch before 2.12, SAM "
                          "cannot use CUDA graphs; use --torchcompile inductor")
    if sam and accumulates and mode in _WITHOUT_CUDA_GRAPHS:
        # the gradients that one chunk leaves lie in memory of its graph, which the next chunk's writes over
        mode = _WITHOUT_CUDA_GRAPHS[mode]
        if utils.is_primary(args):
            _logger.info(f"--torchcompile-mode {args.torchcompile_mode}: gradients are accumulated under SAM, which "
                         f"CUDA graphs do not allow; compiling with mode {mode}")
    options = dict(backend=args.torchcompile, mode=mode)
    # without a filter the first normalization layer is perturbed, and there is next to nothing below it
    shares = (sam and args.sam_filter is not None and not args.sam_no_shared_forward
              and args.sam_bn_stats == "clean" and args.sam_ascent_fraction == 1 and args.torchcompile != "cudagraphs")
    if shares or sam and not WHOLE_GRAPHS_WORK:
        compile_split(task.get_trainable_module(), **options)
        if (teacher := getattr(task, "teacher", None)) is not None:
            features = isinstance(task, FeatureDistillationTask)
            teacher.compile(**options, compile_model=not features, compile_features=features)
    else:
        task.compile(**options)
    if task.has_ema():
        task.compile_ema(**options)
    if utils.is_primary(args):
        parts = "the model in parts" if shares else "the model"
        _logger.info(f"Compiling {parts} with {args.torchcompile}, mode {mode}")


def create_schedule(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int,
                    decreasing_metric: bool) -> tuple[Any, int]:
    """timm's learning-rate scheduler (or None) and the number of epochs in all.

    Raises:
        OptionError: The schedule is unknown or its lengths contradict each other.
    """
    try:
        return create_scheduler_v2(
            optimizer, **scheduler_kwargs(args, decreasing_metric=decreasing_metric),
            updates_per_epoch=updates_per_epoch)
    except (ValueError, AssertionError) as e:
        raise OptionError(f"--sched {args.sched}: {one_line(e) or 'refuses its options'}; check --epochs, "
                          f"--warmup-epochs and --decay-epochs") from e
