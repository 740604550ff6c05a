#!/usr/bin/env python3
"""Vanilla, SAM on all parameters and SAM-ON, as in Table 16 of the SAM-ON paper: small, on another data set.

    python examples/translation/table.py data/bible_es_en --out output/translation_table --jobs 2

Runs ``train.py`` for each of them and three seeds, and writes ``table.md`` and ``runs.csv``. It can be stopped and
started again: a run that is finished is not run again, any other starts anew. ``--done runs.csv`` takes runs that were
finished elsewhere, ``--show runs.csv`` prints the table of runs that are over.
"""
import csv
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from timm_sam.cli.errors import OptionError, report
from timm_sam.cli.parser import OptionParser, non_negative, positive_int
from timm_sam.cli.text import csv_text, markdown, sample_std, say, spread, write_text
from timm_sam.jobs.pool import locked
from timm_sam.report.statistics import welch

HEADER = "not IWSLT'14, not the paper's numbers"
PAPER = {"vanilla": "34.56 ± .11", "SAM-all": "34.83 ± .10", "SAM-ON": "34.95 ± .16"}
TRAIN = Path(__file__).resolve().with_name("train.py")


def cells(rho_all: float, rho_on: float) -> dict[str, list[str]]:
    """Flags of each row; the last one is its rho."""
    return {"vanilla": [],
            "SAM-all": ["--sam-variant", "sam", "--sam-params", "all", "--sam-rho", f"{rho_all:g}"],
            "SAM-ON": ["--sam-variant", "sam", "--sam-params", "onlynorm", "--sam-rho", f"{rho_on:g}"]}


def rho_of(flags: Sequence[str]) -> str:
    """The radius in the flags of a row, as it is printed; empty: none."""
    return "".join(flags[-1:])


@dataclass(frozen=True)
class Done:
    """A row of ``runs.csv``: a run that is over.

    Attributes:
        row: Of the table.
        rho: As it is printed; empty: none.
        seed: Of the run.
        epochs: It went over the training set.
        updates: It took.
        valid_bleu: The best on the validation set, by greedy search.
        test_bleu: Of that epoch on the test set, by beam search.
    """

    row: str
    rho: str
    seed: int
    epochs: int
    updates: int
    valid_bleu: float
    test_bleu: float


def train(command: Sequence[str], flags: Sequence[str], out: Path, threads: Sequence[str] = ()) -> dict[str, float]:
    """The result of a run, which is done if it is not finished.

    Args:
        command: Arguments of ``train.py`` that all runs have.
        flags: This run's own.
        out: Its folder.
        threads: Arguments that make no other run of it.

    Raises:
        OptionError: It failed, or the folder holds a run of other flags.
    """
    wanted = [*command, *flags]
    result, line = out / "result.json", out.with_name(f"{out.name}.command.json")
    if result.exists():
        if not line.exists() or json.loads(line.read_text()) != wanted:
            raise OptionError(f"{out} was run with other flags: remove it, or name another --out")
        return dict(json.loads(result.read_text()))
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(str(line), json.dumps(wanted), "--out")
    if code := subprocess.run([sys.executable, str(TRAIN), *wanted, *threads, "--out", str(out)]).returncode:
        raise OptionError(f"{out.name} ended with code {code}: see above")
    return dict(json.loads(result.read_text()))


def table(runs: Sequence[Done], command: str) -> str:
    """The table in Markdown, of the rows that have a run."""
    rows = []
    plain = [run.test_bleu for run in runs if run.row == "vanilla"]
    for name, published in PAPER.items():
        found = [run for run in runs if run.row == name]
        if found:
            scores = [run.test_bleu for run in found]
            apart = None if name == "vanilla" else welch(scores, plain)
            rows.append([name, found[0].rho, "/".join(sorted({str(run.epochs) for run in found})),
                         spread(sum(scores) / len(scores), sample_std(scores)), str(len(scores)),
                         "" if apart is None else f"{apart.difference:+.2f} ({apart.low:+.2f} to {apart.high:+.2f})",
                         published])
    text = ("Test BLEU (sacreBLEU, of text that is neither tokenized nor lowercased before), mean ± sample standard "
            "deviation over seeds, and its difference to vanilla with Welch's 95 % interval. The last column is the "
            "paper's Table 16: another data set, another BLEU.")
    columns = ["", "rho", "epochs", "BLEU", "seeds", "less vanilla", "published, IWSLT'14 DE-EN"]
    return "\n\n".join([f"# Translation: {HEADER}", text, markdown(columns, rows),
                        f"Written by `{command}`.\n"])


