"""SAM methods, one file a paper: each fills some of the slots of ``stages.py``."""
from collections.abc import Callable, Mapping

from .gsam import gsam
from .stages import Method

# name -> constructor: what train.py's --sam-method knows, with a flag for each argument
METHODS: Mapping[str, Callable[..., Method]] = {"gsam": gsam}

__all__ = ["METHODS", "Method", "gsam"]
