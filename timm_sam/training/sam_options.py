"""``--sam-*``: the flags, their checks, and SAM built from them.

Methods bring their flags along: each argument of a constructor in ``timm_sam.methods`` is one, but for those that the
run itself knows.
"""
import argparse
import inspect
import logging
import re
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..arguments import check_variant
from ..cli.device import Process
from ..cli.errors import OptionError
from ..cli.parser import epoch, fraction, non_negative, positive_int
from ..cli.rules import flag
from ..methods import METHODS, Method
from ..methods.stages import Stages, merged, when
from ..passes import BN_STATS
from ..perturbation import VARIANTS
from ..sam import SAM
from ..selection import SELECTIONS
from ..sharing import ruled_out
from .losses import whole_batch_only
from .plain import Plain, Update
from .schedule import planned_epochs

_logger = logging.getLogger(__name__)

# what a method's constructor may ask for that is no flag: train.py knows it
_OF_THE_RUN = ("lr_max", "lr_min", "total_updates", "total_epochs")
_UPDATES = 10 ** 6  # of an epoch, as long as nobody knows the data


@dataclass(frozen=True)
class _Parameter:
    """An argument of a method as a flag."""

    method: str
    name: str
    convert: Callable[[str], Any]
    default: Any
    required: bool
    help: str

    @property
    def dest(self) -> str:
        return f"sam_{self.method}_{self.name}"

    @property
    def flag(self) -> str:
        return flag(self.dest)

    @property
    def begun(self) -> str:
        """The help as the beginning of a line."""
        return f"{self.help[:1].lower()}{self.help[1:].rstrip('.')}"


def _parameters(method: str, constructor: Callable[..., Method]) -> dict[str, _Parameter]:
    """The arguments of a method that are flags; their help is what the constructor's docstring says of them."""
    documented = dict(re.findall(r"^    +(\w+): (.+(?:\n {12,}.+)*)", inspect.getdoc(constructor) or "", re.MULTILINE))
    found = {}
    for name, argument in inspect.signature(constructor).parameters.items():
        if name not in _OF_THE_RUN:
            kinds = [kind for kind in typing.get_args(argument.annotation) or (argument.annotation,)
                     if kind is not type(None)]
            required = argument.default is inspect.Parameter.empty
            convert = kinds[0] if len(kinds) == 1 else str
            found[name] = _Parameter(method, name, convert,
                                     None if required else argument.default, required,
                                     " ".join(documented[name].split()))
    return found


_PARAMETERS = {name: _parameters(name, constructor) for name, constructor in METHODS.items()}


_UNSET = object()


