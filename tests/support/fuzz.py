"""Command lines and YAML files at random, the same for the same seed, most of them wrong."""
import random

# what YAML makes of these is a null, a date, a number, a list, text and more, or an error
TEXTS = ('null', '~', 'true', 'no', '2020-01-01', '2020-01-01 10:00:00', '2020-13-45', '12:30:45', '0x1f', '0o17',
         '0b1', '1_000', '.nan', '.inf', '-.inf', '1e3', '1e-3', '1e400', '-1', '0', '1', '2', '0.5', '-0.5', '1.5',
         '9' * 30, '9' * 5000, '0x' + 'f' * 3000, '!!int x', '!!float x', '!!bool x', '!!timestamp x', '!!binary "a"',
         '!!null x', '!!set {a, b}', '!!omap [a: 1]', '!!pairs [a: 1]', '!!str 5', '!!python/name:os.system', '!x y',
         '[]', '{}', '[1]', '[1, 2]', '[0, 0]', '[1, 2, 3]', '[-1]', '[.nan, 1]', '[[1]]', '[null]', '["", ""]',
         '{a: 1}', '{1: 2}', '{a: [1, {b: null}]}', '{a: "\\0"}', '""', '"a b"', '"\\0"', '"\\ud800"', '"\\udc80"',
         '"\\x1b[31m"', '"é\\u2028"', "'../..'", '/', '.', 'x', "'%s'", '"a\\nb"', '[' * 40 + ']' * 40, '[' * 400,
         '&a [*a]', '*b', '<<', '"="', '-')
# what a flag is given
WORDS = ('nan', 'inf', '-inf', '-1', '0', '1', '2', '3', '0.5', '1.5', '-0.0', '1e3', '1e-9', '1e400', '1e-400',
         '9' * 30, '9' * 5000, '2147483647', '0x10', '1_0', '', ' ', 'x', '.', '/', '..', 'None', 'True', '[]', 'a=1',
         'a=[1,2]', 'a=((((', 'a=1=2', 'a=1.2.3', '=', 'a=' + '(' * 300, '\udc80', '\x1b[31m', 'é\u2028', '%', '%s',
         '{}', '*', '(a+)+$', 'sgd', 'auto', 'linear', 'cosine', 'l2=1', 'linf=1/0', 'rand-m9', 'bicubic', 'a,b',
         '1,2', ',')
# what may be trained with for a moment
SMALL = ('nan', '-1', '0', '1', '2', '3', '4', '8', '0.5', '0.1', '1e-9', '1e30')


def flags_of(parser, without):
    return [action for action in parser._actions if action.option_strings and action.dest not in without]


def words_for(action, draw, words):
    """A flag and its values, as argparse wants them or not."""
    flag = draw.choice(action.option_strings)
    if action.nargs == 0:
        return [flag]
    if action.choices is not None and draw.random() < 0.7:
        return [flag, str(draw.choice(list(action.choices)))]
    count = action.nargs if isinstance(action.nargs, int) else draw.choice((1, 1, 2, 3)) if action.nargs in (
        '+', '*') else 1
    values = [draw.choice(words) for _ in range(count)]
    if count == 1 and flag.startswith('--') and draw.random() < 0.8:
        return [f'{flag}={values[0]}']
    return [flag, *values]


def command(parser, seed, without=(), words=WORDS, most=4, text=True):
    """A few flags; only numbers, choices and switches without `text`."""
    draw = random.Random(seed)
    actions = [action for action in flags_of(parser, {'help', 'config', *without})
               if text or action.nargs == 0 or action.choices is not None or action.type not in (None, str)]
    return [word for action in draw.sample(actions, draw.randint(1, most)) for word in words_for(action, draw, words)]


def yaml_text(parser, seed):
    """A file of a few keys, or of something else."""
    draw = random.Random(seed)
    keys = [action.dest for action in parser._actions if action.dest not in ('help', 'config')]
    lines = [f'{draw.choice(keys) if draw.random() < 0.95 else draw.choice(TEXTS)}: {draw.choice(TEXTS)}'
             for _ in range(draw.choice((1, 1, 1, 2, 3)))]
    if draw.random() < 0.05:
        lines.append(draw.choice(('base: c.yaml', 'base: nowhere', 'base: .', '- x', '---', '...', '\t', 'x: y: z')))
    return '\n'.join(lines) + '\n'
