"""What layers of a model give for images, as one row of numbers per image."""
import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

PRE_LOGITS = "pre_logits"  # what the classifier gets: of timm's models not the output of any one module
TOKENS = ("first", "mean", "all")

Features = Callable[[Tensor], dict[str, Tensor]]


def layer_names(model: nn.Module, asked: Sequence[str] | None) -> list[str]:
    """The layers that are looked at.

    Args:
        model: Of timm.
        asked: Modules' names, ``pre_logits``, and ``all`` for every entry of ``feature_info``; None: its last but one
            entry (of a residual network with four stages the third) and ``pre_logits``.

    Returns:
        Names of modules, and ``pre_logits``; each once.

    Raises:
        ValueError: There is no such layer.
    """
    entries = _entries(model)
    has_head = callable(getattr(model, "forward_features", None)) and callable(getattr(model, "forward_head", None))
    known = [*entries, *([PRE_LOGITS] if has_head else [])]
    if asked is None:
        names = [*entries[-2:][:1], *([PRE_LOGITS] if has_head else [])]
        if not names:
            raise ValueError(f"{type(model).__name__} says nothing of its layers: name modules")
        return names
    modules = dict(model.named_modules())
    names = []
    for name in asked:
        if name == "all" and not entries:
            raise ValueError(f"all: {type(model).__name__} says nothing of its layers: name modules")
        names += entries if name == "all" else [name]
    for name in names:
        if name not in known and (name not in modules or not name):
            close = difflib.get_close_matches(name, dict.fromkeys(filter(None, (*known, *modules))), 3) or known
            raise ValueError(f"{name}: {type(model).__name__} has no such layer; use {', '.join(close[:6])}, or the "
                             f"name of another module")
    return list(dict.fromkeys(names))


def _entries(model: nn.Module) -> list[str]:
    """The modules that ``feature_info`` names."""
    info: Any = getattr(model, "feature_info", None) or ()
    entries = info.get_dicts() if hasattr(info, "get_dicts") else info
    return [entry["module"] for entry in entries if "module" in entry]


@contextmanager
def features_of(model: nn.Module, names: Sequence[str], tokens: str | None = None) -> Iterator[Features]:
    """Looks at layers as long as it is open; afterwards the model has no hook more than before.

    Args:
        model: In eval mode.
        names: Of :func:`layer_names`.
        tokens: What is taken of (B, tokens, C): the ``first`` token, the ``mean`` over all, or ``all`` in a row;
            None: the first where that is the class token, else the mean.

    Yields:
        A function: images (B, C, H, W) -> for each layer (B, d), without gradients. It raises ValueError for a layer
        that is not run, or several times, or gives no tensor with a row per image.
    """
    modules = {name: module for name, module in model.named_modules() if name in names and name != PRE_LOGITS}
    seen: dict[str, list[Any]] = {}
    handles = [module.register_forward_hook(partial(_note, seen, name)) for name, module in modules.items()]

    @torch.no_grad()
    def features(images: Tensor) -> dict[str, Tensor]:
        seen.clear()
        network: Any = model  # of timm: with a head of its own
        if PRE_LOGITS in names:
            last = network.forward_features(images)
            before = network.forward_head(last, pre_logits=True)
            found = dict(seen)
            if any(name not in found for name in modules):
                seen.clear()  # what comes before the logits runs again, and is known
                network.forward_head(last)
                found = {**seen, **found}
            found[PRE_LOGITS] = [before]
        else:
            network(images)
            found = dict(seen)
        seen.clear()
        return {name: _rows(name, found.get(name, []), len(images), tokens or partial(_own_tokens, model))
                for name in names}

    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
        seen.clear()


def has_tokens(model: nn.Module, names: Sequence[str], images: Tensor) -> bool:
    """Whether any of the layers gives (B, tokens, C)."""
    with features_of(model, names, "all") as every, features_of(model, names, "mean") as mean:
        wide, narrow = every(images), mean(images)
    return any(wide[name].shape != narrow[name].shape for name in names)


def _note(seen: dict[str, list[Any]], name: str, module: nn.Module, args: Any, output: Any) -> None:
    seen.setdefault(name, []).append(output)


def _own_tokens(model: nn.Module, output: Tensor) -> str:
    """What is taken of (B, tokens, C) where it is not said: ``first`` if that is the class token, else ``mean``."""
    has_class_token = getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None)
    # registers alone are prefix tokens, too; and CaiT, XCiT and ConViT have blocks before the class token comes
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    there = getattr(model, "num_prefix_tokens", 0) and has_class_token and output.shape[1] != patches
    return "first" if there else "mean"


def _rows(name: str, outputs: Sequence[Any], images: int, tokens: str | Callable[[Tensor], str]) -> Tensor:
    """What a layer gave, as (B, d)."""
    if len(outputs) != 1:
        times = "is not run" if not outputs else f"is run {len(outputs)} times"
        raise ValueError(f"{name}: it {times} in a forward pass; name a layer that is run once")
    output = outputs[0]
    if not isinstance(output, Tensor):
        raise ValueError(f"{name}: it gives a {type(output).__name__}, no tensor; name another layer")
    if not output.is_floating_point() or output.ndim < 2 or len(output) != images:
        raise ValueError(f"{name}: it gives {output.dtype} of shape {tuple(output.shape)} for {images} images, not a "
                         f"row of numbers for each; name another layer")
    if output.ndim == 3:
        taken = tokens if isinstance(tokens, str) else tokens(output)
        if taken != "all":
            return output[:, 0] if taken == "first" else output.mean(dim=1)
    return output.flatten(1)
