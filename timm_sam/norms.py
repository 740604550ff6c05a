"""What a normalization layer is: the project's only list of types, and how it is added to.

Layers of torch.nn and timm are known by type, with their subclasses. Those of other libraries are known by where their
class is defined and by its name, so that none of the libraries is imported. Everything else is added by the user, for
all of a process (:func:`register_norm`) or for one selection (``norm_types=``).

Layers that only scale, without statistics of their input, are none: in timm resmlp's ``Affine`` and hgnetv2's
``LearnableAffineBlock``, LayerScale, the gains of networks without normalization.
"""
import re
from collections.abc import Collection, Sequence

from timm import layers
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

# Base classes only: their subclasses (LayerNorm2d, BatchNormAct2d, SyncBatchNormAct, the NoBias forms, ...) count too.
NORM_TYPES: tuple[type[nn.Module], ...] = (
    _BatchNorm, _InstanceNorm,  # of torch, and what apex and torch_geometric derive from them
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    layers.RmsNorm, layers.RmsNormFp32, layers.RmsNorm2d, layers.RmsNorm2dFp32,
    layers.SimpleNorm, layers.SimpleNormFp32, layers.SimpleNorm2d, layers.SimpleNorm2dFp32,
    GlobalResponseNorm, layers.InplaceAbn, layers.FrozenBatchNormAct2d,
    layers.EvoNorm2dB0, layers.EvoNorm2dB1, layers.EvoNorm2dB2,
    layers.EvoNorm2dS0, layers.EvoNorm2dS1, layers.EvoNorm2dS2,
    layers.FilterResponseNormAct2d, layers.FilterResponseNormTlu2d,
)

# Top package -> names of classes, whole ones. Each model of transformers has its own: LlamaRMSNorm, T5LayerNorm,
# MambaRMSNormGated, ConvNextV2GRN; `transformers_modules` is code that came with weights.
_OF_TRANSFORMERS = r"\w*(RMS_?Norm|RmsNorm|LayerNorm|GroupNorm)(2d|Gated|1P)?|\w*GRN"
_FAMILIES = {package: re.compile(names) for package, names in {
    "transformers": _OF_TRANSFORMERS,
    "transformers_modules": _OF_TRANSFORMERS,
    "diffusers": r"\w*(RMS_?[Nn]orm|LayerNorm|GlobalResponseNorm)",
    "apex": r"\w*(Fused|Fast)(Layer|RMS)Norm|GroupNorm",
    "xformers": r"(Fused)?(Layer|RMS)Norm",
    "flash_attn": r"(DropoutAdd)?(Layer|RMS)Norm",
    "mamba_ssm": r"(Layer|RMS)Norm(Gated)?",
    "transformer_engine": r"(Layer|RMS)Norm",
    "liger_kernel": r"Liger(Layer|RMS|Group)Norm",
    "torch_geometric": r"(Hetero|Vec)?(Layer|Batch)Norm|InstanceNorm|GraphNorm",
}.items()}

# "norm" in the name of the class, parameters of its own, and no normalization layer
_OTHERS = {"timm.models.nfnet.NormFreeBlock"}

NormTypes = type[nn.Module] | Sequence[type[nn.Module]]
_registered: list[type[nn.Module]] = []


def register_norm(cls: type[nn.Module]) -> type[nn.Module]:
    """Makes a class and its subclasses normalization layers for every selection of this process.

    Args:
        cls: A subclass of ``torch.nn.Module``.

    Returns:
        The class itself, so that this can stand above its definition as a decorator.

    Raises:
        ValueError: It is no class of modules.
    """
    (checked,) = checked_types(cls, "cls")
    if checked not in _registered:
        _registered.append(checked)
    return cls


def checked_types(types: NormTypes | None, name: str = "norm_types") -> tuple[type[nn.Module], ...]:
    """The classes of an argument.

    Raises:
        ValueError: It holds something else.
    """
    found = () if types is None else (types,) if isinstance(types, type) or not isinstance(types, Sequence) else types
    for cls in found:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise ValueError(f"{name}: {cls!r} is not a class of torch.nn.Module")
    return tuple(found)


def is_norm(module: nn.Module, norm_types: tuple[type[nn.Module], ...] = ()) -> bool:
    """Whether ``module`` is a normalization layer.

    A module that ``torch.jit.script`` made keeps only the name of its class; it is looked up among the subclasses of
    the known types.

    Args:
        module: The module.
        norm_types: Types that count beside those that are known and registered.
    """
    types = (*NORM_TYPES, *_registered, *norm_types)
    original = getattr(module, "original_name", None)
    if isinstance(original, str):
        return original in _class_names(types)
    return isinstance(module, types) or any(_is_of_family(cls) for cls in type(module).__mro__)


def _class_names(types: Collection[type[nn.Module]]) -> set[str]:
    names: set[str] = set()
    todo = list(types)
    while todo:
        cls = todo.pop()
        names.add(cls.__name__)
        todo.extend(cls.__subclasses__())
    return names


def _is_of_family(cls: type) -> bool:
    names = _FAMILIES.get(cls.__module__.partition(".")[0])
    return names is not None and names.fullmatch(cls.__name__) is not None


def norm_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What a normalization layer owns: its parameters, or what ``torch.nn.utils.parametrize`` computes them from.

    Lists and dictionaries of parameters are modules, but are never called: what they hold is the layer's own.
    """
    owned = list(module.parameters(recurse=False))
    for child in module.children():
        if isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            owned += child.parameters()
    if is_parametrized(module):
        for original in module.parametrizations.children():  # type: ignore[union-attr]
            owned += original.parameters(recurse=False)
    return owned


def left_out(model: nn.Module, known: set[int]) -> list[str]:
    """Classes with "norm" in their name that own trainable parameters which are not among ``known`` ids."""
    found = {}
    for module in model.modules():
        cls = type_before_parametrizations(module)
        if "norm" not in cls.__name__.lower() or f"{cls.__module__}.{cls.__qualname__}" in _OTHERS:
            continue
        if any(p.requires_grad and id(p) not in known for p in norm_parameters(module)):
            found[cls] = cls.__name__
    return list(dict.fromkeys(found.values()))
