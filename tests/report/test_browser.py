"""The page in a real browser, as people open it."""

from __future__ import annotations

import pytest

from dyrep_mm.report.data import read_runs
from dyrep_mm.report.page import make_report
from support.browser import browser, find_browser

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason='no Chromium is found; DYREP_BROWSER may name one'
)


@pytest.fixture(scope='module')
def page():
    with browser() as page:
        yield page


@pytest.fixture(scope='module')
def file(r50, plain, trained, tmp_path_factory):
    report = make_report(read_runs([str(r50[0]), str(plain), trained.work_dir]))
    file = tmp_path_factory.mktemp('page') / 'report.html'
    file.write_text(report.html())
    return file


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1280, 390])
def test_it_opens(page, file, width, scheme):
    """Nothing is wrong, nothing is asked for, and figures scroll in their places, not the page."""
    page.open(file, width, scheme=scheme)
    assert page.said == []
    assert page.asked == []
    assert page.value('document.documentElement.scrollWidth') == width
    assert page.value('document.querySelectorAll("svg").length') > 20
    colours = [page.value(f'getComputedStyle({of}).{what}') for of, what in PAINTED]
    background, ink, letters = (sum(map(int, c[4:-1].split(','))) / 3 for c in colours)
    assert ink == letters
    assert (background > 200, ink < 80) == ((True, True) if scheme == 'light' else (False, False))


#: What must stand out: the page, its text, the text of a figure.
PAINTED = [
    ('document.body', 'backgroundColor'),
    ('document.body', 'color'),
    ('document.querySelector("svg text")', 'fill'),
]


def test_every_picture_is_seen(page, file):
    page.open(file)
    sizes = page.value(
        '[...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect())'
        '.map(r => [r.width, r.height])'
    )
    assert min(min(size) for size in sizes) > 100


def test_the_watch_sees_what_is_wrong(page, tmp_path):
    """A page that does what ours must not."""
    bad = tmp_path / 'bad.html'
    bad.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("no"); f()</script>')
    page.open(bad)
    said, asked = list(page.said), list(page.asked)
    page.said.clear()
    page.asked.clear()
    assert asked == ['http://127.0.0.1:9/x.png']
    assert len(said) >= 2
