"""The part of train.py between its options and its epochs: a run around a model, an optimizer and what updates it."""
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from timm_sam import SAM
from timm_sam.cli.device import Process
from timm_sam.training.diverged import Watch
from timm_sam.training.engine import SAM_COUNTS, SAM_MEASURES, Run
from timm_sam.training.plain import Plain
from timm_sam.training.progress import Progress

CPU = Process(torch.device('cpu'))


def run_around(args, task, data, optimizer, sam=None, *, process=CPU, scaler=None, model_dtype=None, total_updates=1):
    """A run that is never asked to stop, and writes nothing."""
    update = Plain(optimizer, task.get_trainable_module()) if sam is None else sam
    perturbed = isinstance(update, SAM)
    return Run(
        args=args, process=process, task=task, data=data, optimizer=optimizer, update=update,
        measures=SAM_MEASURES if perturbed else (), counts=SAM_COUNTS if perturbed else (), scaler=scaler,
        autocast=nullcontext, model_dtype=model_dtype, scheduler=None,
        preemption=SimpleNamespace(should_stop=lambda update: False),
        watch=Watch(SimpleNamespace(allow_nonfinite=False), process, task.get_trainable_module(), scaler),
        progress=Progress(process, total_updates, 0, total_updates))
