"""What shows only when training begins: that SAM was built with something else than what is trained."""
import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .arguments import check_model, refuse_whole_graph
from .group import Group, in_group
from .sharded.units import SHARDED_LATE, units_of
from .split import WHOLE_GRAPHS_WORK

Selection = Sequence[tuple[str, nn.Parameter]]


class FirstUpdate:
    """Looks once, before the first perturbed update, at what may have changed since SAM was built.

    Nothing of it reads from the device.

    Args:
        optimizer: The base optimizer.
        model: The model.
        group: The ranks, as found when SAM was built.
        selected: What is perturbed.
        again: Selects once more.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, group: Group, selected: Selection,
                 again: Callable[[], Selection]) -> None:
        self._optimizer = optimizer
        self._model = model
        self._group = group
        self._selected = selected
        self._again = again
        self._looked = False

    def around(self) -> AbstractContextManager[None]:
        """Around the pass at w: as :meth:`look`, and what synchronizes gradients of the model must be known.

        Raises:
            ValueError: As there, or gradients at w are synchronized.
        """
        return nullcontext() if self._looked else self._around()

    @contextmanager
    def _around(self) -> Iterator[None]:
        self.look()
        self._looked = False  # until it is certain
        self._find_wrapped()
        yield
        self._find_wrapped()  # `replicate` wraps a model in its first forward
        dynamo = sys.modules.get("torch._dynamo.eval_frame")
        if not WHOLE_GRAPHS_WORK and dynamo is not None and _is_inside(self._selected[0][1], dynamo.OptimizedModule):
            refuse_whole_graph()
        self._looked = True

    def look(self) -> None:
        """The first call looks, the others do nothing.

        Raises:
            ValueError: What would be perturbed is not what is trained.

        Warns:
            UserWarning: Parameters are perturbed and never updated, or would be perturbed by now and are not.
        """
        if self._looked:
            return
        self._group.settle()
        if units_of(self._model) and not self._group.sharded:
            raise ValueError(SHARDED_LATE)
        check_model(self._model, Group(self._model))
        self._find_replaced()
        self._compare_with_optimizer()
        self._find_unfrozen()
        self._looked = True

    def _find_replaced(self) -> None:
        there = {id(p) for p in self._model.parameters()}
        gone = [name for name, p in self._selected if id(p) not in there]
        if gone:
            raise ValueError(
                f"model: {len(gone)} of {len(self._selected)} perturbed parameters ({_names(gone)}) are not in it any "
                f"more; replace layers before you build the optimizer and SAM")

    def _find_wrapped(self) -> None:
        p = self._selected[0][1]
        if self._group.ddp or not in_group() or not _is_inside(p, DistributedDataParallel):
            return
        gc.collect()  # one that nobody uses any more may wait to be collected
        if _is_inside(p, DistributedDataParallel):
            raise ValueError(
                "model: it is inside of a DistributedDataParallel that SAM does not know, which would synchronize the "
                "gradients at w; wrap the model first, then build SAM(optimizer, wrapped, ...), where wrapped is the "
                "DistributedDataParallel or what the trainer's prepare or setup returned")

    def _compare_with_optimizer(self) -> None:
        trained = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        if not any(id(p) in trained for p in self._model.parameters()):
            raise ValueError(
                "optimizer: it has none of the model's parameters; build it and SAM with the model that is trained")
        missing = [name for name, p in self._selected if id(p) not in trained]
        if missing:
            warnings.warn(
                f"{len(missing)} of {len(self._selected)} perturbed parameters ({_names(missing)}) are not in the "
                f"optimizer and never updated: give them to it, or freeze them before SAM is built", stacklevel=2)

    def _find_unfrozen(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of was said when SAM was built
            now = self._again()
        known = {id(p) for _, p in self._selected}
        new = [name for name, p in now if id(p) not in known]
        if new:
            warnings.warn(
                f"{len(new)} parameters ({_names(new)}) were frozen or not in the model when SAM was built, and are "
                f"not perturbed: build SAM after that", stacklevel=2)


def _is_inside(p: nn.Parameter, kind: type[nn.Module]) -> bool:
    """Whether a parameter is in a module of a class, of all of this process; wherever a trainer may keep it."""
    return any(issubclass(type(o), kind) and any(q is p for q in o.parameters()) for o in gc.get_objects())


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
