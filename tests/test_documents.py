"""What README and docs show is run, and every file that they name is there."""

from __future__ import annotations

import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
from mmengine.registry import HOOKS

import dyrep_mm

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted(ROOT.glob('*.md')),
    *sorted((ROOT / 'docs').rglob('*.md')),
    *sorted((ROOT / 'configs').rglob('*.md')),
]
NAMED = re.compile(r'(?<![\w/.<-])(?:configs|tools|tests|docs|dyrep_mm)/[\w./-]*\w\.(?:py|md|sh)\b')
PYTHON = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(document):
    missing = {name for name in NAMED.findall(document.read_text()) if not (ROOT / name).is_file()}
    assert not missing


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = re.findall(r'\]\((?!https?://)([^)]+)\)', outside_of_code(document.read_text()))
    wrong = []
    for link in links:
        name, _, anchor = link.partition('#')
        file = document.parent / name if name else document
        if not file.exists() or (anchor and anchor not in anchors(file.resolve())):
            wrong.append(link)
    assert not wrong


def outside_of_code(text: str) -> str:
    return re.sub(r'^(`{3,}|:{3,})[^\n]*\n.*?^\1', '', text, flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(document: Path) -> set[str]:
    """What a code host, and MyST, call the headings of a document."""
    headings = re.findall(r'^#+ +(.+)$', outside_of_code(document.read_text()), re.MULTILINE)
    words = [re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading).lower() for heading in headings]
    return {re.sub(r'[^\w\- ]', '', word).strip().replace(' ', '-') for word in words}


def test_anchors_are_those_of_a_code_host(tmp_path):
    (tmp_path / 'page.md').write_text(
        "# `a_b`: what, if\n```sh\n# no heading\n```\n## C's [d](e.md)\n"
    )
    assert anchors(tmp_path / 'page.md') == {'a_b-what-if', 'cs-d'}


def test_every_page_is_listed():
    """In a toctree of the index, without which Sphinx warns."""
    listed = re.findall(r'^(\w+)$', (ROOT / 'docs/index.md').read_text(), re.MULTILINE)
    pages = {file.stem for file in (ROOT / 'docs').glob('*.md')} - {'index'}
    assert pages <= set(listed)
    assert len(listed) == len(set(listed))


def test_every_option_is_described():
    """The site shows the docstring, and nothing else describes all options."""
    arguments = dyrep_mm.DyRepHook.__doc__.partition('Args:')[2].partition('Raises:')[0]
    described = re.findall(r'^ {8}(\w+): ', arguments, re.MULTILINE)
    assert described == list(inspect.signature(dyrep_mm.DyRepHook).parameters)


def test_every_public_name_is_on_the_page_of_options():
    page = (ROOT / 'docs/options.md').read_text()
    shown = set(re.findall(r'^\.\. auto\w+:: (\w+)$', page, re.MULTILINE))
    assert shown >= set(dyrep_mm.__all__) - {'__version__'}


@pytest.mark.parametrize('page', ['how_it_works', 'faq'])
def test_the_code_of_a_page_runs(page):
    """All blocks of it, one after another."""
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / f'docs/{page}.md').read_text(), re.DOTALL)
    exec(compile('\n'.join(blocks), page, 'exec'), {})
    assert any('assert ' in block for block in blocks)


def test_pictures_are_those_of_the_script():
    """What they say is read off real kernels; how they are drawn depends on matplotlib."""
    spec = importlib.util.spec_from_file_location('pictures', ROOT / 'docs/pictures.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for picture in module.pictures():
        file = (ROOT / f'docs/images/{picture.name}.svg').read_text()
        assert f'>{picture.title}</title>' in file
        assert f'>{picture.description}</desc>' in file


@pytest.mark.parametrize('block', PYTHON, ids=lambda block: block.splitlines()[0])
def test_the_readme_runs(block):
    """Each block by itself, as a user would paste it."""
    names: dict = {}
    exec(compile(block, 'README.md', 'exec'), names)
    for hook in names.get('custom_hooks', ()):
        HOOKS.build(hook)


def test_the_readme_has_blocks():
    assert len(PYTHON) >= 2
