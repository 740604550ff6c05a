"""Which parameters are perturbed: normalization layers by the type of the module that owns the parameter.

``onlynorm`` is SAM-ON (Section 4 of https://arxiv.org/abs/2306.04226), ``all`` is SAM, ``nonorm`` its complement.
This file holds the project's only list of normalization types.
"""
import re
from collections import Counter

from timm import layers
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

SELECTIONS = ("onlynorm", "all", "nonorm")

# Base classes only: their subclasses (LayerNorm2d, BatchNormAct2d, SyncBatchNormAct, the NoBias forms, ...) count too.
NORM_TYPES: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    layers.RmsNorm, layers.RmsNormFp32, layers.RmsNorm2d, layers.RmsNorm2dFp32,
    layers.SimpleNorm, layers.SimpleNormFp32, layers.SimpleNorm2d, layers.SimpleNorm2dFp32,
    GlobalResponseNorm, layers.InplaceAbn, layers.FrozenBatchNormAct2d,
    layers.EvoNorm2dB0, layers.EvoNorm2dB1, layers.EvoNorm2dB2,
    layers.EvoNorm2dS0, layers.EvoNorm2dS1, layers.EvoNorm2dS2,
    layers.FilterResponseNormAct2d, layers.FilterResponseNormTlu2d,
)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalization layer of torch.nn or timm.layers.

    A module that ``torch.jit.script`` made keeps only the name of its class; it is looked up among the subclasses of
    the same types.
    """
    original = getattr(module, "original_name", None)
    if isinstance(original, str):
        return original in _class_names()
    return isinstance(module, NORM_TYPES)


def _class_names() -> set[str]:
    names: set[str] = set()
    todo = list(NORM_TYPES)
    while todo:
        cls = todo.pop()
        names.add(cls.__name__)
        todo.extend(cls.__subclasses__())
    return names


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        inner = model.module if isinstance(model, (DistributedDataParallel, DataParallel)) else getattr(
            model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def select_parameters(
        model: nn.Module,
        params: str = "onlynorm",
        filter: str | None = None,
) -> list[tuple[str, nn.Parameter]]:
    """The parameters that SAM perturbs.

    Args:
        model: Any module; names are those of the module inside DDP and torch.compile wrappers.
        params: ``"onlynorm"``: the parameters that normalization layers own (SAM-ON); ``"all"``: every trainable
            parameter; ``"nonorm"``: every trainable parameter except those.
        filter: Regular expression; keeps only the names in which ``re.search`` finds it.

    Returns:
        ``(name, Parameter)`` pairs in the order of ``model.named_parameters()``, each parameter once, trainable ones
        only.

    Raises:
        ValueError: ``params`` is unknown, ``filter`` is no regular expression, or nothing is selected.
    """
    if params not in SELECTIONS:
        raise ValueError(f"params={params!r} is unknown: use one of {', '.join(SELECTIONS)}")
    try:
        pattern = None if filter is None else re.compile(filter)
    except (re.error, TypeError) as e:
        raise ValueError(f"filter={filter!r} is not a regular expression: {e}") from None

    model = unwrap(model)
    norm_ids = {id(p) for m in model.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    trainable = [(_plain(n), p) for n, p in model.named_parameters() if p.requires_grad]
    keep = {"onlynorm": lambda p: id(p) in norm_ids, "all": lambda p: True, "nonorm": lambda p: id(p) not in norm_ids}
    candidates = [(n, p) for n, p in trainable if keep[params](p)]
    if not candidates:
        raise ValueError(
            f"params={params!r} selects nothing in {type(model).__name__}: its trainable parameters "
            f"belong to {_owners(model)}; use params='{_alternative(params)}' or another model")
    selected = candidates if pattern is None else [(n, p) for n, p in candidates if pattern.search(n)]
    if not selected:
        raise ValueError(
            f"filter={filter!r} matches none of the {len(candidates)} parameters of "
            f"params={params!r}: {_examples([n for n, _ in candidates])}")
    return selected


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _alternative(params: str) -> str:
    return "onlynorm" if params == "nonorm" else "all"


def _owners(model: nn.Module) -> str:
    counts: Counter[str] = Counter()
    for module in model.modules():
        counts[type(module).__name__] += sum(p.requires_grad for p in module.parameters(recurse=False))
    found = [f"{name} ({count})" for name, count in counts.most_common(4) if count]
    return ", ".join(found) if found else "no module (all are frozen)"


def _examples(names: list[str]) -> str:
    shown = names if len(names) <= 6 else [*names[:3], "...", *names[-3:]]
    return "they are " + ", ".join(shown)
