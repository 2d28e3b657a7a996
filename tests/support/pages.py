"""What an HTML page holds, read with the parser of the standard library."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

_VOID = {'meta', 'link', 'br', 'wbr', 'img', 'hr', 'input'}
#: Attributes that make a browser ask for something.
_ASKING = {'src', 'href', 'xlink:href', 'srcset', 'data', 'action', 'poster'}


class Html(HTMLParser):
    """A page that was read.

    Attributes:
        asked: What it makes a browser ask for, but for places and data in itself.
        pictures: Attributes of every ``svg`` and ``img``.
        ids: How often each id is there.
        texts: Text of every element that has an id, in all that it holds.
        text: All text but scripts and styles.
        styles: Text of all style sheets.
        scripts: How many scripts it has.
    """

    def __init__(self, page: str):
        super().__init__()
        self.asked: list[str] = []
        self.pictures: list[dict[str, str]] = []
        self.ids: Counter[str] = Counter()
        self.texts: dict[str, str] = {}
        self.text, self.styles, self.scripts = '', '', 0
        self._open: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert not self._open, f'not closed: {self._open}'

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or '' for name, value in attrs}
        self.asked += [
            value
            for name, value in known.items()
            if name in _ASKING and not value.startswith(('#', 'data:'))
        ]
        self.scripts += tag == 'script'
        if tag in ('svg', 'img'):
            self.pictures.append(known)
        if 'id' in known:
            self.ids[known['id']] += 1
        if tag not in _VOID:
            self._open.append((tag, known.get('id')))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self._open.pop()
        assert opened == tag, f'{opened} is closed by {tag}'

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._open]
        if 'style' in tags:
            self.styles += data
        elif 'script' not in tags:
            self.text += data
        for _, name in self._open:
            if name is not None:
                self.texts[name] = self.texts.get(name, '') + data


def read_page(file: Path) -> Html:
    """The page in a file."""
    return Html(file.read_text())
