"""Options -> the model under evaluation, with its weights, preprocessing and precision."""
import argparse
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from timm import utils
from timm.data import resolve_input_data_config
from timm.data.loader import adapt_to_chs
from timm.layers import apply_test_time_pool
from timm.models import create_model, resolve_model_input_args
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from .. import models as models  # registers the paper's CIFAR networks with timm
from ..cli.errors import OptionError, one_line
from ..cli.models import check_model_name, check_naflex, image_mode, scripted
from ..runs.checkpoints import AVERAGED
from .weights import Hashes, load_weights, weights_sha256

_logger = logging.getLogger(__name__)


@dataclass
class Subject:
    """A model that is evaluated.

    Attributes:
        name: timm's name of the model.
        checkpoint: File of the weights, or None: timm's, or random ones.
        sha256: Of that file, or of the weights themselves without one, as 64 hexadecimal digits; None: not asked for.
        model: Images (B, C, H, W) -> logits (B, num_classes), on ``device``, in eval mode.
        num_classes: Number of outputs.
        param_count: Number of parameters.
        data_config: Of ``timm.data.resolve_input_data_config``; ``mean`` and ``std`` have one number per channel.
        crop_pct: Share of the image that the crop keeps.
        device: Where the model is.
        dtype: Of the weights; None: float32.
        autocast: Context of a forward pass.
        weights: Which of the file's weights they are, by their key in it.
    """

    name: str
    checkpoint: str | None
    sha256: str | None
    model: nn.Module
    num_classes: int
    param_count: int
    data_config: Mapping[str, Any]
    crop_pct: float
    device: torch.device
    dtype: torch.dtype | None
    autocast: Callable[[], AbstractContextManager]
    weights: str = ""

    @property
    def called(self) -> str:
        """What messages call it."""
        return self.checkpoint or self.name


def build_subject(args: argparse.Namespace, checkpoint: str | None, device: torch.device, name: str | None = None,
                  verbose: bool = True, hashes: Hashes | None = None, must_be_averaged: bool = False) -> Subject:
    """Builds the model, loads the weights and brings it to the device.

    Args:
        args: All options.
        checkpoint: File of the weights; None: timm's own, as --pretrained would.
        device: Where the model goes.
        name: The model, if not ``args.model``.
        verbose: Whether to log.
        hashes: Of the files, to know the weights by; None: they need not be known.
        must_be_averaged: Whether it is an error if --use-ema finds no averaged weights.

    Raises:
        OptionError: The name is unknown, its arguments do not fit, the weights cannot be loaded into it, or it takes
            no images of this size.
    """
    name = name or args.model
    utils.random_seed(args.seed)
    model = create(args, name, pretrained=args.pretrained or checkpoint is None)
    check_naflex(args, name, model)
    weights = "timm's"
    if checkpoint is not None:
        weights = load_weights(model, name, checkpoint, args.use_ema, must_be_averaged)
        if args.use_ema and weights not in AVERAGED and verbose:
            _logger.warning(f"--use-ema: {checkpoint} has no averaged weights; the plain ones are evaluated")
        if verbose:
            _logger.info(f"Loaded {weights or 'the weights'} of {checkpoint}")
    sha256 = None
    if hashes is not None:
        sha256 = weights_sha256(model) if checkpoint is None else hashes.of_file(checkpoint)
    if args.reparam:
        model = utils.reparameterize_model(model)
    param_count = sum(p.numel() for p in model.parameters())
    if verbose:
        _logger.info(f"Model {name} created, {param_count:,} parameters")
    try:
        data_config = resolve_input_data_config(
            model, vars(args), use_test_size=not args.use_train_size, verbose=verbose)
    except ValueError as e:
        raise OptionError(f"--model {name}: {one_line(e)}; check --img-size, --input-size, --in-chans, --mean and "
                          f"--std") from e
    image_mode(args, name, data_config)
    for key in ("mean", "std"):  # as timm's loader would: the attack normalizes by the same numbers
        data_config[key] = tuple(adapt_to_chs(data_config[key], data_config["input_size"][0]))
    num_classes, crop_pct = cast(int, model.num_classes), data_config["crop_pct"]
    if args.test_pool:
        model, pooled = apply_test_time_pool(model, data_config)
        crop_pct = 1.0 if pooled else crop_pct

    dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    model = model.to(device=device, dtype=dtype)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch leaves it out
    model.eval()
    autocast: Callable[[], AbstractContextManager] = nullcontext
    if args.amp:
        autocast = partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
    if not isinstance(model, NaFlexVit):
        with autocast():
            _try(model, name, torch.zeros(1, *data_config["input_size"], device=device, dtype=dtype))
    model = _transformed(args, model, name)
    model.eval()
    return Subject(
        name=name, checkpoint=checkpoint, sha256=sha256, model=model,
        num_classes=num_classes, param_count=param_count, data_config=data_config, crop_pct=crop_pct, device=device,
        dtype=dtype, autocast=autocast, weights=weights)


def create(args: argparse.Namespace, name: str, pretrained: bool) -> nn.Module:
    """The model by its name and the options, on the CPU.

    Raises:
        OptionError: The name is unknown, its arguments do not fit, or timm's weights cannot be had.
    """
    check_model_name("--model", name)
    try:
        return create_model(**resolve_model_input_args(
            name, vars(args), pretrained=pretrained, num_classes=args.num_classes, global_pool=args.gp,
            scriptable=args.torchscript, **args.model_kwargs))
    except Exception as e:  # the name, its arguments and its files: all of it comes from the options
        if pretrained and not isinstance(e, TypeError):
            raise OptionError(
                f"--model {name}: timm's weights cannot be had: {one_line(e)}; check the network, or give a file by "
                f"--checkpoint") from e
        raise OptionError(
            f"--model {name} cannot be built: {one_line(e)}; check --model-kwargs, --gp, --in-chans and "
            f"--img-size") from e


def _try(model: nn.Module, name: str, images: Tensor) -> None:
    """A forward pass, to see whether the images' size is the model's.

    Not under inference_mode: what a model keeps of it could not be used under autograd later.
    """
    try:
        with torch.no_grad():
            model(images)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError, IndexError) as e:
        if "memory" in str(e):
            raise
        raise OptionError(
            f"--model {name} cannot be run on images of {'x'.join(map(str, images.shape[1:]))}: {one_line(e)}; check "
            f"--img-size, --input-size, --in-chans and --model-dtype") from e


def _transformed(args: argparse.Namespace, model: nn.Module, name: str) -> nn.Module:
    """Scripted, compiled, fused or spread over devices, as the options say.

    Raises:
        OptionError: It cannot be scripted.
    """
    if args.torchscript:
        model = scripted(model, name)
    elif args.torchcompile:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
        model = cast(nn.Module, compiled)  # of a module, it is one
    elif args.aot_autograd:
        from functorch.compile import memory_efficient_fusion
        model = memory_efficient_fusion(model)
    if args.num_gpu > 1:
        model = nn.DataParallel(model, device_ids=list(range(args.num_gpu)))
    return model
