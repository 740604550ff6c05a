"""The command lines of analyses: validate.py's groups of flags, what analyses do not have of them, and their own."""
import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from ..cli import rules
from ..cli.errors import OptionError
from ..cli.parser import OptionParser, program
from ..cli.rules import LOWER_PRECISIONS, Rules, flag
from ..cli.tasks import is_multilabel
from ..evaluation import checks, flags
from ..evaluation.options import Resolved, build_validate_parser, parse_given, resolve
from . import flags as own_flags


def prog() -> str:
    """The command's name, before that of the analysis."""
    return program("timm_sam.analyze")


class Command(NamedTuple):
    """The command line of an analysis.

    Attributes:
        help: What it says of weights.
        add: Adds its own flags.
        check: All options, those that were given -> its rules.
        settle: Brings values into their form.
        remedy: Where the device's memory is short.
    """

    help: str
    add: Callable[[argparse.ArgumentParser], None]
    check: Callable[[argparse.Namespace, argparse.Namespace], Rules]
    settle: Callable[[argparse.Namespace], None]
    remedy: str = "use a smaller --m"


def _norms(args: argparse.Namespace, given: argparse.Namespace) -> Rules:
    yield args.skip_existing, "--skip-existing has no effect on norms, which take seconds: use --overwrite"


COMMANDS = {
    "sharpness": Command("how much the loss rises within a radius around the weights",
                         own_flags.add_sharpness, own_flags.sharpness, own_flags.settle_sharpness),
    "rank": Command("how many directions hold most of the variance of a layer's activations",
                    own_flags.add_rank, own_flags.rank, own_flags.settle_rank,
                    "use a smaller --batch-size, --memory or --num-images"),
    "norms": Command("how the parameters of normalization layers are distributed, beside all others",
                     lambda parser: None, _norms, lambda args: None, "use --device cpu"),
    "line": Command("how the loss changes along SAM's own direction",
                    own_flags.add_line, own_flags.line, own_flags.settle_line),
    "hessian": Command("the largest eigenvalue and the trace of the loss' second derivative",
                       own_flags.add_hessian, own_flags.hessian, lambda args: None,
                       "use a smaller --batch-size"),
    "card": Command("all of these on one page per checkpoint, for no more than an epoch of training",
                    own_flags.add_card, own_flags.card, own_flags.settle_card),
}

# flags of evaluation's groups that would change what is analysed, or not allow it
_NOT_HERE = ("amp", "torchscript", "torchcompile", "aot_autograd", "naflex_loader", "reparam", "test_pool", "retry",
             "tf_preprocessing", "dataset", "dataset_download", "dataset_trust_remote_code", "num_samples", "input_key",
             "target_key", "target_format", "real_labels", "valid_labels")


def build_parser(command: str) -> OptionParser:
    """The parser of one of ``COMMANDS``."""
    parser = OptionParser(prog=f"{prog()} {command}", description=f"Trained weights: {COMMANDS[command].help}.")
    # norms needs no images, but a run's args.yaml has values for all of these
    for add in (flags.add_dataset, flags.add_model, flags.add_input, flags.add_execution, _add_output):
        add(parser)
    COMMANDS[command].add(parser)
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


def parse(command: str, argv: Sequence[str]) -> tuple[argparse.Namespace, Resolved]:
    """Parses and checks the command line of one of ``COMMANDS``.

    Raises:
        SystemExit: With code 2, after one line on stderr, for anything wrong with the values.
    """
    parser = build_parser(command)
    given, args = parse_given(parser, argv)
    try:
        args.checkpoint = list(args.checkpoint)
        resolved = resolve(parser, given, args, suites=True)
        rules.apply(args, partial(checks.files, suites=True), checks.values, partial(_not_here, parser=parser))
        rules.apply(args, lambda args: COMMANDS[command].check(args, given))
        COMMANDS[command].settle(args)
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
