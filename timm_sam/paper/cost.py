"""What runs cost: FLOPs, counted on tensors that have shapes and no numbers."""
import argparse
import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from timm.layers import set_fast_norm
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..cli.device import Process
from ..cli.errors import OptionError
from ..selection import select_parameters
from ..training import factory
from ..training.options import build_train_parser, read_args
from ..training.schedule import planned_epochs
from .exhibits import Config, Evaluation
from .plan import Plan

_BATCH = 2  # of which FLOPs are counted; BatchNorm wants more than one image
_SIDE = 224  # of images, where a recipe has the model's own


@dataclass
class Costs:
    """FLOPs of runs and evaluations; every network is counted once.

    Attributes:
        plan: Whose recipes.
    """

    plan: Plan
    _counted: dict[object, float] = field(default_factory=dict)

    def run(self, config: Config) -> float | None:
        """FLOPs of a run: forward and backward of every image, and once more what gives eps where that is perturbed.

        That is a forward and the gradient of what is selected. What a method adds or saves is left out, and so is what
        both passes share.

        Returns:
            The count; None where train.py has no such flags.
        """
        args = self._args(config)
        if args is None:
            return None
        each = self._count(args, None)
        if args.sam_variant is not None:
            each += self._count(args, (args.sam_params, args.sam_filter))
        return each * (config.data.train // args.batch_size * args.batch_size) * planned_epochs(args)

    def evaluation(self, config: Config, evaluation: Evaluation) -> float:
        """FLOPs of an evaluation of one run, at most."""
        args = self._args(config)
        return 0.0 if args is None or not evaluation.passes else evaluation.passes * self._count(args, None)

    def _args(self, config: Config) -> argparse.Namespace | None:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a flag that there is not: the caller says so
                return self._read(config)
        except (OptionError, SystemExit):
            return None

    def _read(self, config: Config) -> argparse.Namespace:
        rho = ["--sam-rho", "1"] if config.needs else []
        return read_args(build_train_parser(), [*self.plan.recipe(config), *rho])

    def _count(self, args: argparse.Namespace, selection: tuple[str, str | None] | None) -> float:
        """FLOPs of forward and backward of one image; None selects all parameters."""
        network = (args.model, str(args.model_kwargs), args.num_classes, args.img_size)
        if (network, selection) not in self._counted:
            self._counted[network, selection] = _count(args, selection)
        return self._counted[network, selection]


def _count(args: argparse.Namespace, selection: tuple[str, str | None] | None) -> float:
    side = args.img_size or _SIDE
    args = argparse.Namespace(**{**vars(args), "pretrained": False})
    set_fast_norm(False)  # it asks for autocast, which meta tensors have not
    with torch.device("meta"):
        network = factory.build_model(args, Process(torch.device("cpu"))).train()
        images, target = torch.empty(_BATCH, 3, side, side), torch.zeros(_BATCH, dtype=torch.long)
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.__dict__["fused_attn"] = False  # the fused one is not counted everywhere
    wanted: Iterable[nn.Parameter] = network.parameters() if selection is None else (
        parameter for _, parameter in select_parameters(network, *selection))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(F.cross_entropy(network(images), target), list(wanted), allow_unused=True)
    return counter.get_total_flops() / _BATCH
