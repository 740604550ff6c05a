"""train.py as a program that also notes which images each rank trains and validates on.

    torchrun --standalone --nproc-per-node 2 -m support.held_out OPTIONS
"""
import json
import os
import sys
from pathlib import Path

from timm_sam import train
from timm_sam.training import data


def files_of(part):
    return [part.filename(i) for i in range(len(part))]


def noting(seen):
    """`hold_out` itself, which also hands the file names of both parts to `seen`."""
    real = data.hold_out

    def hold_out(*args):
        kept, held = real(*args)
        seen([files_of(kept), files_of(held)])
        return kept, held
    return hold_out


if __name__ == '__main__':
    data.hold_out = noting(lambda parts: Path(f'held-out-{os.environ["RANK"]}.json').write_text(json.dumps(parts)))
    sys.exit(train.main(sys.argv[1:]))
