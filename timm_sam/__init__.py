"""Sharpness-aware minimization for timm: SAM-ON, SAM and their variants around any optimizer."""
from . import methods
from .perturbation import VARIANTS
from .sam import SAM
from .selection import NORM_TYPES, SELECTIONS, select_parameters
from .split import compile_split
from .stats import Stats

__version__ = "0.1.0"
__all__ = ["NORM_TYPES", "SAM", "SELECTIONS", "Stats", "VARIANTS", "compile_split", "methods", "select_parameters"]
