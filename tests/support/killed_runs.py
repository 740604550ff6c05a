"""train.py killed in front of one operation on files of its folder after the other, each run gone on with afterwards.

    python -m support.killed_runs FOLDER OPTIONS...

`FOLDER/<n>` is the output of the run that died in front of its n-th operation, and of the one with `--resume auto` that
followed it. The first that lives to its end is the last; `FOLDER/whole` was never killed.
"""
import logging
import os
import sys
from pathlib import Path

import torch

from support.killed_saves import die_at
from timm_sam import train


def in_fork(run):
    """Exit code of something in a process of its own; negative: the signal that ended it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            logging.getLogger().handlers.clear()
            os._exit(run() or 0)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(root, options):
    torch.set_num_threads(1)
    line = [*options, '--output', root, '--resume', 'auto', '--experiment']
    assert in_fork(lambda: train.main([*line, 'whole'])) == 0
    number, code = 0, -9
    while code:
        number += 1

        def killed(name=str(number)):
            die_at(int(name), Path(root, name))
            return train.main([*line, name])

        code = in_fork(killed)
        assert code in (0, -9), code
        assert code == 0 or in_fork(lambda name=str(number): train.main([*line, name])) == 0


if __name__ == '__main__':
    main(os.path.realpath(sys.argv[1]), sys.argv[2:])
