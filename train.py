#!/usr/bin/env python3
"""Trains an image classifier with timm's command line, and with SAM or SAM-ON if asked to (``--sam-*``).

    torchrun --nproc-per-node 8 train.py -c hparams/... --data-dir /data/imagenet

The run from top to bottom is ``timm_sam/train.py``.
"""
import sys

from timm_sam.train import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
