"""One block from the plain conv that it was to the plain conv that it becomes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dyrep_mm.reparam.branches import ORIGIN
from dyrep_mm.report.data import Run
from dyrep_mm.report.drawing import FAINT, INK, MUTED, Picture, colour_of, figure
from dyrep_mm.report.evolution import when
from dyrep_mm.report.history import MARK, Life, operations_in, outermost
from dyrep_mm.report.words import count

#: Points: width and height of a branch, space between two, what a block adds above and below,
#: the least width of a stage, and the space between two stages.
LANE, TALL, GAP, RAIL, LEAST, ARROW = 19, 92, 4, 17, 92, 30

#: Of the stages that are drawn; between the first and the last ones others are left out.
STAGES = 5


@dataclass
class Lane:
    """A branch at one time.

    Attributes:
        operation: Its name.
        cut: It is pruned at this time.
        inside: The branches of a block that stands in it.
    """

    operation: str
    cut: bool = False
    inside: list[Lane] = field(default_factory=list)

    @property
    def width(self) -> float:
        """Points."""
        return max(LANE, _width(self.inside) + 2 * GAP if self.inside else 0)

    @property
    def height(self) -> float:
        """Points."""
        return _height(self.inside) if self.inside else TALL


@dataclass
class Stage:
    """A block between two changes."""

    title: str
    said: str
    lanes: list[Lane]


def story(run: Run) -> Picture | None:
    """A picture of the block that changed most; None in a run without a block."""
    changes = Counter(outermost(life.path) for life in run.lives)
    if not changes:
        return None
    path = max(changes, key=changes.__getitem__)  # the first of equals
    lives = [life for life in run.lives if outermost(life.path) == path]
    moments = sorted({life.born for life in lives} | {life.gone for life in lives if life.gone})
    stages = [_stage(run, path, lives, at) for at in moments]
    if moments[0]:
        stages.insert(0, Stage('plain', 'one conv', [Lane(ORIGIN)]))
    if len(stages) > STAGES - 1:
        left = f'{len(stages) - STAGES + 2} stages between'
        stages = [*stages[: STAGES - 3], Stage(left, '', []), *stages[-1:]]
    stages.append(Stage('fused', 'one conv again', [Lane(ORIGIN)]))
    rows = [(stage.title, stage.said, _written(stage.lanes)) for stage in stages]
    description = ' '.join(f'{title}: {said}, {names}.' for title, said, names in rows)
    return Picture(
        'story',
        f'{path} grows, is pruned and becomes one conv',
        description,
        partial(_draw, stages),
        ('time', 'change', 'branches'),
        rows,
        'Branches are side by side between the input, above, and the sum, below; one with a cross '
        'is pruned then. Fusing is exact, at any time.',
    )


def _stage(run: Run, path: str, lives: list[Life], at: int) -> Stage:
    grown = sum(life.born == at for life in lives)
    cut = sum(life.gone == at and life.cut for life in lives)
    said = []
    if grown:
        said.append(count(grown, 'branch') + (' grow' + 's' * (grown == 1) if at else ''))
    said += [f'{count(cut, "branch")} go' + 'es' * (cut == 1)] if cut else []
    there = [life for life in lives if life.born <= at and (life.gone is None or life.gone > at)]
    there += [life for life in lives if life.gone == at and life.cut]
    return Stage(when(run, at) if at else 'start', ', '.join(said), _lanes(path, there, at))


def _lanes(path: str, lives: list[Life], at: int) -> list[Lane]:
    """The branches of the block at ``path``, with the blocks in them; one lane for a conv."""
    own = {life.operation: life for life in lives if life.path == path}
    lanes = []
    for name in [ORIGIN, *operations_in(own)]:
        place = f'{path}{MARK}{name}'
        gone = name in own and own[name].gone == at
        inside: list[Lane] = []
        for inner in sorted({life.path for life in lives}):
            if not gone and (inner == place or inner.rpartition('.')[0] == place):
                inside += _lanes(inner, lives, at)
        lanes.append(Lane(name, gone, inside))
    return lanes


def _written(lanes: list[Lane]) -> str:
    words = []
    for lane in lanes:
        inside = f' ({_written(lane.inside)})' if lane.inside else ''
        words.append(f'{lane.operation}{" pruned" if lane.cut else ""}{inside}')
    return ', '.join(words) or 'not drawn'


def _width(lanes: list[Lane]) -> float:
    return sum(lane.width for lane in lanes) + GAP * (len(lanes) - 1)


def _height(lanes: list[Lane]) -> float:
    return max((lane.height for lane in lanes), default=0) + (2 * RAIL if len(lanes) > 1 else 0)


def _draw(stages: list[Stage]) -> Figure:
    widths = [max(LEAST, _width(stage.lanes)) for stage in stages]
    tall = max(_height(stage.lanes) for stage in stages)
    width, height = sum(widths) + ARROW * (len(stages) - 1) + 8, tall + 44
    fig = figure(width, height)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.axis('off')
    left, middle = 4.0, 38 + tall / 2
    for i, (stage, wide) in enumerate(zip(stages, widths, strict=True)):
        if i:
            ax.annotate(
                '',
                (left - 7, middle),
                (left - ARROW + 7, middle),
                arrowprops={'arrowstyle': '-|>', 'color': MUTED, 'lw': 1.2},
            )
        centre = left + wide / 2
        ax.text(centre, 9, stage.title, ha='center', va='center', fontsize=10, weight='bold')
        ax.text(centre, 23, stage.said, ha='center', va='center', fontsize=9, color=MUTED)
        if stage.lanes:
            own = _width(stage.lanes)
            _draw_lanes(ax, stage.lanes, centre - own / 2, middle - tall / 2, tall)
        else:
            ax.text(centre, middle, '…', ha='center', va='center', fontsize=16, color=MUTED)
        left += wide + ARROW
    return fig


def _draw_lanes(ax: Axes, lanes: list[Lane], left: float, top: float, tall: float) -> None:
    """Branches side by side in ``tall`` points, with the lines that split and sum."""
    middle = left + _width(lanes) / 2
    height = max(lane.height for lane in lanes)
    rail = (tall - height) / 2
    centres = []
    for lane in lanes:
        centre = left + lane.width / 2
        centres.append(centre)
        soft, gap = FAINT if lane.cut else MUTED, (tall - lane.height) / 2
        for y, end in ((top + rail - 5, top + gap), (top + tall - rail + 5, top + tall - gap)):
            ax.plot([centre, centre], [y, end], color=soft, lw=0.9, zorder=0)
        if lane.inside:
            _draw_frame(ax, lane, left, top + gap)
            inner = centre - _width(lane.inside) / 2
            _draw_lanes(ax, lane.inside, inner, top + gap, lane.height)
        else:
            _draw_lane(ax, lane, left, top + (tall - TALL) / 2)
        left += lane.width + GAP
    for y, end in ((top + rail - 5, top), (top + tall - rail + 5, top + tall)):
        if len(lanes) > 1:
            ax.plot([centres[0], centres[-1]], [y, y], color=MUTED, lw=0.9, zorder=0)
        ax.plot([middle, middle], [y, end], color=MUTED, lw=0.9, zorder=0)


def _draw_frame(ax: Axes, lane: Lane, left: float, top: float) -> None:
    frame = FancyBboxPatch(
        (left, top),
        lane.width,
        lane.height,
        boxstyle='round,pad=0,rounding_size=4',
        fc=colour_of(lane.operation),
        alpha=0.12,
        ec='none',
    )
    ax.add_patch(frame)
    ax.text(left + 3, top + 6, lane.operation, ha='left', va='center', fontsize=7.5, color=INK)


def _draw_lane(ax: Axes, lane: Lane, left: float, top: float) -> None:
    colour = FAINT if lane.cut else colour_of(lane.operation)
    for fill, alpha, edge in ((colour, 0.0 if lane.cut else 0.3, 'none'), ('none', 1.0, colour)):
        box = FancyBboxPatch(
            (left, top),
            LANE,
            TALL,
            boxstyle='round,pad=0,rounding_size=3',
            fc=fill,
            alpha=alpha,
            ec=edge,
            lw=1.3,
            ls='--' if lane.cut else '-',
        )
        ax.add_patch(box)
    x, y = left + LANE / 2, top + TALL / 2
    tone = MUTED if lane.cut else INK
    ax.text(x, y, lane.operation, rotation=90, ha='center', va='center', fontsize=9, color=tone)
    if lane.cut:
        ax.plot([x], [top + 10], marker='x', color=MUTED, ms=6)
