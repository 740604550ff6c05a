"""``--sam-*``: the flags, their checks, and SAM built from them."""
import argparse
import logging
import re
from collections.abc import Sequence

import torch
from timm import utils
from torch import nn

from ..cli.errors import OptionError
from ..cli.parser import epoch, fraction, non_negative, positive_int
from ..cli.rules import flag
from ..passes import BN_STATS
from ..perturbation import VARIANTS
from ..sam import SAM
from ..selection import SELECTIONS

_logger = logging.getLogger("train")


def add_sam_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the group ``SAM``. Without ``--sam-variant`` training is timm's own."""
    add = parser.add_argument_group("SAM").add_argument
    add("--sam-variant", choices=tuple(VARIANTS), default=None,
        help="perturbation of Table 9 of the SAM-ON paper; none: plain training")
    add("--sam-rho", type=non_negative, default=None, metavar="RHO",
        help="radius of the perturbation; required with --sam-variant")
    add("--sam-params", choices=SELECTIONS, default="onlynorm",
        help="what is perturbed: the normalization layers (SAM-ON), all parameters (SAM), or all but those")
    add("--sam-filter", default=None, metavar="REGEX",
        help="perturb only parameters in whose name this is found, such as 'layer4'")
    add("--sam-eta", type=non_negative, default=None, metavar="ETA",
        help="eta of Table 9; none: the variant's own (elementwise_l2_orig 0.01, fisher 1, other elementwise 0)")
    add("--sam-bn-stats", choices=BN_STATS, default="clean",
        help="which passes update running statistics: the one at w only, or both")
    add("--sam-m", type=positive_int, default=None, metavar="M",
        help="samples that share one perturbation: each rank's batch is taken in chunks of M; none: the whole of it")
    add("--sam-sync", action="store_true",
        help="average the gradient that gives eps over all ranks, so that they share one perturbation")
    add("--sam-ascent-fraction", type=fraction, default=1.0, metavar="F",
        help="take the gradient that gives eps from the first F of each batch only")
    add("--sam-no-shared-forward", action="store_true",
        help="compute both forward passes in full, also below the first perturbed layer")
    add("--sam-every", type=positive_int, default=1, metavar="K",
        help="perturb every K-th update, starting with the first; the others are plain")
    add("--sam-start-epoch", type=epoch, default=0, metavar="N", help="first epoch with SAM")
    add("--sam-end-epoch", type=epoch, default=None, metavar="N", help="first epoch without SAM again; none: never")


def check_sam(args: argparse.Namespace, given: Sequence[str] = ()) -> None:
    """Checks the SAM group.

    Args:
        args: All options.
        given: Names of the SAM options that stand on the command line, whatever their value.

    Raises:
        OptionError: Options that contradict each other.
    """
    if args.sam_variant is None:
        neutral = {"sam_params": "onlynorm", "sam_bn_stats": "clean", "sam_ascent_fraction": 1.0,
                   "sam_no_shared_forward": False, "sam_sync": False, "sam_every": 1, "sam_start_epoch": 0}
        for dest, value in vars(args).items():
            if dest.startswith("sam_") and (dest in given or value != neutral.get(dest)):
                raise OptionError(
                    f"{flag(dest)} {value} has no effect without --sam-variant: add --sam-variant sam, or leave "
                    f"{flag(dest)} out")
        return
    if args.sam_rho is None:
        raise OptionError(
            f"--sam-variant {args.sam_variant} needs --sam-rho: add --sam-rho RHO, a number >= 0 (see hparams/ for "
            f"the values of the paper)")
    if args.sam_eta is not None and VARIANTS[args.sam_variant].eta is None:
        raise OptionError(f"--sam-eta {args.sam_eta}: --sam-variant {args.sam_variant} has no eta; leave it out")
    if args.sam_filter is not None:
        try:
            re.compile(args.sam_filter)
        except re.error as e:
            raise OptionError(
                f"--sam-filter {args.sam_filter!r} is not a regular expression ({e}): mend or quote it") from None
    if args.sam_end_epoch is not None and args.sam_end_epoch <= args.sam_start_epoch:
        raise OptionError(
            f"--sam-end-epoch {args.sam_end_epoch} is not after --sam-start-epoch {args.sam_start_epoch}: raise it, or "
            f"leave it out")


def create_sam(args: argparse.Namespace, optimizer: torch.optim.Optimizer, module: nn.Module) -> SAM | None:
    """SAM around the optimizer, or None without --sam-variant.

    Raises:
        OptionError: Nothing is selected, or the optimizer cannot be wrapped.
    """
    if args.sam_variant is None:
        return None
    try:
        sam = SAM(optimizer, module, variant=args.sam_variant, params=args.sam_params, rho=args.sam_rho,
                  eta=args.sam_eta, filter=args.sam_filter, bn_stats=args.sam_bn_stats,
                  share_forward=not args.sam_no_shared_forward, sync=args.sam_sync)
    except ValueError as e:
        raise OptionError(str(e)) from e
    if utils.is_primary(args):
        _logger.info(f"SAM {sam.describe()}")
    return sam
