"""The part of train.py's command line that says what is minimized: the loss, its weights, its parameters."""
import argparse
from collections.abc import Callable
from typing import Any

from timm.loss import LOSS_TYPES


def add_loss(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Loss").add_argument
    add("--loss", type=str, choices=LOSS_TYPES,
        help="jsd needs --aug-splits; twoway, zlpr and db need --task multilabel, db --class-stats too; None: ce, or "
             "bce with --task multilabel")
    add("--smoothing", type=float, metavar="X",
        help="label smoothing, the share of the target spread over all classes, or with --task multilabel moved "
             "towards 0.5: 0 for none, below 1; None: 0.1, or 0 with --task multilabel")
    add("--bce-sum", action="store_true",
        help="bce: sum over classes and average over images, rather than average over both")
    add("--bce-target-thresh", type=float, metavar="X",
        help="bce: targets above this become 1, all others 0; None keeps them soft")
    _add_weights(add)
    add("--asl-gamma-pos", type=float, metavar="G", default=1.0, help="asl: focusing exponent of positive targets")
    add("--asl-gamma-neg", type=float, metavar="G", default=4.0, help="asl: focusing exponent of negative targets")
    add("--asl-clip", type=float, metavar="P", default=0.05,
        help="asl with --task multilabel: probability by which negatives are shifted; 0 for none")
    add("--asl-reduction", type=str, choices=("batchmean", "sum", "mean"), default="batchmean",
        help="asl with --task multilabel: sum over classes and mean over images, sum over both, or mean over both")
    add("--poly-epsilon", type=float, metavar="X", default=2.0,
        help="poly: coefficient of the first polynomial term; 0 is ce or bce")
    add("--poly-gamma", type=float, metavar="G", default=0.0,
        help="poly with --task multilabel: focusing exponent; 0 for none")
    add("--poly-alpha", type=float, metavar="X",
        help="poly with --task multilabel: weight of positive targets, negatives get the rest of 1; None for none")
    add("--twoway-tp", type=float, metavar="T", default=4.0, help="twoway: temperature of positive logits")
    add("--twoway-tn", type=float, metavar="T", default=1.0, help="twoway: temperature of negative logits")
    add("--db-neg-scale", type=float, metavar="X", default=2.0,
        help="db: scale of negative logits in the tolerant regularization; 1 for none")
    add("--db-init-bias", type=float, metavar="X", default=0.05,
        help="db: factor of the shift of logits by each class's frequency; 0 for none")
    add("--db-focal-gamma", type=float, metavar="G", default=2.0, help="db: focusing exponent; 0 for none")
    add("--jsd-loss", action="store_true", help="deprecated: --loss jsd")
    add("--bce-loss", action="store_true", help="deprecated: --loss bce")
    add("--bce-pos-weight", type=float, metavar="X", help="deprecated: --loss-pos-weight")


def _add_weights(add: Callable[..., Any]) -> None:
    add("--class-stats", type=str, metavar="FILE",
        help="JSON file with pos_counts (images of each class) and num_samples of the training split, as timm's "
             "class_weights.py writes it; for db, and for weights by a method")
    add("--loss-pos-weight", type=str, metavar="WEIGHTS",
        help="bce, and asl with --task multilabel: weight of positive targets; a number, one per class with commas "
             "between, a file of them, or neg_pos (negatives per positive, from --class-stats)")
    add("--loss-class-weight", type=str, metavar="WEIGHTS",
        help="bce, and asl with --task multilabel: weight of each class, given in the same ways, or inv_freq or "
             "effective_num (from --class-stats)")
    add("--loss-weight-power", type=float, metavar="X", default=1.0,
        help="exponent of neg_pos and inv_freq; 0.5 takes the root")
    add("--loss-weight-beta", type=float, metavar="X", default=0.999, help="beta of effective_num, between 0 and 1")
    add("--loss-weight-max", type=float, metavar="X",
        help="largest weight that is taken from --class-stats; None for no limit")
