"""Checks of the options against the model and the data's number, before anything is written."""
import argparse
import math
import re
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..cli.errors import OptionError, one_line, shown
from .losses import mixup_active

SECONDS = 5.0  # for a pattern and all names; it takes milliseconds, or grows with 2 to the power of a name's length


def check_filter(pattern: str | None, names: Iterable[str]) -> None:
    """Tries --sam-filter on the names of the parameters.

    Args:
        pattern: A regular expression; None: there is none.
        names: Of the parameters.

    Raises:
        OptionError: It does not come to an end.
    """
    if pattern is None:
        return
    try:
        with _at_most(SECONDS):
            for name in names:
                re.search(pattern, name)
    except TimeoutError:
        raise OptionError(f"--sam-filter {shown(pattern)} takes more than {SECONDS:g} s on the names of the model's "
                          f"parameters: repetitions in it, such as (a+)+, multiply; write it without") from None


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after that time, also out of a regular expression; outside of the main thread it cannot."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_single_samples(args: argparse.Namespace, model: nn.Module, data_config: Mapping[str, Any]) -> None:
    """Looks whether the model can be trained on one sample at a time, where the options ask for that.

    Batch normalization of one sample needs more than one pixel. The model is run without numbers, on torch's meta
    device: nothing of it changes, and no random number is drawn.

    Args:
        args: All options.
        model: On the CPU, neither scripted nor compiled.
        data_config: Of ``timm.data.resolve_input_data_config``.

    Raises:
        OptionError: It cannot.
    """
    asked = _single_sample(args)
    if asked is None or args.naflex_loader or args.split_bn or args.sync_bn:
        return
    channels, *size = data_config["input_size"]
    if args.train_img_sizes:
        size = [min(args.train_img_sizes)] * 2
    tensors = {name: torch.empty_like(t, device="meta")
               for name, t in (*model.named_parameters(), *model.named_buffers())}
    was_training = model.training
    try:
        model.train()
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what only matters when it is computed
            torch.func.functional_call(model, tensors, (torch.empty(1, channels, *size, device="meta"),))
    except ValueError as e:
        if "more than 1 value per channel" not in str(e):
            return
        raise OptionError(f"{asked}: batch normalization cannot be trained on a single sample ({one_line(e)}); use "
                          f"more samples, or a larger --img-size") from e
    except Exception:  # a model that torch cannot run without numbers; what is wrong with it shows when it is trained
        return
    finally:
        model.train(was_training)


def check_views(args: argparse.Namespace, loader: Any) -> None:
    """Looks whether the validation inputs of this process are views of --tta each.

    Args:
        args: All options.
        loader: Of validation; None: there is none.

    Raises:
        OptionError: Some are left over.
    """
    sampler = getattr(loader, "sampler", None)
    if args.tta < 2 or not isinstance(sampler, Sized) or args.naflex_loader:
        return
    if len(sampler) % args.tta:
        raise OptionError(f"--tta {args.tta} does not divide the {len(sampler)} validation inputs of a process: leave "
                          f"it out, if each image is there once")


def _single_sample(args: argparse.Namespace) -> str | None:
    """The flag, with its value, by which a forward pass has one sample; None: none has."""
    if args.aug_splits > 1:
        return None
    batch = min([args.batch_size, *(args.train_batch_sizes or ())])
    if args.mixup_mode == "half" and mixup_active(args):
        if batch == 2:
            return f"--batch-size {batch} with --mixup-mode half"
        batch //= 2
    if batch == 1:
        return f"--batch-size {batch}"
    chunk = batch
    if args.sam_m is not None:
        chunk = min(args.sam_m, batch % args.sam_m or args.sam_m, batch)
        if chunk == 1:
            rest = "" if args.sam_m == 1 else f", of which --batch-size {batch} leaves one sample over"
            return f"--sam-m {args.sam_m}{rest}"
    if args.sam_ascent_fraction < 1 and math.ceil(args.sam_ascent_fraction * chunk) == 1:
        return f"--sam-ascent-fraction {args.sam_ascent_fraction}"
    return None
