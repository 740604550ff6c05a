"""``python -m timm_sam.paper list | run table1 --data-dir DIR --out DIR | show table1 --out DIR``."""
import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

from ..cli import recipes
from ..cli.errors import OptionError, report
from ..cli.parser import OptionParser, non_negative, positive_int, program
from ..cli.text import say, write_table
from ..jobs.table import run_table
from . import archive, drawing, small
from .catalogue import EXHIBITS
from .exhibits import NORMS, Exhibit
from .plan import Plan, check, check_recipes
from .results import collect
from .show import overview, table_csv, table_text

COMMANDS = {
    "list": "which runs each table and figure needs, which are there, and what they would cost",
    "run": "trains what is missing, evaluates it, and shows it; further flags go to train.py",
    "show": "the paper's numbers beside those of the runs",
    "pack": "writes all runs of a folder into one CSV file",
    "unpack": "writes the folders of such a file again",
}


def prog() -> str:
    """The command's name, before that of what it is to do."""
    return program("timm_sam.paper")


def build_parser(command: str) -> OptionParser:
    """The parser of one of ``COMMANDS``."""
    parser = OptionParser(prog=f"{prog()} {command}", description=f"The SAM-ON paper: {COMMANDS[command]}.")
    add = parser.add_argument
    if command == "pack":
        add("folder", metavar="DIR", help="folder of runs")
        add("--to", required=True, metavar="FILE.csv", help="the file to write")
        return parser
    if command == "unpack":
        add("file", metavar="FILE.csv", help="what pack has written")
        add("folder", metavar="DIR", help="folder to write, new")
        return parser
    add("exhibits", nargs="*" if command == "list" else "+", metavar="NAME",
        help=f"tables and figures, table1 to table19 and figure1 to figure11{'; none: all' * (command == 'list')}")
    add("--out", default=os.path.join("output", "paper"), metavar="DIR",
        help="folder of the runs; tables share them")
    add("--seeds", type=positive_int, default=3, metavar="N", help="seeds 0 to N - 1")
    add("--hparams", default=recipes.folder(), metavar="DIR", help="folder of the recipes")
    if command == "list":
        add("--tflops", type=non_negative, default=50.0, metavar="X",
            help="10^12 FLOP per second that hours are reckoned with")
    if command == "run":
        add("--data-dir", default="", metavar="DIR",
            help="folder of the data set, or of cifar10, cifar100 and imagenet as folders in it")
        add("--preset", choices=("small",), default=None,
            help="Table 1, 3 or both in small, for a machine without a GPU; none: as in the paper")
        add("--set", choices=("digits", "fashion"), default=None, help="images of --preset small; none: digits")
        add("--eval-root", default="", metavar="DIR", help="folder of the published evaluation sets (Tables 4, 15)")
        add("--devices", type=positive_int, default=1, metavar="N",
            help="runs at the same time: one per GPU, or one per thread of the CPU where there is none")
        add("--only", nargs="+", default=[], metavar="VARIANT", help="only these variants, and plain if it is named")
    if command == "show":
        add("--csv", default="", metavar="FILE", help="also write the numbers as CSV; of one table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if a run failed, 2 for a mistake, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = OptionParser(prog=prog(), description="The SAM-ON paper. --help after a name says more.")
    first.add_argument("command", choices=COMMANDS, help="; ".join(
        f"{name}: {text}" for name, text in COMMANDS.items()))
    command = first.parse_args(arguments[:1]).command
    parser = build_parser(command)
    args, flags = parser.parse_known_args(arguments[1:]) if command == "run" else (
        parser.parse_args(arguments[1:]), [])
    try:
        if command in ("pack", "unpack"):
            count = archive.pack(args.folder, args.to) if command == "pack" else archive.unpack(args.file, args.folder)
            say(f"{count} runs in {args.to if command == 'pack' else args.folder}")
            return 0
        return {"list": _list, "run": _run, "show": _show}[command](args, flags)
    except OptionError as e:
        report(parser.prog, e)
        return 2


def _chosen(names: Sequence[str]) -> list[Exhibit]:
    for name in names:
        if name not in EXHIBITS:
            raise OptionError(f"{name} is none of {', '.join(EXHIBITS)}")
    return [EXHIBITS[name] for name in dict.fromkeys(names or EXHIBITS)]


def _list(args: argparse.Namespace, flags: Sequence[str]) -> int:
    if args.tflops == 0:
        raise OptionError("--tflops 0 would take for ever: use a number > 0")
    check_recipes(args.hparams)
    say(overview(Plan(args.out, args.hparams, seeds=args.seeds), _chosen(args.exhibits), args.tflops * 1e12))
    return 0


def _run(args: argparse.Namespace, flags: Sequence[str]) -> int:
    exhibits = _chosen(args.exhibits)
    if args.preset is not None:
        return _run_small(args, flags)
    if args.set is not None:
        raise OptionError(f"--set {args.set} chooses images of --preset small: add it, or leave --set out")
    if not args.data_dir:
        raise OptionError("--data-dir is missing: give the folder of the data set")
    plan = Plan(args.out, args.hparams, args.data_dir, args.seeds, tuple(flags), args.eval_root)
    name = f"{prog()} run"
    check(plan, exhibits, args.only, name)
    for exhibit in exhibits:
        if not exhibit.configs:
            raise OptionError(f"{exhibit.name}: there is nothing to run ({exhibit.title})")
    norms = [exhibit for exhibit in exhibits if exhibit.kind == NORMS]
    shown = dataclasses.replace(plan, flags=())
    code = run_table(
        name, lambda: list(dict.fromkeys(job for exhibit in exhibits for job in plan.jobs(exhibit, args.only))),
        args.out, args.devices, lambda: 0 if norms else _print(shown, exhibits))
    if norms and code < 2:
        code = max(code, run_table(name, lambda: [drawing.norms_job(plan, exhibit) for exhibit in norms], args.out,
                                   args.devices, lambda: _print(shown, exhibits)))
    return code


def _run_small(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """The rows of Tables 1 and 3 on small images; these are written into ``--out``."""
    for name in args.exhibits:
        if name not in small.MODELS:
            raise OptionError(f"--preset small has {' and '.join(small.MODELS)}, and not {name}")
    for flag, value in (("--data-dir", args.data_dir), ("--only", args.only), ("--eval-root", args.eval_root)):
        if value:
            raise OptionError(f"{flag}: --preset small has none; leave it out")
    check_recipes(args.hparams)
    models = tuple(small.MODELS[name] for name in dict.fromkeys(args.exhibits))
    return small.run(small.Small(args.set or "digits", models, args.out, args.hparams, args.seeds, tuple(flags)),
                     args.devices, f"{prog()} run")


def _show(args: argparse.Namespace, flags: Sequence[str]) -> int:
    exhibits = _chosen(args.exhibits)
    if args.csv and len(exhibits) != 1:
        raise OptionError(f"--csv {args.csv} takes one table: name one")
    check_recipes(args.hparams)
    plan = Plan(args.out, args.hparams, seeds=args.seeds)
    if args.csv:
        write_table(args.csv, table_csv(exhibits[0], collect(plan, exhibits[0])), "--csv")
    return _print(plan, exhibits)


def _print(plan: Plan, exhibits: Sequence[Exhibit]) -> int:
    code = 0
    for exhibit in exhibits:
        found = collect(plan, exhibit)
        say(table_text(exhibit, found) + "\n")
        code = max(code, drawing.draw(plan, exhibit, found))
    return code


if __name__ == "__main__":
    sys.exit(main())
