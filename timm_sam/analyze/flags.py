"""The own flags of each analysis, and what their values must be."""
import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..cli import ranges
from ..cli.parser import non_negative
from ..cli.rules import Rules
from ..evaluation.attack.ball import NORMS
from ..perturbation import VARIANTS
from ..selection import SELECTIONS
from .features import PRE_LOGITS, TOKENS
from .inputs import IMAGES
from .line import Line
from .sharpness import KINDS, Measured

RANK_IMAGES = 10_240  # as in the paper on the rank of features of networks for CIFAR
SEARCH = {"iterations": ranges.COUNT, "probes": ranges.Range(2), "tolerance": ranges.BETWEEN}
Add = Callable[..., Any]  # add_argument of a group
_UNITS = {"": 1, "KB": 10 ** 3, "MB": 10 ** 6, "GB": 10 ** 9, "TB": 10 ** 12}


def add_batches(parser: argparse.ArgumentParser, none: str = f"{IMAGES}, or all full batches") -> Add:
    """Images of analyses that take one batch after another; ``none`` says how many, where it is not said."""
    add = parser.add_argument_group("Batches").add_argument
    add("--num-images", type=int, metavar="N", help=f"images, class-balanced; none: {none}")
    add("--m", "--sam-m", type=int, default=128, metavar="M",
        help="images per batch, each of which is measured by itself; torchrun takes --m for its own: use --sam-m there")
    return add


def batches(args: argparse.Namespace, given: argparse.Namespace) -> Rules:
    """Values of :func:`add_batches`."""
    yield not args.data_dir, "--data-dir is missing: give the folder of the training images"
    yield from ranges.in_range(args, dict.fromkeys(("num_images", "m"), ranges.COUNT))
    yield (given.batch_size is not None,
           f"--batch-size {args.batch_size}: batches of this analysis are --m images; use --m")
    n = args.num_images
    yield (n is not None and n % args.m != 0,
           f"--num-images {n} is no multiple of --m {args.m}: use {max(1, (n or 0) // args.m) * args.m}")


def add_sharpness(parser: argparse.ArgumentParser) -> None:
    add_batches(parser)
    # the SAM-ON paper's Table 6, for WRN-28-10
    add_measures(parser, "worst-linf=0.003,0.005,0.007", "step-linf=0.007,0.01,0.03")


def add_measures(parser: argparse.ArgumentParser, *default: str) -> None:
    """Which sharpness is taken, ``default`` where it is not said, and of which parameters."""
    add = parser.add_argument_group("Sharpness").add_argument
    add("--measure", nargs="+", metavar="KIND-NORM[-raw]=R,...", type=_measured,
        default=[measured for text in default for measured in _measured(text)],
        help=f"KIND worst (many steps), step (one) or average (noise), NORM linf or l2, radii R relative to each "
             f"weight's size, with -raw absolute (default: {' '.join(default)})")
    add("--no-logit-norm", action="store_true", help="the logits as they are, instead of with length 1")
    add("--steps", type=int, default=20, metavar="N", help="steps of worst")
    add("--draws", type=int, default=20, metavar="N", help="draws of average")
    add("--params", choices=SELECTIONS, default="all", help="which parameters move, as --sam-params in training")
    add("--filter", metavar="REGEX", help="of those, only the parameters in whose names this is found")
    add("--protocol", choices=("apgd", "released"), default="apgd",
        help="the search of worst and step: APGD, or what the published code does")


def _measured(text: str) -> list[Measured]:
    name, _, values = text.partition("=")
    kind, norm, *raw = name.split("-")[:4] if name.count("-") in (1, 2) else ("", "")
    if kind not in KINDS or norm not in NORMS or raw not in ([], ["raw"]) or not values:
        raise argparse.ArgumentTypeError(
            f"must be KIND-NORM=R,... or KIND-NORM-raw=R,... with {', '.join(KINDS)} and {', '.join(NORMS)}, got "
            f"{text!r}")
    found = []
    for value in values.split(","):
        try:
            radius = float(value)
        except ValueError:
            radius = math.nan
        if not (math.isfinite(radius) and radius > 0):
            raise argparse.ArgumentTypeError(f"radius {value!r} of {text!r} is not a number > 0 such as 0.005")
        found.append(Measured(kind, norm, bool(raw), radius))
    return found


def sharpness(args: argparse.Namespace, given: argparse.Namespace) -> Rules:
    """Values of :func:`add_sharpness`."""
    yield from batches(args, given)
    yield from ranges.in_range(args, dict.fromkeys(("steps", "draws"), ranges.COUNT))


def settle_batches(args: argparse.Namespace) -> None:
    """The loader's batches are ``m`` images."""
    args.batch_size = args.m


def settle_sharpness(args: argparse.Namespace) -> None:
    """``measure`` becomes one list without repetitions."""
    settle_batches(args)
    # the default is one list, what is given one per word
    args.measure = list(dict.fromkeys(
        m for part in args.measure for m in (part if isinstance(part, list) else [part])))


def add_layers(parser: argparse.ArgumentParser) -> Add:
    """Whose activations are looked at."""
    add = parser.add_argument_group("Rank").add_argument
    add("--layers", nargs="+", metavar="NAME",
        help=f"modules, {PRE_LOGITS}, or all for every stage or block that the model names; none: the last but one of "
             f"those (layer3 of a ResNet) and {PRE_LOGITS}")
    add("--tokens", choices=TOKENS,
        help="of layers that give tokens: the first, their mean, or all; none: the first where it is the class token, "
             "else the mean")
    add("--memory", type=_memory, default="2GB", metavar="SIZE",
        help="for features that are kept: with less, layers with more features than images take more passes")
    return add


