"""The loops of `examples/` on a CUDA device: float16 with loss scales that trainers own, shards, translation."""
import warnings

import pytest
import torch
from support.example_loops import by_accelerate, by_fabric, by_lightning, by_transformers, load, needs
from support.gpu import DEVICE, data, net
from support.places import ROOT
from support.processes import python, run, torchrun

from timm_sam import SAM

pytestmark = pytest.mark.gpu


@pytest.fixture
def built(monkeypatch):
    """The SAMs that a loop builds."""
    seen, init = [], SAM.__init__

    def noting(self, *args, **kwargs):
        init(self, *args, **kwargs)
        seen.append(self)
    monkeypatch.setattr(SAM, '__init__', noting)
    return seen


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the packages' own
        yield


def network():
    model = net(torch.float32)
    model.drop.p = model.drop_path.drop_prob = 0.0
    return model


def batches(count=8):
    return [data(seed, torch.float32) for seed in range(count)]


def assert_trained(built, model):
    [sam] = built
    assert float(sam.stats.eps_norm) == pytest.approx(0.5, rel=1e-5) and int(sam.nonfinite) == 0
    assert float(sam.stats.loss_perturbed) > float(sam.stats.loss)
    fresh = network().state_dict()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(model.state_dict()['head.weight'].cpu(), fresh['head.weight'].cpu())


@pytest.mark.parametrize('name', ['plain_loop', 'grad_scaler'])
def test_loops_of_torch_train(built, name):
    model = network()
    load(name).train(model, batches())
    assert_trained(built, model)


@needs('lightning_module')
@pytest.mark.parametrize('name, precision', [
    ('lightning_module', '32-true'), ('lightning_module', 'bf16-mixed'), ('lightning_accumulation', '16-mixed')])
def test_lightning_trains(built, name, precision):
    model = network()
    by_lightning(load(name), model, batches(), 1, accelerator='gpu', precision=precision)
    assert_trained(built, model)


@needs('fabric_loop')
@pytest.mark.parametrize('precision', ['32-true', 'bf16-mixed', '16-mixed'])
def test_fabric_trains(built, precision):
    model = network()
    by_fabric(load('fabric_loop'), model, batches(), 1, accelerator='cuda', precision=precision)
    assert_trained(built, model)


@pytest.fixture
def other_precision():
    """Accelerate keeps the first one of a process."""
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)


@needs('accelerate_loop')
@pytest.mark.parametrize('precision', ['no', 'bf16', 'fp16'])
def test_accelerate_trains(built, other_precision, precision):
    model = network()
    by_accelerate(load('accelerate_loop'), model, batches(), 1, cpu=False, mixed_precision=precision)
    assert_trained(built, model)


@needs('transformers_trainer')
@pytest.mark.parametrize('precision', [{}, dict(bf16=True), dict(fp16=True)])
def test_trainer_of_transformers_trains(built, other_precision, precision):
    model = network()
    data = [(x.cpu(), y.cpu()) for x, y in batches()]
    by_transformers(load('transformers_trainer'), model, data, 1, use_cpu=False, gradient_accumulation_steps=2,
                    **precision)
    assert_trained(built, model)


def test_sharded_model_trains_under_nccl(tmp_path):
    done = run(torchrun(ROOT / 'examples' / 'fsdp2.py', ranks=1), tmp_path)
    assert done.code == 0, done.err[-3000:]


SHARDED = '''
import sys
import torch
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from support.gpu import data, net
from support.models import BatchLoss, weights
from timm_sam import SAM

torch.distributed.init_process_group('nccl')
found = []
for sharded in (True, False):
    model = net()
    model.drop.p = model.drop_path.drop_prob = 0.0
    if sharded:
        for part in (model.conv, model.gn, model):
            fully_shard(part, mesh=init_device_mesh('cuda', (1,)))
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5)
    for step in range(3):
        sam.minimize(BatchLoss(model, data(step)) if not sharded else (
            lambda: torch.nn.functional.cross_entropy(model(data(step)[0]), data(step)[1])))
    found.append({n: p.full_tensor() if hasattr(p, 'full_tensor') else p for n, p in weights(model).items()})
for name in found[0]:
    torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-10, atol=1e-12)
torch.distributed.destroy_process_group()
print('the same')
'''


def test_sharded_model_takes_the_steps_of_the_one_that_is_not(tmp_path):
    (tmp_path / 'sharded.py').write_text(SHARDED)
    done = run(torchrun(tmp_path / 'sharded.py', ranks=1), tmp_path)
    assert done.code == 0 and 'the same' in done.out, done.err[-3000:]


@pytest.mark.parametrize('options', ['', '--amp', '--amp --sam-params all'])
def test_translator_learns_a_toy_language(tmp_path, options):
    from support.translation import write_toy
    write_toy(tmp_path / 'toy')
    done = run(python(ROOT / 'examples' / 'translation' / 'train.py', 'toy', '--source', 'xx', '--target', 'yy',
                      '--device', DEVICE, '--epochs', 2, '--max-tokens', 256, '--sam-variant', 'sam', '--sam-rho', 0.1,
                      '--out', 'out', *options.split()), tmp_path)
    assert done.code == 0, done.err[-3000:]
