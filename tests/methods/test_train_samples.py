"""Methods that look at single samples, in train.py: their losses, one by one, and what is refused."""
import argparse
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.command_lines import AOT, JSD, NAFLEX
from support.loop import CPU
from support.states import differences, finite
from timm.loss import create_classification_loss
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from timm_sam import train
from timm_sam.cli.errors import OptionError
from timm_sam.training.losses import of_each_sample
from timm_sam.training.options import parse_args
from timm_sam.training.single_samples import TrainingSamples

SAM_ON = '--sam-variant sam --sam-rho 0.05'
ESAM = f'{SAM_ON} --sam-method esam --sam-esam-beta 0.6 --sam-esam-gamma 0.5'
FISHER = f'{SAM_ON} --sam-params all --sam-method ssam_fisher --sam-ssam-fisher-sparsity 0.5'


# The loss of each sample

@pytest.mark.parametrize('soft, kwargs', [
    (False, {}), (False, dict(smoothing=0.1)), (True, dict(soft_targets=True)), (False, dict(loss_type='bce')),
    (False, dict(loss_type='bce', smoothing=0.1, bce_sum=True)),
    (True, dict(loss_type='bce', soft_targets=True, bce_target_thresh=0.2)),
    (False, dict(loss_type='bce', class_weight=[1.0, 2.0, 3.0, 4.0], pos_weight=2.0))])
def test_losses_of_samples_are_those_of_batches_of_one_and_their_mean_the_loss(soft, kwargs):
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(5, 4, generator=generator).requires_grad_()
    target = torch.randn(5, 4, generator=generator).softmax(1) if soft else torch.tensor([0, 3, 1, 1, 2])
    criterion = create_classification_loss(**kwargs)
    losses = of_each_sample(criterion, output, target)
    expected = torch.stack([criterion(output[i:i + 1], target[i:i + 1]) for i in range(5)])
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(losses.mean(), criterion(output, target))
    mine, = torch.autograd.grad(losses.mean(), output)
    theirs, = torch.autograd.grad(criterion(output, target), output)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.full
@pytest.mark.parametrize('options', [
    '--sam-m 4', '--grad-accum-steps 2', '--mixup 0.2 --smoothing 0.1', '--loss bce', '--amp --amp-dtype bfloat16',
    '--no-prefetcher --channels-last --sam-params all', pytest.param(AOT, marks=pytest.mark.slow)])
def test_esam_trains_with(run_train, options):
    done = run_train(f'{ESAM} --epochs 1 {options}')
    assert done.code == 0, done.err[-2000:]
    assert all(finite(row) for row in done.summary())


@pytest.mark.full
def test_run_with_esam_of_everything_has_the_weights_of_sam_and_a_share_has_others(run_train):
    runs = {'sam': SAM_ON, 'limit': f'{ESAM} --sam-esam-beta 1 --sam-esam-gamma 1',
            'draws': f'{ESAM} --sam-esam-gamma 1', 'chooses': f'{ESAM} --sam-esam-beta 1'}
    states = {}
    for name, options in runs.items():
        done = run_train(f'{options} --experiment {name}')
        assert done.code == 0, done.err[-2000:]
        states[name] = done.checkpoint(name)['state_dict']
    assert differences(states['limit'], states['sam']) == []
    assert differences(states['draws'], states['sam']) and differences(states['chooses'], states['sam'])
    assert done.log('SAM forward: ') == [
        'SAM forward: two full forwards per update: the method needs a whole pass at w']


@pytest.mark.parametrize('options, message', [
    (f'{ESAM} {JSD} --no-prefetcher', '--aug-splits'),
    (f'{ESAM} {JSD}', '--loss jsd gives no loss of single samples, which --sam-method esam chooses by; leave one of '
     'the two out, or take all samples by --sam-esam-gamma 1'),
    (f'{ESAM} --loss poly', '--loss poly gives no loss of single samples'),
    (f'{ESAM} --task multilabel --dataset wds/x --data-dir .', '--task multilabel gives no loss'),
    (f'{ESAM} --kd-model-name test_resnet', '--kd-model-name test_resnet gives no loss'),
    (f'{ESAM} {NAFLEX}', '--naflex-loader gives no loss'),
    (f'{ESAM} --sam-ascent-fraction 0.5', '--sam-ascent-fraction 0.5: --sam-method esam needs the gradient of the'),
    (f'{ESAM} --sam-esam-beta 0', '--sam-esam-beta 0.0 must be a number > 0 and <= 1'),
    (f'{SAM_ON} --sam-method esam --sam-esam-beta 1', '--sam-method esam needs --sam-esam-gamma'),
    (f'{ESAM} --sam-method esam friendly', '--sam-method: friendly(sigma=1, lam=0.9) needs the gradients of all'),
    (f'{FISHER} {NAFLEX}', '--naflex-loader gives no single samples with a label, which --sam-method ssam_fisher'),
    (f'{FISHER} --train-img-sizes 24 32 --train-batch-sizes 8 4', '--train-img-sizes gives no single samples'),
    (f'{FISHER} --sam-ssam-fisher-samples 0', '--sam-ssam-fisher-samples 0 must be an integer >= 1'),
    (f'{SAM_ON} --sam-method gsam --sam-gsam-alpha 0.4 --sam-gsam-rho-min 0.1 --model nowhere',
     '--sam-gsam-rho-min 0.1 is above --sam-rho 0.05: lower it')])
