"""One page per checkpoint of what a card has measured: Markdown, HTML, JSON and a figure."""
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..cli import page
from ..cli.document import Block, Document, Entry, Figure, Points, Section, Table, as_markdown
from ..cli.errors import OptionError
from ..cli.text import write_text
from ..evaluation.evaluated import Evaluated, Key, Number, merged
from ..evaluation.tables import Measure, finite
from .card import NORMS
from .hessian_rows import ERROR, TOP, TRACE

_logger = logging.getLogger(__name__)
_TEXTS = {  # how the name of a measure begins, and what it says
    "worst-": "the largest rise of the loss within the radius around the weights",
    "step-": "the rise of the loss after one step along the gradient",
    "average-": "the mean rise of the loss under noise",
    "loss": "cross entropy of plain logits, in eval mode, without augmentation",
    "rise ": "the rise of that loss to SAM's perturbed weights, w + eps",
    "rank_released ": "the same after the published code's centring, by image",
    "rank ": "directions that hold this share of the variance of the activations",
    TOP: "the largest curvature of the loss in any direction",
    TRACE: "the sum of the curvatures in all directions",
}


class Pages:
    """The pages of all checkpoints, under ``card-`` and the first digits of their hashes.

    Args:
        out: Their folder.
        measures: The rows, a value per checkpoint.
        names: Of the checkpoints.
        protocol: What the numbers depend on.
        evaluations: Results of validate.py, of these checkpoints or others.
    """

    def __init__(self, out: str, measures: Sequence[Measure], names: Sequence[str], protocol: Mapping[str, Any],
                 evaluations: Sequence[Evaluated]) -> None:
        self.out, self.measures, self.names, self.protocol = out, measures, names, protocol
        self.evaluated = [self._evaluated(checkpoint, evaluations) for checkpoint in protocol["checkpoints"]]
        self._drawn: set[int] = set()

    def _evaluated(self, checkpoint: Mapping[str, Any], evaluations: Sequence[Evaluated]) -> dict[Key, Number]:
        """What is known of a checkpoint, by its hash."""
        notes: list[str] = []
        found = merged([each for each in evaluations if each.sha256 == checkpoint["sha256"]], notes)
        if evaluations and not found:
            notes.append(f"--evaluations: none is of {checkpoint['path'] or checkpoint['model']} "
                         f"(SHA-256 {checkpoint['sha256'][:12]})")
        for note in notes:
            _logger.warning(note)
        return found

    def _path(self, number: int, ending: str) -> str:
        return os.path.join(self.out, f"card-{self.protocol['checkpoints'][number]['sha256'][:12]}.{ending}")

    def draw(self, draw: Callable[[str, Callable[[Any], None]], bool]) -> None:
        """Makes the figures: ``draw`` calls what it gets with the module ``plots``, and says whether that is there."""
        for number in range(len(self.names)):
            path = self._path(number, "png")
            if not draw(path, partial(self._draw, number, path)):
                return
            self._drawn.add(number)

    def _draw(self, number: int, path: str, plots: Any) -> None:
        plots.draw_card(self.measures, number, path)

    def write(self) -> list[str]:
        """Writes all but the figures; returns the files.

        Raises:
            OptionError: One cannot be written.
        """
        written = []
        for number in range(len(self.names)):
            document = self._document(number)
            try:
                html = page.as_html(document, self.out)
            except OSError as e:
                raise OptionError(f"--out {self.out}: a figure cannot be read ({e.strerror}); try again") from None
            for ending, text in (("md", as_markdown(document)), ("html", html), ("json", self._json(number))):
                write_text(self._path(number, ending), text, f"--out {self.out}")
                written.append(self._path(number, ending))
        return written

    def _json(self, number: int) -> str:
        checkpoint = self.protocol["checkpoints"][number]
        evaluations: dict[str, dict[str, dict[str, float]]] = {}
        for key, value in self.evaluated[number].items():
            evaluations.setdefault(key.group, {}).setdefault(key.dataset, {})[key.measure] = value.value
        protocol = {**self.protocol, "checkpoints": [checkpoint], "labels": [self.protocol["labels"][number]]}
        content = dict(
            checkpoint=checkpoint["path"], sha256=checkpoint["sha256"],
            measures={m.name: None if m.broken[number] else m.values[number] for m in self.measures},
            evaluations=evaluations,
            details={m.name: m.details[number] for m in self.measures if m.details and m.details[number]},
            protocol=protocol)
        return json.dumps(finite(content), indent=2, default=str) + "\n"

    def _document(self, number: int) -> Document:
        checkpoint, parts = self.protocol["checkpoints"][number], self.protocol["analysis"]
        about = [f"{checkpoint['model']}, {checkpoint['parameters']:,} parameters",
                 f"checkpoint: {checkpoint['path'] or checkpoint['weights']}", f"SHA-256: {checkpoint['sha256']}",
                 f"price: at most {parts['forwards']:,} forward passes of one image, "
                 f"as many as {parts['forwards'] / parts['epoch']:.2f} epochs of training"]
        figure = [Figure(os.path.basename(self._path(number, "png")), "Loss along SAM's direction, feature rank over "
                         "the share of the variance, parameters of normalization layers")
                  ] if number in self._drawn else []
        settings = [f"{name}: {_settings(part)}" for name, part in parts.items() if isinstance(part, dict)]
        return Document(f"Flatness of {self.names[number]}", [Points(about)], [
            Section("Flatness", [self._table([m for m in self.measures if m.group != NORMS], number), *figure]),
            Section("Normalization layers", self._norms(number)),
            Section("Evaluations", self._evaluations(number)),
            Section("Settings", [Points(settings)])])

    def _table(self, measures: Sequence[Measure], number: int) -> Table:
        errors = {m.name: m.details[number].get("standard_error") for m in measures if m.details}
        return Table(["measure", "what it is", "images", "value", "standard error"], [
            [m.name, next((text for start, text in _TEXTS.items() if m.name.startswith(start)), ""), f"{m.images:,}",
             _shown(m, number), "" if (error := errors.get(m.name)) is None else f"{error:.2g}"]
            for m in measures if m.name != ERROR], left=2)

    def _norms(self, number: int) -> list[Block]:
        found = [m for m in self.measures if m.group == NORMS]
        if not found:
            return ["The model has none."]
        return [Table(["parameters", "value"], [[m.name, _shown(m, number)] for m in found], left=1)]

    def _evaluations(self, number: int) -> list[Block]:
        found = self.evaluated[number]
        if not found:
            return ["No evaluation of this checkpoint was given by --evaluations."]
        return [Table(["", "data set", "measure", "value"], [
            [key.group, key.dataset, key.measure if key.unit in ("%", "") else f"{key.measure} ({key.unit})",
             Entry(f"{value.value:.2f}", number=value.value)] for key, value in found.items()], left=3)]


def _settings(protocol: Mapping[str, Any]) -> str:
    """What a reader asks for first; the JSON has all."""
    return "; ".join(f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
                     for key, value in protocol.items()
                     if key not in ("analysis", "moving") and not key.endswith("sha256") and value is not None)


def _shown(measure: Measure, number: int) -> Entry:
    if measure.broken[number]:
        return Entry("non-finite")
    value = measure.values[number]
    return Entry(f"{value:.{measure.digits}f}" if measure.digits == 0 else f"{value:.5g}", number=value)
