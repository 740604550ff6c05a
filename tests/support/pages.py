"""HTML as a browser takes it apart: tables, anchors, links, pictures and scripts."""
import base64
import hashlib
import re
from html.parser import HTMLParser

VOID = {'meta', 'img', 'br', 'link', 'input', 'base', 'hr'}


class Page(HTMLParser):
    """What a file of HTML holds.

    Attributes:
        tags: All names of elements.
        ids: All anchors, in their order.
        hrefs: Targets of all links.
        images: (source, words) of each.
        raw: Element -> contents, of scripts and styles.
        policy: What the page allows itself.
        tables: Of each the rows, of cells: dict(text, id, key, all, missing, links).
        text: All that is read, but for scripts and styles.
    """

    def __init__(self, content):
        super().__init__()
        self.tags, self.ids, self.hrefs, self.images, self.tables = [], [], [], [], []
        self.raw = {'script': [], 'style': []}
        self.attributes, self.policy, self.text = set(), None, ''
        self._open, self._cell = [], None
        self.feed(content)
        self.close()
        assert self._open == [], 'elements that are not closed'

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.attributes |= attrs.keys()
        if tag not in VOID:
            self._open.append(tag)
        if 'id' in attrs:
            self.ids.append(attrs['id'])
        if tag == 'meta' and attrs.get('http-equiv') == 'Content-Security-Policy':
            self.policy = attrs['content']
        if tag == 'img':
            self.images.append((attrs['src'], attrs['alt']))
        if tag in self.raw:
            self.raw[tag].append('')
        if tag == 'table':
            self.tables.append([])
        if tag == 'tr':
            self.tables[-1].append([])
        if tag in ('td', 'th'):
            self._cell = dict(text='', id=attrs.get('id'), key=attrs.get('data-key'), all=[], links=[],
                              missing='data-missing' in attrs)
            self.tables[-1][-1].append(self._cell)
        if tag == 'a':
            self.hrefs.append(attrs['href'])
            if self._cell is not None:
                self._cell['links'].append(attrs['href'].removeprefix('#'))
                self._cell['all'] += attrs.get('data-all', '').split()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag in ('td', 'th'):
            self._cell = None

    def handle_data(self, data):
        if self._open and self._open[-1] in self.raw:
            self.raw[self._open[-1]][-1] += data
            return
        self.text += data
        if self._cell is not None:
            self._cell['text'] += data

    def row(self, anchor):
        """The texts of the row that an anchor is in."""
        (found,) = (row for table in self.tables for row in table if any(cell['id'] == anchor for cell in row))
        return [cell['text'] for cell in found]

    def assert_alone(self):
        """It needs nothing but itself, runs nothing but its own script, and its links lead somewhere."""
        assert len(self.ids) == len(set(self.ids)) and {href.removeprefix('#') for href in self.hrefs} <= set(self.ids)
        assert not {'link', 'iframe', 'object', 'embed', 'base', 'form'} & set(self.tags)
        assert not [name for name in self.attributes if name.startswith('on')] and 'style' not in self.attributes
        assert all(source.startswith('data:image/') for source, _ in self.images)
        for kind, contents in self.raw.items():
            (content,) = contents
            assert not re.search(r'https?:|//[a-z]|url\(|import', content)
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{kind}-src 'sha256-{digest}'" in self.policy
        assert "default-src 'none'; img-src data:;" in self.policy