def add_sam_flags(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Adds the group ``SAM``. Without ``--sam-variant`` training is timm's own.

    Args:
        parser: Of a command.
        without: Flags that the command does not have.
    """
    group = parser.add_argument_group("SAM")

    def add(name: str, **kwargs: Any) -> None:
        if name not in without:
            group.add_argument(name, **kwargs)

    add("--sam-variant", choices=tuple(VARIANTS), default=None,
        help="perturbation of Table 9 of the SAM-ON paper; none: plain training")
    add("--sam-rho", type=non_negative, default=None, metavar="RHO",
        help="radius of the perturbation; required with --sam-variant")
    add("--sam-params", choices=SELECTIONS, default="onlynorm",
        help="what is perturbed: the normalization layers (SAM-ON), all parameters (SAM), or all but those")
    add("--sam-filter", default=None, metavar="REGEX",
        help="perturb only parameters in whose name this is found, such as 'layer4'")
    add("--sam-eta", type=non_negative, default=None, metavar="ETA",
        help="eta of Table 9; none: the variant's own (elementwise_l2_orig 0.01, fisher 1, other elementwise 0)")
    add("--sam-bn-stats", choices=BN_STATS, default="clean",
        help="which passes update running statistics: the one at w only, or both")
    add("--sam-m", type=positive_int, default=None, metavar="M",
        help="samples that share one perturbation: each rank's batch is taken in chunks of M; none: the whole of it")
    add("--sam-sync", action="store_true",
        help="average the gradient that gives eps over all ranks, so that they share one perturbation")
    add("--sam-ascent-fraction", type=fraction, default=1.0, metavar="F",
        help="take the gradient that gives eps from the first F of each batch only")
    add("--sam-no-shared-forward", action="store_true",
        help="compute both forward passes in full, also below the first perturbed layer")
    add("--sam-every", type=positive_int, default=1, metavar="K",
        help="perturb every K-th update, starting with the first; the others are plain")
    add("--sam-start-epoch", type=epoch, default=0, metavar="N", help="first epoch with SAM")
    add("--sam-end-epoch", type=epoch, default=None, metavar="N", help="first epoch without SAM again; none: never")
    add("--sam-method", nargs="+", choices=tuple(METHODS), default=None, metavar="NAME",
        help=f"methods that change how an update is made: {', '.join(METHODS)}; none: SAM itself")
    for name, parameters in _PARAMETERS.items():
        for parameter in parameters.values():
            kind: dict[str, Any] = dict(type=parameter.convert, metavar="X")
            if parameter.convert is bool:
                kind = dict(action=argparse.BooleanOptionalAction)
            said = f"with --sam-method {name}"
            add(parameter.flag, **kind, default=None,
                help=f"{parameter.begun} (required {said})" if parameter.required else
                f"{parameter.begun} (default {said}: {parameter.default})")


def parse_noting(parser: argparse.ArgumentParser, argv: Sequence[str] | None,
                 others: Collection[str] = ()) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line.

    Args:
        parser: Of the command.
        argv: Its arguments; None: those of the process.
        others: Names of further options to note.

    Returns:
        All options, and the names of those that stand on the command line, whatever their value: of the SAM options
        and the others.

    Raises:
        SystemExit: With code 2, for what the parser refuses.
    """
    # what the command line leaves out keeps the mark, so that a flag given with its default value is noticed too
    dests = [a.dest for a in parser._actions if a.dest.startswith("sam_") or a.dest in others]
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(dests, _UNSET)))
    given = [dest for dest in dests if getattr(args, dest) is not _UNSET]
    for dest in dests:
        if dest not in given:
            setattr(args, dest, parser.get_default(dest))
    return args, given


def _defaults() -> dict[str, Any]:
    parser = argparse.ArgumentParser(add_help=False)
    add_sam_flags(parser)
    return {action.dest: action.default for action in parser._actions}


def check_sam(args: argparse.Namespace, given: Sequence[str] = ()) -> None:
    """Checks the SAM group.

    Args:
        args: All options.
        given: Names of the SAM options that stand on the command line, whatever their value.

    Raises:
        OptionError: Options that contradict each other.
    """
    if args.sam_variant is None:
        for dest, default in _defaults().items():
            value = getattr(args, dest)
            if dest in given or value != default:
                shown = " ".join(value) if isinstance(value, list) else value
                raise OptionError(
                    f"{flag(dest)} {shown} has no effect without --sam-variant: add --sam-variant sam, or leave "
                    f"{flag(dest)} out")
        return
    if args.sam_rho is None:
        raise OptionError(
            f"--sam-variant {args.sam_variant} needs --sam-rho: add --sam-rho RHO, a number >= 0 (the recipes "
            f"for -c have the values of the paper)")
    if args.sam_eta is not None and VARIANTS[args.sam_variant].eta is None:
        raise OptionError(f"--sam-eta {args.sam_eta}: --sam-variant {args.sam_variant} has no eta; leave it out")
    if args.sam_end_epoch is not None and args.sam_end_epoch <= args.sam_start_epoch:
        raise OptionError(
            f"--sam-end-epoch {args.sam_end_epoch} is not after --sam-start-epoch {args.sam_start_epoch}: raise it, or "
            f"leave it out")
    if args.sam_start_epoch and args.sam_start_epoch >= (epochs := planned_epochs(args)):
        raise OptionError(f"--sam-start-epoch {args.sam_start_epoch} is not before the end of training, which has "
                          f"{epochs} epochs: no update would be perturbed; lower it, or raise --epochs")
    _check_methods(args)


