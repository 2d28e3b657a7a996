"""The documentation as a site: it is built, and every page is opened in a real browser."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest

from support.browser import browser, find_browser

ROOT = Path(__file__).parents[1]
PACKAGES = ('sphinx', 'myst_parser', 'furo', 'sphinx_copybutton')
LACKING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKING), reason=f'{LACKING} lacking: `make docs` installs them'),
]


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    """The folder of the site; a warning of Sphinx is an error."""
    folder = tmp_path_factory.mktemp('site')
    build = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'html']
    done = subprocess.run(
        [*build, str(ROOT / 'docs'), str(folder)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope='module')
def page():
    if find_browser() is None:
        pytest.skip('no Chromium is found; DYREP_BROWSER may name one')
    with browser() as page:
        yield page


def pages_of(site: Path) -> list[Path]:
    return sorted(site.glob('*.html'))


def test_every_page_is_there(site):
    written = {file.stem for file in (ROOT / 'docs').glob('*.md')}
    assert written <= {file.stem for file in pages_of(site)}


def test_docstrings_are_in_the_options(site):
    text = (site / 'options.html').read_text()
    for words in ('t of Algorithm 1, epochs or iterations', 'Structure file', 'Raises'):
        assert words in text


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1280, 390])
def test_pages_open(site, page, width, scheme):
    """Nothing is wrong, nothing is asked for, pictures are there, no page scrolls sideways."""
    wrong = {}
    for file in pages_of(site):
        page.said.clear()
        page.asked.clear()
        page.open(file, width, scheme=scheme)
        broken = page.value('[...document.images].filter(i => !i.naturalWidth).map(i => i.src)')
        seen = page.value('document.documentElement.scrollWidth')
        if page.said or page.asked or broken or seen != width:
            wrong[file.name] = [*page.said, *page.asked, *broken, seen]
    assert not wrong


def test_links_lead_somewhere(site, page):
    """Every link to a file of the site, and its anchor."""
    ids, links = {}, {}
    for file in pages_of(site):
        page.open(file)
        ids[file.resolve()] = set(
            page.value('[...document.querySelectorAll("[id]")].map(e => e.id)')
        )
        links[file] = page.value('[...document.querySelectorAll("a[href]")].map(a => a.href)')
    wrong = []
    for file, targets in links.items():
        for target in targets:
            address, anchor = urldefrag(target)
            if not address.startswith('file:'):
                continue
            path = Path(unquote(urlparse(address).path))
            known = ids.get(path)
            if not path.is_file() or (
                anchor and known is not None and unquote(anchor) not in known
            ):
                wrong.append(f'{file.name}: {target}')
    assert not wrong
    assert sum(map(len, links.values())) > 200


def test_formulas_are_drawn(site, page):
    page.open(site / 'how_it_works.html')
    sizes = page.value(
        '[...document.querySelectorAll("math")].map(m => m.getBoundingClientRect().width)'
    )
    assert len(sizes) > 8
    assert min(sizes) > 3
