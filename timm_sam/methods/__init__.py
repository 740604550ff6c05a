"""SAM methods, one file a paper: each fills some of the slots of ``stages.py``."""
from .gsam import gsam
from .stages import Method

__all__ = ["Method", "gsam"]
