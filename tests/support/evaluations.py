"""Several runs of validate.py in the same processes, one after another; `test_evaluation_ranks.py` reads what is left.

    torchrun --standalone --nproc-per-node 2 -m support.evaluations RUNS.json

Each rank writes `<name>.<i>.log` into the current folder: exit code, stdout and stderr. In runs named `memory...` the
second rank's memory is short for more than three images at once.
"""
import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch

from support.turns import turns
from timm_sam import validate
from timm_sam.evaluation import subject

torch.set_num_threads(1)
create = subject.create_model


def with_limit(*args, **kwargs):
    def limit(module, inputs):
        if os.environ['RANK'] == '1' and len(inputs[0]) > 3:
            raise RuntimeError('CUDA out of memory')
    model = create(*args, **kwargs)
    model.register_forward_pre_hook(limit)
    return model


def main(file):
    for name, arguments in turns(file):
        subject.create_model = with_limit if name.startswith('memory') else create
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = validate.main(arguments)
        Path(f'{name}.{os.environ["RANK"]}.log').write_text(json.dumps([code, out.getvalue(), err.getvalue()]))


if __name__ == '__main__':
    main(sys.argv[1])
