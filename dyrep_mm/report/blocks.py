"""Every block at the end of a run, drawn as in Figure 6 of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

from dyrep_mm.reparam.branches import ORIGIN
from dyrep_mm.report.data import Run
from dyrep_mm.report.drawing import FAINT, INK, MUTED, Picture, colour_of, figure
from dyrep_mm.report.evolution import when
from dyrep_mm.report.history import MARK, depth, in_order, outermost
from dyrep_mm.report.words import count, number

#: Points: width and height of a box, space between two, what a block adds around its branches.
BOX, TALL, GAP, PAD, STEP = 88, 23, 9, 10, 14
#: Under the branches: importance and its bar, then the sum.
FOOT, SUM = 40, 32


@dataclass
class Chain:
    """A branch: operations one after the other, some of them blocks.

    Attributes:
        operation: Name of the branch.
        parts: Labels and blocks, from input to output.
        importance: Of the branch relative to ``kxk``; None where it is not known.
    """

    operation: str
    parts: list[str | Group]
    importance: float | None

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in points."""
        sizes = [(BOX, TALL) if isinstance(part, str) else part.size for part in self.parts]
        gaps = STEP * (len(sizes) - 1)
        return max(w for w, _ in sizes), sum(h for _, h in sizes) + gaps


@dataclass
class Group:
    """A block: branches side by side, and their sum."""

    path: str
    chains: list[Chain] = field(default_factory=list)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in points."""
        sizes = [chain.size for chain in self.chains]
        width = sum(w for w, _ in sizes) + GAP * (len(sizes) - 1)
        return width + 2 * PAD, max(h for _, h in sizes) + STEP + FOOT + SUM + PAD


def make_group(run: Run, path: str) -> Group:
    """The block at ``path`` with all blocks in it."""
    height, width = run.kernels.get(path, (None, None))
    known = run.importances.get(path, {})
    group = Group(path)
    for name in run.structure[path]:
        place = f'{path}{MARK}{name}'
        parts: list[str | Group] = list(_parts(name, height, width))
        for inner in run.structure:
            if run.structure[inner] and (inner == place or inner.rpartition('.')[0] == place):
                _put_in(parts, make_group(run, inner), inner[len(place) + 1 :])
        group.chains.append(Chain(name, parts, known.get(name)))
    return group


def _put_in(parts: list[str | Group], inner: Group, attribute: str) -> None:
    """Put a block in the place of the conv that it grew from: the first one is ``pre``."""
    convs = [i for i, part in enumerate(parts) if isinstance(part, str) and 'conv' in part]
    if convs:
        parts[convs[0] if attribute == 'pre' else convs[-1]] = inner
    else:
        parts.append(inner)


def _parts(name: str, height: int | None, width: int | None) -> Sequence[str]:
    h, w = height or 'k', width or 'k'
    return {
        ORIGIN: (f'{h}×{w} conv',),
        '1x1': ('1×1 conv', 'BN'),
        '1x1-kxk': ('1×1 conv', 'BN', f'{h}×{w} conv', 'BN'),
        '1x1-avg': ('1×1 conv', 'BN', f'{h}×{w} average', 'BN'),
        '1xk': (f'1×{w} conv', 'BN'),
        'kx1': (f'{h}×1 conv', 'BN'),
        'identity': ('identity', 'BN'),
    }.get(name, (name, 'BN'))


def blocks(run: Run) -> list[Picture]:
    """A picture of each outermost block, from input to output."""
    outer = [path for path, names in run.structure.items() if names and not depth(path)]
    return [
        _picture(run, path, f'block-{i}') for i, path in enumerate(in_order(outer, run.layers), 1)
    ]


def _picture(run: Run, path: str, name: str) -> Picture:
    inside = [p for p, names in run.structure.items() if names and p.startswith(f'{path}{MARK}')]
    inside = in_order([path, *inside], run.layers)
    branches = sum(len(run.structure[p]) - 1 for p in inside)
    title = f'{path}: {count(branches, "branch")}'
    said = []
    if len(inside) > 1:
        said.append(f'{count(len(inside) - 1, "block")} inside')
    born = {
        p: max(life.born for life in run.lives if life.path == p and life.gone is None)
        for p in inside
        if any(life.path == p and life.gone is None for life in run.lives)
    }
    if path in born:
        said.append(f'grown at {when(run, born[path])}' if born[path] else 'there from the start')
    if run.measured.get(path, run.recorded) != run.recorded:
        said.append(f'importances as of {when(run, run.measured[path])}')
    rows = []
    for p in inside:
        for operation in run.structure[p]:
            value = 1.0 if operation == ORIGIN else run.importances.get(p, {}).get(operation)
            rows.append((p, operation, number(value)))
    known = [
        (operation, value)
        for operation, value in run.importances.get(path, {}).items()
        if operation in run.structure[path]
    ]
    description = (
        f'At {when(run, run.recorded)} the block in the place of {path} sums '
        f'{", ".join(run.structure[path])}. '
        + (
            f'Most important beside the conv is {max(known, key=lambda x: x[1])[0]}. '
            if known
            else 'Importances are not known. '
        )
        + (f'Blocks inside: {", ".join(inside[1:])}. ' if inside[1:] else '')
    )
    return Picture(
        name,
        title,
        description,
        partial(_draw, make_group(run, path)),
        ('block', 'branch', 'importance'),
        rows,
        '; '.join(said),
    )


def _draw(group: Group) -> Figure:
    width, height = group.size
    top, bottom = 30, 24
    width, total = width + 4, height + top + bottom
    fig = figure(width, total)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, width)
    ax.set_ylim(total, 0)
    ax.axis('off')
    middle = width / 2
    ax.text(middle, 9, 'input', ha='center', va='center', fontsize=10.5, color=MUTED)
    _line(ax, [(middle, 18), (middle, top)])
    _draw_group(ax, group, 2, top, outer=True)
    _line(ax, [(middle, top + height - PAD), (middle, total - 17)])
    ax.text(middle, total - 8, 'output', ha='center', va='center', fontsize=10.5, color=MUTED)
    return fig


def _draw_group(ax: Axes, group: Group, left: float, top: float, outer: bool = False) -> None:
    width, height = group.size
    if not outer:
        frame = FancyBboxPatch(
            (left + 2, top),
            width - 4,
            height,
            boxstyle='round,pad=0,rounding_size=5',
            fc=FAINT,
            alpha=0.35,
            ec=MUTED,
            lw=0.9,
            ls=(0, (3, 2)),
        )
        ax.add_patch(frame)
    middle, split = left + width / 2, top + STEP / 2
    bottom = top + STEP + max(chain.size[1] for chain in group.chains)
    foot = bottom + FOOT
    most = max((c.importance for c in group.chains if c.importance is not None), default=0)
    most = max(most, 1.0)
    x, centres = left + PAD, []
    for chain in group.chains:
        wide, tall = chain.size
        centre = x + wide / 2
        centres.append(centre)
        _line(ax, [(centre, split), (centre, top + STEP)])
        _draw_chain(ax, chain, centre, top + STEP)
        _line(ax, [(centre, top + STEP + tall), (centre, bottom + 3)])
        _draw_importance(ax, chain, centre, bottom + 3, most)
        _line(ax, [(centre, bottom + FOOT - 8), (centre, foot)])
        x += wide + GAP
    for y in (split, foot):
        _line(ax, [(min(*centres, middle), y), (max(*centres, middle), y)])
    _line(ax, [(middle, top), (middle, split)])
    ax.add_patch(Circle((middle, foot + 12), 7, fc='none', ec=INK, lw=1))
    ax.text(middle, foot + 12.5, '+', ha='center', va='center', fontsize=10)
    _line(ax, [(middle, foot), (middle, foot + 5)])
    _line(ax, [(middle, foot + 19), (middle, top + height)])


def _draw_chain(ax: Axes, chain: Chain, centre: float, y: float) -> None:
    for i, part in enumerate(chain.parts):
        if i:
            _line(ax, [(centre, y - STEP), (centre, y)])
        if isinstance(part, Group):
            width, height = part.size
            _draw_group(ax, part, centre - width / 2, y)
            y += height + STEP
            continue
        soft = part == 'BN'
        box = FancyBboxPatch(
            (centre - BOX / 2, y),
            BOX,
            TALL,
            boxstyle='round,pad=0,rounding_size=3',
            fc=colour_of(chain.operation),
            alpha=0.1 if soft else 0.3,
            lw=0,
        )
        ax.add_patch(box)
        frame = FancyBboxPatch(
            (centre - BOX / 2, y),
            BOX,
            TALL,
            boxstyle='round,pad=0,rounding_size=3',
            fc='none',
            ec=colour_of(chain.operation),
            lw=0.7 if soft else 1.3,
        )
        ax.add_patch(frame)
        ax.text(centre, y + TALL / 2 + 0.5, part, ha='center', va='center', fontsize=10)
        y += TALL + STEP


def _draw_importance(ax: Axes, chain: Chain, centre: float, y: float, most: float) -> None:
    """The number under a branch, and a bar that is as long as it is important."""
    value = 1.0 if chain.operation == ORIGIN else chain.importance
    text = 'conv: 1' if chain.operation == ORIGIN else number(value)
    ax.text(centre, y + 7, text, ha='center', va='center', fontsize=10)
    ax.add_patch(Rectangle((centre - BOX / 2, y + 16), BOX, 5, fc=FAINT, lw=0))
    if value is not None:
        wide = BOX * min(value / most, 1)
        bar = Rectangle((centre - wide / 2, y + 16), wide, 5, fc=colour_of(chain.operation), lw=0)
        ax.add_patch(bar)
    _line(ax, [(centre, y + 21), (centre, y + 30)])


def _line(ax: Axes, points: Sequence[tuple[float, float]]) -> None:
    ax.plot([x for x, _ in points], [y for _, y in points], color=MUTED, lw=0.9)


def replaced(run: Run) -> list[str]:
    """The convs in whose place a block stands at the end."""
    return in_order({outermost(path) for path, names in run.structure.items() if names}, run.layers)
