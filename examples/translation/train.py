#!/usr/bin/env python3
"""Machine translation with SAM: a transformer of torch, without timm, in a loop of its own.

    python examples/translation/train.py data/bible_es_en --sam-variant sam --sam-params onlynorm --sam-rho 0.5

The set-up is that of fairseq's recipe for IWSLT'14 (`examples/translation` there), which Table 16 of the SAM-ON paper
is likely to have used; see README.md for what differs. The SAM flags are train.py's.
"""
import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import sacrebleu
    from data import PAD, SPLITS, Batch, Example, Vocabulary, collate, languages, plan, read
    from transformer import Size, Transformer, search
except ModuleNotFoundError as e:
    if e.name not in ("sacrebleu", "sentencepiece"):
        raise
    print(f"train.py: error: {e.name} is not installed: pip install 'timm_sam[translation]'", file=sys.stderr)
    sys.exit(2)

from timm_sam import SAM
from timm_sam.cli.device import Process
from timm_sam.cli.errors import OptionError, report
from timm_sam.cli.parser import OptionParser, positive_int
from timm_sam.cli.ranges import BELOW_ONE, COUNT, NOT_NEGATIVE, POSITIVE, SEED, in_range
from timm_sam.cli.rules import apply, device_is_there
from timm_sam.cli.text import csv_text, write_text
from timm_sam.training.options import build_train_parser
from timm_sam.training.sam_options import add_sam_flags, check_sam, create_update, merged_methods, parse_noting

PRESETS: dict[str, dict[str, Any]] = {
    "small": dict(size=Size(width=128, layers=2, between=256, heads=4, subwords=4000), epochs=10, lr=1e-3,
                  warmup_updates=400, dropout=0.1),
    "iwslt_de_en": dict(size=Size(width=512, layers=6, between=1024, heads=4, subwords=10_000), epochs=50, lr=5e-4,
                        warmup_updates=4000, dropout=0.3),
}
RANGES = {"epochs": COUNT, "max_updates": COUNT, "lr": POSITIVE, "warmup_updates": COUNT, "dropout": BELOW_ONE,
          "weight_decay": NOT_NEGATIVE, "label_smoothing": BELOW_ONE, "max_tokens": COUNT, "beam": COUNT, "seed": SEED}
WITHOUT = ("--sam-m", "--sam-sync")  # a batch is one m-batch, and there is one process
COLUMNS = ("epoch", "train_loss", "valid_loss", "valid_bleu", "train_seconds", "valid_seconds")
BATCH_OF_SEARCH = 2048  # tokens of the source, times the beam


def build_parser() -> OptionParser:
    parser = OptionParser(prog="train.py", description="Trains a transformer that translates, with SAM if asked to.")
    add = parser.add_argument
    add("data", type=Path, help="folder with {train,valid,test}.SRC and .TGT, one sentence a line")
    add("--source", default=None, metavar="SUFFIX", help="language; none: the other one of two")
    add("--target", default=None, metavar="SUFFIX", help="language; none: en, if it is one of two")
    add("--preset", choices=tuple(PRESETS), default="small", help="size of the model, and what of these is not given")
    for name, convert in (("epochs", int), ("lr", float), ("warmup-updates", int), ("dropout", float)):
        add(f"--{name}", type=convert, default=None, metavar="X", help="none: the preset's")
    add("--max-updates", type=int, default=None, metavar="N", help="stop after so many updates; none: --epochs says")
    add("--weight-decay", type=float, default=1e-4, metavar="X", help="of AdamW")
    add("--label-smoothing", type=float, default=0.1, metavar="X", help="of training and validation loss")
    add("--max-tokens", type=int, default=4096, metavar="N", help="subwords of a batch, padding too, longer side")
    add("--beam", type=int, default=5, metavar="N", help="of the search on the test set; validation is greedy")
    add("--lowercase", action="store_true", help="lowercase all text")
    add("--tok-bleu", action="store_true", help="BLEU of lowercased text as it is tokenized in the files")
    add("--amp", action="store_true", help="autocast to bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--threads", type=positive_int, default=None, metavar="N", help="of the CPU; none: torch's")
    add("--seed", type=int, default=0, help="of initialization, order and dropout")
    add("--out", type=Path, default=None, metavar="DIR", help="new folder of results; none: output/translation/...")
    add_sam_flags(parser, WITHOUT)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with the preset's where nothing is given.

    Raises:
        OptionError: Something is wrong with them.
    """
    args, given = parse_noting(build_parser(), argv)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    apply(args, lambda args: in_range(args, RANGES), device_is_there)
    check_sam(as_train_options(args), given)
    for method in merged_methods(as_train_options(args)):
        if method.rows is not None or method.mask is not None and method.mask.samples:
            raise OptionError(f"--sam-method {method.name} needs losses of single samples, which are not offered here: "
                              f"leave it out")
    if args.out is None:
        sam = "plain" if args.sam_variant is None else f"{args.sam_variant}-{args.sam_params}-{args.sam_rho:g}"
        args.out = Path("output") / "translation" / f"{args.data.name}-{args.preset}-{sam}-seed{args.seed}"
    if args.out.exists():
        raise OptionError(f"--out {args.out} exists: name another folder, or remove it")
    return args


def as_train_options(args: argparse.Namespace) -> argparse.Namespace:
    """What the checks of SAM's flags look at: train.py's defaults, and this run's length."""
    own = dict(vars(args), warmup_epochs=0, cooldown_epochs=0, min_lr=0.0)
    return argparse.Namespace(**{**vars(build_train_parser().parse_args([])), **own})


