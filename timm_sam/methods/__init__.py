"""SAM methods, one file a paper: each fills some of the slots of ``stages.py``."""
from collections.abc import Callable, Mapping

from .esam import esam
from .friendly import friendly
from .gsam import gsam
from .late import late
from .look import looksam
from .masks import random_mask, ssam_dynamic, ssam_fisher
from .msam import msam
from .stable import stable
from .stages import Method
from .usam import usam

# name -> constructor: what train.py's --sam-method knows, with a flag for each argument
METHODS: Mapping[str, Callable[..., Method]] = {
    "usam": usam, "msam": msam, "friendly": friendly, "stable": stable, "looksam": looksam, "gsam": gsam, "late": late,
    "random_mask": random_mask, "ssam_dynamic": ssam_dynamic, "esam": esam,
    "ssam_fisher": ssam_fisher}

__all__ = ["METHODS", "Method", "esam", "friendly", "gsam", "late", "looksam", "msam", "random_mask", "ssam_dynamic",
           "ssam_fisher", "stable", "usam"]
