"""How figures look: sizes, colours for every eye in light and dark, and SVG to put into a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from dyrep_mm.reparam.branches import OPERATIONS, ORIGIN

# Colours of which the page says what they are: dark on light, light on dark.
INK = '#1b1f24'
MUTED = '#5c6570'
FAINT = '#d0d4d9'
VARIABLES = {INK: '--ink', MUTED: '--muted', FAINT: '--faint'}
DARK = {INK: '#e6e9ec', MUTED: '#a0a8b1', FAINT: '#3a424b'}

# Okabe and Ito's colours, which people with any colour vision tell apart; the yellow and the sky
# blue a little darker, so that they stand out on white.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY = (
    *('#0079bd', '#d55e00', '#009e73', '#d08a00', '#cc79a7', '#3d9fd8', '#8b939c'),
)

#: Of operations.
COLOURS = {
    ORIGIN: GREY,
    **dict(zip(OPERATIONS[1:], (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY), strict=True)),
}

#: Of methods that are laid side by side, in the order in which they come; with markers and dashes.
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)
MARKERS = 'osD^vPX'
DASHES = ('-', (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), '-', (0, (5, 2)), (0, (1, 1.5)))

STYLE: Any = {
    'font.family': 'sans-serif',
    'font.sans-serif': ['DejaVu Sans', 'Verdana', 'sans-serif'],
    'font.size': 11,
    'axes.titlesize': 11.5,
    'axes.titleweight': 'bold',
    'axes.titlelocation': 'left',
    'axes.labelsize': 11,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.linewidth': 0.8,
    'axes.grid': True,
    'axes.axisbelow': True,
    'axes.formatter.useoffset': False,
    'grid.color': FAINT,
    'grid.linewidth': 0.6,
    'text.color': INK,
    'axes.labelcolor': INK,
    'axes.titlecolor': INK,
    'axes.edgecolor': MUTED,
    'xtick.color': MUTED,
    'ytick.color': MUTED,
    'xtick.labelcolor': INK,
    'ytick.labelcolor': INK,
    'legend.frameon': False,
    'legend.fontsize': 10.5,
    'xtick.labelsize': 10.5,
    'ytick.labelsize': 10.5,
    'svg.fonttype': 'none',
    'svg.hashsalt': 'dyrep_mm',
    'figure.facecolor': 'none',
    'axes.facecolor': 'none',
    'savefig.facecolor': 'none',
}


def colour_of(operation: str) -> str:
    """The colour of an operation; those of other projects share one."""
    return COLOURS.get(operation, MUTED)


@dataclass
class Picture:
    """A figure with its words.

    Attributes:
        name: Of its file, without suffix.
        title: What is seen.
        description: The same for people who do not see it.
        draw: Draws it.
        columns: Of the table of the same data.
        rows: Of that table.
        note: What one must know to read it.
    """

    name: str
    title: str
    description: str
    draw: Callable[[], Figure]
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    note: str = ''
    _svg: str = field(default='', repr=False)

    def svg(self) -> str:
        """It as an SVG element, in the colours of the page that it is in."""
        if not self._svg:
            with style():
                file = io.StringIO()
                self.draw().savefig(file, format='svg', metadata={'Date': None, 'Creator': None})
            self._svg = for_page(file.getvalue(), self.name, self.title, self.description)
        return self._svg

    def svg_file(self) -> str:
        """It as a file of its own, light or dark as its reader has it."""
        light = ''.join(f'{name}:{colour};' for colour, name in VARIABLES.items())
        dark = ''.join(f'{name}:{DARK[colour]};' for colour, name in VARIABLES.items())
        sheet = f'<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>'
        svg = self.svg().replace('<svg ', '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        return svg.replace('<title ', f'{sheet}<title ', 1)

    def png(self) -> bytes:
        """It on white."""
        with style():
            file = io.BytesIO()
            self.draw().savefig(file, format='png', dpi=144, facecolor='white')
        return file.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Draw in our style, whatever the user's is."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def for_page(svg: str, name: str, title: str, description: str) -> str:
    """An SVG file as an element of a page that has several, with a text alternative."""
    svg = svg[svg.index('<svg') :]
    svg = re.sub(r'<!--.*?-->|<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
    # Only what is referred to needs a name, and no two in a page may be the same.
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else '', svg)
    svg = re.sub(r'(url\(#|href="#)', rf'\g<1>{name}-', svg.replace('xlink:href', 'href'))
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f'var({variable})')
    svg = re.sub(r'>\s+<', '><', svg)
    # Trailing digits are below a thousandth of a pixel.
    svg = re.sub(r'<[^>]*>', lambda tag: re.sub(r'(\d+\.\d{2})\d+', r'\1', tag[0]), svg)
    (width,) = re.findall(r'<svg[^>]* width="([\d.]+)pt"', svg)
    (box,) = re.findall(r'viewBox="([^"]+)"', svg)
    head = (
        f'<svg role="img" aria-labelledby="{name}-title {name}-text" viewBox="{box}" '
        f'width="{float(width):.0f}">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-text">{escape(description)}</desc>'
    )
    return re.sub(r'<svg[^>]*>', lambda _: head, svg, count=1)


def figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in points, which are pixels of a page."""
    return Figure(figsize=(width / 72, height / 72))
