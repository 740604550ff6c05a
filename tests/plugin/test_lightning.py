"""SAM in the trainer of Lightning, with the weights of a loop by hand; skipped where it is not installed."""
import copy
import importlib.util
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.example_loops import batches, by_hand, load, network
from support.models import assert_identical, weights
from torch.utils.data import DataLoader

from timm_sam import SAM

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec('lightning') is None, reason='needs lightning: pip install it'),
    pytest.mark.filterwarnings('ignore'),  # of the package's own
]


def classifier(**methods):
    """The module of the example, with some methods replaced."""
    return type('Own', (load('lightning_module').Classifier,), methods)(network())


def manual(step):
    module = classifier(training_step=step)
    module.automatic_optimization = False
    return module


def fit(module, data=None, epochs=1, **options):
    import lightning
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    trainer = lightning.Trainer(max_epochs=epochs, accelerator='cpu', logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False, **options)
    trainer.fit(module, DataLoader(batches() if data is None else data, batch_size=None))
    return trainer


def assert_close(module, net):
    for (name, a), b in zip(weights(module.net).items(), weights(net).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=name)


def loss_of(module, batch):
    x, y = batch
    return F.cross_entropy(module.net(x), y)


def test_a_training_step_that_returns_none_leaves_its_batch_out():
    for left_out in (0, 1, 3):
        module = classifier(training_step=lambda self, batch, i, left_out=left_out: (
            None if i == left_out else loss_of(self, batch)))
        fit(module)
        assert_close(module, by_hand([b for i, b in enumerate(batches()) if i != left_out]))


def test_schedulers_and_global_step_count_updates():
    def configure(self):
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        sam = SAM(sgd, self, rho=0.5)
        return [sam], [{'scheduler': torch.optim.lr_scheduler.StepLR(sam, 1, gamma=0.5), 'interval': 'step'}]
    module = classifier(configure_optimizers=configure)
    trainer = fit(module)
    assert trainer.global_step == 4
    assert trainer.optimizers[0].param_groups[0]['lr'] == 0.1 * 0.5 ** 4


@pytest.mark.parametrize('way', ['minimize', 'backward', 'halves'])
def test_manual_optimization_through_lightnings_wrapper(way):
    def step(self, batch, index):
        sam = self.optimizers()
        if way == 'minimize':
            sam.minimize(lambda: loss_of(self, batch))
            return
        sam.zero_grad()
        if way == 'backward':
            sam.backward(lambda: loss_of(self, batch), backward_fn=self.manual_backward)
        else:
            with sam.ascent():
                self.manual_backward(loss_of(self, batch))
            with sam.perturbed():
                self.manual_backward(loss_of(self, batch))
        sam.step()
    module = manual(step)
    assert fit(module).global_step == 4
    assert_close(module, by_hand(batches()))


def test_manual_optimization_that_forgets_sam_is_refused():
    def step(self, batch, index):
        self.manual_backward(loss_of(self, batch))
        self.optimizers().step()
    with pytest.raises(ValueError, match='would be a plain step'):
        fit(manual(step))


def test_lightnings_accumulation_is_refused_with_what_works():
    with pytest.raises(ValueError, match='closure: it adds to gradients that were there before.*SAM.backward'):
        fit(load('lightning_module').Classifier(network()), accumulate_grad_batches=2)


def test_averaging_of_weights_averages_those_of_sam():
    from lightning.pytorch.callbacks import StochasticWeightAveraging
    seen = []

    class Seen(StochasticWeightAveraging):
        def on_train_epoch_end(self, trainer, module):
            seen.append(copy.deepcopy(weights(module.net)))
            super().on_train_epoch_end(trainer, module)
    module = load('lightning_module').Classifier(network())
    fit(module, epochs=3, callbacks=[Seen(swa_lrs=0.05, swa_epoch_start=1)])
    at_starts = [weights(network()), *seen[:2]]  # of epochs; its first is counted from 1
    for name, average in weights(module.net).items():
        expected = sum(w[name] for w in at_starts) / 3
        torch.testing.assert_close(average, expected, rtol=1e-11, atol=1e-13, msg=name)


def half_precision():
    from lightning.pytorch.plugins.precision import MixedPrecision
    return MixedPrecision('16-mixed', 'cpu', scaler=torch.amp.GradScaler('cpu', init_scale=2.0 ** 8))


def test_half_precision_runs_the_closure_first_and_is_refused():
    module = load('lightning_module').Classifier(network().float())
    with pytest.raises(ValueError, match='would be a plain step'):
        fit(module, [(x.float(), y) for x, y in batches()], plugins=[half_precision()])


def test_half_precision_with_manual_optimization_is_that_of_a_loop_with_a_scaler():
    def step(self, batch, index):
        sam = self.optimizers()
        sam.backward(lambda: loss_of(self, batch), backward_fn=self.manual_backward,
                     scaler=self.trainer.precision_plugin.scaler)
        sam.step()
        sam.zero_grad()
    data = [(x.float(), y) for x, y in batches()]
    module = manual(step)
    module.net.float()
    fit(module, data, plugins=[half_precision()])
    net = network().float()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        load('grad_scaler').train(net, data, parts=1)
    assert_identical(weights(module.net), weights(net))