def test_what_does_not_fit_is_one_line_before_anything_is_built(run_train, options, message):
    done = run_train(options)
    assert done.code == 2 and done.err.count('Traceback') == 0
    assert 'train.py: error: ' in done.last_line and message in done.last_line
    assert not done.folder().exists()


def test_esam_without_a_choice_of_samples_takes_any_loss():
    args = parse_args(train.build_parser(), [
        *f'--device cpu --data-dir . --sam-esam-gamma 1 {SAM_ON} --sam-method esam --sam-esam-beta 0.5'.split(),
        '--loss', 'poly'])
    assert args.sam_esam_gamma == 1


# Single samples of the training set

class Images(Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return torch.full((3, 4, 4), float(index)) + torch.rand(3, 4, 4) * 0.1, index % 3


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()


class Net(nn.Module):
    """Remembers what it was given; `norm` is what sees a single value per channel, or more."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.head, self.seen = norm, nn.Linear(3, 3), []

    def forward(self, x):
        self.seen.append((round(float(x.mean())), self.training))
        return self.head(self.norm(x.mean((2, 3), keepdim=True) if isinstance(self.norm, nn.BatchNorm2d) else x)
                         .mean((2, 3)))


def drawn(net, n=5, seed=0, epoch=0, rank=0, dataset=None):
    args = argparse.Namespace(seed=seed, dataset='wds/x', sam_method=['ssam_fisher'])
    data = SimpleNamespace(train=DataLoader(Images() if dataset is None else dataset, batch_size=2))
    process = SimpleNamespace(rank=rank, device=CPU.device)
    losses = [loss() for loss in TrainingSamples(args, process, net, data, nullcontext, epoch)(n)]
    assert all(loss.ndim == 0 and loss.requires_grad for loss in losses)
    return [image for image, _ in net.seen]


def test_samples_are_drawn_by_seed_and_epoch_and_shared_out_among_the_ranks():
    first = drawn(Net(nn.GroupNorm(1, 3)), 3)
    assert first == drawn(Net(nn.GroupNorm(1, 3)), 3) and len(set(first)) == 3
    assert first != drawn(Net(nn.GroupNorm(1, 3)), 3, epoch=1) and first != drawn(Net(nn.GroupNorm(1, 3)), 3, seed=1)
    both = first + drawn(Net(nn.GroupNorm(1, 3)), 3, rank=1)
    assert len(set(both)) == 6
    assert len(drawn(Net(nn.GroupNorm(1, 3)), 9)) == 9  # more than there are


def test_model_is_in_training_mode_unless_a_layer_would_see_a_single_value():
    net = Net(nn.GroupNorm(1, 3)).train()
    drawn(net)
    assert all(training for _, training in net.seen) and net.training
    net = Net(nn.BatchNorm2d(3)).train()
    drawn(net)
    assert [training for _, training in net.seen] == [True] + [False] * 5 and net.training and net.norm.training


def test_stream_has_no_single_samples():
    with pytest.raises(OptionError, match=r'--dataset wds/x is a stream, and --sam-method ssam_fisher draws single'):
        drawn(Net(nn.GroupNorm(1, 3)), dataset=Stream())


@pytest.mark.full
def test_images_are_those_that_training_sees_with_and_without_the_prefetcher(run_train, monkeypatch):
    seen = {}
    loss = TrainingSamples.loss

    def look(self, image, label):
        seen.setdefault(self.args.no_prefetcher, []).append((image.clone(), label.clone()))
        return loss(self, image, label)

    monkeypatch.setattr(TrainingSamples, 'loss', look)
    for name, extra in (('with', ''), ('without', '--no-prefetcher')):
        done = run_train(f'{FISHER} --sam-ssam-fisher-samples 3 --no-aug --mixup 0.2 --experiment {name} {extra}')
        assert done.code == 0, done.err[-2000:]
    assert len(seen[False]) == len(seen[True]) == 3
    for (image, label), (other, same) in zip(seen[False], seen[True]):
        assert image.shape == (1, 3, 32, 32) and torch.equal(label, same) and label.dtype == torch.int64
        torch.testing.assert_close(image, other, atol=1e-4, rtol=1e-4)