def add_rank(parser: argparse.ArgumentParser) -> None:
    add = add_layers(parser)
    add("--variance", nargs="+", type=float, default=[0.99], metavar="Q", help="shares of the variance, each < 1")
    add("--num-images", type=int, metavar="N",
        help=f"images, class-balanced; none: {RANK_IMAGES}, or all that there are")


def rank(args: argparse.Namespace, given: argparse.Namespace) -> Rules:
    """Values of :func:`add_rank`."""
    yield not args.data_dir, "--data-dir is missing: give the folder of the training images"
    yield from ranges.in_range(args, {"num_images": ranges.COUNT, "variance": ranges.BETWEEN})


def settle_rank(args: argparse.Namespace) -> None:
    """Each share once."""
    args.variance = list(dict.fromkeys(args.variance))


def _memory(text: str) -> int:
    number = text.upper().rstrip("KMGTB")
    unit = text.upper()[len(number):]
    try:
        size = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        size = math.nan
    if not 1e6 <= size <= 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MB or 2GB, of at least 1MB")
    return int(size)


def add_search(parser: argparse.ArgumentParser) -> Add:
    """How well curvature is to be known."""
    add = parser.add_argument_group("Hessian").add_argument
    add("--probes", type=int, default=30, metavar="N", help="random vectors for the trace")
    add("--iterations", type=int, default=100, metavar="N", help="most steps for the top eigenvalue")
    add("--tolerance", type=float, default=0.01, metavar="T",
        help="relative change and residual at which the top eigenvalue is taken for known")
    return add


def add_hessian(parser: argparse.ArgumentParser) -> None:
    add = add_search(parser)
    add("--num-images", type=int, metavar="N",
        help=f"images, class-balanced, of whose mean loss the curvature is; kept in memory; none: {IMAGES}, or all")
    add("--logit-norm", action="store_true", help="logits with length 1, as sharpness has them, instead of as they are")
    add("--params", choices=SELECTIONS, default="all", help="which parameters move, as --sam-params in training")
    add("--filter", metavar="REGEX", help="of those, only the parameters in whose names this is found")


def hessian(args: argparse.Namespace, given: argparse.Namespace) -> Rules:
    """Values of :func:`add_hessian`."""
    yield not args.data_dir, "--data-dir is missing: give the folder of the training images"
    yield from ranges.in_range(args, {"num_images": ranges.COUNT, **SEARCH})


def add_directions(parser: argparse.ArgumentParser) -> Add:
    """Along what losses are taken."""
    add = parser.add_argument_group("Line").add_argument
    add("--variant", nargs="+", choices=tuple(VARIANTS), default=["sam"],
        help="perturbations, as --sam-variant in training")
    add("--rho", nargs="+", type=float, default=[0.05], metavar="RHO", help="radius: of each variant, or one for all")
    add("--eta", type=non_negative, metavar="ETA", help="eta of the variants that have one; none: their own")
    return add


def add_line(parser: argparse.ArgumentParser) -> None:
    add_batches(parser)
    add = add_directions(parser)
    add("--params", nargs="+", choices=SELECTIONS, default=["all"],
        help="which parameters move, as --sam-params in training; several one after another")
    add("--filter", metavar="REGEX", help="of those, only the parameters in whose names this is found")


def line(args: argparse.Namespace, given: argparse.Namespace) -> Rules:
    """Values of :func:`add_line`."""
    yield from batches(args, given)
    yield from directions(args)


def directions(args: argparse.Namespace) -> Rules:
    """Values of :func:`add_directions`."""
    yield from ranges.in_range(args, {"rho": ranges.POSITIVE})
    yield (len(args.rho) not in (1, len(args.variant)),
           f"--rho {' '.join(f'{rho:g}' for rho in args.rho)}: give one, or one for each of {' '.join(args.variant)}")
    yield (args.eta is not None and all(VARIANTS[name].eta is None for name in args.variant),
           f"--eta {args.eta}: {', '.join(args.variant)} has no eta; leave it out")


def settle_line(args: argparse.Namespace) -> None:
    """``line`` is the list of directions."""
    settle_batches(args)
    args.line = lines(args, args.params)


def lines(args: argparse.Namespace, selections: Sequence[str]) -> list[Line]:
    """The directions of :func:`add_directions`, of each selection of parameters."""
    radii = args.rho if len(args.rho) > 1 else args.rho * len(args.variant)
    return list(dict.fromkeys(
        Line(variant, params, rho, None if VARIANTS[variant].eta is None else args.eta)
        for params in selections for variant, rho in zip(args.variant, radii)))


def add_card(parser: argparse.ArgumentParser) -> None:
    add = add_batches(
        parser, f"full batches, at most {IMAGES} images, such that all takes no more than an epoch of training")
    add("--rank-images", type=int, metavar="N",
        help=f"images for the feature rank, class-balanced; none: {IMAGES}, or all that there are")
    add_measures(parser, "worst-linf=0.003", "average-l2=0.1")
    add_directions(parser)
    add_layers(parser)
    add_search(parser)
    parser.add_argument_group("Evaluations").add_argument(
        "--evaluations", nargs="+", default=[], metavar="RESULTS.json",
        help="results of validate.py with --eval, joined with the checkpoints by their hashes")
    parser.set_defaults(iterations=50, probes=10)


def card(args: argparse.Namespace, given: argparse.Namespace) -> Rules:
    """Values of :func:`add_card`."""
    yield from sharpness(args, given)
    yield from ranges.in_range(args, {"rank_images": ranges.COUNT, **SEARCH})
    yield from directions(args)


def settle_card(args: argparse.Namespace) -> None:
    """What each part of a card takes beside its own flags."""
    settle_sharpness(args)
    args.line = lines(args, [args.params])
    args.variance, args.logit_norm = [0.99], False
