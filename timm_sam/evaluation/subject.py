"""Options -> the model under evaluation, with its weights, preprocessing and precision."""
import argparse
import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm import utils
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.layers import apply_test_time_pool, set_fast_norm
from timm.models import create_model, load_checkpoint
from timm.models.naflexvit import NaFlexVit
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import Tensor, nn

from ..cli.errors import OptionError, one_line
from ..cli.models import check_model_name
from ..cli.processes import rendezvous_url
from ..runs.checkpoints import why_unreadable

_logger = logging.getLogger("validate")

_AVERAGED = ("state_dict_ema", "model_ema")  # keys of averaged weights, as timm looks for them


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
        data_config: Of ``timm.data.resolve_data_config``; ``mean`` and ``std`` have one number per channel.
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


def prepare_device(args: argparse.Namespace) -> torch.device:
    """Device and process group of this rank, and the settings that timm's script makes for the process."""
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    args.dist_url = rendezvous_url()
    device = utils.init_distributed_device(args)
    if args.fuser:
        utils.set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    return device


def file_sha256(path: str) -> str:
    """SHA-256 of a checkpoint's content.

    Raises:
        OptionError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    except OSError as e:
        raise OptionError(f"--checkpoint {path} cannot be read ({e.strerror}); check its permissions") from None
    return digest.hexdigest()


def _weights_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def build_subject(args: argparse.Namespace, checkpoint: str | None, device: torch.device, name: str | None = None,
                  verbose: bool = True) -> Subject:
    """Builds the model, loads the weights and brings it to the device.

    Args:
        args: All options.
        checkpoint: File of the weights; None: timm's own, as --pretrained would.
        device: Where the model goes.
        name: The model, if not ``args.model``.
        verbose: Whether to log.

    Raises:
        OptionError: The name is unknown, its arguments do not fit, the weights cannot be loaded into it, or it takes
            no images of this size.
    """
    name = name or args.model
    utils.random_seed(args.seed)
    model = _create(args, name, pretrained=args.pretrained or checkpoint is None)
    weights = "timm's"
    if checkpoint is not None:
        weights = _load(args, model, name, checkpoint)
        if args.use_ema and weights not in _AVERAGED and verbose:
            _logger.warning(f"--use-ema: {checkpoint} has no averaged weights; the plain ones are evaluated")
    sha256 = None
    if args.suites:
        sha256 = _weights_sha256(model) if checkpoint is None else file_sha256(checkpoint)
    if args.reparam:
        model = utils.reparameterize_model(model)
    param_count = sum(p.numel() for p in model.parameters())
    if verbose:
        _logger.info(f"Model {name} created, {param_count:,} parameters")
    data_config = resolve_data_config(vars(args), model=model, use_test_size=not args.use_train_size, verbose=verbose)
    for key in ("mean", "std"):  # as timm's loader would: the attack normalizes by the same numbers
        data_config[key] = tuple(adapt_to_chs(data_config[key], data_config["input_size"][0]))
    num_classes, crop_pct = model.num_classes, data_config["crop_pct"]
    if args.test_pool:
        model, pooled = apply_test_time_pool(model, data_config)
        crop_pct = 1.0 if pooled else crop_pct

    dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    model = model.to(device=device, dtype=dtype)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model.eval()
    autocast: Callable[[], AbstractContextManager] = nullcontext
    if args.amp:
        autocast = partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
    if not isinstance(model, NaFlexVit):
        with autocast():
            _try(model, name, torch.zeros(1, *data_config["input_size"], device=device, dtype=dtype))
    model = _transformed(args, model)
    model.eval()
    return Subject(
        name=name, checkpoint=checkpoint, sha256=sha256, model=model,
        num_classes=num_classes, param_count=param_count, data_config=data_config, crop_pct=crop_pct, device=device,
        dtype=dtype, autocast=autocast, weights=weights)


def _create(args: argparse.Namespace, name: str, pretrained: bool) -> nn.Module:
    check_model_name("--model", name)
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else 3)
    try:
        return create_model(
            name, pretrained=pretrained, num_classes=args.num_classes, in_chans=in_chans, global_pool=args.gp,
            scriptable=args.torchscript, **args.model_kwargs)
    except Exception as e:  # the name, its arguments and its files: all of it comes from the options
        if pretrained and not isinstance(e, TypeError):
            raise OptionError(
                f"--model {name}: timm's weights cannot be had: {one_line(e)}; check the network, or give a file by "
                f"--checkpoint") from e
        raise OptionError(
            f"--model {name} cannot be built: {one_line(e)}; check --model-kwargs, --gp and --in-chans") from e


def _load(args: argparse.Namespace, model: nn.Module, name: str, path: str) -> str:
    """Loads a file's weights; returns their key in it."""
    if not os.path.isfile(path):
        raise OptionError(f"--checkpoint {path} is not a file: give the path of a checkpoint")
    try:
        load_checkpoint(model, path, args.use_ema)
        weights = _key_of_weights(path, args.use_ema)
    except Exception as e:  # unpickling a torn or foreign file raises almost anything
        raise OptionError(
            f"--checkpoint {path} cannot be loaded into {name} with {model.num_classes} outputs: {why_unreadable(e)}; "
            f"give a checkpoint of this model, or mend --model and --num-classes") from e
    if args.use_ema and args.suites and weights not in _AVERAGED:
        raise OptionError(f"--use-ema: {path} has no averaged weights; leave it out, or give checkpoints with them")
    return weights


def _key_of_weights(path: str, use_ema: bool) -> str:
    """Where in a file timm takes the weights from; empty: the file is nothing but weights."""
    if os.path.splitext(path)[1].lower() in (".safetensors", ".npz", ".npy"):
        return ""
    try:
        content = load_checkpoint_metadata(path)
    except RuntimeError:  # torch 1.5 and older wrote files that cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        return ""
    averaged = [key for key in _AVERAGED if use_ema and content.get(key) is not None]
    return next((key for key in (*averaged, "state_dict", "model") if key in content), "")


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


def _transformed(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """Scripted, compiled, fused or spread over devices, as the options say."""
    if args.torchscript:
        model = torch.jit.script(model)
    elif args.torchcompile:
        torch._dynamo.reset()
        model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    elif args.aot_autograd:
        from functorch.compile import memory_efficient_fusion
        model = memory_efficient_fusion(model)
    if args.num_gpu > 1:
        model = nn.DataParallel(model, device_ids=list(range(args.num_gpu)))
    return model


def check_weights(args: argparse.Namespace, checkpoints: Sequence[str]) -> None:
    """Loads each file into a model once, to see that it can be done.

    Raises:
        OptionError: One of them cannot.
    """
    model = _create(args, args.model, pretrained=False)
    for path in checkpoints:
        _load(args, model, args.model, path)
