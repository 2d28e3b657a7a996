"""Draw the pictures of how_it_works.md that no run makes: ``python docs/pictures.py``.

The cells of Table 1 are read off the merged kernels of real branches.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import nn

import dyrep_mm
from dyrep_mm.reparam.branches import OPERATIONS, ORIGIN, kernel_of
from dyrep_mm.reparam.geometry import pad
from dyrep_mm.report.drawing import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    Picture,
    colour_of,
    figure,
)

IMAGES = Path(__file__).parent / 'images'

#: How each operation becomes a kernel (k, k); F1 and F2 are kernels, folded with their BN.
FORMULAS = {
    'kxk': 'F',
    '1x1': 'F1, padded',
    '1x1-kxk': 'F2 times F1',
    '1x1-avg': 'F1 / k², all',
    '1xk': 'F1, padded',
    'kx1': 'F1, padded',
    'identity': '1 on the diagonal',
}

Cells = tuple[tuple[bool, ...], ...]


def filled(kernel_size: int = 3, channels: int = 4) -> dict[str, Cells]:
    """The places (k, k) of the kernel in which each operation has weights."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
    block = dyrep_mm.grow(nn.ModuleDict({'conv': conv}), 'conv').eval()
    cells = {}
    for name in OPERATIONS:
        weight = kernel_of(block.branches[name]).weight.detach()
        margin = ((kernel_size - weight.shape[-2]) // 2, (kernel_size - weight.shape[-1]) // 2)
        weight = pad(weight, margin)
        cells[name] = tuple(tuple(row) for row in (weight.abs().amax((0, 1)) > 0).tolist())
    return cells


def table_1() -> Picture:
    """Every operation as the part of a kernel that it fills."""
    cells = filled()
    counts = {name: sum(map(sum, rows)) for name, rows in cells.items()}
    said = ', '.join(f'{name} {n} of 9' for name, n in counts.items())
    return Picture(
        'table1',
        'The operations of Table 1 as parts of a 3x3 kernel',
        f'Places with weights: {said}. Their sum is one 3x3 kernel.',
        partial(_draw_table_1, cells),
    )


def _draw_table_1(cells: dict[str, Cells]) -> Figure:
    cell, wide, gap = 18, 82, 16
    width, height = len(cells) * (wide + gap) + 40, 128
    ax = _canvas(width, height)
    fig = ax.figure
    for i, (name, rows) in enumerate(cells.items()):
        left = 6 + i * (wide + gap)
        centre = left + wide / 2
        ax.text(centre, 12, name, ha='center', va='center', fontsize=11, weight='bold', color=INK)
        start = centre - len(rows) * cell / 2
        for y, row in enumerate(rows):
            for x, full in enumerate(row):
                corner = (start + x * cell, 28 + y * cell)
                colour = colour_of(name) if full else 'none'
                size = (cell - 2, cell - 2)
                ax.add_patch(Rectangle(corner, *size, fc=colour, ec=FAINT, lw=0.8))
        words = FORMULAS[name]
        ax.text(centre, 96, words, ha='center', va='center', fontsize=10, color=MUTED)
        sign = '+' if i < len(cells) - 1 else '='
        at = left + wide + gap / 2
        ax.text(at, 53, sign, ha='center', va='center', fontsize=15, color=INK)
    ax.text(width - 18, 53, 'one\nconv', ha='center', va='center', fontsize=10.5, color=INK)
    ax.text(10, 119, _note(cells), ha='left', va='center', fontsize=10, color=MUTED)
    return fig


def _note(cells: dict[str, Cells]) -> str:
    assert all(all(row) for row in cells[ORIGIN])
    return (
        'Each branch ends in a BN, which folds into its kernel. '
        'An identity needs equal channels and no stride.'
    )


#: What mmengine does in an iteration, and what the hook does at an update, in order.
ITERATION = ('forward', 'backward', 'score', 'step')
UPDATE = ('measure', 'decide', 'insert', 'calibrate', 'settle', 'prune', 'follow')
EXPLAINED = {
    'forward': 'losses',
    'backward': 'gradients',
    'score': 'all convs',
    'step': 'optimizer',
    'measure': 'blocks anew',
    'decide': 'rank 0',
    'insert': 'blocks',
    'calibrate': 'BN statistics',
    'settle': 'Eq. 6',
    'prune': 'Eq. 10',
    'follow': 'EMA, optimizer,\nDDP, journal',
}


def algorithm() -> Picture:
    """One iteration and one update."""
    said = 'Every iteration: ' + ', '.join(ITERATION) + '. Every interval: ' + ', '.join(UPDATE)
    return Picture(
        'algorithm',
        'One iteration and one update of Algorithm 1',
        f'{said}. The hook scores, and does the update; the rest is mmengine.',
        _draw_algorithm,
    )


def _draw_algorithm() -> Figure:
    box, tall, gap, left = 78, 46, 14, 88
    width, height = left + len(UPDATE) * (box + gap) + 4, 186
    ax = _canvas(width, height)
    for title, words, top, names in (
        ('iteration', 'every one', 22, ITERATION),
        ('update', 'every interval', 112, UPDATE),
    ):
        ax.text(6, top + 15, title, ha='left', va='center', fontsize=11, weight='bold', color=INK)
        ax.text(6, top + 31, words, ha='left', va='center', fontsize=9.5, color=MUTED)
        for i, name in enumerate(names):
            x = left + i * (box + gap)
            ours = names is UPDATE or name == 'score'
            colour = (BLUE if name == 'score' else GREEN) if ours else MUTED
            _box(ax, x, top, box, tall, colour, name, EXPLAINED[name])
            if i:
                _arrow(ax, (x - gap + 3, top + tall / 2), (x - 3, top + tall / 2))
    last = left + len(ITERATION) * (box + gap)
    # Back to the next iteration, and down to the update.
    ax.plot([last - gap, last + 12], [44, 44], color=MUTED, lw=1.1)
    ax.plot([last + 12, last + 12], [44, 8], color=MUTED, lw=1.1)
    ax.plot([last + 12, left + box / 2], [8, 8], color=MUTED, lw=1.1)
    _arrow(ax, (left + box / 2, 8), (left + box / 2, 20))
    ax.text(last + 20, 26, 'next iteration', ha='left', va='center', fontsize=9.5, color=MUTED)
    ax.plot([last + 12, last + 12], [44, 90], color=ORANGE, lw=1.3)
    ax.plot([last + 12, left + box / 2], [90, 90], color=ORANGE, lw=1.3)
    _arrow(ax, (left + box / 2, 90), (left + box / 2, 110), ORANGE)
    words = 'after t epochs or iterations'
    ax.text(last + 20, 78, words, ha='left', va='center', fontsize=9.5, color=INK)
    for x, colour, words in (
        (left, MUTED, 'mmengine'),
        (left + 86, BLUE, 'the hook, before the step'),
        (left + 246, GREEN, 'the hook, in one transaction, the same on every process'),
    ):
        ax.add_patch(Rectangle((x, 172), 9, 9, fc=colour, alpha=0.35, ec=colour))
        ax.text(x + 14, 177, words, ha='left', va='center', fontsize=9.5, color=INK)
    return ax.figure


def _canvas(width: float, height: float) -> Axes:
    """Axes of which the units are points, from the upper left corner."""
    ax = figure(width, height).add_axes((0, 0, 1, 1))
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.axis('off')
    return ax


def _box(
    ax: Axes, x: float, y: float, width: float, height: float, colour: str, name: str, words: str
) -> None:
    for fill, alpha, edge in ((colour, 0.22, 'none'), ('none', 1.0, colour)):
        patch = FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle='round,pad=0,rounding_size=4',
            fc=fill,
            alpha=alpha,
            ec=edge,
            lw=1.3,
        )
        ax.add_patch(patch)
    lines = words.count('\n') + 1
    ax.text(x + width / 2, y + 17 - 5 * (lines - 1), name, ha='center', va='center', fontsize=10.5)
    ax.text(x + width / 2, y + 32 - 2 * (lines - 1), words, ha='center', va='center', fontsize=9)


def _arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = MUTED
) -> None:
    arrow = {'arrowstyle': '-|>', 'color': colour, 'lw': 1.2, 'shrinkA': 0, 'shrinkB': 0}
    ax.annotate('', end, start, arrowprops=arrow)


def pictures() -> list[Picture]:
    """All of them."""
    return [table_1(), algorithm()]


if __name__ == '__main__':
    for picture in pictures():
        (IMAGES / f'{picture.name}.svg').write_text(picture.svg_file())
