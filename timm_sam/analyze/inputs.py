"""What every analysis looks at before it begins: its folder, and the weights."""
import argparse
import os
from collections.abc import Sequence

from ..cli.errors import OptionError
from ..evaluation import results
from ..evaluation.subject import Subject


def prepare(args: argparse.Namespace, files: Sequence[str]) -> None:
    """Makes ``args.out``, and looks whether files in it can be written.

    Raises:
        OptionError: One cannot be, or is there and may be neither replaced nor gone on with.
    """
    origin = f"--out {args.out}"
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as e:
        raise OptionError(f"{origin} cannot be made ({e.strerror}): name another folder") from None
    results.refuse_special(files, origin)
    if not (args.overwrite or args.skip_existing):
        results.refuse_existing(files, origin)


def check_finite(subject: Subject) -> None:
    """Looks at all parameters and buffers.

    Raises:
        OptionError: A number is NaN or infinite.
    """
    for name, tensor in subject.model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise OptionError(f"--checkpoint {subject.checkpoint or subject.name}: {name} holds NaN or infinite "
                              f"numbers, of which nothing can be said; give another checkpoint")


def labels_of(args: argparse.Namespace, names: Sequence[str]) -> Sequence[str]:
    """What each checkpoint counts to: ``--labels``, or its own short name.

    Raises:
        OptionError: Copies among the checkpoints were left out, so that there are more labels.
    """
    if args.labels and len(args.labels) != len(names):
        raise OptionError(
            f"--labels: {len(args.labels)} names for {len(names)} different checkpoints; give one for each")
    return args.labels or names