def _check_methods(args: argparse.Namespace) -> None:
    names = args.sam_method or []
    for method, parameters in _PARAMETERS.items():
        for parameter in parameters.values():
            value = getattr(args, parameter.dest)
            if method not in names and value is not None:
                raise OptionError(f"{parameter.flag} {value} has no effect without --sam-method {method}: add it, or "
                                  f"leave {parameter.flag} out")
            if method in names and value is None and parameter.required:
                raise OptionError(f"--sam-method {method} needs {parameter.flag}: add {parameter.flag} X, "
                                  f"{parameter.begun}")
    if len(set(names)) < len(names):
        raise OptionError(f"--sam-method {' '.join(names)} names a method twice: leave one out")
    methods = _in_flags(lambda: merged_methods(args))
    epochs = planned_epochs(args)
    for name, method in zip(names, methods):
        timing = method.timing
        begins = timing.epoch or timing.update / _UPDATES or (_first_epoch(args, methods) if timing.after_warmup else 0)
        if begins >= epochs:
            raise OptionError(f"--sam-method {name}: it begins with epoch {begins:g}, which is not before the end of "
                              f"training, which has {epochs} epochs; let it begin earlier, or raise --epochs")
        if args.sam_end_epoch is not None and begins >= args.sam_end_epoch:
            raise OptionError(f"--sam-end-epoch {args.sam_end_epoch} is not after the beginning of --sam-method {name}"
                              f", epoch {begins:g}: raise it, or leave it out")
    stages = merged(methods)
    _in_flags(lambda: check_variant(stages, " and ".join(method.name for method in methods), args.sam_variant))
    if stages.radius is not None:
        radius = stages.radius
        _in_flags(lambda: radius.bind(args.sam_rho, []))  # the learning rates of these methods are given
    if args.sam_ascent_fraction < 1 and (stages.whole_batch or stages.ahead is not None):
        why = "has no pass at w" if stages.ahead is not None else "needs the gradient of the whole batch"
        raise OptionError(f"--sam-ascent-fraction {args.sam_ascent_fraction}: --sam-method {' '.join(names)} {why}; "
                          f"leave one of the two out")
    _check_samples(args, stages)
    if args.sam_sync and stages.ahead is not None:
        raise OptionError(f"--sam-sync has no effect with --sam-method {' '.join(names)}, whose perturbation is the "
                          f"same on all ranks; leave it out")


def _first_epoch(args: argparse.Namespace, methods: Sequence[Method]) -> int:
    """--sam-start-epoch, or without one the end of the warm-up, if a method asks for that and none decides itself."""
    chosen = args.sam_start_epoch or any(method.timing.epoch or method.timing.update for method in methods)
    if not chosen and any(method.timing.after_warmup for method in methods):
        return args.warmup_epochs
    return args.sam_start_epoch


def _check_samples(args: argparse.Namespace, stages: Stages) -> None:
    """Methods that choose samples need the loss of each; those that ask for some, one at a time, have to get them."""
    names = " ".join(args.sam_method or ())
    for option in whole_batch_only(args):
        if stages.rows is not None:
            raise _in_flags_of(stages.rows.all_by, args, f"{option} gives no loss of single samples, which "
                               f"--sam-method {names} chooses by; leave one of the two out, or take all samples by ")
        if stages.mask is not None and stages.mask.samples and not option.startswith("--loss"):
            raise OptionError(f"{option} gives no single samples with a label, which --sam-method {names} asks for; "
                              f"leave one of the two out")
    if stages.mask is not None and stages.mask.samples and args.train_img_sizes is not None:
        raise OptionError(f"--train-img-sizes gives no single samples, which --sam-method {names} asks for; leave one "
                          f"of the two out")


def _in_flags_of(argument: str, args: argparse.Namespace, message: str) -> OptionError:
    """An error that ends with an argument of one of the methods, ``name=value``, as its flag."""
    name, value = argument.split("=")
    owner = next(_PARAMETERS[method][name] for method in args.sam_method if name in _PARAMETERS[method])
    return OptionError(f"{message}{owner.flag} {value}")


def _methods(args: argparse.Namespace, of_the_run: dict[str, Any]) -> list[Method]:
    methods = []
    for name in args.sam_method or ():
        given = {p.name: getattr(args, p.dest) for p in _PARAMETERS[name].values()}
        known = {key: value for key, value in of_the_run.items()
                 if key in inspect.signature(METHODS[name]).parameters}
        methods.append(METHODS[name](**{key: value for key, value in given.items() if value is not None}, **known))
    return methods


