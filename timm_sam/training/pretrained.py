"""Whether a file that a model starts from has all of its weights: timm takes what fits, and leaves the rest random."""
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timm.models import load_checkpoint
from torch import nn

from ..cli.errors import OptionError
from ..runs.checkpoints import NotWhole, weights_of, why_unreadable

_NOT_OF_TORCH = (".safetensors", ".npz", ".npy")


@contextmanager
def loaded_keys() -> Iterator[list[Any]]:
    """Notes what each ``load_state_dict`` inside reports, in the order of their ends."""
    found: list[Any] = []
    real = nn.Module.load_state_dict

    def load(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        found.append(result)
        return result

    setattr(nn.Module, "load_state_dict", load)  # noqa: B010 mypy refuses an assignment to a method
    try:
        yield found
    finally:
        setattr(nn.Module, "load_state_dict", real)  # noqa: B010


def check_pretrained(path: str, name: str, model: nn.Module, loaded: list[Any]) -> None:
    """Refuses a file of another architecture.

    Args:
        path: Of ``--pretrained-path``.
        name: The model's.
        model: It was made with the file.
        loaded: Of :func:`loaded_keys`.

    Raises:
        OptionError: The file has not all weights but those of the classifier.
    """
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    missing = [key for result in loaded[-1:] for key in result.missing_keys
               if not any(key == head or key.startswith(f"{head}.") for head in heads)]
    if missing:
        raise OptionError(
            f"--pretrained-path {path} is not of --model {name}: {len(missing)} of its weights are not there "
            f"({', '.join(missing[:2])}{', ...' if len(missing) > 2 else ''}) and would be random; give a file of "
            f"this model, or leave it out")


def load_initial(path: str, name: str, model: nn.Module) -> None:
    """Loads all weights of a model, averaged ones if the file has some, as timm does; Lightning's names are understood.

    Args:
        path: Of ``--initial-checkpoint``.
        name: The model's.
        model: Takes them.

    Raises:
        OptionError: The file is damaged, or not of this model.
    """
    try:
        if os.path.splitext(path)[1].lower() in _NOT_OF_TORCH:
            load_checkpoint(model, path)
        else:
            model.load_state_dict(weights_of(path, ema=True)[0])
    except NotWhole as e:
        raise OptionError(f"--initial-checkpoint {path} is not whole: {e}; give a whole checkpoint of {name}") from e
    except Exception as e:  # foreign files hold anything
        raise OptionError(f"--initial-checkpoint {path} cannot be loaded into {name}: {why_unreadable(e)}; give a "
                          f"checkpoint of this model") from e