def rate(update: int, lr: float, warmup: int) -> float:
    """The learning rate of an update, from 0: up linearly, then down with the inverse square root."""
    return lr * min((update + 1) / warmup, math.sqrt(warmup / (update + 1)))


def loss_of(model: Transformer, batch: Batch, smoothing: float) -> Tensor:
    """Mean cross entropy over the target's subwords; padding does not count."""
    logits = model(batch.source, batch.target_in)
    return F.cross_entropy(logits.flatten(0, 1).float() if logits.dtype == torch.bfloat16 else logits.flatten(0, 1),
                           batch.target_out.flatten(), ignore_index=PAD, label_smoothing=smoothing)


class Run:
    """One training.

    Args:
        args: As of :func:`parse_args`.
        model: What is trained, on its device.
        train: Its examples.
    """

    def __init__(self, args: argparse.Namespace, model: Transformer, train: Sequence[Example]) -> None:
        self.args, self.model, self.examples = args, model, train
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98),
                                           weight_decay=args.weight_decay)
        self.per_epoch = len(plan(train, args.max_tokens))
        self.total = min(args.epochs * self.per_epoch, args.max_updates or math.inf)
        self.update = create_update(as_train_options(args), Process(self.device), self.optimizer, model, args.lr,
                                    int(self.total), math.ceil(self.total / self.per_epoch))
        self.done = 0

    def loss(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            return loss_of(self.model, batch, self.args.label_smoothing)

    def step(self, batch: Batch, epoch: int) -> Tensor:
        """One update; gives the loss at w."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.done, self.args.lr, self.args.warmup_updates)
        self.update.begin(epoch, self.done)
        self.done += 1
        if isinstance(self.update, SAM):
            share = self.args.sam_ascent_fraction
            part = batch.first(math.ceil(share * len(batch.source)))
            return self.update.minimize(lambda: self.loss(batch), ascent_fn=None if share == 1 else
                                        lambda: self.loss(part))
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def epoch(self, epoch: int) -> Iterator[Tensor]:
        """The losses of an epoch's updates, as far as it goes."""
        self.model.train()
        for rows in plan(self.examples, self.args.max_tokens, seed=1000 * self.args.seed + epoch)[
                :int(self.total) - self.done]:
            yield self.step(collate([self.examples[i] for i in rows]).to(self.device), epoch)

    @torch.no_grad()
    def validation_loss(self, examples: Sequence[Example]) -> float:
        """Mean over the target's subwords."""
        self.model.eval()
        total, count = 0.0, 0
        for rows in plan(examples, self.args.max_tokens):
            batch = collate([examples[i] for i in rows]).to(self.device)
            tokens = int((batch.target_out != PAD).sum())
            total, count = total + self.loss(batch).item() * tokens, count + tokens
        return total / count


def translate(model: Transformer, vocabulary: Vocabulary, examples: Sequence[Example], beam: int) -> list[str]:
    """Translations of the sources, in their order."""
    model.eval()
    device = next(model.parameters()).device
    found = [""] * len(examples)
    for rows in plan(examples, max(1, BATCH_OF_SEARCH // beam)):
        sentences, _ = search(model, collate([examples[i] for i in rows]).source.to(device), beam)
        for i, sentence in zip(rows, sentences):
            found[i] = vocabulary.decode(sentence)
    return found


def bleu(hypotheses: Sequence[str], references: Sequence[str], tokenized: bool) -> tuple[float, str]:
    """BLEU of a corpus, and sacreBLEU's signature of it."""
    metric = sacrebleu.BLEU(**dict(tokenize="none", lowercase=True, force=True) if tokenized else {})
    return metric.corpus_score(list(hypotheses), [list(references)]).score, str(metric.get_signature())


def run(args: argparse.Namespace, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains, and evaluates the checkpoint with the best validation BLEU on the test set.

    Returns:
        What stands in ``result.json``.

    Raises:
        OptionError: The data cannot be used, or results cannot be written.
    """
    source, target = languages(args.data, args.source, args.target)
    texts = {split: read(args.data, split, source, target, args.lowercase) for split in SPLITS}
    try:
        args.out.mkdir(parents=True)
    except OSError as e:
        raise OptionError(f"--out {args.out} cannot be written ({e.strerror}): name another folder") from e
    vocabulary = Vocabulary.train([text for pair in texts["train"] for text in pair], args.size.subwords,
                                  args.out / "subwords.model")
    examples = {split: vocabulary.encode(pairs) for split, pairs in texts.items()}
    references = {split: [pair[1] for pair in pairs] for split, pairs in texts.items()}
    torch.manual_seed(args.seed)
    model = Transformer(args.size, len(vocabulary), args.dropout).to(args.device)
    training = Run(args, model, examples["train"])
    say(f"{source} to {target}: {', '.join(f'{len(texts[split])} {split}' for split in SPLITS)} pairs, "
        f"{len(vocabulary)} subwords, {sum(p.numel() for p in model.parameters()):,} parameters, {training.per_epoch} "
        f"updates an epoch")
    rows: list[list[Any]] = []
    best, epoch, began = -1.0, 0, time.monotonic()
    while training.done < training.total:
        losses = [loss.item() for loss in training.epoch(epoch)]
        trained = time.monotonic()
        score, _ = bleu(translate(model, vocabulary, examples["valid"], 1), references["valid"], args.tok_bleu)
        rows.append([epoch, sum(losses) / len(losses), training.validation_loss(examples["valid"]), score,
                     trained - began, time.monotonic() - trained])
        write_text(str(args.out / "summary.csv"), csv_text(COLUMNS, rows), "--out")
        say("epoch {}: loss {:.3f}, validation loss {:.3f}, BLEU {:.2f}; {:.0f} s and {:.0f} s".format(*rows[-1]))
        if score > best:
            best = score
            torch.save(model.state_dict(), args.out / "best.pt")
        epoch, began = epoch + 1, time.monotonic()
    model.load_state_dict(torch.load(args.out / "best.pt", weights_only=True))
    hypotheses = translate(model, vocabulary, examples["test"], args.beam)
    score, signature = bleu(hypotheses, references["test"], args.tok_bleu)
    write_text(str(args.out / "test.txt"), "".join(f"{line}\n" for line in hypotheses), "--out")
    result = {"test_bleu": score, "valid_bleu": best, "signature": signature, "updates": training.done, "epochs": epoch,
              "args": {**vars(args), "size": asdict(args.size)}}
    write_text(str(args.out / "result.json"), json.dumps(result, indent=1, default=str) + "\n", "--out")
    say(signature)
    say(f"test BLEU {score:.2f}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for a mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args = parse_args(argv)
        if args.threads:
            torch.set_num_threads(args.threads)
        run(args)
    except OptionError as e:
        report("train.py", e)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
