"""The table of guarantees, and every other page: each test that is named is there."""
import re

import pytest
from support.places import ROOT, TESTS

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')]}
# | subject | what happens | the tests that hold it |
ROWS = [line.strip('|').split(' | ') for line in PAGES['docs/guarantees.md'].splitlines() if line.startswith('| ')][1:]
NAMED = re.compile(r'`((?:\w+/)*test_\w+\.py)::(test_\w+)`')


def test_table_has_rows_of_three_columns():
    assert len(ROWS) >= 18 and all(len(row) == 3 for row in ROWS)


@pytest.mark.parametrize('held_by', [row[-1] for row in ROWS], ids=[row[0].strip() for row in ROWS])
def test_guarantee_names_tests(held_by):
    assert NAMED.findall(held_by)


@pytest.mark.parametrize('page', PAGES)
def test_tests_that_a_page_names_exist(page):
    for file, name in NAMED.findall(PAGES[page]):
        (path,) = TESTS.rglob(file)
        assert re.search(rf'^def {name}\(', path.read_text(), re.M), f'{file}::{name}'
