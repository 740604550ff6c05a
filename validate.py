#!/usr/bin/env python3
"""Evaluates image classifiers with the command line of timm's validate.py, and on suites of data sets and under attack.

    validate.py --checkpoint last.pth.tar --data-dir /data/imagenet

The run from top to bottom is ``timm_sam/validate.py``.
"""
import sys

from timm_sam.validate import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
