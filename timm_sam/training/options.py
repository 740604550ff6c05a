"""The command line of train.py: timm's flags, ``-c`` and the group ``SAM``."""
import argparse
import logging
import os
from collections.abc import Sequence

from ..cli.errors import OptionError, shown
from ..cli.parser import OptionParser, config_defaults
from .ablations import add_ablation_flags, check_ablations
from .checks import check_numbers, check_surroundings, check_values
from .completed import complete
from .diverged import add_run_flags
from .flags import add_train_flags
from .loggers import add_logger_flags
from .losses import loss_type, without_effect
from .sam_options import add_sam_flags, check_sam, parse_noting

_logger = logging.getLogger(__name__)

# What args.yaml of older versions of timm holds, and what became of it.
_OF_THE_MACHINE = "the launcher and the machine decide it"
GONE = {
    "native_amp": "amp: true is the same",
    "apex_amp": "amp: true is torch's",
    "amp_impl": "amp is torch's",
    "jsd": "loss: jsd is the same",
    "mixup_elem": "mixup_mode: elem is the same",
    "bn_tf": "bn_momentum: 0.01 and bn_eps: 0.001 are the same",
    "validation_batch_size_multiplier": "validation_batch_size says how many",
    "aot_autograd": "torchcompile: aot_eager or inductor compiles",
    "prefetcher": "no_prefetcher says it",
    **dict.fromkeys(("world_size", "rank", "distributed", "num_gpu", "dist_backend", "dist_url"), _OF_THE_MACHINE),
}


def build_train_parser(prog: str = "train.py") -> OptionParser:
    """The parser of train.py: ``-c``, the group ``SAM``, and timm's flags with timm's defaults."""
    parser = OptionParser(
        prog=prog, usage="%(prog)s [-c RECIPE] --data-dir DIR [--sam-variant NAME --sam-rho RHO] [FLAG ...]",
        description="Trains an image classifier of timm, with SAM or SAM-ON if asked to.")
    parser.add_argument("-c", "--config", metavar="RECIPE", default="",
                        help="YAML file of defaults, whose keys are the names of the flags with underscores; or one "
                             "that comes with the package by its name, such as imagenet/resnet50/layerwise_l2_onlynorm")
    add_sam_flags(parser)
    add_train_flags(parser)
    add_ablation_flags(parser)
    add_logger_flags(parser)
    add_run_flags(parser)
    return parser


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line over the YAML file that ``-c`` names over the flags' defaults.

    Raises:
        SystemExit: With code 2, after one line on stderr, for anything wrong with the values, or when the machine has
            not what they name.
    """
    try:
        args = read_args(parser, argv)
        check_surroundings(args)
    except OptionError as e:
        parser.error(str(e))
    return args


def read_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """As :func:`parse_args`, without a look at the machine.

    Raises:
        OptionError: Anything is wrong with the values.
        SystemExit: With code 2, for what the parser itself refuses.
    """
    left_out = config_defaults(parser, argv, GONE)
    args, given = parse_noting(parser, argv, ["data_dir"])
    _take_folder(args, args.data != parser.get_default("data"), "data_dir" in given)
    check_numbers(args)
    warnings = [*left_out, *complete(args)]
    check_values(args)
    check_sam(args, given)
    check_ablations(args)
    defaults = {a.dest: a.default for a in build_train_parser(parser.prog)._actions}
    if idle := without_effect(args, defaults):
        warnings.append(f"{', '.join(idle)} without effect: --loss is {loss_type(args)}")
    for warning in warnings if os.environ.get("RANK", "0") == "0" else ():
        _logger.warning(warning)
    return args


def _take_folder(args: argparse.Namespace, bare: bool, flagged: bool) -> None:
    """The folder without a flag stands for --data-dir; on the command line it wins over that of a YAML file.

    Args:
        args: All options; ``data_dir`` is completed.
        bare: Whether ``data`` is on the command line.
        flagged: Whether --data-dir is.

    Raises:
        OptionError: Both are, and are not the same: one may be meant for a flag that takes no value.
    """
    if not args.data or args.data == args.data_dir:
        return
    if bare and flagged and args.data_dir:
        raise OptionError(f"{shown(args.data)} belongs to no flag, so that it is the folder of the data set, and "
                          f"--data-dir {args.data_dir} is another: leave one of the two out (switches take no value, "
                          f"most other flags one)")
    if bare or not args.data_dir:
        args.data_dir = args.data
