#!/usr/bin/env python3
"""Vanilla, SAM on all parameters and SAM-ON, as in Table 16 of the SAM-ON paper: small, on another data set.

    python examples/translation/table.py data/bible_es_en --out output/translation_table

Runs ``train.py`` for each of them and three seeds, one after the other, and writes ``table.md``. It can be stopped and
started again: a run that is finished is not run again, any other starts anew.
"""
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from timm_sam.cli.errors import OptionError, report
from timm_sam.cli.parser import OptionParser, non_negative
from timm_sam.cli.text import markdown, sample_std, say, spread, write_text

HEADER = "not IWSLT'14, not the paper's numbers"
PAPER = {"vanilla": "34.56 ± .11", "SAM-all": "34.83 ± .10", "SAM-ON": "34.95 ± .16"}
TRAIN = Path(__file__).resolve().with_name("train.py")


def cells(rho_all: float, rho_on: float) -> dict[str, list[str]]:
    """Flags of each row."""
    return {"vanilla": [],
            "SAM-all": ["--sam-variant", "sam", "--sam-params", "all", "--sam-rho", f"{rho_all:g}"],
            "SAM-ON": ["--sam-variant", "sam", "--sam-params", "onlynorm", "--sam-rho", f"{rho_on:g}"]}


def run(command: Sequence[str], flags: Sequence[str], out: Path) -> float:
    """Test BLEU of a run, which is done if it is not finished.

    Raises:
        OptionError: It failed, or the folder holds a run of other flags.
    """
    wanted = [*command, *flags]
    result, line = out / "result.json", out.with_name(f"{out.name}.command.json")
    if result.exists():
        if not line.exists() or json.loads(line.read_text()) != wanted:
            raise OptionError(f"{out} was run with other flags: remove it, or name another --out")
        return float(json.loads(result.read_text())["test_bleu"])
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(str(line), json.dumps(wanted), "--out")
    if code := subprocess.run([sys.executable, str(TRAIN), *wanted, "--out", str(out)]).returncode:
        raise OptionError(f"{out.name} ended with code {code}: see above")
    return float(json.loads(result.read_text())["test_bleu"])


def table(scores: dict[str, list[float]], rhos: dict[str, str], command: str) -> str:
    """The table in Markdown."""
    rows = [[name, rhos[name], spread(sum(found) / len(found), sample_std(found)), str(len(found)), PAPER[name]]
            for name, found in scores.items() if found]
    text = ("Test BLEU (sacreBLEU, of text that is neither tokenized nor lowercased before), mean ± sample standard "
            "deviation over seeds. The last column is the paper's Table 16: another data set, another BLEU.")
    return "\n\n".join([f"# Translation: {HEADER}", text,
                        markdown(["", "rho", "BLEU", "seeds", "published, IWSLT'14 DE-EN"], rows),
                        f"Written by `{command}`.\n"])


def build_parser() -> OptionParser:
    parser = OptionParser(prog="table.py", description="Trains vanilla, SAM-all and SAM-ON with three seeds.")
    add = parser.add_argument
    add("data", type=Path, help="folder of parallel text, as of bible_es_en.py")
    add("--out", type=Path, default=Path("output/translation_table"), metavar="DIR",
        help="folder of runs and table; started again, it goes on there")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of each row")
    # neither was searched for
    add("--rho-all", type=non_negative, default=0.1, metavar="RHO", help="radius of SAM-all")
    add("--rho-on", type=non_negative, default=0.5, metavar="RHO", help="radius of SAM-ON")
    add("--epochs", type=int, default=None, metavar="N", help="of each run; none: the preset's")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 2 for a mistake or a run that failed, 130 for Ctrl-C."""
    parser = build_parser()
    args = parser.parse_args(argv)
    flags = cells(args.rho_all, args.rho_on)
    scores: dict[str, list[float]] = {name: [] for name in flags}
    rhos = {"vanilla": "", "SAM-all": f"{args.rho_all:g}", "SAM-ON": f"{args.rho_on:g}"}
    length = [] if args.epochs is None else ["--epochs", str(args.epochs)]
    command = " ".join(["python examples/translation/table.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        for seed in dict.fromkeys(args.seeds):
            for name, own in flags.items():
                score = run([str(args.data), "--seed", str(seed), *length], own, args.out / f"{name}-seed{seed}")
                say(f"{name}, seed {seed}: test BLEU {score:.2f}")
                scores[name].append(score)
                # written after each run, with what is there
                write_text(str(args.out / "table.md"), table(scores, rhos, command), "--out")
    except OptionError as e:
        report(parser.prog, e)
        return 2
    except KeyboardInterrupt:
        print("Stopped; started again, this goes on where it was.", flush=True)
        return 130
    say(table(scores, rhos, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
