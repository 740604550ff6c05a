"""What a run's ``args.yaml`` says of the model and its images, for what the command line leaves open."""
import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cli.errors import OptionError
from ..cli.parser import read_yaml, yaml_value
from ..cli.rules import flag
from ..runs import files

# what a run's options say of the model and its images, and an evaluation has as flags too
OF_A_RUN = ("model", "num_classes", "in_chans", "img_size", "input_size", "mean", "std", "interpolation", "crop_pct",
            "gp", "fast_norm", "class_map", "input_img_mode", "model_kwargs", "naflex_loader", "naflex_max_seq_len",
            "task", "target_format", "multilabel_threshold")
# the same of its data set: of no use for one of another kind, and suites know their files by themselves
OF_ITS_DATA = ("input_key", "target_key")
# flags of train.py only, but part of what the model computes and which images it takes: for its constructor
OF_ITS_MODEL = ("bn_eps", "pretrained_cfg_overlay")
# of the overlay; the rest says where weights come from
_OF_THE_OVERLAY = ("num_classes", "input_size", "test_input_size", "fixed_input_size", "pool_size", "interpolation",
                   "crop_pct", "test_crop_pct", "crop_mode", "mean", "std")
# How train.py validates, which has no flag there: at the size and crop of training, where many a model has others for
# tests.
AS_VALIDATED = {"use_train_size": True}


@dataclass(frozen=True)
class FromRun:
    """What is taken from the runs that wrote the checkpoints.

    Attributes:
        path: The ``args.yaml``; None: there is none, and nothing is taken.
        values: Option -> value, of ``OF_A_RUN``, ``OF_ITS_DATA`` and ``AS_VALIDATED``; what the command line says is
            left out, and what is the evaluation's default.
        built: Likewise of ``OF_ITS_MODEL``.
    """

    path: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    built: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """What is taken, as flags; without the model's name."""
        values = {**self.values, **self.built}
        return " ".join(flag(key) + ("" if value is True else f" {_text(value)}") for key, value in values.items()
                        if key != "model" and value is not False)

    def complete(self, args: argparse.Namespace) -> None:
        """Puts it into the options, while they are being parsed."""
        vars(args).update(self.values)
        if self.built:
            args.model_kwargs = {**self.built, **args.model_kwargs}


def beside(checkpoints: Sequence[str]) -> list[str]:
    """The ``args.yaml`` of the runs that wrote the checkpoints, as far as there are some."""
    paths = [os.path.join(os.path.dirname(checkpoint), files.ARGS) for checkpoint in checkpoints]
    return [path for path in dict.fromkeys(paths) if os.path.isfile(path)]


def from_run(parser: argparse.ArgumentParser, checkpoints: Sequence[str], given: argparse.Namespace,
             suites: bool) -> FromRun:
    """Reads what the runs that wrote the checkpoints were started with.

    Args:
        parser: Of the evaluation's flags.
        checkpoints: Their files.
        given: The options as the command line gives them, None where it gives none.
        suites: Whether data sets are suites.

    Raises:
        OptionError: An ``args.yaml`` cannot be read, or two of them differ in what the command line does not say.
    """
    paths = beside(checkpoints)
    if not paths:
        return FromRun()
    actions = {action.dest: action for action in parser._actions}
    path, *others = paths
    kind = None if suites else _kind(given.dataset)
    values = _read(actions, path, kind)
    # what the command line says in other words
    said = ("img_size", "in_chans") if given.input_size is not None else ()
    for other in others:
        theirs = _read(actions, other, kind)
        for key in (*OF_A_RUN, *OF_ITS_DATA, *OF_ITS_MODEL):
            default = actions[key].default if key in actions else None
            mine, its = values.get(key, default), theirs.get(key, default)
            if mine != its and getattr(given, key, None) is None and key not in said:
                remedy = f"evaluate them one by one, or give {flag(key)}" if key in actions else (
                    "evaluate them one by one")
                raise OptionError(f"--checkpoint: {key} is {mine!r} in {path}, and {its!r} in {other}; {remedy}")
    if given.img_size is not None and "input_size" in values:
        # timm would prefer it to the size that the command line asks for
        values.setdefault("in_chans", values.pop("input_size")[0])
    built = {key: values.pop(key) for key in OF_ITS_MODEL if key in values}
    if not given.test_pool:  # which asks for larger images than those of training
        values.update(AS_VALIDATED)
    return FromRun(path, {key: value for key, value in values.items() if key not in said
                          and getattr(given, key) is None and value != actions[key].default}, built)


def _kind(dataset: Any) -> str:
    """Of a data set, by its name; folders and tar files are one."""
    kind = str(dataset or "").partition("/")[0].lower()
    return "" if kind in ("folder", "tar") else kind


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={item}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _read(actions: Mapping[str, argparse.Action], path: str, kind: str | None) -> dict[str, Any]:
    """What an ``args.yaml`` says of the model and its images.

    Args:
        actions: The evaluation's flags.
        path: Of the file.
        kind: Of the data set that is evaluated: what a run says of one of another kind is left out; None: of any.
    """
    try:
        run = read_yaml(path)
    except Exception:  # YAML makes dates, numbers and more of its text, and fails in as many ways
        run = None
    if not isinstance(run, dict):
        raise OptionError(f"--model is not given, and {path} cannot be read; name the model of the checkpoint")
    keys = (*OF_A_RUN, *(OF_ITS_DATA if kind == _kind(run.get("dataset")) else ()))
    values = {key: yaml_value(path, actions[key], run[key]) for key in keys if run.get(key) is not None}
    if isinstance(run.get("bn_eps"), float):
        values["bn_eps"] = run["bn_eps"]
    overlay = run.get("pretrained_cfg_overlay")
    if isinstance(overlay, dict) and (kept := {key: overlay[key] for key in _OF_THE_OVERLAY if key in overlay}):
        values["pretrained_cfg_overlay"] = kept
    return values
