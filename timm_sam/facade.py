"""An optimizer that is another one's: groups, state, defaults and checkpoints are those of the base optimizer."""
from typing import Any

import torch


class Facade(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` without parameters of its own.

    Learning-rate schedulers, GradScaler and checkpoints see the base optimizer through it. Subclasses define
    ``step``.

    Args:
        optimizer: The base optimizer.

    Raises:
        ValueError: It is no optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer. What is perturbed was fixed at construction and does not change."""
        self.optimizer.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer's own leaves out all but groups, state and defaults. Schedulers put a step around the original's.
        return {name: value for name, value in self.__dict__.items() if name != "step"}
