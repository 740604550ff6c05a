"""The command lines of analyses: validate.py's groups of flags, what analyses do not have of them, and their own."""
import argparse
import math
from collections.abc import Sequence
from functools import partial

from ..cli import ranges, rules
from ..cli.errors import OptionError
from ..cli.parser import OptionParser
from ..cli.rules import LOWER_PRECISIONS, Rules, flag
from ..cli.tasks import is_multilabel
from ..evaluation import checks, flags
from ..evaluation.attack.ball import NORMS
from ..evaluation.options import Resolved, build_validate_parser, parse_given, resolve
from ..selection import SELECTIONS
from .sharpness import KINDS, Measured

COMMANDS = {
    "sharpness": "how much the loss rises within a radius around the weights",
    "norms": "how the parameters of normalization layers are distributed, beside all others",
}
PROG = "python -m timm_sam.analyze"
IMAGES = 2048  # of which sharpness is taken, as in the SAM-ON paper

# flags of evaluation's groups that would change what is analysed, or not allow it
_NOT_HERE = ("amp", "torchscript", "torchcompile", "aot_autograd", "naflex_loader", "reparam", "test_pool", "retry",
             "tf_preprocessing", "dataset", "dataset_download", "dataset_trust_remote_code", "num_samples", "input_key",
             "target_key", "target_format", "real_labels", "valid_labels")


def build_parser(command: str) -> OptionParser:
    """The parser of one of ``COMMANDS``."""
    parser = OptionParser(prog=f"{PROG} {command}", description=f"Trained weights: {COMMANDS[command]}.")
    # norms needs no images, but a run's args.yaml has values for all of these
    for add in (flags.add_dataset, flags.add_model, flags.add_input, flags.add_execution, _add_output):
        add(parser)
    if command == "sharpness":
        _add_sharpness(parser)
    # what evaluation has beside, and analyses leave at rest
    own = {action.dest for action in parser._actions}
    others = vars(build_validate_parser().parse_args([]))
    parser.set_defaults(split="train", **{dest: value for dest, value in others.items() if dest not in own})
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Output").add_argument
    add("--out", metavar="DIR", help="folder for the table (Markdown, CSV, JSON), the figure, and what is done so far")
    add("--labels", nargs="+", default=[], metavar="NAME",
        help="one per checkpoint: those of the same name are one line of the figure, with mean and standard deviation")
    add("--overwrite", action="store_true", help="replace an earlier analysis in --out")
    add("--skip-existing", action="store_true", help="go on with an analysis in --out that was interrupted")
    add("--allow-partial", action="store_true", help="take data sets that lack classes, and mark them")


def _add_sharpness(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Sharpness").add_argument
    add("--measure", nargs="+", metavar="KIND-NORM[-raw]=R,...", type=_measured,
        default=[*_measured("worst-linf=0.003,0.005,0.007"), *_measured("step-linf=0.007,0.01,0.03")],
        help="KIND worst (many steps), step (one) or average (noise), NORM linf or l2, radii R relative to each "
             "weight's size, with -raw absolute; none: those of the SAM-ON paper's Table 6 for WRN-28-10")
    add("--no-logit-norm", action="store_true", help="the logits as they are, instead of with length 1")
    add("--num-images", type=int, metavar="N", help=f"images, class-balanced; none: {IMAGES}, or all full batches")
    add("--m", type=int, default=128, metavar="M", help="images per batch, each of which has a maximum of its own")
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


def parse(command: str, argv: Sequence[str]) -> tuple[argparse.Namespace, Resolved]:
    """Parses and checks the command line of one of ``COMMANDS``; ``measure`` becomes one list, ``batch_size`` is ``m``.

    Raises:
        SystemExit: With code 2, after one line on stderr, for anything wrong with the values.
    """
    parser = build_parser(command)
    given, args = parse_given(parser, argv)
    try:
        args.checkpoint = list(args.checkpoint)
        resolved = resolve(parser, given, args, suites=True)
        rules.apply(args, partial(checks.files, suites=True), checks.values, partial(_not_here, parser=parser))
        if command == "sharpness":
            rules.apply(args, partial(_sharpness, given=given))
            # the default is one list, what is given one per word
            args.measure = list(dict.fromkeys(
                m for part in args.measure for m in (part if isinstance(part, list) else [part])))
            args.batch_size = args.m
        else:
            rules.apply(args, _norms)
    except OptionError as e:
        parser.error(str(e))
    return args, resolved


def _not_here(args: argparse.Namespace, parser: OptionParser) -> Rules:
    """What would change the model or the images, or has no derivative."""
    yield not args.out, "--out is missing: give the folder for the results"
    yield is_multilabel(args), "--task multilabel: analyses need one class per image; give --task classification"
    for dest in _NOT_HERE:
        yield getattr(args, dest) != parser.get_default(dest), f"{flag(dest)} is not for analyses: leave it out"
    yield (args.model_dtype in LOWER_PRECISIONS,
           f"--model-dtype {args.model_dtype}: small differences of losses need float32; leave it out")
    yield args.num_gpu > 1, f"--num-gpu {args.num_gpu}: leave it out, and start several processes by torchrun"
    yield args.skip_existing and args.overwrite, "--skip-existing keeps what --overwrite removes: leave one out"
    yield (bool(args.labels) and len(args.labels) != len(args.checkpoint),
           f"--labels: {len(args.labels)} names for {len(args.checkpoint)} checkpoints; give one for each")


def _sharpness(args: argparse.Namespace, given: argparse.Namespace) -> Rules:
    yield not args.data_dir, "--data-dir is missing: give the folder of the training images"
    yield from ranges.in_range(args, dict.fromkeys(("num_images", "m", "steps", "draws"), ranges.COUNT))
    yield given.batch_size is not None, f"--batch-size {args.batch_size}: batches of sharpness are --m images; use --m"
    n = args.num_images
    yield (n is not None and n % args.m != 0,
           f"--num-images {n} is no multiple of --m {args.m}: use {max(1, (n or 0) // args.m) * args.m}")


def _norms(args: argparse.Namespace) -> Rules:
    yield args.skip_existing, "--skip-existing has no effect on norms, which take seconds: use --overwrite"
