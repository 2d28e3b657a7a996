"""Figures of one run over its training: how the structure evolved, and which scores decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from dyrep_mm.report.data import Run, best_of
from dyrep_mm.report.drawing import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    MUTED,
    VERMILION,
    Picture,
    colour_of,
    figure,
)
from dyrep_mm.report.history import (
    MARK,
    Life,
    depth,
    in_order,
    operations_in,
    outermost,
    short_names,
)
from dyrep_mm.report.words import count, number, scale_of

#: Points: width of a figure, its right margin, a lane of a branch, a row without one, the rest.
WIDTH, RIGHT, LANE, THIN, GAP = 1090, 100, 3.8, 15, 5
#: Of a letter of a label, and of a step to the right.
LETTER, INDENT = 6.4, 18
#: Of a curve above the rows: height, with the space for its title.
PANEL, ABOVE = 100, 34
#: So many neighbours that stay plain are one row.
FOLD = 3
#: So many operations of an update are shown.
TOP = 5


def when(run: Run, at: float) -> str:
    """A time of a run, as in a sentence."""
    return f'{run.unit} {number(at, 6)}'


def place_name(path: str, names: dict[str, str]) -> str:
    """A conv inside a block by the branch that it is in; else its short name."""
    if not depth(path):
        return names[path]
    return path.rpartition(MARK)[2].replace('.', ' › ')


def evolution(run: Run, metric: str | None) -> Picture:
    """When each layer grew, with which branches, and what it cost and gained.

    Args:
        run: Has a structure.
        metric: To show above.
    """
    grown = {life.path for life in run.lives}
    updates = [entry for entry in run.journal if entry.grown or entry.pruned]
    pruned = [life for life in run.lives if life.cut]
    alive = [life for life in run.lives if life.gone is None]
    many, changed = len({outermost(path) for path in grown}), {life.path for life in run.lives}
    changed -= run.start.keys()
    title = (
        f'{run.label}: {many} of {count(len(_layers(run)), "layer")} '
        + ('grew' if changed else 'had branches from the start, and kept them')
        + f' over {number(run.recorded, 6)} {run.unit}s'
    )
    description = (
        f'Layers from input to output downwards, training time in {run.unit}s to the right. '
        f'{count(len(updates), "update")} changed the structure; '
        f'{count(len(run.lives), "branch")} grew, {len(pruned)} were pruned, '
        f'{len(alive)} stand at {when(run, run.recorded)}. '
    )
    if metric is not None:
        at, value = best_of(run.metrics[metric], metric)
        description += f'{metric} was best at {when(run, at)}, with {number(value, 4)}. '
    description += 'The table below has every branch.'
    names = short_names(_layers(run))
    paths = in_order([*grown], run.layers)
    order = {path: i for i, path in enumerate(paths)}
    return Picture(
        'evolution',
        title,
        description,
        partial(_draw_evolution, run, metric),
        ('layer', 'branch', f'grew at {run.unit}', f'ended at {run.unit}', 'how'),
        [
            (
                life.path,
                life.operation,
                number(life.born, 6) if life.born else 'start',
                '' if life.gone is None else number(life.gone, 6),
                '' if life.gone is None else ('pruned' if life.cut else 'with its block'),
            )
            for life in sorted(run.lives, key=lambda x: (order[x.path], x.born))
        ],
        'Each row is a layer and each bar a branch of it, from its growth (▲ on the row) to the '
        'update that pruned it (×). A conv inside a branch that became a block itself is indented '
        'below it.'
        + (f' Names are without the leading "{_head(run, names)}".' if _head(run, names) else ''),
    )


def _layers(run: Run) -> list[str]:
    return in_order([*run.layers, *(outermost(life.path) for life in run.lives)], run.layers)


def _head(run: Run, names: dict[str, str]) -> str:
    heads = {path[: len(path) - len(name)] for path, name in names.items()}
    return ''.join(heads) if len(heads) == 1 else ''


def _rows(run: Run) -> list[tuple[str, list[str]]]:
    """A label and the paths of each row; several paths are neighbours that stay plain."""
    grown = {life.path for life in run.lives}
    layers, names = _layers(run), short_names(_layers(run))
    rows: list[tuple[str, list[str]]] = []
    for path in in_order([*layers, *grown], run.layers):
        last = rows[-1][1] if rows else []
        if path not in grown and last and not grown & set(last) and not depth(last[-1]):
            last.append(path)
            continue
        rows.append((path, [path]))
    result = []
    for _, paths in rows:
        if len(paths) > FOLD:
            result.append((f'{len(paths)} plain: {names[paths[0]]} …', paths))
        else:
            for path in paths:
                inside = depth(path)
                label = ('└ ' if inside else '') + place_name(path, names)
                result.append((label, [path]))
    return result


def _draw_evolution(run: Run, metric: str | None) -> Figure:
    rows = _rows(run)
    operations = operations_in(life.operation for life in run.lives)
    left = 24 + max(len(label) * LETTER + INDENT * depth(paths[0]) for label, paths in rows)
    tall = len(operations) * LANE + 2 * GAP
    grown = {life.path for life in run.lives}
    heights = [tall if paths[0] in grown else THIN for _, paths in rows]
    panels = _panels(run, metric)
    legend = 38
    below = sum(heights) + 50
    height = len(panels) * (PANEL + ABOVE) + legend + below
    fig = figure(WIDTH, height)
    end = max(run.reached, 1)

    def axes(top: float, tall: float) -> Axes:
        width = WIDTH - left - RIGHT
        return fig.add_axes((left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height))

    top = 0.0
    for title, unit, draw in panels:
        ax = axes(top + ABOVE - 10, PANEL)
        ax.set_title(title)
        ax.set_ylabel(unit)
        draw(ax)
        ax.set_xlim(0, end)
        ax.tick_params(labelbottom=False)
        ax.yaxis.set_major_locator(MaxNLocator(4))
        top += PANEL + ABOVE
    ax = axes(top + legend, sum(heights))
    _draw_rows(ax, run, rows, heights, operations, left)
    ax.set_xlim(0, end)
    ax.set_xlabel(f'{run.unit}s of training')
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    handles = [Line2D([], [], color=colour_of(name), lw=4, label=name) for name in operations]
    handles += [
        Line2D([], [], color=INK, marker='^', ls='', ms=5, label='grew'),
        Line2D([], [], color=INK, marker='x', ls='', ms=4.5, label='pruned'),
    ]
    fig.legend(
        handles=handles,
        loc='upper left',
        bbox_to_anchor=(left / WIDTH - 0.012, 1 - (top - 2) / height),
        ncols=len(handles),
        handlelength=1.4,
        columnspacing=1.5,
    )
    return fig


def _panels(run: Run, metric: str | None) -> list[tuple]:
    panels: list[tuple] = []
    if metric is not None:
        panels.append((f'{metric} on the validation set', '', partial(_draw_metric, run, metric)))
    elif run.loss:
        panels.append(('loss of training', '', lambda ax: ax.plot(*_xy(run.loss), color=BLUE)))
    for name, title, colour in (
        ('multiply_adds', 'multiply-adds of one image in training', VERMILION),
        ('parameters', 'parameters in training', GREEN),
    ):
        known = [value for e in run.journal if (value := getattr(e, name)) is not None]
        if known:
            size, unit = scale_of(name, known)
            panels.append((title, unit, partial(_draw_cost, run, name, size, colour)))
    return panels


def _xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _draw_metric(run: Run, metric: str, ax: Axes) -> None:
    points = run.metrics[metric]
    ax.plot(*_xy(points), color=BLUE, marker='o', ms=3 if len(points) < 60 else 0, lw=1.5)
    at, value = best_of(points, metric)
    ax.plot([at], [value], marker='o', ms=7, mfc='none', mec=BLUE)
    _say(ax, value, f'best {number(value, 4)}', BLUE)


def _draw_cost(run: Run, name: str, scale: float, colour: str, ax: Axes) -> None:
    """A step at every update, with plain and average where they are known."""
    xs: list[float] = []
    ys: list[float] = []
    if (first := run.first.get(name)) is not None:
        xs, ys = [0], [first / scale]
    for entry in run.journal:
        if (value := getattr(entry, name)) is not None:
            xs.append(entry.at)
            ys.append(value / scale)
    xs.append(max(run.recorded, xs[-1]))
    ys.append(ys[-1])
    ax.step(xs, ys, where='post', color=colour, lw=1.8)
    said = [(ys[-1], f'now {number(ys[-1])}')]
    for label, values in (('plain', run.plain), ('average', run.averages)):
        if name in values:
            value = values[name] / scale
            ax.axhline(value, color=MUTED, lw=1, ls=':' if label == 'plain' else '--')
            said.append((value, f'{label} {number(value)}'))
    low, high = min(v for v, _ in said), max(v for v, _ in said)
    room = (high - low) * 0.15 or 1
    ax.set_ylim(min(low, *ys) - room, max(high, *ys) + room)
    # Side by side, and not one on the other.
    least = (ax.get_ylim()[1] - ax.get_ylim()[0]) / (PANEL / 14)
    at = -math.inf
    for value, text in sorted(said):
        at = max(value, at + least)
        _say(ax, at, text, colour if text.startswith('now') else MUTED)


def _say(ax: Axes, y: float, text: str, colour: str) -> None:
    ax.annotate(
        text,
        (1, y),
        (4, 0),
        xycoords=ax.get_yaxis_transform(),
        textcoords='offset points',
        va='center',
        color=INK if colour == MUTED else colour,
        fontsize=10,
        annotation_clip=False,
    )


def _draw_rows(
    ax: Axes,
    run: Run,
    rows: Sequence[tuple[str, list[str]]],
    heights: Sequence[float],
    operations: Sequence[str],
    left: float,
) -> None:
    by_path: dict[str, list[Life]] = {}
    for life in run.lives:
        by_path.setdefault(life.path, []).append(life)
    now = max(run.recorded, 1e-9)
    ticks, labels, y = [], [], 0.0
    for (label, paths), tall in zip(rows, heights, strict=True):
        middle = y + tall / 2
        ticks.append(middle)
        labels.append(label)
        mine = by_path.get(paths[0], [])
        if not mine:
            ax.plot([0, now], [middle, middle], color=FAINT, lw=1)
            y += tall
            continue
        for begin, end in _spans(mine, now):
            box = Rectangle((begin, y + 1), end - begin, tall - 2, fc=FAINT, alpha=0.45, lw=0)
            ax.add_patch(box)
            if begin > 0:
                ax.plot([begin], [y + 1], marker='^', ms=5, color=INK, clip_on=False, zorder=5)
        for life in mine:
            lane = y + GAP + (operations.index(life.operation) + 0.5) * LANE
            end = now if life.gone is None else life.gone
            ax.add_patch(
                Rectangle(
                    (life.born, lane - LANE * 0.36),
                    end - life.born,
                    LANE * 0.72,
                    fc=colour_of(life.operation),
                    lw=0,
                )
            )
            if life.cut:
                ax.plot([end], [lane], marker='x', ms=3.2, mew=1.1, color=INK, zorder=5)
        last = sum(life.gone is None for life in mine)
        ax.annotate(
            count(last, 'branch') if last else 'plain again',
            (1, middle),
            (6, 0),
            xycoords=ax.get_yaxis_transform(),
            textcoords='offset points',
            va='center',
            fontsize=10,
            color=MUTED,
            annotation_clip=False,
        )
        y += tall
    ax.set_ylim(y, 0)
    ax.set_yticks(ticks, labels, fontsize=10.5)
    ax.tick_params(axis='y', length=0)
    for text, (_, paths) in zip(ax.get_yticklabels(), rows, strict=True):
        text.set_horizontalalignment('left')
        text.set_x((INDENT * depth(paths[0]) - left + 4) / (WIDTH - left - RIGHT))
        text.set_color(INK if paths[0] in by_path else MUTED)
    ax.grid(axis='y', visible=False)
    ax.spines['left'].set_visible(False)


def _spans(mine: Sequence[Life], now: float) -> list[tuple[float, float]]:
    """The stretches in which a path was a block."""
    spans: list[list[float]] = []
    for life in sorted(mine, key=lambda life: life.born):
        end = now if life.gone is None else life.gone
        if spans and life.born < spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([life.born, end])
    return [(begin, end) for begin, end in spans]


def ranking(scores: dict[str, float], top: int = TOP) -> list[tuple[str, float]]:
    """The best operations, the best first."""
    finite = [(path, score) for path, score in scores.items() if math.isfinite(score)]
    return sorted(finite, key=lambda item: -item[1])[:top]


def scores(run: Run) -> Picture | None:
    """Who was close to growing at each update; None if no update had scores."""
    entries = [entry for entry in run.journal if ranking(entry.scores)]
    if not entries:
        return None
    ranks = {entry.update: ranking(entry.scores) for entry in entries}
    shown = {path for best in ranks.values() for path, _ in best}
    shown |= {path for entry in entries for path in entry.grown if path in entry.scores}
    first = entries[-1]
    best, *others = ranks[first.update]
    description = (
        f'A column for each of {count(len(entries), "update")}, a row for each of '
        f'{count(len(shown), "operation")} that was once among the best {TOP}. The number in a '
        'cell is the rank by score; what grew is framed. '
        f'At the last update {best[0]} was first'
        + (
            f' and {others[0][0]} second, with {number(others[0][1])} to {number(best[1])}.'
            if others
            else '.'
        )
    )
    rows = [
        (
            str(entry.update),
            number(entry.at, 6),
            str(rank),
            path,
            number(score, 4),
            'grew' if path in entry.grown else '',
        )
        for entry in entries
        for rank, (path, score) in enumerate(ranks[entry.update], 1)
    ]
    return Picture(
        'scores',
        f'{run.label}: the operations with the highest scores at each update',
        description,
        partial(_draw_scores, run, entries, in_order(shown, run.layers)),
        ('update', run.unit, 'rank', 'operation', 'score', ''),
        rows,
        'The stronger the blue of a cell, the closer its score is to the best one. Numbers '
        f'are the ranks 1 to {TOP}; a frame marks what grew. A row is empty where its operation '
        'could not grow. The first one does not grow where the same update prunes the branch that '
        'it lies in.',
    )


def _draw_scores(run: Run, entries: Sequence, shown: Sequence[str]) -> Figure:
    names = short_names({outermost(path) for path in shown})
    labels = [
        names[outermost(p)] + ''.join(f' › {part}' for part in p.split(MARK)[1:]) for p in shown
    ]
    label, tall = 24 + LETTER * max(map(len, labels)), 18
    cell = min(max((WIDTH - label - 20) / len(entries), 16), 26)
    width = max(label + cell * len(entries) + 20, 480)
    height = tall * len(shown) + 84
    fig = figure(width, height)
    ax = fig.add_axes(
        (label / width, 50 / height, cell * len(entries) / width, tall * len(shown) / height)
    )
    for i, entry in enumerate(entries):
        best = dict(ranking(entry.scores))
        ranks = {path: rank for rank, path in enumerate(best, 1)}
        highest = max((abs(score) for score in best.values()), default=0) or 1
        for j, path in enumerate(shown):
            score = entry.scores.get(path)
            if score is None or not math.isfinite(score):
                continue
            share = max(score / highest, 0) if highest else 0
            ax.add_patch(Rectangle((i, j), 1, 1, fc=BLUE, alpha=0.05 + 0.5 * min(share, 1), lw=0))
            if path in ranks:
                ax.text(i + 0.5, j + 0.54, str(ranks[path]), ha='center', va='center', fontsize=10)
            if path in entry.grown:
                ax.add_patch(
                    Rectangle((i + 0.06, j + 0.06), 0.88, 0.88, fc='none', ec=VERMILION, lw=1.8)
                )
    ax.set_xlim(0, len(entries))
    ax.set_ylim(len(shown), 0)
    ax.set_yticks([j + 0.5 for j in range(len(shown))], labels, fontsize=10.5)
    every = math.ceil(34 / cell)
    ticks = range(0, len(entries), every)
    ax.set_xticks([i + 0.5 for i in ticks], [number(entries[i].at, 6) for i in ticks], fontsize=10)
    ax.set_xlabel(f'{run.unit} of the update')
    ax.tick_params(length=0)
    ax.grid(visible=False)
    for y in range(1, len(shown)):
        ax.axhline(y, color=FAINT, lw=0.4)
    for spine in ax.spines.values():
        spine.set_visible(False)
    fig.legend(
        handles=[
            Rectangle((0, 0), 1, 1, fc=BLUE, alpha=0.55, lw=0, label='score close to the best'),
            Rectangle((0, 0), 1, 1, fc='none', ec=VERMILION, lw=1.8, label='grew'),
        ],
        loc='upper left',
        bbox_to_anchor=(label / width - 0.012, 1),
        ncols=2,
        handlelength=1.2,
    )
    return fig
