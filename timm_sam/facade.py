"""An optimizer that is another one's: groups, state, defaults and checkpoints are those of the base optimizer."""
import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_itself(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method that runs on the facade, also where it is called on a wrapper that imitates its class.

    The optimizers of Lightning and Fabric are instances of a class that has the facade's class among its bases: what
    its methods set would be set on the wrapper. Such wrappers have what they wrap as their ``optimizer``.

    Where ``torch.compile`` is called on a whole step of a loop, the method runs as it is, and the model inside compiled
    if it is: graphs do not hold what changes between the passes.
    """
    @torch.compiler.disable
    @functools.wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        inner = self.optimizer
        return method(inner if isinstance(inner, Facade) else self, *args, **kwargs)

    return call


class Facade(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` without parameters of its own.

    Learning-rate schedulers, GradScaler and checkpoints see the base optimizer through it. Subclasses define
    ``step``.

    Args:
        optimizer: The base optimizer.

    Raises:
        ValueError: It is no optimizer, or one that calls its closure itself (LBFGS), or a facade already.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, Facade):
            raise ValueError("optimizer: it is a SAM already; give SAM the base optimizer")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if isinstance(optimizer, torch.optim.LBFGS) or closure is not None and closure.default is closure.empty:
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} calls a closure several times per step, at weights of its own; "
                f"SAM gives one gradient per step, so use another one, as SGD or AdamW")
        # Optimizer.__init__ is not called: groups, state and defaults are the base optimizer's. This sets up the rest
        # (hooks, profiling names) as unpickling does.
        self.optimizer = optimizer
        super().__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's groups, also after its ``load_state_dict`` replaced the list."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of the base optimizer's parameters."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Registers it with the base optimizer, whose state it is; so do the three below."""
        return self.optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer. What is perturbed was fixed at construction and does not change."""
        self.optimizer.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        # schedule-free optimizers and Lookahead have two sets of weights; trainers ask whether these methods are there
        if name in ("train", "eval", "sync_lookahead") and "optimizer" in self.__dict__:
            return getattr(self.optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer's own leaves out all but groups, state and defaults. Schedulers put a step around the original's.
        return {name: value for name, value in self.__dict__.items() if name != "step"}