def read_runs(flag: str, path: Path) -> list[Done]:
    """A file ``runs.csv``, which a flag names.

    Raises:
        OptionError: It is none.
    """
    try:
        with path.open(newline="", encoding="utf-8") as f:
            return [Done(row["row"], row["rho"], int(row["seed"]), int(row["epochs"]), int(row["updates"]),
                         float(row["valid_bleu"]), float(row["test_bleu"])) for row in csv.DictReader(f)]
    except OSError as e:
        raise OptionError(f"{flag} {path} cannot be read ({e.strerror}): name a runs.csv of this script") from e
    except (KeyError, TypeError, ValueError) as e:
        raise OptionError(f"{flag} {path} is no file of runs: name a runs.csv of this script") from e


def done_elsewhere(args: Namespace, flags: dict[str, list[str]]) -> dict[tuple[str, int], Done]:
    """The runs of ``--done`` that are asked for.

    Raises:
        OptionError: It is no file of runs, or has a run of another radius or length.
    """
    if args.done is None:
        return {}
    found = {(run.row, run.seed): run for run in read_runs("--done", args.done)
             if run.row in flags and run.seed in args.seeds}
    for run in found.values():
        if run.rho != rho_of(flags[run.row]) or args.epochs not in (None, run.epochs):
            raise OptionError(f"--done {args.done}: {run.row}, seed {run.seed}, has rho {run.rho or 'none'} and "
                              f"{run.epochs} epochs: give the same, or leave it out")
    return found


def run_all(args: Namespace, command: str) -> list[Done]:
    """All runs, ``args.jobs`` at a time; both files are written after each, with what is there.

    Raises:
        OptionError: As of :func:`train` and :func:`done_elsewhere`; no further run is begun.
    """
    flags = cells(args.rho_all, args.rho_on)
    length = [] if args.epochs is None else ["--epochs", str(args.epochs)]
    # several at a time share the cores; one alone takes what torch gives it
    threads = [] if args.jobs == 1 else ["--threads", str(max(1, (os.cpu_count() or 1) // args.jobs))]
    order = [(name, seed) for seed in dict.fromkeys(args.seeds) for name in flags]
    done = done_elsewhere(args, flags)
    runs = [done[key] for key in order if key in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = {pool.submit(train, [str(args.data), "--seed", str(seed), *length], flags[name],
                               args.out / f"{name}-seed{seed}", threads): (name, seed)
                   for name, seed in order if (name, seed) not in done}
        try:
            for future in as_completed(waiting):
                (name, seed), result = waiting[future], future.result()
                done[name, seed] = Done(name, rho_of(flags[name]), seed, int(result["epochs"]),
                                        int(result["updates"]), result["valid_bleu"], result["test_bleu"])
                say(f"{name}, seed {seed}: test BLEU {result['test_bleu']:.2f}")
                runs = [done[key] for key in order if key in done]
                write_text(str(args.out / "table.md"), table(runs, command), "--out")
                write_text(str(args.out / "runs.csv"), csv_text(
                    [field.name for field in fields(Done)], [list(asdict(run).values()) for run in runs]), "--out")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return runs


def build_parser() -> OptionParser:
    parser = OptionParser(prog="table.py", description="Trains vanilla, SAM-all and SAM-ON with three seeds.")
    add = parser.add_argument
    add("data", type=Path, nargs="?", default=None, help="folder of parallel text, as of bible_es_en.py")
    add("--show", type=Path, default=None, metavar="FILE", help="train nothing: print the table of a runs.csv")
    add("--done", type=Path, default=None, metavar="FILE", help="a runs.csv, of the same data: what it has is not run")
    add("--jobs", type=positive_int, default=1, metavar="N", help="runs at the same time, which share the cores")
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
    command = " ".join(["python examples/translation/table.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        if (args.data is None) == (args.show is None):
            raise OptionError("Name either a folder of parallel text or --show FILE: there is nothing to do otherwise")
        if args.show is not None:
            say(table(read_runs("--show", args.show), command))
            return 0
        with locked(str(args.out)):
            say(table(run_all(args, command), command))
    except OptionError as e:
        report(parser.prog, e)
        return 2
    except KeyboardInterrupt:
        print("Stopped; started again, this goes on where it was.", flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
