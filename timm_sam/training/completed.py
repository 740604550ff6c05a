"""What the options say without saying it: older flags under their new names, defaults that depend on other options.

As in timm's script, the completed values are what ``args.yaml`` records.
"""
import argparse

from ..cli.errors import OptionError
from ..cli.tasks import EVALUATORS, is_multilabel


def complete(args: argparse.Namespace) -> list[str]:
    """Completes the options in place, before anything checks or reads them.

    Returns:
        What to warn of: one line per deprecated option that was given.

    Raises:
        OptionError: An older flag and its newer one say different things.
    """
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    warnings = _older_flags(args)
    if args.smoothing is None:
        args.smoothing = 0.0 if is_multilabel(args) else 0.1
    if args.decay_epochs is None:
        args.decay_epochs = 0.2 if args.sched in ("wsd", "rsqrt") else 90.0
    if args.eval_metric is None:
        args.eval_metric = EVALUATORS[args.task].default_metric
    return warnings


def _older_flags(args: argparse.Namespace) -> list[str]:
    warnings = []
    for older, given, loss in (("--bce-loss", args.bce_loss, "bce"), ("--jsd-loss", args.jsd_loss, "jsd")):
        if given:
            warnings.append(f"{older} is deprecated: use --loss {loss}")
            if args.loss not in (None, loss):
                raise OptionError(f"{older} and --loss {args.loss} say different things: leave {older} out")
            args.loss = loss
    if args.bce_pos_weight is not None:
        warnings.append("--bce-pos-weight is deprecated: use --loss-pos-weight")
        weight = str(args.bce_pos_weight)
        if args.loss_pos_weight not in (None, weight):
            raise OptionError(f"--bce-pos-weight {weight} and --loss-pos-weight {args.loss_pos_weight} say different "
                              f"things: leave --bce-pos-weight out")
        args.loss_pos_weight = weight
    return warnings
