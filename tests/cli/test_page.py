"""Documents as Markdown and as HTML: what stands where, what leads where, and names that would act if they could."""
import base64

import pytest
from support.pages import Page

from timm_sam.cli.document import Document, Entry, Figure, Link, Points, Section, Table, as_markdown
from timm_sam.cli.page import as_html

ACTING = ('<script>alert(1)</script>', '" onmouseover="alert(1)" x="', "' autofocus onfocus='alert(1)",
          '</td></table><h1>', '{{ 7 * 7 }}{% raw %}', 'a\x1b[2J\u202eb', '&lt;b&gt;', '</style></title>')


def document(*blocks, title='Title'):
    return Document(title, ['Before.'], [Section('First', blocks), Section('Second', ['After.'])])


def page(*blocks, folder='.', title='Title'):
    found = Page(as_html(document(*blocks, title=title), str(folder)))
    found.assert_alone()
    return found


def test_markdown():
    table = Table(['name', 'n'], [
        ['a|b', Entry('1.5 ± 0.1', ' (3) ≈', strong=True, underlined=True, number=1.5, links=[Link('run-1', '#1')])],
        [Entry('runs/a_b', code=True, anchor='x'), Entry('-2.00', links=[Link('run-1', '#1')], spelled=True)]], left=1)
    assert as_markdown(document(table, Figure('a.png', 'what *is* seen'), Points(['one', '- two']))) == (
        '# Title\n\nBefore.\n\n## First\n\n'
        '| name | n |\n|---|---:|\n| a&#124;b | <u>**1.5 ± 0.1**</u> (3) ≈ |\n| `runs/a_b` | -2.00 |\n\n'
        '![what \\*is\\* seen](a.png)\n\n- one\n- \\- two\n\n## Second\n\nAfter.\n')


def test_page_has_the_same_texts_links_and_keys():
    table = Table(['', 'in', 'n'], [
        ['x', 'b', Entry('1.50 ± 0.10', ' (3)', number=1.5, links=[Link('run-1', '#1'), Link('run-2', '#2')])],
        ['y', 'a', Entry('–')],
        [Entry('z', anchor='run-1'), Entry('a', anchor='run-2'),
         Entry('2', number=float('nan'), links=[Link('run-1', '#1'), Link('run-2', '#2')], spelled=True)]], left=2)
    found = page(table, Points(['one', 'two']))
    (rows,) = found.tables
    assert [[cell['text'] for cell in row] for row in rows] == [
        ['', 'in', 'n'], ['x', 'b', '1.50 ± 0.10 (3)'], ['y', 'a', '–'], ['z', 'a', '2 #1 #2']]
    first, second, third = (row[2] for row in rows[1:])
    assert first['key'] == '1.5' and first['links'] == ['run-1'] and first['all'] == ['run-1', 'run-2']
    assert second['missing'] and second['links'] == [] and not first['missing']
    assert third['key'] is None and third['links'] == ['run-1', 'run-1', 'run-2']
    assert 'section-2' in found.ids and all(word in found.text for word in ('Title', 'Before.', 'Second', 'two'))


def test_key_is_the_whole_number():
    (rows,) = page(Table(['n'], [[Entry('0.33', number=1 / 3)], [Entry('1', number=1)]])).tables
    assert [float(row[0]['key']) for row in rows[1:]] == [1 / 3, 1.0]


@pytest.mark.parametrize('name', ACTING)
def test_names_are_only_text(tmp_path, name):
    (tmp_path / 'a.png').write_bytes(b'\x89PNG')
    plain = page(Table(['x'], [[Entry('x', 'x', links=[Link('y', 'x')], anchor='y')]]), Figure('a.png', 'x'),
                 Points(['x']), 'x', folder=tmp_path)
    found = page(Table([name], [[Entry(name, name, links=[Link('y', name)], anchor='y')]]), Figure('a.png', name),
                 Points([name]), name, folder=tmp_path, title=name)
    assert found.tags == plain.tags and found.ids == plain.ids and found.attributes == plain.attributes
    shown = name.replace('\x1b', r'\x1b').replace('\u202e', r'\u202e')
    assert found.tables[0][1][0]['text'] == f'{shown} {shown}' and found.images[0][1] == shown
    assert found.text.count(shown) >= 7


def test_figures_are_inside(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'\x89PNG of a')
    (tmp_path / 'b.svg').write_text('<svg/>')
    png, svg = page(Figure('a.png', 'of a'), Figure('b.svg', 'of b'), folder=tmp_path).images
    assert png == (f"data:image/png;base64,{base64.b64encode(b'%cPNG of a' % 0x89).decode()}", 'of a')
    assert svg[0].startswith('data:image/svg+xml;base64,')
    with pytest.raises(OSError):
        page(Figure('c.png', 'gone'), folder=tmp_path)


def test_row_of_another_length_is_found():
    with pytest.raises(ValueError, match='a row of 1 cells below a header of 2'):
        Table(['a', 'b'], [['1']])
