"""What README, docs and the other pages name exists: links, flags, commands, targets, files; their Python runs."""
import re
import shlex
from functools import partial

import pytest
import torch
from support.models import TinyNet, batch
from support.places import ROOT
from torch.distributed.run import get_args_parser as torchrun_parser

from timm_sam import train, validate
from timm_sam.analyze import options as analyses
from timm_sam.cli import recipes
from timm_sam.paper.__main__ import COMMANDS as PAPER
from timm_sam.paper.__main__ import build_parser as paper_parser
from timm_sam.report.__main__ import build_parser as report_parser
from timm_sam.sweep.__main__ import build_parser as sweep_parser
from timm_sam.sweep.grid import cells

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')]}
FOLDERS = 'timm_sam|hparams|examples|benchmarks|tests|docs'
PARSERS = {name: build() for names, build in (
    (('train.py', 'timm_sam.train'), train.build_parser),
    (('validate.py', 'timm_sam.validate'), validate.build_parser),
    (('timm_sam.report',), report_parser),
    *(((f'timm_sam.paper {name}',), partial(paper_parser, name)) for name in PAPER),
    *(((f'timm_sam.analyze {name}',), partial(analyses.build_parser, name)) for name in analyses.COMMANDS),
) for name in names}


def anchors(text):
    """Of headings, by GitHub's rule: letters, digits and hyphens in small, spaces as hyphens."""
    headings = re.findall(r'^#+ (.+)$', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def commands(text):
    """Command lines of indented blocks, of diffs (as they are after it) and of code spans, whole."""
    for diff in re.findall(r'^```diff\n(.*?)^```', text, re.M | re.S):
        text += ''.join('\n    ' + line[1:] for line in diff.splitlines() if line[0] != '-')
    indented = re.sub(r'\\\n\s*', '', text)
    lines = [line.strip() for line in indented.splitlines() if line.startswith('    ')]
    spans = [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', re.sub(r'^```.*?^```', '', text,
                                                                               flags=re.M | re.S))]
    return [line for line in (*lines, *spans) if re.match(r'(python|torchrun) .*(\.py|-m [\w.]+)( |$)', line)]


COMMANDS = [(page, command) for page, text in PAGES.items() for command in commands(text)]


def test_pages_are_there():
    assert {'README.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'docs/training.md', 'docs/guarantees.md'} <= PAGES.keys()
    assert len(PAGES['README.md'].splitlines()) < 120


@pytest.mark.parametrize('page', PAGES)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', PAGES[page]):
        if re.match(r'https?://', target):
            continue
        file, _, anchor = target.partition('#')
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text()), target


@pytest.mark.parametrize('page', [page for page in PAGES if page.startswith('docs/')])
def test_readme_links_each_page(page):
    assert f']({page})' in PAGES['README.md']


@pytest.mark.parametrize('page', [page for page in PAGES if page != 'CHANGELOG.md'])  # which names what is gone, too
def test_files_and_targets_of_make_that_are_named_exist(page):
    for path in re.findall(rf'(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w', PAGES[page]):
        assert (ROOT / path).exists(), path
    targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M)
    for named in re.findall(r'(?:`|^    )make ([a-z-]+)', PAGES[page], re.M):
        assert named in targets, named


@pytest.mark.parametrize('page', [page for page in PAGES if page != 'CHANGELOG.md'])
def test_flags_that_are_named_exist(page):
    flags = {flag for parser in (*PARSERS.values(), torchrun_parser()) for action in parser._actions
             for flag in action.option_strings}
    of_others = {flag for file in (*(ROOT / 'benchmarks').glob('*.py'), *ROOT.glob('timm_sam/*/__main__.py'))
                 for flag in re.findall(r'"(--[a-z-]+)"', file.read_text())}
    named = set(re.findall(r'(?<![\w-])--[a-z]+(?:-[a-z]+)*(?![\w-])', PAGES[page]))
    assert named <= flags | of_others | {'--help'}


@pytest.mark.parametrize('page, command', COMMANDS, ids=[f'{page}: {command[:40]}' for page, command in COMMANDS])
def test_commands_parse(page, command):
    words = [word for word in shlex.split(command) if word != '...']
    if words[0] == 'torchrun':
        launched = torchrun_parser().parse_args(words[1:])
        name, arguments = launched.training_script, launched.training_script_args
    else:
        name, arguments = (words[2], words[3:]) if words[1] == '-m' else (words[1], words[2:])
    module = ROOT / name.replace('.', '/')
    assert (ROOT / name).exists() or module.with_suffix('.py').exists() or (module / '__main__.py').exists()
    if name in ('timm_sam.analyze', 'timm_sam.paper'):  # whose flags are those of what is named next
        name, arguments = ' '.join([name, *arguments[:1]]), arguments[1:]
    if name == 'timm_sam.sweep' and arguments:  # which takes train.py's, too
        given, arguments = sweep_parser().parse_known_args(arguments)
        name, arguments = 'train.py', [*arguments, *cells(given.grid, given.plain)[-1].flags]
    if name not in PARSERS or not arguments:
        return
    args = PARSERS[name].parse_args(arguments)
    if getattr(args, 'config', ''):
        assert recipes.find(args.config, str(ROOT))


def passed_on(flag):
    """Whether torchrun leaves a flag of a script to it: it takes what begins several of its own flags for a mistake."""
    try:
        return torchrun_parser().parse_args(['-m', 'x', flag, '1']).training_script_args == [flag, '1']
    except SystemExit:
        return False


@pytest.mark.parametrize('name', [name for name in PARSERS if name.startswith('timm_sam.')])
def test_every_flag_has_a_name_that_torchrun_passes_on(name):
    for action in PARSERS[name]._actions:
        assert not action.option_strings or any(map(passed_on, action.option_strings)), action.option_strings


@pytest.mark.parametrize('page', [page for page in PAGES if '```python' in PAGES[page]])
def test_python_examples_run(page):
    model = TinyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    batches = [batch(seed, dtype=torch.float32) for seed in range(2)]
    names = dict(torch=torch, model=model, optimizer=optimizer, criterion=torch.nn.CrossEntropyLoss(), loader=batches,
                 micro_batches=batches, accumulation_steps=1, epochs=2, update=0,
                 scaler=torch.amp.GradScaler('cpu', init_scale=8.0))
    before = [p.detach().clone() for p in model.parameters()]
    for block in re.findall(r'^```python\n(.*?)^```', PAGES[page], re.M | re.S):
        exec(block, names)
    if 'x' in names:  # some block of the page is a loop
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before))
