"""Several analyses in the same processes, one after another; each rank writes `<name>.<i>.log`: code, stdout, stderr.

    torchrun --standalone --nproc-per-node 2 -m support.analyses RUNS.json
"""
import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch

from support.turns import turns
from timm_sam.analyze import __main__ as analyze

torch.set_num_threads(1)


def main(file):
    for name, arguments in turns(file):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = analyze.main(arguments)
        Path(f'{name}.{os.environ["RANK"]}.log').write_text(json.dumps([code, out.getvalue(), err.getvalue()]))


if __name__ == '__main__':
    main(sys.argv[1])
