"""Options -> model, loss, task, optimizer, SAM and schedule, through timm's factories."""
import argparse
import copy
import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from timm.data import resolve_input_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models import create_model, resolve_model_input_args, safe_model_name
from timm.optim import create_optimizer_v2, get_optimizer_class, optimizer_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from .. import models as models  # registers the paper's CIFAR networks with timm
from ..cli.device import Process
from ..cli.errors import OptionError, one_line
from ..cli.models import check_model_name, image_mode, scripted
from ..cli.tasks import is_multilabel
from ..runs.checkpoints import why_unreadable
from .ablations import alter_norms, decay_groups
from .data import Data
from .losses import check_lengths
from .pretrained import check_pretrained, check_whole, load_initial, loaded_keys

_logger = logging.getLogger(__name__)


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


def build_model(args: argparse.Namespace, process: Process) -> nn.Module:
    """timm's model on the CPU.

    Raises:
        OptionError: The name is unknown, a keyword does not fit, or a checkpoint cannot be read.
    """
    overlay: dict[str, Any] = {}
    if args.pretrained_path:
        check_whole(args.pretrained_path)
        # num_classes -1 makes timm fit the classifier of the file to ours
        overlay = dict(file=args.pretrained_path, num_classes=-1)
    overlay.update(args.pretrained_cfg_overlay)
    check_model_name("--model", args.model)
    try:
        with loaded_keys() as loaded:
            model = create_model(**resolve_model_input_args(
                args.model,
                vars(args),
                pretrained=args.pretrained,
                pretrained_cfg_overlay=overlay or None,
                num_classes=args.num_classes,
                drop_rate=args.drop,
                drop_path_rate=args.drop_path,
                drop_block_rate=args.drop_block,
                global_pool=args.gp,
                bn_momentum=args.bn_momentum,
                bn_eps=args.bn_eps,
                scriptable=args.torchscript,
                **args.model_kwargs,
            ))
    except Exception as e:  # the name, its keywords and the files: all of it comes from the options
        if args.pretrained_path and not isinstance(e, TypeError):
            raise OptionError(f"--pretrained-path {args.pretrained_path} cannot be loaded into {args.model}: "
                              f"{why_unreadable(e)}; give a checkpoint of this model") from e
        if args.pretrained and not isinstance(e, TypeError):
            raise OptionError(f"--pretrained: the weights of {args.model} cannot be had: {one_line(e)}; check the "
                              f"network, or give a file by --pretrained-path") from e
        raise OptionError(
            f"--model {args.model} cannot be built: {one_line(e)}; check --model-kwargs{_set_model_flags(args)}") from e
    if args.pretrained_path:
        check_pretrained(args.pretrained_path, args.model, model, loaded, process.primary)
    if args.initial_checkpoint:
        load_initial(args.initial_checkpoint, args.model, model)
    _init_head(args, model)
    built: Any = model
    if args.grad_checkpointing:
        try:
            built.set_grad_checkpointing(enable=True)
        except (AssertionError, AttributeError) as e:  # as timm's VGG and models without the method say it
            raise OptionError(f"--grad-checkpointing: {args.model} has none; leave it out") from e
    if process.primary:
        count = sum(p.numel() for p in model.parameters())
        _logger.info(f"Model {safe_model_name(args.model)} created, {count:,} parameters")
    return model


def _init_head(args: argparse.Namespace, model: Any) -> None:
    """Scales the classifier, and sets its bias; distilled models have two."""
    given = {"--head-init-scale": args.head_init_scale, "--head-init-bias": args.head_init_bias}
    given = {flag: value for flag, value in given.items() if value is not None}
    if not given:
        return
    found = model.get_classifier()
    heads = found if isinstance(found, (tuple, list)) else (found,)
    weights, biases = ([p for head in heads if isinstance(p := getattr(head, name, None), nn.Parameter)]
                       for name in ("weight", "bias"))
    for flag, value in given.items():
        if not (biases if flag == "--head-init-bias" else weights):
            raise OptionError(f"{flag} {value}: the classifier of {args.model} has no such parameter; leave it out")
    with torch.no_grad():
        if args.head_init_scale is not None:
            for p in (*weights, *biases):
                p.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            for p in biases:
                p.fill_(args.head_init_bias)


def _set_model_flags(args: argparse.Namespace) -> str:
    """The flags that the model's constructor was given, for a message."""
    given = {"--gp": args.gp, "--drop-path": args.drop_path, "--drop-block": args.drop_block,
             "--bn-momentum": args.bn_momentum, "--bn-eps": args.bn_eps, "--in-chans": args.in_chans,
             "--img-size": args.img_size, "--input-size": args.input_size,
             "--pretrained-cfg-overlay": args.pretrained_cfg_overlay or None}
    return "".join(f", {flag} {value}" for flag, value in given.items() if value is not None)


