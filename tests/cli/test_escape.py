"""Foreign names in logs, Markdown and CSV: they show, and do nothing."""
import csv
import io
import logging

import pytest
from support.running import logging_as_before

from timm_sam.cli.errors import report
from timm_sam.cli.escape import csv_cell, markdown_code, markdown_text, printable, setup_logging
from timm_sam.cli.text import csv_text, markdown

# a title set for the terminal, a torn line, text from right to left, a name that is no UTF-8
ACTING = 'a\x1b]0;b\x07c\nd\r\x9be\u202ef\udcffg\u2028h\x00'


def test_printable():
    shown = printable(ACTING)
    assert shown == r'a\x1b]0;b\x07c\nd\r\x9be\u202ef\udcffg\u2028h\x00' and shown.isprintable()
    shown.encode()  # whatever the name was, it can be written
    assert printable('Größe ± 日本 🙂 a\\b') == 'Größe ± 日本 🙂 a\\b'


@pytest.mark.parametrize('text, shown', [
    ('elementwise_l2_orig', 'elementwise_l2_orig'),  # within words an underscore is only that
    ('_x_ and __y__', r'\_x\_ and \_\_y\_\_'),
    ('**bold** `code`', r'\*\*bold\*\* \`code\`'),
    ('[click](javascript:x)', r'\[click\](javascript:x)'),
    ('![](http://tracker)', r'!\[\](http://tracker)'),
    ('<script>alert(1)</script>&amp;', '&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;'),
    ('a|b', 'a&#124;b'),
    ('\\|', '\\\\&#124;'),
    ('# no heading', r'\# no heading'),
    ('- no list', r'\- no list'),
    ('two\n# lines', r'two\\n# lines'),
    ('~~x~~ $y$', r'\~\~x\~\~ \$y\$'),
])
def test_markdown_text(text, shown):
    assert markdown_text(text) == shown


def test_name_is_one_cell_of_a_table():
    names = ['a|b', 'x\n| y | z |', '\\|', '`|`']
    for name in names:
        for cell in (markdown_text(name), markdown_code(name)):
            lines = markdown(['name', 'n'], [[cell, '1']]).split('\n')
            assert len(lines) == 3
            # GitHub splits a row at each bar without a backslash before it
            assert lines[2].replace('\\|', '').count('|') == 3, lines[2]


def test_code_is_fenced_by_more_backticks_than_it_has():
    assert markdown_code('runs/a b') == '`runs/a b`'
    assert markdown_code('a``b`c') == '```a``b`c```'
    assert markdown_code('`x') == '`` `x ``'
    assert markdown_code('a\x1bb') == r'`a\x1bb`'


@pytest.mark.parametrize('value, cell', [
    ('=HYPERLINK("http://x")', '\'=HYPERLINK("http://x")'), ('+1+1|cmd', "'+1+1|cmd"), ('-1+2', "'-1+2"),
    ('@SUM(A1)', "'@SUM(A1)"), ('\t=1', '\\t=1'), ('\r=1', '\\r=1'), ('-0.25', '-0.25'), ('+1e-3', '+1e-3'),
    ('-inf', '-inf'), ('a\x1b[2J', r'a\x1b[2J'), ('two\nlines', 'two\nlines'), ('', ''), (-3, -3), (None, None),
])
def test_csv_cell_is_no_formula(value, cell):
    assert csv_cell(value) == cell


def test_csv_file_has_no_formula():
    rows = list(csv.reader(io.StringIO(csv_text(['=a', 'b'], [['@c', -1.5], ['-0.5', 'd\udcff']]))))
    assert rows == [["'=a", 'b'], ["'@c", '-1.5'], ['-0.5', r'd\udcff']]


def test_log_line_is_one_line_without_escapes(capsys):
    with logging_as_before():
        logging.getLogger().handlers.clear()
        setup_logging()
        logging.getLogger('timm_sam.x').info(f'read {ACTING}')
        logging.getLogger('timm_sam.x').warning('read %s', 'a\x1b[2J\nWARNING: forged')
        try:
            raise RuntimeError('inside')
        except RuntimeError:
            logging.getLogger('timm_sam.x').exception('failed')
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [f'read {printable(ACTING)}', r'WARNING: read a\x1b[2J\nWARNING: forged', 'ERROR: failed']
    assert lines[3].startswith('Traceback') and lines[-1] == 'RuntimeError: inside'  # stays readable


def test_error_is_one_line_without_escapes(capsys):
    report('validate.py', 'a\x1b[2Jb\nc \u202ed')
    assert capsys.readouterr().err == 'validate.py: error: a\\x1b[2Jb c \\u202ed\n'
