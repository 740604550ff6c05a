"""What `--help` says of defaults: each flag's once, in the words that the command line takes."""
import re

import pytest

from timm_sam import train
from timm_sam.analyze import options as analyses
from timm_sam.cli.parser import OptionParser


def helped(parser):
    """Help texts without line breaks, by flag."""
    texts = re.split(r'\n  (?=-)', parser.format_help())
    return {text.split()[0].rstrip(','): ' '.join(text.split()) for text in texts[1:]}


def test_default_is_added_to_texts_that_do_not_say_it():
    parser = OptionParser(prog='p')
    parser.add_argument('--one', default=1, help='a number')
    parser.add_argument('--two', help='a number (required with --one)')
    parser.add_argument('--three', default=[object()], help='numbers (default: 1,2)')
    said = helped(parser)
    assert [said[f'--{name}'].partition(' number')[2] for name in ('one', 'two')] == [
        ' (default: 1)', ' (required with --one)']
    assert said['--three'].endswith('numbers (default: 1,2)')


@pytest.mark.parametrize('build', [train.build_parser, lambda: analyses.build_parser('sharpness'),
                                   lambda: analyses.build_parser('card')], ids=['train', 'sharpness', 'card'])
def test_no_flag_has_two_defaults_or_one_that_is_no_value_of_it(build):
    said = helped(build())
    assert len(said) > 50
    assert [text for text in said.values() if len(re.findall(r'\((?:default|required)\b', text)) > 1] == []
    assert [text for text in said.values() if 'Measured(' in text or '``' in text] == []


@pytest.mark.parametrize('command, default', [
    ('sharpness', 'worst-linf=0.003,0.005,0.007 step-linf=0.007,0.01,0.03'),
    ('card', 'worst-linf=0.003 average-l2=0.1')])
def test_measures_of_the_help_are_those_that_are_taken(command, default):
    parser = analyses.build_parser(command)
    (text,) = (action.help for action in parser._actions if action.dest == 'measure')
    assert text.endswith(f'(default: {default})')
    given = [measured for part in parser.parse_args(['--measure', *default.split()]).measure for measured in part]
    assert parser.get_default('measure') == given
