"""Which parameters are perturbed: normalization layers by the type of the module that owns the parameter.

``onlynorm`` is SAM-ON (Section 4 of https://arxiv.org/abs/2306.04226), ``all`` is SAM, ``nonorm`` its complement.
What a normalization layer is, ``norms.py`` says.
"""
import re
import warnings
from collections import Counter
from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .norms import NormTypes, checked_types, is_norm, left_out, norm_parameters

SELECTIONS = ("onlynorm", "all", "nonorm")


def check_module(model: object) -> None:
    """Looks at what is given as a model.

    Raises:
        ValueError: It is none, as its parameters.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be the torch.nn.Module that is trained, got {type(model).__name__}")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        inner = model.module if isinstance(model, (DistributedDataParallel, DataParallel)) else getattr(
            model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def share_of(params: Sequence[nn.Parameter], model: nn.Module) -> str:
    """How many tensors and numbers they are, and of how many."""
    tensors = list(unwrap(model).parameters())
    return (f"{len(params)} of {len(tensors)} tensors, {sum(p.numel() for p in params):,} of "
            f"{sum(p.numel() for p in tensors):,} parameters")


def select_parameters(
        model: nn.Module,
        params: str = "onlynorm",
        filter: str | None = None,
        norm_types: NormTypes | None = None,
) -> list[tuple[str, nn.Parameter]]:
    """The parameters that SAM perturbs.

    Args:
        model: Any module; names are those of the module inside DDP and torch.compile wrappers.
        params: ``"onlynorm"``: the parameters that normalization layers own (SAM-ON); ``"all"``: every trainable
            parameter; ``"nonorm"``: every trainable parameter except those.
        filter: Regular expression; keeps only the names in which ``re.search`` finds it.
        norm_types: A class, or several, whose modules are normalization layers beside those that are known; see
            :func:`register_norm`.

    Returns:
        ``(name, Parameter)`` pairs in the order of ``model.named_parameters()``, each parameter once, trainable ones
        only.

    Raises:
        ValueError: ``model`` is none, ``params`` is unknown, ``filter`` is no regular expression, ``norm_types`` holds
            no class of modules, nothing is selected, or complex numbers are.

    Warns:
        UserWarning: A class with "norm" in its name owns trainable parameters, and is none of the known types.
    """
    check_module(model)
    if params not in SELECTIONS:
        raise ValueError(f"params={params!r} is unknown: use one of {', '.join(SELECTIONS)}")
    try:
        pattern = None if filter is None else re.compile(filter)
    except (re.error, TypeError) as e:
        raise ValueError(f"filter={filter!r} is not a regular expression: {e}") from None

    types = checked_types(norm_types)
    model = unwrap(model)
    norm_ids = {id(p) for m in model.modules() if is_norm(m, types) for p in norm_parameters(m)}
    trainable = [(_plain(n), p) for n, p in model.named_parameters() if p.requires_grad]
    keep = {"onlynorm": lambda p: id(p) in norm_ids, "all": lambda p: True, "nonorm": lambda p: id(p) not in norm_ids}
    candidates = [(n, p) for n, p in trainable if keep[params](p)]
    missed = [] if params == "all" else left_out(model, norm_ids)
    if not candidates:
        raise ValueError(
            f"params={params!r} selects nothing in {type(model).__name__}: its trainable parameters "
            f"belong to {_owners(model)}; {_remedy(model, params, norm_ids, missed)}")
    if missed:
        warnings.warn(
            f"params={params!r}: {', '.join(missed)} {'owns' if len(missed) == 1 else 'own'} parameters and "
            f"{'is' if len(missed) == 1 else 'are'} not known as normalization; if {missed[0]} normalizes, say "
            f"norm_types=({missed[0]},) or timm_sam.register_norm({missed[0]})", stacklevel=2)
    selected = candidates if pattern is None else [(n, p) for n, p in candidates if pattern.search(n)]
    if not selected:
        raise ValueError(
            f"filter={filter!r} matches none of the {len(candidates)} parameters of "
            f"params={params!r}: {_examples([n for n, _ in candidates])}")
    complex_ones = [n for n, p in selected if p.is_complex()]
    if complex_ones:
        raise ValueError(
            f"params={params!r} selects complex parameters ({_examples(complex_ones)}), which SAM cannot perturb: keep "
            f"them as real ones that the forward views by torch.view_as_complex, or choose others by filter")
    return selected


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _remedy(model: nn.Module, params: str, norm_ids: set[int], missed: list[str]) -> str:
    frozen = sum(not p.requires_grad for p in model.parameters() if id(p) in norm_ids)
    if params == "onlynorm" and frozen:
        return (f"its normalization layers are frozen ({frozen} parameters): call requires_grad_(True) on them before, "
                f"or use params='all'")
    if params == "onlynorm" and missed:
        return f"if {missed[0]} normalizes, say norm_types=({missed[0]},), else use params='all'"
    return f"use params='{'onlynorm' if params == 'nonorm' else 'all'}' or another model"


def _owners(model: nn.Module) -> str:
    counts: Counter[str] = Counter()
    for module in model.modules():
        counts[type(module).__name__] += sum(p.requires_grad for p in module.parameters(recurse=False))
    found = [f"{name} ({count})" for name, count in counts.most_common(4) if count]
    return ", ".join(found) if found else "no module (all are frozen)"


def _examples(names: list[str]) -> str:
    shown = names if len(names) <= 6 else [*names[:3], "...", *names[-3:]]
    return "they are " + ", ".join(shown)
