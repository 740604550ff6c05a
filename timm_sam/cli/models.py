"""Models by their options: names, channels."""
import argparse
import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from PIL import ImageMode
from timm.models.naflexvit import NaFlexVit
from torch import nn

from .errors import OptionError, one_line


def check_model_name(flag: str, name: str) -> None:
    if ":" in name or "/" in name:  # hf-hub:..., local-dir:...
        return
    base = name.split(".")[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), 3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise OptionError(f"{flag} {name} is not a model of timm {timm.__version__}; {hint}")


def check_naflex(args: argparse.Namespace, name: str, model: nn.Module, flag: str = "--model") -> None:
    """Looks whether the model takes the batches of --naflex-loader.

    Raises:
        OptionError: It takes images.
    """
    if args.naflex_loader and not isinstance(model, NaFlexVit):
        raise OptionError(f"--naflex-loader: {flag} {name} takes images of one size; leave it out, or use a NaFlex "
                          f"model such as naflexvit_base_patch16_gap")


def scripted(model: nn.Module, name: str) -> nn.Module:
    """The model in TorchScript, for ``--torchscript``.

    Args:
        model: The model.
        name: Of the model, for the error.

    Raises:
        OptionError: It cannot be scripted.
    """
    try:
        return torch.jit.script(model)
    except Exception as e:  # torch has many ways to say what of Python it does not know
        raise OptionError(f"--torchscript: --model {name} cannot be scripted ({one_line(e)}); leave it out, or use "
                          f"--torchcompile") from e


def channels(args: argparse.Namespace) -> int:
    """Channels of the images: ``--in-chans``, else those of ``--input-size``, else 3."""
    return args.in_chans or (args.input_size[0] if args.input_size else 3)


def image_mode(args: argparse.Namespace, name: str, data_config: Mapping[str, Any]) -> str:
    """PIL's mode that images are converted to: ``--input-img-mode``, else RGB or L.

    Args:
        args: All options.
        name: Of the model, for the error.
        data_config: Of ``timm.data.resolve_input_data_config``, for the number of channels.

    Raises:
        OptionError: Images of that mode have more or fewer channels than the model takes.
    """
    count = data_config["input_size"][0]
    mode = args.input_img_mode or ("RGB" if count == 3 else "L")
    bands = len(ImageMode.getmode(mode).bands)
    if bands != count and args.input_img_mode is None:
        raise OptionError(f"--model {name} takes {count} channels (--in-chans), and images are read as RGB or L; name "
                          f"what gives {count} channels by --input-img-mode, e.g. RGBA for 4")
    if bands != count:
        raise OptionError(f"--input-img-mode {mode} has {bands} channels, and --model {name} takes {count}: mend one "
                          f"of them, or --in-chans")
    return mode
