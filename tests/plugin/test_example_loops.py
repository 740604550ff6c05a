"""The loops of `examples/`: short, and with the weights of a loop that is written down by hand, also on two ranks."""
import pytest
import torch
from support.example_loops import (
    NEEDS,
    PARTS,
    RANKS_ONLY,
    batches,
    by_fabric,
    by_hand,
    by_transformers,
    load,
    needs,
    network,
    run,
)
from support.example_ranks import ON_RANKS
from support.models import weights
from support.places import ROOT
from support.scenarios import of_both_ranks

from timm_sam import SAM


def installed(names):
    """Examples as parameters; those whose packages are not there are skipped."""
    return [pytest.param(name, marks=needs(name)) for name in names]


def assert_close(actual, expected):
    for (name, a), b in zip(actual.items(), expected.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize('name', NEEDS)
def test_examples_are_short(name):
    assert len((ROOT / 'examples' / f'{name}.py').read_text().splitlines()) < 60


@pytest.mark.full
@pytest.mark.parametrize('name', installed(name for name in NEEDS if name not in RANKS_ONLY))
def test_weights_are_those_of_a_loop_by_hand(name):
    assert_close(weights(run(name, batches())), weights(by_hand(batches(), PARTS.get(name, 1))))


@pytest.mark.full
@needs('fabric_loop')
@pytest.mark.filterwarnings('ignore')  # of the package's own
def test_fabric_in_mixed_precision_takes_the_steps_of_autocast():
    """There Fabric lets no backward pass begin but its own, at w neither."""
    data = [(x.float(), y) for x, y in batches()]
    theirs, net = network().float(), network().float()
    by_fabric(load('fabric_loop'), theirs, data, 1, precision='bf16-mixed')
    sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), net, rho=0.5)
    for x, y in data:
        with torch.autocast('cpu', torch.bfloat16):
            sam.minimize(lambda x=x, y=y: torch.nn.functional.cross_entropy(net(x).float(), y))
    for (name, a), b in zip(weights(theirs).items(), weights(net).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


class OfTwoModes(torch.optim.SGD):
    """As schedule-free optimizers are: they step in one mode, and an evaluation leaves them in the other."""

    mode = 'train'

    def train(self):
        self.mode = 'train'

    def eval(self):
        self.mode = 'eval'

    def step(self, closure=None):
        assert self.mode == 'train'
        return super().step(closure)


def scales(trainer):
    """What the trainer has where it computes in float16."""
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 8)


@pytest.mark.full
@pytest.mark.filterwarnings('ignore')  # of the packages' own
@pytest.mark.parametrize('options', [
    dict(before=scales, max_grad_norm=1e6), dict(kind=OfTwoModes, eval_strategy='steps', eval_steps=1),
    pytest.param(dict(devices=2), marks=pytest.mark.skipif(torch.cuda.is_available(), reason='stands for devices')),
], ids=['loss scale and clipping', 'optimizer of two modes', 'several devices'])
@pytest.mark.parametrize('name', installed(['transformers_trainer']))
def test_what_the_trainer_of_transformers_does_besides_leaves_the_update_as_it_is(name, options, monkeypatch):
    if 'before' in options:
        import accelerate
        monkeypatch.setattr(accelerate.Accelerator, 'mixed_precision', property(lambda self: 'fp16'))
    net = network()
    by_transformers(load(name), net, batches(), 1, **options)
    assert_close(weights(net), weights(by_hand(batches())))


@pytest.mark.full
@pytest.mark.filterwarnings('ignore')  # of the package's own
@pytest.mark.parametrize('name', installed(['transformers_trainer']))
def test_trainer_of_transformers_may_begin_anew_with_another_model(name, tmp_path):
    from transformers import TrainingArguments
    module, norms = load(name), []
    items = [{'x': x[i], 'labels': y[i]} for x, y in batches() for i in range(len(y))]
    trainer = module.SAMTrainer(model_init=lambda: module.Classifier(network()), args=TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy='no', logging_strategy='no',
        disable_tqdm=True, remove_unused_columns=False), train_dataset=items)
    for _ in range(2):
        trainer.train()
        norms.append((trainer.sam.stats.grad_norm, trainer.sam.stats.eps_norm))
    assert norms[0] == norms[1] and norms[0][1] == pytest.approx(0.5)


@pytest.fixture(scope='session')
def scenario(tmp_path_factory):
    return of_both_ranks('support.example_ranks', tmp_path_factory.mktemp('example_loops'))


@pytest.mark.full
@pytest.mark.parametrize('name', installed(ON_RANKS))
def test_weights_on_two_ranks_are_those_of_a_loop_by_hand(scenario, name):
    for actual, expected in zip(scenario(name), scenario(f'by hand {PARTS.get(name, 1)}')):
        assert_close(actual, expected)


@pytest.mark.full
@pytest.mark.parametrize('name', installed(['lightning_module']))
def test_a_sam_that_does_not_know_lightnings_wrapper_is_refused_at_the_first_update(scenario, name):
    for rank in scenario('too late'):
        assert 'wrap the model first, then build SAM(optimizer, wrapped, ...)' in rank['said']
        assert rank['same']
