"""Flags that a command does not know: an error that names the nearest ones, never a guess."""
import pytest

from timm_sam import train, validate


@pytest.fixture(params=[train, validate], ids=['train', 'validate'])
def refusal(request, capsys):
    """The one line with which a command refuses its options."""
    def refuse(*argv):
        with pytest.raises(SystemExit) as stop:
            request.param.build_parser().parse_args(argv)
        shown = capsys.readouterr()
        assert stop.value.code == 2 and shown.out == '' and shown.err.count('\n') == 1
        return shown.err
    return refuse


@pytest.mark.parametrize('argv, nearest', [
    (['--bath-size', '3'], '--batch-size'),
    (['--batch-siz=3'], '--batch-size'),
    (['--torchcompile-mod', 'x'], '--torchcompile-mode'),
    (['--model_kwargs', 'a=1'], '--model-kwargs'),
    (['--no-prefetch'], '--no-prefetcher'),
])
def test_unknown_flag_is_an_error_that_names_the_nearest(refusal, argv, nearest):
    message = refusal(*argv)
    assert argv[0].partition('=')[0] in message and f'did you mean {nearest}' in message


def test_unknown_flag_that_is_like_none_says_so(refusal):
    message = refusal('--qqqqqq')
    assert '--qqqqqq is like no flag, see --help' in message


def test_every_unknown_flag_is_named(refusal):
    message = refusal('--seeed', '1', '--worker', '2')
    assert 'for --seeed did you mean --seed' in message and 'for --worker did you mean --workers' in message


@pytest.mark.parametrize('build', [train.build_parser, validate.build_parser])
def test_no_flag_can_be_abbreviated(build):
    """Of each flag all but its last letter, where that is not a flag itself."""
    parser = build()
    names = [name for action in parser._actions for name in action.option_strings if name.startswith('--')]
    for name in names:
        if name[:-1] not in names and len(name) > 4:
            assert parser.parse_known_args([name[:-1]])[1] == [name[:-1]]


@pytest.mark.parametrize('argv', [['-b8'], ['-b', '8'], ['--batch-size=8'], ['--batch-size', '8']])
def test_known_flags_are_read_in_every_spelling(argv):
    assert train.build_parser().parse_args(argv).batch_size == 8
