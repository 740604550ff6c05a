"""Random generators are set back, whatever was drawn: NumPy's and Python's are looked at in their memory first."""
import random

import numpy as np
import pytest
import torch

from timm_sam.random_state import RandomState

DRAWS = {
    'nothing': lambda: None, 'uniform': np.random.rand, 'normal': np.random.randn,
    'binomial': lambda: np.random.binomial(10, 0.3), 'seed': lambda: np.random.seed(3),
    'permutation': lambda: np.random.permutation(5).tolist(), 'torch': lambda: torch.rand(()).item(),
    'python': random.random, 'python gauss': lambda: random.gauss(0, 1), 'python seed': lambda: random.seed(4),
    'python bits': lambda: random.getrandbits(5),
}


@pytest.mark.parametrize('half', [False, True])  # of a pair of normal numbers is left: the next one moves nothing else
@pytest.mark.parametrize('draw', DRAWS.values(), ids=DRAWS)
def test_every_draw_is_repeated(draw, half):
    np.random.seed(0)
    random.seed(0)
    if half:
        np.random.randn()
        random.gauss(0, 1)
    state = RandomState({torch.device('cpu')})

    def drawn():
        return (draw(), np.random.randn(), np.random.rand(), np.random.randn(), random.gauss(0, 1), random.random(),
                torch.rand(()).item())

    first = drawn()
    for _ in range(2):
        state.restore()
        assert drawn() == first
    again = RandomState({torch.device('cpu')})
    assert again.numpy is not state.numpy and again.python is not state.python
    assert RandomState(set()).numpy is again.numpy and RandomState(set()).python is again.python
