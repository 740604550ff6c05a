"""Help and errors name the command as it was started."""
import sys
from types import ModuleType, SimpleNamespace

import pytest
from support.running import in_process

from timm_sam import train, validate
from timm_sam.analyze import __main__ as analyze
from timm_sam.cli.parser import program
from timm_sam.digits import __main__ as digits
from timm_sam.paper import __main__ as paper
from timm_sam.report import __main__ as report
from timm_sam.sweep import __main__ as sweep

COMMANDS = {'train': train, 'validate': validate, 'analyze': analyze, 'report': report, 'sweep': sweep,
            'digits': digits, 'paper': paper}


@pytest.fixture
def started(monkeypatch):
    """As if this process had been started by a path, or by ``-m`` and the name of a module."""
    def start(path, module=None):
        main = ModuleType('__main__')
        main.__spec__ = module and SimpleNamespace(name=module)
        monkeypatch.setitem(sys.modules, '__main__', main)
        monkeypatch.setattr(sys, 'argv', [path])
    return start


@pytest.mark.parametrize('path, module, name', [
    ('train.py', None, 'train.py'), ('/a/clone/train.py', None, 'train.py'), ('a_test.py', None, 'train.py'),
    ('/site-packages/timm_sam/train.py', 'timm_sam.train', 'python -m timm_sam.train'),
    ('/bin/timm-sam-train', None, 'timm-sam-train'), ('C/timm-sam-train.exe', None, 'timm-sam-train'),
    ('/bin/pytest', 'pytest.__main__', 'train.py'),
])
def test_of_a_command_with_a_script(started, path, module, name):
    started(path, module)
    assert program('timm_sam.train', 'train.py') == name


@pytest.mark.parametrize('path, module, name', [
    ('/site-packages/timm_sam/report/__main__.py', 'timm_sam.report.__main__', 'python -m timm_sam.report'),
    ('/bin/timm-sam-report', None, 'timm-sam-report'), ('a_test.py', None, 'python -m timm_sam.report'),
])
def test_of_a_command_without_one(started, path, module, name):
    started(path, module)
    assert program('timm_sam.report') == name


@pytest.mark.parametrize('command', COMMANDS)
def test_each_command_says_the_name_that_it_is_installed_by(started, tmp_path, command):
    started(f'/bin/timm-sam-{command}')
    refused = in_process(COMMANDS[command].main, ['--qqqqqq'], tmp_path)
    assert (refused.code, refused.err.count('\n')) == (2, 1)
    assert refused.err.startswith(f'timm-sam-{command}: error: ')
    if command == 'analyze':
        assert in_process(analyze.main, ['norms', '--qqqqqq'], tmp_path).err.startswith('timm-sam-analyze norms: error')
