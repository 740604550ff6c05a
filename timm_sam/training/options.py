"""The command line of train.py: timm's flags, ``-c`` and the group ``SAM``."""
import argparse
from collections.abc import Sequence

from ..cli.errors import OptionError
from ..cli.parser import OptionParser, config_defaults
from .checks import check_train
from .flags import add_train_flags
from .sam_options import add_sam_flags, check_sam

_UNSET = object()


def build_train_parser(prog: str = "train.py") -> OptionParser:
    """The parser of train.py: timm's flags with timm's defaults, ``-c`` and the group ``SAM``."""
    parser = OptionParser(prog=prog, description="Trains an image classifier of timm, with SAM or SAM-ON if asked to.")
    parser.add_argument("-c", "--config", metavar="FILE", default="",
                        help="YAML file of defaults; its keys are the names of the flags, with underscores")
    add_train_flags(parser)
    add_sam_flags(parser)
    return parser


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line over the YAML file that ``-c`` names over the flags' defaults.

    Raises:
        SystemExit: With code 2, after one line on stderr, for anything wrong with the values.
    """
    try:
        config_defaults(parser, argv)
        # what the command line leaves out keeps the mark, so that a flag given with its default value is noticed too
        sam_dests = [a.dest for a in parser._actions if a.dest.startswith("sam_")]
        args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(sam_dests, _UNSET)))
        given = [dest for dest in sam_dests if getattr(args, dest) is not _UNSET]
        for dest in sam_dests:
            if dest not in given:
                setattr(args, dest, parser.get_default(dest))
        check_sam(args, given)
        check_train(args)
    except OptionError as e:
        parser.error(str(e))
    return args
