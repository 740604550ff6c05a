"""The loops of `examples/` by name, each on a network and batches of the tests; and what each needs to be installed."""
import importlib.util
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler

from support.models import TinyNet, batch
from support.places import ROOT

NEEDS = {
    'plain_loop': (), 'grad_scaler': (), 'lightning_module': ('lightning',), 'lightning_accumulation': ('lightning',),
    'fabric_loop': ('lightning',), 'accelerate_loop': ('accelerate',),
    'transformers_trainer': ('transformers', 'accelerate'), 'fsdp2': (),
}
RANKS_ONLY = ['fsdp2']
PARTS = {'grad_scaler': 2, 'lightning_accumulation': 2, 'accelerate_loop': 2}  # batches of an update


def missing(name):
    """The packages that an example needs and that are not there."""
    return [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]


def needs(name):
    """The mark of a test of an example: it is skipped, with the reason, where the example's packages are not there."""
    return pytest.mark.skipif(bool(missing(name)), reason=f'needs {", ".join(NEEDS[name])}: pip install them')


def network():
    net = TinyNet().double()
    net.drop.p = net.drop_path.drop_prob = 0.0
    return net


def batches(rank=0, updates=4):
    return [batch(2 * update + rank) for update in range(updates)]


def load(name):
    spec = importlib.util.spec_from_file_location(f'example_{name}', ROOT / 'examples' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, data, ranks=1):
    """The network after an example's loop over batches."""
    net = network()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the packages' own
        RUNS[name](load(name), net, data, ranks)
    return net


def by_hand(data, parts=1, wrap=lambda net: net):
    """The same, written down: perturb, take the gradient there, go back, add it up, step after `parts` of them."""
    net = network()
    model = wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    norms = [p for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm)
             for p in m.parameters()]
    for i, (x, y) in enumerate(data):
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), norms)
        statistics = [b.clone() for b in net.buffers()]
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        at_w = [p.detach().clone() for p in norms]
        with torch.no_grad():
            for p, g in zip(norms, grads):
                p += 0.5 * g / norm
        (F.cross_entropy(model(x), y) / parts).backward()
        with torch.no_grad():
            for p, w in zip(norms, at_w):
                p.copy_(w)
            for b, before in zip(net.buffers(), statistics):
                b.copy_(before)
        if (i + 1) % parts == 0:
            optimizer.step()
            optimizer.zero_grad()
    return net


def by_lightning(module, net, data, ranks, **options):
    import lightning
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    lightning.Trainer(**{**dict(
        max_epochs=1, accelerator='cpu', devices=ranks, strategy='ddp' if ranks > 1 else 'auto', logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False), **options},
    ).fit(module.Classifier(net), DataLoader(data, batch_size=None))


def by_fabric(module, net, data, ranks, accelerator='cpu', **options):
    from lightning.fabric import Fabric
    fabric = Fabric(accelerator=accelerator, devices=ranks, strategy='ddp' if ranks > 1 else 'auto', **options)
    fabric.launch()
    module.train(fabric, net, data)


def by_accelerate(module, net, data, ranks, cpu=True, **options):
    from accelerate import Accelerator
    module.train(Accelerator(cpu=cpu, gradient_accumulation_steps=2, **options), net, data)


def by_transformers(module, net, data, ranks, devices=1, kind=torch.optim.SGD, before=None, **options):
    """``before(trainer)`` is called before the first batch."""
    import tempfile

    from transformers import TrainingArguments

    class InOrder(module.SAMTrainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

        def create_optimizer(self, *args):
            self.optimizer = kind(self.model.parameters(), lr=0.1, momentum=0.9)
            return self.optimizer

        def training_step(self, *args):
            if before is not None and self.sam is None:
                before(self)
            return super().training_step(*args)

    class Parts(module.Classifier):
        """What DataParallel makes of it: the loss of each device's part of the batch."""

        def forward(self, x, labels):
            logits = self.net(x)
            losses = [F.cross_entropy(*part) for part in zip(logits.chunk(devices), labels.chunk(devices))]
            return {'loss': torch.stack(losses) if devices > 1 else losses[0], 'logits': logits}

    items = [{'x': x[i], 'labels': y[i]} for x, y in data for i in range(len(y))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, **{**dict(
            per_device_train_batch_size=len(data[0][1]) // devices, num_train_epochs=1, lr_scheduler_type='constant',
            use_cpu=True, max_grad_norm=0.0, report_to=[], save_strategy='no', logging_strategy='no', disable_tqdm=True,
            remove_unused_columns=False), **options})
        assert arguments.n_gpu < 2  # looking makes it known
        arguments._n_gpu = devices
        InOrder(Parts(net), arguments, train_dataset=items, eval_dataset=items[:2]).train()


RUNS = {
    'plain_loop': lambda module, net, data, ranks: module.train(net, data),
    'grad_scaler': lambda module, net, data, ranks: module.train(net, data, autocast=False),
    'lightning_module': by_lightning, 'lightning_accumulation': by_lightning, 'fabric_loop': by_fabric,
    'accelerate_loop': by_accelerate, 'transformers_trainer': by_transformers,
    'fsdp2': lambda module, net, data, ranks: module.train(net, data),
}
