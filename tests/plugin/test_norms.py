"""Normalization layers that are neither torch's nor timm's: known by name, registered, or named in a warning."""
import warnings

import pytest
import timm
import torch
from support.models import assert_identical, weights
from support.processes import python, run
from torch import nn
from torch.nn.utils import parametrize

import timm_sam
from timm_sam import SAM, register_norm, select_parameters


class Scale(nn.Module):
    """The parameters of a norm layer; the classes below lend it names."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.weight * x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()


class OwnRMSNorm(Scale):
    pass


class CountingNorm(Scale):
    """Its statistics are integers, which only those of known normalization layers are put back."""

    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def class_of(qualified):
    """A class as if a module of another library had defined it."""
    module, name = qualified.rsplit('.', 1)
    return type(name, (Scale,), {'__module__': module})


def around(norm):
    """A network in which another normalization layer is known."""
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), norm, nn.Linear(4, 3))


def names(model, params='onlynorm', **options):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return [n for n, _ in select_parameters(model, params, **options)]


@pytest.mark.parametrize('qualified', [
    *(f'transformers.models.{m}.modeling_{m}.{name}' for m, name in [
        ('llama', 'LlamaRMSNorm'), ('mistral', 'MistralRMSNorm'), ('qwen2', 'Qwen2RMSNorm'), ('qwen3', 'Qwen3RMSNorm'),
        ('gemma', 'GemmaRMSNorm'), ('gemma3', 'Gemma3RMSNorm'), ('phi3', 'Phi3RMSNorm'), ('olmo2', 'Olmo2RMSNorm'),
        ('mamba', 'MambaRMSNorm'), ('mamba2', 'MambaRMSNormGated'), ('t5', 'T5LayerNorm'),
        ('convnextv2', 'ConvNextV2GRN'), ('deberta', 'DebertaLayerNorm')]),
    'transformers_modules.someone.model.RMSNorm',
    'diffusers.models.normalization.RMSNorm', 'diffusers.models.normalization.GlobalResponseNorm',
    'diffusers.models.autoencoders.autoencoder_kl_wan.WanRMS_norm',
    'apex.normalization.fused_layer_norm.FusedLayerNorm', 'apex.normalization.fused_layer_norm.MixedFusedRMSNorm',
    'apex.contrib.layer_norm.layer_norm.FastLayerNorm', 'xformers.triton.layer_norm.FusedLayerNorm',
    'xformers.ops.rmsnorm.RMSNorm', 'flash_attn.ops.rms_norm.RMSNorm', 'mamba_ssm.ops.triton.layer_norm.RMSNorm',
    'liger_kernel.transformers.rms_norm.LigerRMSNorm',
    'torch_geometric.nn.norm.layer_norm.LayerNorm', 'torch_geometric.nn.norm.layer_norm.HeteroLayerNorm',
    'torch_geometric.nn.norm.instance_norm.InstanceNorm', 'torch_geometric.nn.norm.graph_norm.GraphNorm',
    'torch_geometric.nn.norm.batch_norm.HeteroBatchNorm',
])
def test_layers_of_other_libraries_are_known_by_their_names_and_so_are_their_subclasses(qualified):
    cls = class_of(qualified)
    for kind in (cls, type('Mine', (cls,), {})):
        assert names(around(kind())) == ['1.weight', '1.bias', '2.weight']


@pytest.mark.parametrize('qualified', [
    'transformers.models.mobilebert.modeling_mobilebert.NoNorm', 'transformer_engine.pytorch.LayerNormLinear',
    'torch_geometric.nn.norm.msg_norm.MessageNorm', 'my_transformers.LlamaRMSNorm', 'model.RMSNorm',
    'model.FusedLayerNorm',
])
@pytest.mark.parametrize('params', ['onlynorm', 'nonorm'])
def test_any_other_class_with_norm_in_its_name_is_named_in_a_warning(qualified, params):
    name = qualified.rsplit('.', 1)[1]
    model = around(class_of(qualified)())
    says = rf'{name} owns .* norm_types=\({name},\) or .*register_norm\({name}\)'
    with pytest.warns(UserWarning, match=says) as caught:
        chosen = [n for n, _ in select_parameters(model, params)]
    assert len(caught) == 1 and caught[0].filename == __file__
    assert ('2.weight' in chosen) == (params == 'nonorm')
    names(model, 'all')  # where it is perturbed anyway, nothing is said
    model[2].requires_grad_(False)
    names(model, params)  # nor of what is frozen


def test_one_warning_names_all_classes():
    model = nn.Sequential(around(OwnRMSNorm()), CountingNorm(), OwnRMSNorm())
    with pytest.warns(UserWarning, match='OwnRMSNorm, CountingNorm own') as caught:
        select_parameters(model)
    assert len(caught) == 1


def test_layers_that_contain_known_ones_and_own_nothing_are_no_reason_to_warn():
    class PreNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fn = nn.LayerNorm(4), nn.Linear(4, 4)
    assert names(around(PreNorm())) == ['1.weight', '1.bias', '2.norm.weight', '2.norm.bias']


@pytest.mark.parametrize('types', [OwnRMSNorm, (OwnRMSNorm,), [CountingNorm, OwnRMSNorm]])
def test_types_that_are_given_count_for_one_selection(types):
    model = around(OwnRMSNorm())
    assert names(model, norm_types=types) == ['1.weight', '1.bias', '2.weight']
    assert names(model, 'nonorm', norm_types=types) == ['0.weight', '0.bias', '3.weight', '3.bias']
    with pytest.warns(UserWarning, match='OwnRMSNorm'):
        select_parameters(model)


def test_registered_types_count_everywhere_with_their_subclasses():
    class Statistical(Scale):
        pass

    assert register_norm(Statistical) is Statistical
    for kind in (Statistical, type('Sub', (Statistical,), {})):
        assert names(around(kind())) == ['1.weight', '1.bias', '2.weight']


@pytest.mark.parametrize('wrong', [3, 'RMSNorm', OwnRMSNorm(), dict, [nn.Linear, None], {'OwnRMSNorm'}])
def test_what_is_no_class_of_modules_is_refused(wrong):
    with pytest.raises(ValueError, match='norm_types: .* not a class of torch.nn.Module'):
        select_parameters(around(OwnRMSNorm()), norm_types=wrong)
    with pytest.raises(ValueError, match='^cls: '):
        register_norm(wrong)


def test_sam_takes_types_and_puts_back_what_their_layers_count():
    torch.manual_seed(0)
    model = around(CountingNorm()).double()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5, norm_types=CountingNorm)
    assert [n for n, _ in sam.selected] == ['1.weight', '1.bias', '2.weight']
    x = torch.randn(5, 4, dtype=torch.float64)
    for update in range(1, 4):
        sam.minimize(lambda: model(x).square().mean())
        assert model[2].calls == update


def test_originals_of_parametrized_layers_are_perturbed_as_the_layers_own_would_be():
    class Same(nn.Module):
        def forward(self, w):
            return 1 * w

    def net(parametrized):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
        if parametrized:
            parametrize.register_parametrization(model[1], 'weight', Same())
        return model
    results = []
    x = torch.randn(5, 4, dtype=torch.float64)
    for parametrized in (False, True):
        model = net(parametrized)
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, rho=0.5)
        assert {n for n, _ in sam.selected} == {'1.bias', *(
            ['1.parametrizations.weight.original'] if parametrized else ['1.weight'])}
        for _ in range(3):
            sam.minimize(lambda m=model: m(x).square().mean())
        results.append({n.replace('parametrizations.weight.original', 'weight'): w for n, w in weights(model).items()})
    assert_identical(dict(sorted(results[1].items())), dict(sorted(results[0].items())))


def test_class_that_is_not_known_is_named_where_its_parameters_are_parametrized():
    layer = OwnRMSNorm()
    parametrize.register_parametrization(layer, 'weight', nn.Identity())
    with pytest.warns(UserWarning, match=r'norm_types=\(OwnRMSNorm,\)'):
        select_parameters(around(layer))


@pytest.mark.parametrize('holder', [nn.ParameterList, lambda gains: nn.ParameterDict({'a': gains[0], 'b': gains[1]})])
def test_lists_and_dictionaries_of_parameters_are_their_layers_own(holder):
    class SeveralNorms(nn.Module):
        def __init__(self):
            super().__init__()
            self.gains = holder([nn.Parameter(torch.full((4,), gain)) for gain in (1.0, 0.5)])
            self.other = nn.Linear(4, 4)

        def forward(self, x):
            gains = self.gains.values() if hasattr(self.gains, 'values') else self.gains
            return sum(gain * nn.functional.layer_norm(self.other(x), (4,)) for gain in gains)

    model = around(SeveralNorms())
    with pytest.warns(UserWarning, match='SeveralNorms owns'):
        select_parameters(model)
    chosen = names(model, norm_types=SeveralNorms)
    assert chosen[2:] == [n for n, _ in model.named_parameters() if 'gains' in n] and len(chosen) == 4
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5, norm_types=SeveralNorms)
    x, seen = torch.randn(3, 4), []
    model[2].register_forward_pre_hook(lambda m, args: seen.append([p.detach().clone() for p in m.gains.parameters()]))
    sam.minimize(lambda: model(x).square().sum())
    assert all(not torch.equal(a, b) for a, b in zip(*seen))


@pytest.mark.parametrize('name, scale', [('resmlp_12_224', 'Affine'), ('hgnetv2_b0', 'LearnableAffineBlock')])
def test_layers_that_only_scale_stay_out_without_a_word(name, scale):
    with torch.device('meta'):
        model = timm.create_model(name)
    scales = {f'{prefix}.{n}' for prefix, m in model.named_modules() if type(m).__name__ == scale
              for n, _ in m.named_parameters(recurse=False)}
    assert scales and scales <= set(names(model, 'nonorm'))


def test_norm_layers_that_exist_and_are_frozen_are_said_to_be():
    model = around(nn.BatchNorm1d(4))
    for layer in (model[1], model[2]):
        layer.requires_grad_(False)
    with pytest.raises(ValueError, match=r'normalization layers are frozen \(4 parameters\).*requires_grad_\(True\)'):
        select_parameters(model)


def test_where_only_unknown_layers_are_found_the_error_says_how_to_make_them_known():
    with pytest.raises(ValueError, match=r'selects nothing.*norm_types=\(OwnRMSNorm,\)') as e:
        select_parameters(nn.Sequential(nn.Linear(4, 4), OwnRMSNorm()))
    assert '\n' not in str(e.value)


def test_public_names():
    assert timm_sam.register_norm is register_norm
    assert issubclass(nn.BatchNorm2d, timm_sam.NORM_TYPES)


@pytest.mark.full
def test_import_loads_none_of_the_libraries(tmp_path):
    libraries = ['transformers', 'diffusers', 'apex', 'xformers', 'torch_geometric', 'lightning', 'accelerate', 'peft',
                 'torch.distributed.tensor', 'torch.distributed.fsdp']
    probe = tmp_path / 'probe.py'
    probe.write_text('import torch, timm, sys\nbefore = set(sys.modules)\nimport timm_sam\n'
                     f'print(sorted(set({libraries}) & (set(sys.modules) - before)))')
    assert run(python(probe), tmp_path).out.strip() == '[]'
