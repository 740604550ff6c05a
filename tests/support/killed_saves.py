"""A saver that is killed in front of one operation on files after the other; `test_saver.py` looks at what is left.

    python -m support.killed_saves FOLDER

Every case is a process of its own, forked from this one, with a folder `FOLDER/<n>`: it saves three epochs, of which
the last is the best, and recovery checkpoints, and dies by SIGKILL in front of its n-th operation on a file there.
`n.json` says which it was. The first case that lives to its end is the last.
"""
import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch
from timm.task import ClassificationTask

from timm_sam.training.saver import Saver

OPERATIONS = {'open', 'os.rename', 'os.link', 'os.remove', 'os.truncate', 'shutil.copyfile'}
METRICS = [50.0, 40.0, 60.0]
EPOCHS = range(3)
HISTORY = 2


def saver(folder):
    model = torch.nn.Linear(2, 2)
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    args = argparse.Namespace(model='linear', checkpoint_hist=HISTORY)
    return Saver(args, task, torch.optim.SGD(model.parameters(), 0.1), None, str(folder), False), model


def save_all(folder, epochs=EPOCHS, path=None):
    """Saves these epochs, and in the middle of each one a recovery checkpoint; goes on from `path` if there is one."""
    made, model = saver(folder)
    if path is not None:
        made.go_on(path)
    for epoch in epochs:
        with torch.no_grad():
            model.weight.fill_(epoch - 0.5)
        made.save_recovery(epoch, 0, {'position': {'epoch': epoch, 'batch': 1}})
        with torch.no_grad():
            model.weight.fill_(epoch)
        made.save(epoch, METRICS[epoch], {})
    return made


def die_at(number, folder):
    """Kills this process in front of its `number`-th operation on a file of the folder, or of bringing one to disk."""
    counted, fsync = [], os.fsync

    def count(event, name):
        counted.append(event)
        if len(counted) == number:
            Path(f'{folder}.json').write_text(json.dumps([event, name]))
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args):
        if event in OPERATIONS and str(args[0]).startswith(f'{folder}{os.sep}'):
            count(event, os.path.basename(str(args[0])))

    def counted_fsync(fd):
        count('fsync', os.path.basename(os.readlink(f'/proc/self/fd/{fd}')))
        fsync(fd)

    os.fsync = counted_fsync
    sys.addaudithook(hook)


def main(root):
    torch.set_num_threads(1)
    number = 1
    while True:
        folder = Path(root, str(number))
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            die_at(number, folder)
            save_all(folder)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status):
            sys.exit(os.waitstatus_to_exitcode(status))
        number += 1


if __name__ == '__main__':
    main(os.path.realpath(sys.argv[1]))
