"""The documentation as a site: ``make docs``. Pages stay plain Markdown that a code host shows."""

import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dyrep_mm.version import __version__  # noqa: E402

project = 'dyrep_mm'
release = version = __version__
language = 'en'

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx_copybutton',
]
exclude_patterns = ['_static', 'images']
nitpicky = False  # annotations name types of other projects, whose sites are not asked

# Files that a code host shows where they are, and the pages of the site that include them.
PAGES = {
    '../configs/README.md': 'configs.md',
    '../CONTRIBUTING.md': 'contributing.md',
    '../CHANGELOG.md': 'changelog.md',
}

myst_enable_extensions = ['dollarmath', 'colon_fence']
myst_heading_anchors = 4  # the anchors that a code host gives, which plain links use

autodoc_typehints = 'none'  # the signature has the defaults, the docstring what they mean
autodoc_member_order = 'bysource'
add_module_names = False
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = 'furo'
html_title = f'dyrep_mm {release}'
html_static_path = ['_static']
html_css_files = ['pages.css']
html_show_sourcelink = False
html_show_copyright = False
copybutton_exclude = '.linenos, .gp, .go'
copybutton_prompt_text = '$ '
# Formulas are elements of the page: nothing is loaded, and no script runs.
html_math_renderer = 'mathml'


def inline_math(translator, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def block_math(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>\n')
    raise nodes.SkipNode


def adapt(app, name: str, source: list[str]) -> None:
    """Let a page of plain Markdown lead to pages of the site."""
    for file, page in PAGES.items():
        source[0] = source[0].replace(f']({file}', f']({page}')


def shorten(app, what, name, thing, options, signature: str | None, returned: str | None):
    """An option whose default depends on the loop has no value to show."""
    return (signature or '').replace('=Ellipsis', '=...') or None, returned


def setup(app) -> None:
    app.connect('source-read', adapt)
    app.connect('autodoc-process-signature', shorten)
    app.add_html_math_renderer('mathml', (inline_math, None), (block_math, None))
