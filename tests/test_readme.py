import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / 'README.md').read_text().split('## What SAM does under ...')[1].split('\n\n')[1]
ROWS = [line.strip('|').split(' | ') for line in TABLE.splitlines()[2:]]


@pytest.mark.parametrize('subject, words, held_by', ROWS, ids=[row[0].strip() for row in ROWS])
def test_statement_of_the_readme_names_tests_that_exist(subject, words, held_by):
    named = re.findall(r'`(test_\w+\.py)::(test_\w+)`', held_by)
    assert named
    for file, name in named:
        assert f'\ndef {name}(' in (TESTS / file).read_text()
