"""What normalization layers have learned, beside all other parameters: Figures 5 and 9 of the SAM-ON paper.

Paper: M. Müller et al., NeurIPS 2023, https://arxiv.org/abs/2306.04226, Section 5.3 and B.6.
"""
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..cli.escape import markdown_text
from ..cli.text import csv_text, markdown
from ..evaluation import provenance
from ..evaluation.session import Session
from ..evaluation.tables import short_names
from ..norms import is_norm, norm_parameters
from .inputs import check_finite, labels_of

NORM_WEIGHT, NORM_BIAS = "norm weight", "norm bias"
KINDS = (NORM_WEIGHT, NORM_BIAS, "other weight", "other")
BINS = 100
QUANTILES = (5, 25, 50, 75, 95)
_NOTE = ("Larger weights of normalization layers need not be another function: a following layer can take a scale back "
         "(Appendix B.6 of the paper).")


@dataclass(frozen=True)
class Tensors:
    """All parameters of one checkpoint.

    Attributes:
        label: What it counts to: checkpoints of the same label are pooled.
        checkpoint: Its short name.
        values: (name, kind, flat values in float64) of each parameter, in the model's order.
    """

    label: str
    checkpoint: str
    values: list[tuple[str, str, np.ndarray]]

    def of(self, kind: str) -> np.ndarray:
        """All values of a kind, in one array."""
        return np.concatenate([np.empty(0), *(value for _, its, value in self.values if its == kind)])


def kinds(model: nn.Module) -> dict[str, str]:
    """Name of each parameter -> one of ``KINDS``, by the type of the module that owns it.

    Of a normalization layer what is called a bias is one, and all else a weight; of other modules ``.weight`` is.
    """
    norm_ids = {id(p) for module in model.modules() if is_norm(module) for p in norm_parameters(module)}
    found = {}
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if id(parameter) in norm_ids:
            found[name] = NORM_BIAS if last == "bias" else NORM_WEIGHT
        else:
            found[name] = "other weight" if last == "weight" else "other"
    return found


def tensors_of(model: nn.Module, label: str, checkpoint: str) -> Tensors:
    """The parameters of a model."""
    values = dict(model.named_parameters())
    return Tensors(label, checkpoint, [(key, kind, values[key].detach().double().cpu().flatten().numpy())
                                       for key, kind in kinds(model).items()])


def collect(session: Session) -> tuple[list[Tensors], dict[str, Any]]:
    """The parameters of every checkpoint, and whose they are.

    Raises:
        OptionError: A checkpoint does not fit, or holds numbers that are not finite.
    """
    checkpoints, found, described = session.checkpoints(), [], []
    names = short_names(checkpoints, session.args.model)
    labels = labels_of(session.args, names)
    for checkpoint, name, label in zip(checkpoints, names, labels):
        subject = session.subject(checkpoint)
        session.ranks.each(lambda subject=subject: check_finite(subject))  # type: ignore[misc]
        found.append(tensors_of(subject.model, label, name))
        described.append(provenance.checkpoint(subject))
    return found, dict(checkpoints=described, labels=labels, use_ema=session.args.use_ema)


def pooled(found: Sequence[Tensors], kind: str) -> dict[str, np.ndarray]:
    """Label -> all values of a kind, of all its checkpoints."""
    return {label: np.concatenate([tensors.of(kind) for tensors in found if tensors.label == label])
            for label in dict.fromkeys(tensors.label for tensors in found)}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Wasserstein-1 distance of two samples: the mean difference of their sorted values, interpolated between the
    quantiles of the smaller one where their sizes differ."""
    small, large = sorted((np.sort(a), np.sort(b)), key=len)
    if len(small) != len(large):
        small = np.interp((np.arange(len(large)) + 0.5) / len(large), (np.arange(len(small)) + 0.5) / len(small), small)
    return float(np.abs(small - large).mean())


def summary(values: np.ndarray) -> dict[str, float]:
    """Numbers of one sample, not empty."""
    return dict(
        count=len(values), mean=float(values.mean()), std=float(values.std()), mean_abs=float(np.abs(values).mean()),
        **{f"q{q:02d}": float(v) for q, v in zip(QUANTILES, np.percentile(values, QUANTILES))},
        max_abs=float(np.abs(values).max()), zeros=int((values == 0).sum()), negative=float((values < 0).mean()))


def summaries(found: Sequence[Tensors]) -> list[dict[str, Any]]:
    """A row per kind and label: :func:`summary`, number of checkpoints, distance to the first label."""
    rows = []
    for kind in KINDS:
        samples = {label: values for label, values in pooled(found, kind).items() if len(values)}
        first = next(iter(samples.values()), None)
        for label, values in samples.items():
            assert first is not None
            rows.append(dict(kind=kind, label=label, checkpoints=sum(t.label == label for t in found),
                             **summary(values), w1=distance(values, first)))
    return rows


def shares(samples: Mapping[str, np.ndarray], edges: np.ndarray) -> dict[str, np.ndarray]:
    """Label -> the share of its values in each bin."""
    return {label: np.histogram(values, edges)[0] / len(values) for label, values in samples.items()}


def edges(samples: Mapping[str, np.ndarray]) -> np.ndarray:
    """Bins of all labels together, from their smallest value to their largest."""
    return np.histogram_bin_edges(np.concatenate(list(samples.values())), BINS)


def norms_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, and what to think of beside it."""
    header = list(rows[0])
    cells = [[_shown(row[key]) for key in header] for row in rows]
    return markdown(header, cells, left=2) + f"\n\nw1: Wasserstein-1 distance to the first label. {_NOTE}\n"


def norms_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    return csv_text(list(rows[0]), [list(row.values()) for row in rows])


def norms_json(rows: Sequence[Mapping[str, Any]], protocol: Mapping[str, Any]) -> str:
    return json.dumps(dict(rows=rows, protocol=protocol), indent=2) + "\n"


def tensors_csv(found: Sequence[Tensors]) -> str:
    """A row per checkpoint and parameter, for plots over depth."""
    rows = [dict(checkpoint=tensors.checkpoint, label=tensors.label, name=name, kind=kind, **summary(values))
            for tensors in found for name, kind, values in tensors.values if len(values)]
    return csv_text(list(rows[0]), [list(row.values()) for row in rows])


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else markdown_text(str(value))
