"""The moving average of the weights: its type, and how it is rounded."""
import argparse

import torch
from timm.task import TrainingTask
from torch import Tensor


def setup_ema(args: argparse.Namespace, task: TrainingTask, dtype: torch.dtype | None) -> None:
    """Starts the average of the weights.

    In bfloat16 it is rounded stochastically, by a generator of its own that all ranks seed alike; float16 has too few
    bits for that.

    Args:
        args: All options.
        task: Gets the average.
        dtype: Of the weights; None: float32.
    """
    wider = dtype == torch.float16 or dtype == torch.bfloat16 and args.model_ema_force_fp32
    task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup,
                   device=torch.device("cpu") if args.model_ema_force_cpu else None,
                   dtype=torch.float32 if wider else None, stochastic_rounding_seed=args.seed)


def rounding_state(task: TrainingTask) -> Tensor | None:
    """The state of the generator that rounds an average in bfloat16; None: nothing is rounded."""
    generator = _generator(task)
    return None if generator is None else generator.get_state()


def restore_rounding(task: TrainingTask, state: Tensor | None) -> None:
    """Lets an average be rounded on from where it was; without a state (of an older checkpoint) it begins anew."""
    generator = _generator(task)
    if generator is not None and state is not None:
        generator.set_state(state)


def _generator(task: TrainingTask) -> torch.Generator | None:
    ema = task.get_trainable_module(ema=True)
    if ema is None or not any(p.dtype == torch.bfloat16 for p in ema.parameters()):
        return None
    return getattr(ema, "_sr_generator", None)  # timm's; it has no public name