def merged_methods(args: argparse.Namespace) -> list[Method]:
    """The methods as they can be built before the run is known, once it is seen that they go together."""
    epochs = planned_epochs(args)
    methods = _methods(args, dict(lr_max=1.0, lr_min=0.0, total_updates=_UPDATES * epochs, total_epochs=epochs))
    merged(methods)
    when(methods, args.sam_every, args.sam_start_epoch)
    return methods


def shares_forward(args: argparse.Namespace) -> bool:
    """Whether the passes of SAM, if it is on, share the forward below the first perturbed layer."""
    if args.sam_variant is None:
        return False
    stages = merged(merged_methods(args))
    return ruled_out(
        share_forward=not args.sam_no_shared_forward, bn_stats=args.sam_bn_stats,
        full_ascent=stages.full_ascent or stages.rows is not None, one_pass=stages.ahead is not None,
        whole_batch=args.sam_ascent_fraction == 1) is None


def create_update(args: argparse.Namespace, process: Process, optimizer: torch.optim.Optimizer, module: nn.Module,
                  lr: float, total_updates: int, total_epochs: int) -> Update:
    """SAM around the optimizer, or the plain update without --sam-variant.

    Args:
        args: All options.
        process: This one.
        optimizer: The base optimizer.
        module: What is trained, inside of DDP where there is one.
        lr: The highest learning rate of the schedule.
        total_updates, total_epochs: Length of the run.

    Raises:
        OptionError: Nothing is selected, or the optimizer cannot be wrapped.
    """
    if args.sam_variant is None:
        return Plain(optimizer, module)
    of_the_run = dict(lr_max=lr, lr_min=args.min_lr, total_updates=total_updates, total_epochs=total_epochs)
    methods = _in_flags(lambda: _methods(args, of_the_run))
    start = _first_epoch(args, methods)
    if start != args.sam_start_epoch and process.primary:
        _logger.info(f"SAM begins after the warm-up, with epoch {start}; --sam-start-epoch sets another")
    sam = _in_flags(lambda: SAM(
        optimizer, module, variant=args.sam_variant, params=args.sam_params, rho=args.sam_rho, eta=args.sam_eta,
        filter=args.sam_filter, bn_stats=args.sam_bn_stats, share_forward=not args.sam_no_shared_forward,
        sync=args.sam_sync, method=methods, every=args.sam_every, start=start,
        end=args.sam_end_epoch, seed=args.seed))
    if process.primary:
        _logger.info(f"SAM {sam.describe()}")
        for method in methods:
            if method.note:
                _logger.info(f"SAM method {method.name}: {method.note}")
    return sam


def _in_flags(build: Callable[[], Any]) -> Any:
    """Does it, with the flags where an error names arguments.

    Raises:
        OptionError: An argument is out of range.
    """
    try:
        return build()
    except ValueError as e:
        raise OptionError(_with_flags(str(e))) from e


_FLAG_OF = {"start": "sam_start_epoch", "end": "sam_end_epoch", "lr_max": "lr", "lr_min": "min_lr"}
_ARGUMENTS = (inspect.signature(SAM).parameters.keys() | _FLAG_OF.keys()) - {"optimizer", "model"}


def _with_flags(message: str) -> str:
    """An error of the plugin with its arguments' flags; what stands in brackets behind a method's name is its own."""
    own, found, rest = message.partition(": ")
    parameters = _PARAMETERS.get(own, {}) if found else {}

    def as_flag(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in parameters:
            return f"{parameters[name].flag} "
        return f"{flag(_FLAG_OF.get(name, f'sam_{name}'))} " if name in _ARGUMENTS else match.group(0)

    text = re.sub(r"\w+\([^()]*\)|\b([a-z_]+)=", as_flag, rest if own in _PARAMETERS else message)
    if own in _PARAMETERS and not text.startswith("--"):
        text = f"--sam-method {own}: {text}"
    return re.sub(r"^(model|method|optimizer): ", lambda m: "--sam-method: " if m[1] == "method" else m[0], text)
