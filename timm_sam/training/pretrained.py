"""Whether a file that a model starts from has all of its weights: timm takes what fits, and leaves the rest random."""
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timm.models import load_checkpoint
from torch import nn

from ..cli.errors import OptionError
from ..runs.checkpoints import NotWhole, check_records, weights_of, why_unreadable

_logger = logging.getLogger(__name__)

_NOT_OF_TORCH = (".safetensors", ".npz", ".npy")
# Share of the weights that a file may lack: what --gp, --in-chans or --model-kwargs add to a model is less (a norm
# behind the pooling, layer scale, a stem, an attention pool), what another depth or width adds is more.
_MOST_MISSING = 0.1


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


def check_whole(path: str) -> None:
    """Refuses a damaged file, whose weights timm would take as they are.

    Args:
        path: Of ``--pretrained-path``.

    Raises:
        OptionError: It is damaged.
    """
    if _is_of_torch(path):
        try:
            check_records(path)
        except NotWhole as e:
            raise OptionError(f"--pretrained-path {path} is not whole: {e}; give a whole checkpoint") from e
        except OSError:  # what timm says of it is told where the model is made
            return


def _is_of_torch(path: str) -> bool:
    return os.path.splitext(path)[1].lower() not in _NOT_OF_TORCH


def check_pretrained(path: str, name: str, model: nn.Module, loaded: list[Any], verbose: bool) -> None:
    """Refuses a file of another architecture, and warns of the weights that one of this architecture lacks.

    Args:
        path: Of ``--pretrained-path``.
        name: The model's.
        model: It was made with the file.
        loaded: Of :func:`loaded_keys`.
        verbose: Whether to warn.

    Raises:
        OptionError: The file lacks more weights, beside those of the classifier, than options add to a model.
    """
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    missing = [key for result in loaded[-1:] for key in result.missing_keys
               if not any(key == head or key.startswith(f"{head}.") for head in heads)]
    if not missing:
        return
    sizes = {key: tensor.numel() for key, tensor in model.state_dict().items()}
    named = f"{', '.join(missing[:2])}{', ...' if len(missing) > 2 else ''}"
    if sum(sizes.get(key, 0) for key in missing) > _MOST_MISSING * sum(sizes.values()):
        raise OptionError(
            f"--pretrained-path {path} is not of --model {name}: {len(missing)} of its weights are not there ({named}) "
            f"and would be random; give a file of this model, or leave it out")
    if verbose:
        _logger.warning(f"--pretrained-path {path} lacks {len(missing)} of the weights of {name} ({named}), which "
                        f"begin as in a new model.")


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
        if _is_of_torch(path):
            model.load_state_dict(weights_of(path, ema=True)[0])
        else:
            load_checkpoint(model, path)
    except NotWhole as e:
        raise OptionError(f"--initial-checkpoint {path} is not whole: {e}; give a whole checkpoint of {name}") from e
    except Exception as e:  # foreign files hold anything
        raise OptionError(f"--initial-checkpoint {path} cannot be loaded into {name}: {why_unreadable(e)}; give a "
                          f"checkpoint of this model") from e
