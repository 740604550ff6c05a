"""The shape of the house: imports go one way, the plugin stands alone, and no room is too large to be read."""
import graphlib
import json
import re
import sys

import pytest
from support.imports import graph, imports_of, pokes, private, private_names, raised_texts, sources
from support.places import ROOT, TESTS
from support.processes import python, run

PACKAGE = ROOT / 'timm_sam'
GRAPH = graph(PACKAGE, ROOT)
COMMANDS = {'timm_sam.train', 'timm_sam.validate'}
LINES = 450

# wing -> the others that it may import; 'plugin' are the files of the root
PLUGIN = {'plugin', 'methods', 'sharded'}  # parts of one thing
ALLOWED = {
    'plugin': {'methods', 'sharded'},
    'methods': {'plugin'},
    'sharded': {'plugin', 'methods'},
    'models': set(),
    'cli': {'plugin'},
    'runs': {'cli'},
    'training': {'plugin', 'methods', 'models', 'cli', 'runs'},
    'evaluation': {'plugin', 'methods', 'models', 'cli', 'runs'},
    'analyze': {'plugin', 'methods', 'models', 'cli', 'runs', 'evaluation'},
    'report': {'plugin', 'cli', 'runs', 'training', 'evaluation'},
    'digits': {'cli'},
    'jobs': {'cli', 'runs', 'training', 'evaluation', 'report', 'train', 'validate', 'analyze'},
    'sweep': {'cli', 'training', 'report', 'jobs'},
    'fashion': {'cli'},
    'paper': {'plugin', 'cli', 'runs', 'training', 'evaluation', 'report', 'jobs', 'digits', 'fashion'},
    'train': {'plugin', 'methods', 'models', 'cli', 'runs', 'training'},
    'validate': {'plugin', 'methods', 'models', 'cli', 'runs', 'evaluation'},
}


def wing(module):
    """The wing of a module of the package: its folder, the command that it is, or the plugin."""
    parts = module.split('.')
    if len(parts) == 1 or (len(parts) == 2 and module not in COMMANDS and not (PACKAGE / parts[1]).is_dir()):
        return 'plugin'
    return parts[1]


def file_of(module):
    path = ROOT / module.replace('.', '/')
    return path / '__init__.py' if path.is_dir() else path.with_suffix('.py')


def where(path):
    return path.relative_to(ROOT).as_posix()


def test_imports_are_found():
    assert {'timm_sam.perturbation', 'timm_sam.methods.stages'} <= GRAPH['timm_sam.sam']
    assert 'timm_sam.cli.errors' in GRAPH['timm_sam.train']
    wings = {wing(module) for module in GRAPH}
    assert wings <= ALLOWED.keys()
    assert {'plugin', 'methods', 'models', 'cli', 'runs', 'training', 'evaluation', 'report', 'digits', 'train',
            'validate'} <= wings


@pytest.mark.parametrize('name', ALLOWED)
def test_wing_imports_only_those_below_it(name):
    wrong = [f'{module} imports {target}' for module, targets in GRAPH.items() for target in targets
             if wing(module) == name and wing(target) not in ALLOWED[name] | {name}]
    assert not wrong


def test_wings_are_ordered():
    order = {name: others - PLUGIN for name, others in ALLOWED.items()}
    assert len(list(graphlib.TopologicalSorter(order).static_order())) >= len(order)


def test_method_imports_only_the_stages_and_the_kernels():
    """A file of a paper can be read alone, or taken out."""
    allowed = {'timm_sam.methods.stages', 'timm_sam.multi_tensor'}
    for module, targets in GRAPH.items():
        if wing(module) == 'methods' and module != 'timm_sam.methods':  # which names them all
            assert targets <= allowed, module
            for taken in imports_of(file_of(module), ROOT):
                top = taken.module.split('.')[0]
                assert top in {'torch', 'timm_sam'} | sys.stdlib_module_names, f'{module} imports {taken.module}'


def test_networks_are_known_to_what_builds_models_and_to_nothing_else():
    """They are registered by being imported: so whatever builds a model by its name must, and `import timm_sam` not."""
    importers = {module for module, targets in GRAPH.items()
                 if wing(module) != 'models' and any(wing(target) == 'models' for target in targets)}
    assert importers == {'timm_sam.training.factory', 'timm_sam.evaluation.subject'}
    for module in GRAPH:
        if wing(module) == 'models':
            taken = {found.module.split('.')[0] for found in imports_of(file_of(module), ROOT)}
            assert taken <= {'torch', 'timm', 'timm_sam'} | sys.stdlib_module_names, module


def test_plugin_is_made_of_torch_and_timm():
    """What `import timm` loads itself cannot be told from what the plugin does: so by the text."""
    libraries = {'torch', 'timm', 'timm_sam', 'numpy'} | sys.stdlib_module_names - {'argparse', 'csv', 'json'}
    for module in GRAPH:
        if wing(module) in PLUGIN:
            taken = {found.module.split('.')[0] for found in imports_of(file_of(module), ROOT)}
            assert taken <= libraries, module


