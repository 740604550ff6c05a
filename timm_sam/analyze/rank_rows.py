"""The rows of the table of feature rank: which layers and images, what it costs, and what the numbers depend on."""
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..cli.errors import OptionError
from ..evaluation import provenance
from ..evaluation.journal import key_of
from ..evaluation.sets.loaders import suite_loader
from ..evaluation.subject import Subject
from ..evaluation.tables import Measure
from .features import features_of, has_tokens, layer_names
from .flags import RANK_IMAGES
from .inputs import batches_sha256, loader_batches, placed
from .progress import Progress
from .protocol import Opened
from .rank import CENTRINGS
from .streaming import measure_rank, plan

CURVE = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)  # shares of the variance in the figure
ROWS = dict(zip(("rank", "rank_released"), CENTRINGS))


class Rank:
    """Feature rank of checkpoints, of several layers.

    Args:
        opened: The options, and what is open.
        subject: The first checkpoint.
        flag: That says how many images.

    Raises:
        OptionError: There is no such layer, it gives no row of numbers for each image, or there are not enough images.
    """

    def __init__(self, opened: Opened, subject: Subject, flag: str = "--num-images") -> None:
        session, suite, args = opened.session, opened.suite, opened.session.args
        self.session, self.suite, self.journal, self.count = session, suite, opened.journal, opened.count
        self.batches = loader_batches(args, suite, RANK_IMAGES, flag)
        self.n = n = sum(map(len, self.batches))
        with _in_flags(args.layers):
            self.layers = layer_names(subject.model, args.layers)
            image = torch.zeros(1, *subject.data_config["input_size"], device=subject.device)
            with features_of(subject.model, self.layers, args.tokens) as features:
                self.dims = {name: rows.shape[1] for name, rows in features(image).items()}
            if args.tokens is not None and not has_tokens(subject.model, self.layers, image):
                raise OptionError(
                    f"--tokens {args.tokens}: none of {', '.join(self.layers)} gives tokens; leave it out")
        self.shares = list(dict.fromkeys([*args.variance, *CURVE]))
        self.progress = Progress(session.primary)
        self.passes = len(plan(n, self.dims, args.memory))
        layers = ", ".join(f"{name} (d = {d:,})" for name, d in self.dims.items())
        largest = max(min(n, d) for d in self.dims.values())
        self.said = (f"{opened.count} checkpoints, {n:,} images, {self.passes} forward passes over them; {layers}; "
                     f"products of up to {largest:,} by {largest:,} in float64, {8e-9 * largest ** 2:.2g} GB")
        self.protocol: dict[str, Any] = dict(
            analysis="rank", mode="eval", images=n, subset_sha256=batches_sha256(self.batches), seed=args.seed,
            tokens=args.tokens, variance=self.shares)

    def rows(self) -> list[str]:
        """Names of the measures."""
        return [_row(row, name, share) for name in self.layers for row in ROWS for share in self.session.args.variance]

    def measures(self, subject: Subject, number: int) -> list[Measure]:
        """The rows of one checkpoint, the ``number``-th from 0; all ranks together.

        Raises:
            OptionError: An image cannot be read, or the journal cannot be written.
        """
        args, ranks, done = self.session.args, self.session.ranks, self.journal.done
        identity = dict(provenance.identity(args, subject, self.suite), analysis=self.protocol)
        keys = {name: key_of(part="rank", layer=name, **identity) for name in self.layers}
        dims = {name: d for name, d in self.dims.items() if keys[name] not in done}
        self.progress.begin("Rank", subject.called, number, self.count)
        places = ranks.share(range(len(self.batches)))
        later = (self.count - number - 1) * self.passes * len(places)
        passes = len(plan(self.n, dims, args.memory))
        passed = 0

        def batches() -> Iterator[Tensor]:
            nonlocal passed
            self.progress.expect((passes - passed) * len(places) + later, f"pass {passed + 1} of {passes}")
            passed += 1
            for images, _ in suite_loader(args, subject, self.suite, self.batches, places):
                yield placed(args, subject, images)

        def note(layer: str, value: dict[str, Any]) -> None:
            self.journal.note(keys[layer], value)
            self.progress.say()

        # mps has no float64
        device = subject.device if subject.device.type == "cuda" else torch.device("cpu")
        if dims:
            with features_of(subject.model, list(dims), args.tokens) as features:
                measure_rank(features, dims, self.n, args.memory, self.shares, ranks, device, batches,
                             [len(batch) for batch in self.batches], note, self.progress.tick)
        return [measure for layer in self.layers for measure in self._measures(subject, layer, done[keys[layer]])]

    def _measures(self, subject: Subject, layer: str, value: dict[str, Any]) -> list[Measure]:
        broken = 0 if value["finite"] else self.n
        self.session.note_non_finite(f"{layer} of {subject.called}", broken, self.n)
        measures = []
        for row, centring in ROWS.items():
            found = dict(zip(self.shares, value[centring]))
            details = dict(layer=layer, n=value["n"], d=value["d"], centring=centring,
                           curve=[[share, found[share]] for share in CURVE])
            measures += [Measure(
                "rank", self.suite.name, _row(row, layer, share), self.n, list(self.suite.flags),
                [float("nan") if broken else float(found[share])], [broken], f"d = {value['d']}", 0,
                [dict(details, variance=share)]) for share in self.session.args.variance]
        return measures


def _row(row: str, layer: str, share: float) -> str:
    return f"{row} {layer} {share}"


@contextlib.contextmanager
def _in_flags(layers: list[str] | None) -> Iterator[None]:
    """What is wrong with layers, as a mistake of the user.

    Raises:
        OptionError: Something is.
    """
    try:
        yield
    except OptionError:
        raise
    except ValueError as e:
        raise OptionError(f"--layers{'' if layers is None else ' ' + ' '.join(layers)}: {e}") from None
