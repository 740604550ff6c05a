"""The process group of a script's ranks."""
import gc
import time

import torch


def leave_process_group() -> None:
    """Ends this rank's part in the process group, if there is one.

    gloo's destructor joins its threads while it holds Python's lock. A thread that has just finished the last
    collective may need that lock to let go of its tensors, and then both wait for ever (seen with timm's script on two
    CPU ranks): so whatever holds the group goes first, and the threads get a moment without the lock.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        time.sleep(0.1)
        torch.distributed.destroy_process_group()