def test_no_circle_of_imports_between_files():
    # raises CycleError, with the circle
    assert len(list(graphlib.TopologicalSorter(GRAPH).static_order())) == len(GRAPH)


def test_nothing_imports_a_command_but_what_runs_jobs():
    starters = {ROOT / 'train.py', ROOT / 'validate.py'}
    for path in sources(PACKAGE, ROOT / 'examples'):
        if path == PACKAGE / 'jobs' / 'worker.py':
            continue
        taken = {f'{found.module}.{found.name}' for found in imports_of(path, ROOT)} | {
            found.module for found in imports_of(path, ROOT)}
        assert not taken & {'train', 'validate', *COMMANDS}, where(path)
    for path in starters:  # a few lines that start them
        assert len(path.read_text().splitlines()) <= 20
        assert {found.module for found in imports_of(path, ROOT)} <= {'sys', f'timm_sam.{path.stem}'}


@pytest.mark.full
def test_import_of_the_package_loads_the_plugin_and_nothing_else(tmp_path):
    script = ('import json, sys, torch, timm; before = set(sys.modules); import timm_sam; '
              'print(json.dumps([sorted(set(sys.modules) - before), len(before)]))')
    done = run(python('-c', script), tmp_path)
    assert done.code == 0, done.err
    loaded, before = json.loads(done.out)
    ours = {module for module in loaded if module.split('.')[0] == 'timm_sam'}
    assert ours == {module for module in GRAPH if wing(module) in PLUGIN}
    foreign = {module.split('.')[0] for module in loaded} - {'timm_sam'} - sys.stdlib_module_names
    assert foreign <= {'torch'}, foreign
    # it is to take under 1.5 times as long to import as torch and timm alone: it loads next to nothing beside them
    assert len(loaded) - len(ours) < before / 10


def test_file_can_be_read_in_one_sitting():
    lines = {where(path): len(path.read_text().splitlines())
             for path in sources(PACKAGE, TESTS, ROOT / 'benchmarks', ROOT / 'examples')}
    assert len(lines) > 100
    assert {path: count for path, count in lines.items() if count > LINES} == {}


def test_library_logs_under_the_names_of_its_modules():
    """So that they can be silenced one by one."""
    for path in sources(PACKAGE):
        named = re.findall(r'logging\.getLogger\(([^()]*)\)', path.read_text())
        assert set(named) <= {'', '__name__'}, where(path)


def test_errors_of_the_plugin_name_arguments_and_no_flags():
    raised = [(module, text) for module in GRAPH if wing(module) in PLUGIN
              for text in raised_texts(file_of(module))]
    assert len(raised) > 20
    assert [(module, text) for module, text in raised if re.search(r'--[a-z]', text)] == []


def test_nothing_depends_on_the_machine_it_was_written_on():
    folders = '|'.join(('home', 'root', 'Users', 'work', 'mnt'))
    paths = re.compile(rf'(?<![\w.$}}-])/(?:{folders})/\w|\.\./shar' + 'ed')
    kinds = {'.py', '.md', '.yaml', '.sh', '.cfg', '.toml', '.txt', ''}
    folders = ['timm_sam', 'tests', 'benchmarks', 'examples', 'hparams', 'docs', '.ci']
    files = [*ROOT.glob('*'), *(path for folder in folders for path in (ROOT / folder).rglob('*'))]
    files = [path for path in files if path.is_file() and path.suffix in kinds and '_cache' not in str(path)]
    assert ROOT / 'Makefile' in files and len(files) > 300
    for path in files:
        assert not paths.search(path.read_text()), where(path)


# The tests themselves

def test_test_modules_import_only_what_is_shared():
    modules = {path.stem for path in sources(TESTS) if path.stem.startswith('test_')} | {'conftest', 'tests'}
    assert len(modules) > 40
    wrong = [(where(path), taken) for path in sources(TESTS) for taken in imports_of(path, TESTS)
             if taken.module.split('.')[0] in modules or (taken.module.startswith('support') and private(taken.name))]
    assert wrong == []


def test_tests_use_no_private_name_of_ours():
    names = private_names(PACKAGE, ROOT / 'benchmarks', ROOT / 'examples')
    assert len(names) > 100
    assert {where(path): found for path in sources(TESTS) if (found := pokes(path, TESTS, names))} == {}


def test_tests_stand_in_the_folders_of_the_wings():
    wings = {wing(module) for module in GRAPH} - {'train', 'validate'}
    for path in sources(TESTS):
        if path.stem.startswith('test_'):
            folder = path.relative_to(TESTS).parts[0]
            assert folder in wings | {'project'}, where(path)
