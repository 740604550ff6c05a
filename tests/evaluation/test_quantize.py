"""validate.py --quantize-weights: rounding by hand, which weights, and the accuracy of models that are built so."""
import json

import pytest
import torch
from support.processes import run_in_turn
from support.validating import labelled, preprocessed, result, run_validate
from torch import nn

from timm_sam.evaluation.quantize import quantizable, quantize, quantized

BITS = '--quantize-weights 8 2'


def test_weights_by_hand():
    weight = torch.tensor([[1.0, -0.5, 0.3], [0.0, 0.0, 0.0], [-6.0, 1.0, 3.0]])
    # three bits: -3 to 3; the steps of the channels are 1/3, none, and 2; -1.5 and 0.5 and 1.5 go to even numbers
    by_hand = [[1.0, -2 / 3, 1 / 3], [0.0, 0.0, 0.0], [-6.0, 0.0, 4.0]]
    assert quantize(weight, 3).tolist() == [pytest.approx(row) for row in by_hand]
    # two bits: -1, 0 and 1
    assert quantize(weight, 2).tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-6.0, 0.0, 0.0]]
    assert quantize(weight.T.contiguous(), 3, dim=1).T.tolist() == [pytest.approx(row) for row in by_hand]
    with pytest.raises(ValueError, match='bits=1'):
        quantize(weight, 1)


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_no_weight_moves_by_more_than_half_a_step_and_so_many_values_are_left(bits, dtype):
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 7, 7).to(dtype)
    found = quantize(weight, bits)
    assert found.dtype == dtype and found.shape == weight.shape
    step = weight.float().abs().amax(dim=(1, 2, 3), keepdim=True) / (2 ** (bits - 1) - 1)
    slack = 0.01 if dtype == torch.bfloat16 else 1e-6  # of the type itself
    assert ((found.float() - weight.float()).abs() <= step / 2 + slack * weight.float().abs() + slack * step).all()
    for channel in found:
        assert len(channel.unique()) <= 2 ** bits - 1
    assert torch.equal(quantize(found.float(), bits).to(dtype), found)  # nothing is left to be rounded


def test_weights_of_linear_and_convolutional_layers_and_no_others():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3)
            self.norm, self.embed = nn.BatchNorm2d(4), nn.Embedding(5, 6)
            self.heads = nn.MultiheadAttention(6, 2)
            self.fc = nn.Linear(6, 6)
            self.tied = nn.Linear(6, 6, bias=False)
            self.tied.weight = self.fc.weight
            self.pos = nn.Parameter(torch.zeros(1, 5, 6))
    model = Model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(weight)]: dim for weight, dim in quantizable(model)} == {
        'conv.weight': 0, 'up.weight': 1, 'heads.in_proj_weight': 0, 'heads.out_proj.weight': 0, 'fc.weight': 0}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError), quantized(model, 3):
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {'conv.weight', 'up.weight', 'heads.in_proj_weight', 'heads.out_proj.weight', 'fc.weight',
                           'tied.weight'}
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# validate.py

@pytest.fixture(scope='module')
def command(fitted):
    return (f'{fitted.base} --eval validation={fitted.data}/validation train={fitted.data}/train --results-file r '
            f'--attack l2=0.05 --attack-steps 2 --attack-num-samples 5')


@pytest.fixture(scope='module')
def evaluated(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp('quantised')
    result(run_validate(folder, '', command))
    plain = json.loads((folder / 'r.json').read_text())
    result(run_validate(folder, f'{BITS} --skip-existing', command))
    return folder, plain


def test_accuracy_is_that_of_rounded_weights_and_the_rest_stays(fitted, evaluated):
    folder, plain = evaluated
    content = json.loads((folder / 'r.json').read_text())
    rows = {(row['dataset'], row['measure']): row for row in content['results']}
    for row in plain['results']:  # the attack among them, which comes later
        assert rows[row['dataset'], row['measure']] == row
    assert content['protocol']['quantized_weights']['bits'] == [8, 2]
    exact = {name: value.clone() for name, value in fitted.model.state_dict().items()}
    drops = {}
    for split in ('validation', 'train'):
        paths, targets = labelled(fitted.data / split)
        for bits in (8, 2):
            for name, value in fitted.model.state_dict().items():
                if value.ndim == 4 or name == 'fc.weight':
                    value.copy_(quantize(exact[name], bits))
            with torch.no_grad():
                right = (fitted.model(preprocessed(paths, fitted.model)).argmax(1) == targets).float().mean().item()
            fitted.model.load_state_dict(exact)
            assert rows[split, f'top1_w{bits}']['values'] == [pytest.approx(100 * right)]
            drop = rows[split, 'top1']['values'][0] - 100 * right
            assert rows[split, f'drop_w{bits}']['values'] == [pytest.approx(drop, abs=1e-4)]
            assert rows[split, f'drop_w{bits}']['group'] == 'quantised'
            drops[split, bits] = drop
    assert max(map(abs, drops.values())) > 1  # or nothing has been rounded


def test_what_is_done_is_gone_on_with(evaluated, command, monkeypatch):
    folder, _ = evaluated
    before = (folder / 'r.json').read_bytes()
    monkeypatch.setattr('timm_sam.evaluation.protocol.score', None)  # is not called
    result(run_validate(folder, f'{BITS} --skip-existing', command))
    assert (folder / 'r.json').read_bytes() == before
    lost = run_validate(folder, '--quantize-weights 8 --skip-existing', command)
    assert lost.code == 2 and 'top1_w2 of validation' in lost.last_line


@pytest.mark.parametrize('options, words', [
    ('--quantize-weights 1', '--quantize-weights [1] must be >= 2'), ('--quantize-weights 8 40', '--quantize-weights'),
    ('--quantize-weights 8 8', '--quantize-weights 8 8: name each number once'),
    ('--quantize-weights 8 --torchscript', 'leave out --torchscript')])
def test_bits_that_cannot_be_are_one_line(fitted, tmp_path, options, words):
    done = run_validate(tmp_path, f'--eval v={fitted.data}/validation {options}', fitted.base)
    assert done.code == 2 and words in done.last_line


@pytest.mark.slow
def test_two_processes_write_the_file_of_one_byte_for_byte(evaluated, command, tmp_path):
    run_in_turn('support.evaluations', {'two': f'{command} {BITS}'}, tmp_path)
    assert json.loads((tmp_path / 'two.0.log').read_text())[0] == 0
    assert (tmp_path / 'r.json').read_bytes() == (evaluated[0] / 'r.json').read_bytes()
