"""The own flags of each analysis, and what their values must be."""
import argparse
import math

from ..cli import ranges
from ..cli.rules import Rules
from ..evaluation.attack.ball import NORMS
from ..selection import SELECTIONS
from .inputs import IMAGES
from .sharpness import KINDS, Measured


def add_batches(parser: argparse.ArgumentParser) -> None:
    """Images of analyses that take one batch after another."""
    add = parser.add_argument_group("Batches").add_argument
    add("--num-images", type=int, metavar="N", help=f"images, class-balanced; none: {IMAGES}, or all full batches")
    add("--m", type=int, default=128, metavar="M", help="images per batch, each of which is measured by itself")


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
    add = parser.add_argument_group("Sharpness").add_argument
    add("--measure", nargs="+", metavar="KIND-NORM[-raw]=R,...", type=_measured,
        default=[*_measured("worst-linf=0.003,0.005,0.007"), *_measured("step-linf=0.007,0.01,0.03")],
        help="KIND worst (many steps), step (one) or average (noise), NORM linf or l2, radii R relative to each "
             "weight's size, with -raw absolute; none: those of the SAM-ON paper's Table 6 for WRN-28-10")
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
