"""The files of a run's folder, by name. Those of checkpoints are timm's ``CheckpointSaver``'s."""
import glob
import os

ARGS = "args.yaml"  # the options as they were given
ARGS_BEFORE = "args-before-epoch-{}.yaml"  # options of a run up to where it went on with others
SUMMARY = "summary.csv"  # one row per evaluated epoch
ENDING = ".pth.tar"  # of the checkpoints
LAST = f"last{ENDING}"
BEST = f"model_best{ENDING}"

_BEING_WRITTEN = ("tmp", "recovery_tmp")
_INSIDE_AN_EPOCH = "recovery"


def checkpoints(folder: str) -> list[str]:
    """Paths of the files in a folder that a training calls checkpoints, in no order; torn ones too."""
    return glob.glob(os.path.join(glob.escape(folder), f"*{ENDING}"))


def is_being_written(path: str) -> bool:
    """Whether the name is that of a checkpoint that gets its real name once it is whole."""
    return os.path.basename(path).startswith(_BEING_WRITTEN)


def is_unfinished(path: str) -> bool:
    """Whether the name is that of weights which no finished epoch has left: being written, or for recovery only."""
    return is_being_written(path) or os.path.basename(path).startswith(_INSIDE_AN_EPOCH)
