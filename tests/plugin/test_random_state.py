"""Random generators are set back, whatever was drawn: NumPy's and Python's are looked at in their memory first."""
import importlib.util
import io
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


@pytest.mark.filterwarnings('error')  # NumPy's, where the old form of a state is asked of a new generator
@pytest.mark.parametrize('kind', [np.random.PCG64, np.random.Philox, np.random.SFC64, np.random.MT19937])
def test_any_generator_of_numpy_is_set_back_also_from_what_was_stored(kind):
    usual = np.random.get_bit_generator()
    np.random.set_bit_generator(kind(3))
    try:
        np.random.randn()  # half of a pair is left
        state = RandomState(set())
        stored = io.BytesIO()
        torch.save(state.to_dict(), stored)
        stored.seek(0)
        first = [np.random.randn(), np.random.rand(), np.random.randn()]
        for again in (state, RandomState.from_dict(torch.load(stored, weights_only=True))):
            again.restore()
            assert [np.random.randn(), np.random.rand(), np.random.randn()] == first
    finally:
        np.random.set_bit_generator(usual)


def test_functions_in_the_place_of_pythons_do_not_matter(monkeypatch):
    """Where they are there when the generator is first looked at, too."""
    spec = importlib.util.find_spec('timm_sam.random_state')
    first_time = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(first_time)
    monkeypatch.setattr(random, 'random', lambda: 0.5)
    state = first_time.RandomState(set())
    first = random.getrandbits(30)
    state.restore()
    assert random.getrandbits(30) == first
