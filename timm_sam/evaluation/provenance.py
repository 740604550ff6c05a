"""What the numbers of an evaluation depend on: it names finished parts in the journal, and stands in the results."""
import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torchvision

from .. import __version__
from .journal import key_of
from .quantize import SCHEME
from .sets.loaders import crop_border
from .sets.suites import Suite
from .subject import Subject

# Options that change what the model computes, by the names under which they stand in results and journals
OF_THE_MODEL = ("model_kwargs", "gp", "use_ema", "reparam", "test_pool", "fast_norm", "batch_size", "num_gpu",
                "channels_last", "torchscript", "torchcompile", "torchcompile_mode", "aot_autograd", "fuser")


def identity(args: argparse.Namespace, subject: Subject, suite: Suite) -> dict[str, Any]:
    """What the scores of a suite depend on: all of it is in :func:`protocol` too."""
    return dict(sha256=subject.sha256, settings=settings(args, subject), dataset=dataset(args, suite))


def settings(args: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    """What scores depend on beside the weights and the data set."""
    return dict(
        {option: getattr(args, option) for option in OF_THE_MODEL}, model=subject.name,
        num_classes=subject.num_classes, prefetcher=not args.no_prefetcher, preprocessing=preprocessing(args, subject),
        precision=precision(args, subject.device), device_type=subject.device.type,
        versions=dict(timm_sam=__version__, timm=timm.__version__, torch=torch.__version__,
                      torchvision=torchvision.__version__))


def dataset(args: argparse.Namespace, suite: Suite) -> dict[str, Any]:
    """What scores depend on of a data set."""
    return dict(name=suite.name, label_space=suite.space.name, groups=key_of(groups=suite.space.groups),
                classes=suite.num_classes, crop_border_pixels=crop_border(args, suite),
                **({} if suite.space.sets is None else dict(labels=key_of(sets=suite.space.sets))),
                # where it is the model's it stands with the preprocessing
                **({} if suite.crop_pct is None else dict(crop_pct=suite.crop_pct)),
                samples_sha256=suite.samples_sha256)


def preprocessing(args: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    """How images become the model's input."""
    return dict(subject.data_config, crop_pct=subject.crop_pct, crop_border_pixels=args.crop_border_pixels,
                img_mode=args.input_img_mode, naflex=args.naflex_max_seq_len if args.naflex_loader else None)


def precision(args: argparse.Namespace, device: torch.device) -> str:
    """The type of the weights and of products, in words."""
    if args.amp:
        return f"float32, autocast to {args.amp_dtype}"
    dtype = args.model_dtype or "float32"
    return f"{dtype} (TF32 off)" if device.type == "cuda" and dtype == "float32" else dtype


def checkpoint(subject: Subject) -> dict[str, Any]:
    """Whose numbers they are."""
    return dict(path=subject.checkpoint, sha256=subject.sha256, weights=subject.weights, model=subject.name,
                parameters=subject.param_count)


def protocol(args: argparse.Namespace, subject: Subject, suites: Sequence[Suite],
             checkpoints: Sequence[Mapping[str, Any]], attack: Mapping[str, Any] | None) -> dict[str, Any]:
    """All that the numbers depend on, and what is worth knowing beside.

    Args:
        args: All options.
        subject: The last of the checkpoints: what is not said of each is the same for all.
        suites: The data sets.
        checkpoints: Of each, :func:`checkpoint`.
        attack: The attack's own part; None: there is none.
    """
    device = torch.cuda.get_device_name(subject.device) if subject.device.type == "cuda" else subject.device.type
    return dict(
        settings(args, subject),
        checkpoints=checkpoints,
        class_map=args.class_map,
        allow_partial=args.allow_partial,
        seed=args.seed,
        datasets=[dict(
            dataset(args, suite), folder=os.path.abspath(suite.root), images=len(suite.samples), kind=suite.kind,
            flags=suite.flags, notes=suite.notes) for suite in suites],
        **(dict(quantized_weights=dict(bits=args.quantize_weights, scheme=SCHEME)) if args.quantize_weights else {}),
        attack=attack,
        device=device,
    )
