"""The ablations of the SAM-ON paper: what of normalization layers is trained, what decays, and dropout behind them.

Appendices B.7 to B.9 of https://arxiv.org/abs/2306.04226. What belongs to a normalization layer is known by the type of
the module that owns it, as everywhere.
"""
import argparse
import logging
from collections.abc import Callable, Mapping
from typing import Any

from timm import layers
from timm.layers.grn import GlobalResponseNorm
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from ..cli.device import Process
from ..cli.errors import OptionError
from ..cli.rules import Rules, apply
from ..norms import is_norm, norm_parameters
from .norm_drop import drop_behind_norms

NORM_PARAMS = ("fixed", "only")
WD_PARAMS = ("timm", "all", "nonorm", "none")

_logger = logging.getLogger(__name__)

# "weight" and "bias" of these are not the scale and shift that 1 and 0 switch off
_NOT_AFFINE = (GlobalResponseNorm, layers.EvoNorm2dB0, layers.EvoNorm2dB1, layers.EvoNorm2dB2, layers.EvoNorm2dS0,
               layers.EvoNorm2dS1, layers.EvoNorm2dS2, layers.FilterResponseNormAct2d, layers.FilterResponseNormTlu2d)


def add_ablation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the group of these flags; they do not need SAM."""
    add = parser.add_argument_group("Ablations").add_argument
    add("--norm-params", choices=NORM_PARAMS, default=None,
        help="normalization layers: fixed keeps their scale at 1 and their shift at 0, only trains nothing else; none: "
             "all parameters are trained")
    add("--norm-drop", type=float, metavar="P", default=0.0,
        help="dropout probability behind each normalization layer, before an activation that belongs to it")
    add("--wd-params", choices=WD_PARAMS, default="timm",
        help="what --weight-decay acts on: timm leaves out what is 1-d and what the model names, nonorm the parameters "
             "of normalization layers only")


def check_ablations(args: argparse.Namespace) -> None:
    """Looks at what the options are together.

    Raises:
        OptionError: They leave nothing to perturb, would overwrite loaded weights, or say one thing twice.
    """
    apply(args, _rules)


def _rules(args: argparse.Namespace) -> Rules:
    if args.norm_params == "fixed":
        for given in ("--pretrained" if args.pretrained else "",
                      f"--initial-checkpoint {args.initial_checkpoint}" if args.initial_checkpoint else ""):
            yield (bool(given), f"--norm-params fixed with {given} would overwrite the normalization layers that are "
                                f"loaded: leave one of the two out")
    idle = {"fixed": "onlynorm", "only": "nonorm"}.get(args.norm_params)
    yield (idle is not None and args.sam_variant is not None and args.sam_params == idle,
           f"--norm-params {args.norm_params} leaves --sam-params {idle} nothing to perturb: use --sam-params all")
    yield (args.norm_params == "only" and args.kd_model_name is not None and args.kd_distill_type == "feature",
           "--norm-params only with --kd-distill-type feature would train the projection of the features, too: use "
           "--kd-distill-type logit")
    yield (args.norm_drop > 0 and args.torchscript,
           f"--norm-drop {args.norm_drop} cannot be scripted: leave out --torchscript")
    yield (args.wd_params != "timm" and "filter_bias_and_bn" in args.opt_kwargs,
           f"--wd-params {args.wd_params} with --opt-kwargs filter_bias_and_bn says twice what decays: leave one of "
           f"the two out")


def alter_norms(args: argparse.Namespace, model: nn.Module) -> None:
    """Sets and freezes parameters, and puts dropout behind layers, as the options say; in place.

    To be called when layers have their last type (split, synchronized), and before there are an optimizer and DDP.
    ``fixed`` sets the scale of each layer to 1, where timm starts it at 0, too, and the shift to 0; what layers without
    plain scale and shift own (GRN, EvoNorm, FRN) keeps its initial value. Running statistics go on.

    Raises:
        OptionError: The model has no normalization layers, or these no parameters.
    """
    norms = [m for m in model.modules() if is_norm(m)]
    if args.norm_drop > 0 and not drop_behind_norms(model, args.norm_drop):
        raise OptionError(f"--norm-drop {args.norm_drop}: {args.model} has no normalization layers; choose another "
                          f"--model, or leave it out")
    if args.norm_params is None:
        return
    owned = {id(p) for m in norms for p in norm_parameters(m)}
    if not owned:
        raise OptionError(f"--norm-params {args.norm_params}: normalization layers of {args.model} own no parameters; "
                          f"choose another --model, or leave it out")
    for param in model.parameters():
        if (id(param) in owned) == (args.norm_params == "fixed"):
            param.requires_grad_(False)
    if args.norm_params == "only":
        return
    for module in norms:
        if isinstance(module, _NOT_AFFINE):
            continue
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            if isinstance(owned_one := getattr(module, name, None), nn.Parameter):
                nn.init.constant_(owned_one, value)


def decay_groups(args: argparse.Namespace, process: Process, options: Mapping[str, Any],
                 ) -> Callable[[nn.Module], list[dict[str, Any]]] | None:
    """The parameter groups of ``--wd-params``, for ``param_group_fn`` of timm's factory; None: timm's own.

    timm's groups, those of ``--layer-decay`` and of optimizers that treat some names another way included, are made
    without exceptions from weight decay, and then parted.

    Args:
        args: All options.
        process: This one.
        options: Keywords of ``timm.optim.create_optimizer_v2``.
    """
    if args.wd_params == "timm":
        return None
    weight_decay = options["weight_decay"]

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        fallback = set(options.get("fallback_list") or ())
        if options.get("fallback_no_weight_decay"):
            fallback |= set(getattr(model, "no_weight_decay", set)())
        common: dict[str, Any] = dict(
            weight_decay=weight_decay, weight_decay_exclude_1d=False, fallback_list=fallback)
        if options.get("layer_decay") is None:
            made = param_groups_weight_decay(model, **common)
        else:
            made = param_groups_layer_decay(
                model, layer_decay=options["layer_decay"], min_scale=options.get("layer_decay_min_scale") or 0.0,
                no_opt_scale=options.get("layer_decay_no_opt_scale"), **common)
        spared = {id(p) for m in model.modules() if is_norm(m) for p in norm_parameters(m)}
        if args.wd_params != "nonorm":
            spared = {id(p) for p in model.parameters()} if args.wd_params == "none" else set()
        parted, decaying = [], 0
        for group in made:
            for decay, idle in ((0.0, True), (weight_decay, False)):
                params = [p for p in group["params"] if (id(p) in spared) == idle]
                if params:
                    parted.append({**group, "params": params, "weight_decay": decay})
                    decaying += sum(p.numel() for p in params) if decay else 0
        if process.primary:
            trained = sum(p.numel() for group in made for p in group["params"])
            _logger.info(f"Weight decay of {decaying:,} of {trained:,} trained parameters (--wd-params "
                         f"{args.wd_params})")
        return parted
    return groups
