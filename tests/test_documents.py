"""What README and docs show is run, and every file that they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mmengine.registry import HOOKS

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
    links = re.findall(r'\]\((?!https?://|#)([^)#]+)', document.read_text())
    assert not {link for link in links if not (document.parent / link).exists()}


@pytest.mark.parametrize('block', PYTHON, ids=lambda block: block.splitlines()[0])
def test_the_readme_runs(block):
    """Each block by itself, as a user would paste it."""
    names: dict = {}
    exec(compile(block, 'README.md', 'exec'), names)
    for hook in names.get('custom_hooks', ()):
        HOOKS.build(hook)


def test_the_readme_has_blocks():
    assert len(PYTHON) >= 2
