"""The process group of the ranks that train together."""
import torch


def in_group() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
