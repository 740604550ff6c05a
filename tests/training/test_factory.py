"""Which graphs train.py compiles."""
import logging

import pytest
from support.loop import CPU
from support.models import whole_graphs
from timm.task import ClassificationTask
from torch import nn

from timm_sam import train
from timm_sam.cli.errors import OptionError
from timm_sam.split import splitter_of
from timm_sam.training import compiling
from timm_sam.training.compiling import compile_task
from timm_sam.training.options import parse_args

SAM_ON = '--sam-variant sam --sam-rho 0.1'


@pytest.fixture
def compile_with(monkeypatch):
    """The mode with which a model is compiled as a whole, or 'two parts'."""
    def compiled(options):
        task = ClassificationTask(nn.Sequential(nn.Linear(2, 2)), nn.CrossEntropyLoss(), verbose=False)
        args = parse_args(train.build_parser(), f'--device cpu --data-dir . {options}'.split())
        modes = []
        monkeypatch.setattr(task, 'compile', lambda backend, mode: modes.append(mode))
        compile_task(args, CPU, task)
        if splitter_of(task.get_trainable_module()) is not None:
            assert not modes
            return 'two parts'
        return modes[0]
    return compiled


@pytest.mark.parametrize('options', ['--sam-m 4', '--grad-accum-steps 2'])
def test_backend_that_is_cuda_graphs_alone_is_refused_where_they_are_not_allowed(compile_with, options):
    with pytest.raises(OptionError, match='^--torchcompile cudagraphs: .*use --torchcompile inductor'):
        compile_with(f'--torchcompile cudagraphs {SAM_ON} {options}')


def test_whole_graphs_that_would_be_wrong_are_not_made(compile_with, monkeypatch):
    monkeypatch.setattr(compiling, 'WHOLE_GRAPHS_WORK', False)
    assert compile_with(f'--torchcompile {SAM_ON}') == 'two parts'
    assert compile_with('--torchcompile') is None


@whole_graphs
@pytest.mark.parametrize('options, mode', [
    ('--torchcompile', None),
    (f'--torchcompile {SAM_ON}', None),
    (f'--torchcompile {SAM_ON} --sam-filter 0', 'two parts'),
    (f'--torchcompile cudagraphs {SAM_ON} --sam-filter 0', None),  # would write over what is shared
    ('--torchcompile --torchcompile-mode reduce-overhead --grad-accum-steps 2', 'reduce-overhead'),  # as timm's script
    (f'--torchcompile --torchcompile-mode reduce-overhead {SAM_ON}', 'reduce-overhead'),
    (f'--torchcompile --torchcompile-mode reduce-overhead {SAM_ON} --sam-m 4', 'default'),
    (f'--torchcompile --torchcompile-mode max-autotune {SAM_ON} --grad-accum-steps 2', 'max-autotune-no-cudagraphs'),
    (f'--torchcompile --torchcompile-mode max-autotune-no-cudagraphs {SAM_ON} --sam-m 4', 'max-autotune-no-cudagraphs'),
])
def test_nothing_that_is_compiled_writes_over_gradients_or_shared_outputs(compile_with, caplog, options, mode):
    caplog.set_level(logging.INFO)
    assert compile_with(options) == mode
    changed = mode in ('default', 'max-autotune-no-cudagraphs') and mode not in options
    assert ('which CUDA graphs do not allow' in caplog.text) == changed
