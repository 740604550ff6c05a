"""Which options make two trainings different ones."""
import os
from collections.abc import Mapping
from typing import Any

# Options in which two runs may differ without being another experiment, and why.
NOT_COMPARED = {
    "seed": "what means are over",
    "output": "where the run was written",
    "experiment": "its name",
    "config": "what it set is in the other options",
    "resume": "the same run, gone on with",
    "data": "an older name of data_dir, which holds it too",
    "local_rank": "ignored by train.py",
    "device": "the same training elsewhere; times are compared by timing.csv's device",
    "device_modules": "likewise",
    "workers": "who decodes the images",
    "pin_mem": "how batches are copied",
    "dataset_download": "how the data came here",
    "log_interval": "logging",
    "log_wandb": "logging",
    "wandb_project": "logging",
    "wandb_tags": "logging",
    "wandb_resume_id": "logging",
    "log_tensorboard": "logging",
    "log_trackio": "logging",
    "trackio_project": "logging",
    "save_images": "logging",
    "recovery_interval": "checkpoints",
    "checkpoint_hist": "checkpoints",
    "save_epochs": "checkpoints",
    "allow_nonfinite": "when a run ends",
}
_FILES = ("initial_checkpoint", "pretrained_path", "class_map")
# Options that timm or older versions do not know, and what they did instead.
SINCE = {
    "sam_variant": None,
    "sam_method": None,
    "holdout": None,
    "norm_params": None,
    "norm_drop": 0.0,
    "wd_params": "timm",
}


def normal(value: Any) -> Any:
    """1 and 1.0, a tuple and a list are the same option."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [normal(v) for v in value]
    if isinstance(value, dict):
        return {str(k): normal(v) for k, v in value.items()}
    return value


def data_name(data_dir: str | None) -> str:
    """The same data may lie elsewhere on another machine; another data set has another name."""
    return os.path.basename(os.path.normpath(str(data_dir or "")))


def data_dir_of(args: Mapping[str, Any]) -> Any:
    """The folder of the data set, as a run's options name it: timm's script leaves it in ``data`` where it was given
    without a flag."""
    return args.get("data_dir") or args.get("data")


def placeless(name: str, value: Any) -> Any:
    """What is compared of an option: of a path only what is called the same on every machine.

    That is the name of a data set's folder, and of a file its own name and that of its folder.
    """
    if name == "data_dir":
        return data_name(value)
    if name in _FILES and isinstance(value, str) and value:
        return "/".join(os.path.normpath(value).split(os.sep)[-2:])
    return value


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the options that make ``now`` another training than ``before``, seeds included.

    Of options that ``before`` does not name (it may be timm's, or older), those count that changed what was done
    without them.
    """
    changed = []
    for name, value in now.items():
        if name in NOT_COMPARED and name != "seed" or name not in before and name not in SINCE:
            continue
        old = data_dir_of(before) if name == "data_dir" else before.get(name, SINCE.get(name))
        if normal(placeless(name, old)) != normal(placeless(name, value)):
            changed.append(name)
    return changed
