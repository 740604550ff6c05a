"""Puts runs of train.py into the paper's tables and figures: ``python -m timm_sam.report RUNS... --out DIR``."""
