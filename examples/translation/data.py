"""Parallel text: files, subwords, batches."""
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from timm_sam.cli.errors import OptionError, one_line

PAD, UNKNOWN, BEGIN, END = range(4)
SPLITS = ("train", "valid", "test")


def languages(folder: Path, source: str | None, target: str | None) -> tuple[str, str]:
    """The suffixes of source and target; where neither is given, English is the target.

    Raises:
        OptionError: They cannot be told.
    """
    found = sorted(path.suffix[1:] for path in folder.glob("train.*"))
    if source is None and target is None and "en" in found:
        target = "en"
    others = [language for language in found if language not in (source, target)]
    if len(others) == 1:
        source, target = source or others[0], target or others[0]
    if source is None or target is None or source == target or not {source, target} <= set(found):
        raise OptionError(f"{folder} has {', '.join(f'train.{name}' for name in found) or 'no train.*'}: give a folder "
                          f"with train, valid and test of two languages as suffixes, or --source and --target")
    return source, target


def read(folder: Path, split: str, source: str, target: str, lowercase: bool) -> list[tuple[str, str]]:
    """The pairs of a split, one sentence a line.

    Raises:
        OptionError: A file is missing, empty or no text, or the two have not as many lines.
    """
    sides = []
    for language in (source, target):
        path = folder / f"{split}.{language}"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise OptionError(f"{path} cannot be read ({one_line(e)}): give a folder with {split}.{source} and "
                              f"{split}.{target}, one sentence a line") from None
        sides.append((text.lower() if lowercase else text).splitlines())
    if len(sides[0]) != len(sides[1]) or not sides[0]:
        raise OptionError(f"{folder}: {split}.{source} has {len(sides[0])} lines and {split}.{target} {len(sides[1])}: "
                          f"they have to be as many, and not none")
    return list(zip(*sides))


@dataclass(frozen=True)
class Example:
    """A pair as subwords, without marks of begin and end."""

    source: list[int]
    target: list[int]


class Vocabulary:
    """Subwords of both languages together, by byte-pair encoding.

    Args:
        path: Of a model of sentencepiece.
    """

    def __init__(self, path: Path) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))

    @classmethod
    def train(cls, texts: Sequence[str], size: int, path: Path) -> "Vocabulary":
        """Finds subwords in texts, at most ``size`` of them, and writes the model to ``path``."""
        with path.open("wb") as f:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=f, model_type="bpe", vocab_size=size,
                hard_vocab_limit=False, character_coverage=1.0, num_threads=1, minloglevel=2, pad_id=PAD,
                unk_id=UNKNOWN, bos_id=BEGIN, eos_id=END)
        return cls(path)

    def __len__(self) -> int:
        return int(self.model.get_piece_size())

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Example]:
        """Pairs as subwords."""
        return [Example(*self.model.encode(list(pair))) for pair in pairs]

    def decode(self, sentence: Sequence[int]) -> str:
        """Subwords as text."""
        return str(self.model.decode(list(sentence)))


@dataclass(frozen=True)
class Batch:
    """Sentences of about the same length, padded.

    Attributes:
        source: (n, S), each ended by END.
        target_in: (n, T), each begun by BEGIN.
        target_out: (n, T), the same one place further, ended by END.
    """

    source: Tensor
    target_in: Tensor
    target_out: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(part.to(device) for part in (self.source, self.target_in, self.target_out)))

    def first(self, count: int) -> "Batch":
        """Of the first sentences only."""
        return Batch(self.source[:count], self.target_in[:count], self.target_out[:count])


def padded(sentences: Sequence[Sequence[int]]) -> Tensor:
    """Sentences as rows of one tensor, filled up with PAD."""
    longest = max(map(len, sentences))
    return torch.tensor([[*sentence, *[PAD] * (longest - len(sentence))] for sentence in sentences])


def collate(examples: Sequence[Example]) -> Batch:
    """A batch of these examples."""
    return Batch(padded([[*e.source, END] for e in examples]), padded([[BEGIN, *e.target] for e in examples]),
                 padded([[*e.target, END] for e in examples]))


def plan(examples: Sequence[Example], most_tokens: int, seed: int | None = None) -> list[list[int]]:
    """Which examples go together: by length, at most so many tokens of the longer side a batch, padding included.

    Args:
        examples: All of them.
        most_tokens: A longer sentence is a batch by itself.
        seed: Of which of equal length go together, and of the order; None: as they come. How many batches there are
            does not depend on it.

    Returns:
        Positions, by batch.
    """
    order = list(range(len(examples)))
    generator = random.Random(seed)
    if seed is not None:
        generator.shuffle(order)
    order.sort(key=lambda i: (len(examples[i].target), len(examples[i].source)))
    batches: list[list[int]] = []
    longest = 0
    for i in order:
        longest = max(longest, len(examples[i].source) + 1, len(examples[i].target) + 1)
        if not batches or longest * (len(batches[-1]) + 1) > most_tokens:
            batches.append([])
            longest = max(len(examples[i].source), len(examples[i].target)) + 1
        batches[-1].append(i)
    if seed is not None:
        generator.shuffle(batches)
    return batches
