"""The same attack by the authors' code, as packaged in pyautoattack."""
import numpy as np
import pytest
import torch
from support.attack_models import predicted
from torch import nn

from timm_sam.evaluation.attack.attack import attack


def digits_network():
    """A small network, seconds of training, and 512 images that it has not seen."""
    datasets = pytest.importorskip('sklearn.datasets')
    data = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.tensor(data.images[order] / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target[order], dtype=torch.int64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
                          nn.Flatten(), nn.Linear(32 * 9, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    train = len(labels) - 512
    for _ in range(15):
        for rows in torch.randperm(train).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval(), images[train:], labels[train:]


@pytest.mark.slow
@pytest.mark.parametrize(('norm', 'radius'), [('linf', 0.1), ('l2', 0.6)])
def test_robust_accuracy_is_that_of_the_autoattack_package(norm, radius, record_property):
    package = pytest.importorskip('pyautoattack')
    model, images, labels = digits_network()
    found = attack(model, images, labels, range(512), norm, radius)
    theirs = package.AutoAttack(model, norm={'linf': 'Linf', 'l2': 'L2'}[norm], eps=radius, version='custom',
                                attacks=['apgd-ce', 'apgd-t'], seed=0)
    adversarial = theirs.run_standard_evaluation(images, labels, batch_size=512)
    adversarial = adversarial[0] if isinstance(adversarial, tuple) else adversarial
    their_robust = predicted(model, adversarial) == labels
    ours, others = (100 * r.float().mean().item() for r in (found.robust, their_robust))
    record_property('robust accuracy', (ours, others))
    print(f'{norm} {radius}: clean {100 * found.clean.float().mean():.2f}, ours {ours:.2f}, pyautoattack {others:.2f}, '
          f'{int((found.robust != their_robust).sum())} samples differ')
    assert 30 <= others <= 70
    assert abs(ours - others) <= 0.5
