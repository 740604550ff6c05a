"""What of a failure in the middle of a run its options are to blame for: memory, the compiler, the images' size."""
import argparse
import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
from timm.task import TrainingTask
from torch import nn

from ..cli.errors import OptionError, host_is_full, one_line


def _is_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or host_is_full(error)


def short_of_memory(args: argparse.Namespace, device: torch.device, error: BaseException) -> OptionError | None:
    """What is said where memory is short; None: it is another failure."""
    if not _is_of_memory(error):
        return None
    where = "this machine" if host_is_full(error) else device
    return OptionError(
        f"--batch-size {args.batch_size} is too large for the memory of {where} ({one_line(error, 80)}); use a "
        f"smaller one, with --grad-accum-steps for as large an update, or --grad-checkpointing or --amp; what was "
        f"saved is kept")


def explained(args: argparse.Namespace, task: TrainingTask, model: nn.Module, data_config: Mapping[str, Any],
              error: Exception) -> OptionError | None:
    """What is said where the compiler fails, or a model does not take the images.

    Whether it takes them is tried afterwards, on the CPU: a run that goes well pays nothing.

    Args:
        args: All options.
        task: What was trained, with its teacher if there is one.
        model: As it was before it was compiled.
        data_config: Of ``timm.data.resolve_input_data_config``.
        error: That ended the run.

    Returns:
        The mistake, or None where the options are not to blame.
    """
    if isinstance(error, OptionError) or _is_of_memory(error):  # of memory the caller says it, wherever it was short
        return None
    dynamo = sys.modules.get("torch._dynamo.exc")
    if dynamo is not None and isinstance(error, dynamo.BackendCompilerFailed):
        reason = one_line(RuntimeError(str(error).split("\n\nSet TORCH")[0]))
        if args.torchcompile is None:  # some optimizers compile their step
            return OptionError(f"--opt {args.opt} cannot be compiled here ({reason}); see to the compiler, or choose "
                               f"another optimizer")
        return OptionError(f"--torchcompile {args.torchcompile}: compiling has failed ({reason}); see to the compiler, "
                           f"or leave it out")
    if args.naflex_loader:
        return None
    channels, *size = data_config["input_size"]
    sizes = [tuple(size), *((side, side) for side in args.train_img_sizes or ())]
    models: dict[str, Any] = {f"--model {args.model}": model}
    if args.kd_model_name is not None:
        models[f"--kd-model-name {args.kd_model_name}"] = getattr(getattr(task, "teacher", None), "model", None)
    for name, tried in models.items():
        for height, width in sizes if isinstance(tried, nn.Module) else ():
            if (why_not := _why_not(tried, (1, channels, height, width))) is not None:
                return OptionError(f"{name} cannot be run on images of {channels}x{height}x{width}: {why_not}; check "
                                   f"--img-size, --input-size, --train-img-sizes and --in-chans")
    return None


def _why_not(model: nn.Module, shape: tuple[int, ...]) -> str | None:
    """Why a copy of a model on the CPU refuses images; None: it does not, or nobody can tell."""
    try:
        tried = copy.deepcopy(model).to("cpu", torch.float32).eval()
    except Exception:  # its device may be the reason for the failure
        return None
    try:
        with torch.no_grad():
            tried(torch.zeros(shape))
    except (AssertionError, LookupError, RuntimeError, ValueError) as e:
        return one_line(e)
    return None
