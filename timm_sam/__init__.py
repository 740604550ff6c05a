"""Sharpness-aware minimization for timm: SAM-ON, SAM and their variants around any optimizer."""
from . import methods
from .norms import NORM_TYPES, register_norm
from .perturbation import VARIANTS
from .sam import SAM
from .selection import SELECTIONS, select_parameters
from .split import compile_split
from .stats import Stats

__version__ = "0.1.0"
__all__ = ["NORM_TYPES", "SAM", "SELECTIONS", "Stats", "VARIANTS", "compile_split", "methods", "register_norm",
           "select_parameters"]
