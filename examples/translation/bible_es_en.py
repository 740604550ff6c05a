#!/usr/bin/env python3
"""Writes real parallel text, Spanish and English, from two Bibles of Debian's packages.

    sudo apt install sword-text-web sword-text-sparv libsword-utils
    python examples/translation/bible_es_en.py data/bible_es_en

The World English Bible and the Reina-Valera of 1909, both in the public domain, are read by ``mod2imp`` and aligned by
the name of the verse ("Genesis 1:1"): their versifications differ, so an alignment by position would be off. Text that
is no verse (notes, titles, the glossary behind the last one) is left out, and so are pairs with more than 100 words or
of which one side has three times the words of the other. Chapters are drawn for training (90 %), validation and test (5
% each), since verses beside each other share words.
"""
import argparse
import html
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MODULES = {"es": "spaRV1909eb", "en": "engWEB2015eb"}  # of sword-text-sparv and sword-text-web
REMEDY = "apt install sword-text-web sword-text-sparv libsword-utils"
MOST_WORDS, MOST_RATIO = 100, 3.0
SPLITS = (("valid", 0.05), ("test", 0.05), ("train", 0.90))


def verses(module: str) -> dict[str, str]:
    """The verses of a Bible, ``{"Genesis 1:1": text}``, in its order.

    Raises:
        OSError: ``mod2imp`` or the module is not installed.
    """
    if shutil.which("mod2imp") is None:
        raise OSError("mod2imp is not installed")
    done = subprocess.run(["mod2imp", module], capture_output=True)
    if done.returncode or not done.stdout:
        raise OSError(f"the module {module} is not installed")
    found = {}
    for entry in done.stdout.decode("utf-8").split("$$$")[1:]:
        key, _, marked = entry.partition("\n")
        if re.search(r" [1-9]\d*:[1-9]\d*$", key) and (text := plain(marked)):
            found[key] = text
    return found


def plain(marked: str) -> str:
    """A verse without its markup."""
    marked = re.sub(r'<div [^>]*type="glossary".*', "", marked, flags=re.DOTALL)
    # a note may stand for the blank between two words
    marked = re.sub(r"<(note|title)\b[^>]*[^/]>.*?</\1>", " ", marked, flags=re.DOTALL)
    text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", marked)).split())
    return re.sub(r" ([.,;:!?”’)])", r"\1", text)


def pairs(first: dict[str, str], second: dict[str, str]) -> list[tuple[str, str, str]]:
    """Verses that both have: key, text of the first, of the second, in the order of the second."""
    return [(key, first[key], text) for key, text in second.items() if key in first]


def fits(source: str, target: str) -> bool:
    """Whether a pair is likely to be one, and not too long."""
    few, many = sorted((len(source.split()), len(target.split())))
    return many <= MOST_WORDS and many <= MOST_RATIO * few


def split(aligned: Sequence[tuple[str, str, str]], seed: int) -> dict[str, list[tuple[str, str]]]:
    """Pairs by split, whole chapters each, in the order of the text."""
    chapters = sorted({key.rpartition(":")[0] for key, _, _ in aligned})
    random.Random(seed).shuffle(chapters)
    of_chapter = {}
    begin = 0.0
    for name, share in SPLITS:
        for chapter in chapters[round(begin * len(chapters)):round((begin + share) * len(chapters))]:
            of_chapter[chapter] = name
        begin += share
    found: dict[str, list[tuple[str, str]]] = {name: [] for name, _ in SPLITS}
    for key, source, target in aligned:
        found[of_chapter[key.rpartition(":")[0]]].append((source, target))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes Spanish and English verses as parallel text.")
    parser.add_argument("out", type=Path, help="folder to write: train, valid and test, each .es and .en")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of chapters")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.exit(2, f"{parser.prog}: {args.out} exists: name another folder, or remove it\n")
    try:
        aligned = pairs(*(verses(MODULES[language]) for language in ("es", "en")))
    except OSError as e:
        parser.exit(2, f"{parser.prog}: {e}: {REMEDY}\n")
    kept = [pair for pair in aligned if fits(*pair[1:])]
    half = args.out.with_name(args.out.name + ".half-written")
    shutil.rmtree(half, ignore_errors=True)
    try:
        half.mkdir(parents=True)
        for name, found in split(kept, args.seed).items():
            for language, texts in zip(("es", "en"), zip(*found)):
                (half / f"{name}.{language}").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
            print(f"{name}: {len(found)} pairs")
        half.rename(args.out)
    except OSError as e:
        parser.exit(2, f"{parser.prog}: {args.out} cannot be written ({e.strerror}): name another folder\n")
    print(f"Wrote {args.out}: {len(aligned)} verses that both have, {len(kept)} of them kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