def place_model(args: argparse.Namespace, process: Process, model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Splits, moves, synchronises, alters and scripts the model, as the options say.

    Raises:
        OptionError: The device cannot do it, or the model has not what is to be altered.
    """
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=process.device, dtype=dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if process.distributed and args.sync_bn:
        if process.device.type == "cpu":
            raise OptionError("--sync-bn: torch synchronizes batch normalization on accelerators only; leave it out "
                              "with --device cpu")
        model = convert_sync_batchnorm(model)
        if process.primary:
            _logger.info("Batch normalization is synchronized over all ranks.")
    alter_norms(args, model)
    if args.torchscript:
        model = scripted(model, args.model)
    return model


def trained(task: TrainingTask) -> nn.Module:
    """The module that a task trains, in its wrappers."""
    module = task.get_trainable_module()
    assert module is not None
    return module


def evaluated(task: TrainingTask, ema: bool = False) -> nn.Module:
    """What a task evaluates: its model, or the model's average."""
    model = task.get_eval_model(ema=ema)
    assert model is not None
    return model


def num_outputs(args: argparse.Namespace, model: nn.Module) -> int:
    """--num-classes, or the model's own number of outputs.

    Raises:
        OptionError: The weights of the loss are for another number of classes.
    """
    own: Any = model.num_classes
    outputs = int(own) if args.num_classes is None else args.num_classes
    check_lengths(args, outputs)
    return outputs


def data_config(args: argparse.Namespace, process: Process, model: nn.Module) -> dict[str, Any]:
    """Size of the images, normalization, interpolation and crop: the options' or else the model's.

    Raises:
        OptionError: The model takes no images of this size or number of channels.
    """
    try:
        config = resolve_input_data_config(model, vars(args), verbose=process.primary)
    except ValueError as e:
        raise OptionError(f"--model {args.model}: {one_line(e)}; check --img-size, --input-size, --in-chans, --mean "
                          f"and --std") from e
    image_mode(args, args.model, config)
    return config


def patch_size(model: nn.Module) -> tuple[int, int] | None:
    """A model's patch size (height, width), where it has one."""
    get: Any = getattr(model, "get_patch_size", None)
    return None if get is None else get()


def create_task(args: argparse.Namespace, process: Process, model: nn.Module, loss: nn.Module,
                dtype: torch.dtype | None) -> TrainingTask:
    """The classification task of ``--task``, or one of timm's distillation tasks.

    Raises:
        OptionError: The teacher is unknown, or does not fit the student.
    """
    common: dict[str, Any] = dict(criterion=loss, device=process.device, dtype=dtype, verbose=process.primary)
    if is_multilabel(args):
        return MultiLabelClassificationTask(model=model, threshold=args.multilabel_threshold, **common)
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


def learning_rate(args: argparse.Namespace, process: Process, data: Data) -> float:
    """--lr, or without it --lr-base scaled to the global batch size."""
    if args.lr:
        return args.lr
    global_batch_size = data.reference_batch_size * process.world_size * args.grad_accum_steps
    ratio = global_batch_size / args.lr_base_size
    adaptive = any(name in args.opt.lower() for name in ("ada", "lamb"))
    rule = args.lr_base_scale or ("sqrt" if adaptive else "linear")
    lr = args.lr_base * (ratio ** 0.5 if rule == "sqrt" else ratio)
    if process.primary:
        _logger.info(f"Learning rate {lr} from base {args.lr_base}, global batch size {global_batch_size:g}, {rule} "
                     f"scaling.")
    return lr


def create_optimizer(args: argparse.Namespace, process: Process, module: nn.Module,
                     lr: float) -> torch.optim.Optimizer:
    """The base optimizer, of timm's factory.

    Raises:
        OptionError: The factory does not know the name or refuses an option.
    """
    options = {**optimizer_kwargs(cfg=args), "lr": lr}
    _check_betas(args)
    groups = decay_groups(args, process, {**options, **args.opt_kwargs})
    try:
        optimizer = create_optimizer_v2(module, param_group_fn=groups, **options, **args.opt_kwargs)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, AssertionError, ImportError, LookupError, RuntimeError) as e:
        if args.layer_decay is not None and args.layer_decay_no_opt_scale is not None and "empty parameter" in str(e):
            raise OptionError(
                f"--layer-decay-no-opt-scale {args.layer_decay_no_opt_scale:g}: with --layer-decay "
                f"{args.layer_decay:g} nothing of what is trained has a larger scale; choose a smaller one") from e
        raise OptionError(f"--opt {args.opt}: {one_line(e)}; see timm.optim.list_optimizers() for the names, and check "
                          f"--opt-kwargs") from e
    if process.primary:
        defaults = dict(copy.deepcopy(optimizer.defaults), weight_decay=args.weight_decay)
        values = ", ".join(f"{k}: {v}" for k, v in defaults.items())
        _logger.info(f"Optimizer {type(optimizer).__name__} ({args.opt}): {values}")
    return optimizer


def _check_betas(args: argparse.Namespace) -> None:
    """Some optimizers take them apart in the first step only."""
    try:
        optimizer = get_optimizer_class(args.opt.lower().split("_")[-1], bind_defaults=False)
        own = inspect.signature(optimizer).parameters["betas"].default
    except (ValueError, AssertionError, ImportError, LookupError):  # it has none, or the factory says what is wrong
        return
    if args.opt_betas is not None and isinstance(own, tuple) and len(args.opt_betas) != len(own):
        raise OptionError(f"--opt-betas {' '.join(map(str, args.opt_betas))}: --opt {args.opt} has {len(own)} of them; "
                          f"give as many")
