"""Several runs side by side: Figure 5, Figure 1 and Table 3 of the paper."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dyrep_mm.report.data import Run, best_of, lower_is_better
from dyrep_mm.report.drawing import DASHES, MARKERS, SERIES, Picture, figure
from dyrep_mm.report.words import count, number, scale_of, scaled


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by method, in the order in which they come."""
    result: dict[str, list[Run]] = {}
    for run in runs:
        result.setdefault(run.group, []).append(run)
    return result


def common_metric(runs: Sequence[Run], wanted: str | None) -> str | None:
    """The metric that most runs have, the one that is asked for first."""
    names = dict.fromkeys(run.main_metric(wanted) for run in runs if run.metrics)
    return max(names, key=lambda name: sum(name in run.metrics for run in runs), default=None)


def table(runs: Sequence[Run], metric: str | None) -> tuple[list[str], list[list[str]]]:
    """The columns of Tables 2 and 3, a row for each method; with the spread where a method has
    several runs."""
    columns, scales = ['method', 'runs'], dict[str, float]()
    for name, title in (
        ('seconds', 'steps and updates'),
        ('time', 'time relative to plain'),
        ('multiply_adds', 'average multiply-adds'),
        ('parameters', 'average parameters'),
    ):
        size, unit = 1.0, ''
        if name != 'time':
            size, unit = scale_of(name, [cost_of(run, name) for run in runs])
        scales[name] = size
        columns.append(f'{title}, {unit}' if unit else title)
    if metric is not None:
        columns += [f'{metric}, best', f'{metric}, last']
    rows = []
    for name, members in groups(runs).items():
        row = [name, str(len(members))]
        for key, size in scales.items():
            row.append(_mean([scaled(cost_of(run, key), size) for run in members]))
        if metric is not None:
            curves = [run.metrics[metric] for run in members if metric in run.metrics]
            row.append(_mean([best_of(points, metric)[1] for points in curves], 4))
            row.append(_mean([points[-1][1] for points in curves], 4))
        rows.append(row)
    return columns, rows


def _mean(values: Sequence[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return '–'
    text = number(statistics.fmean(known), digits)
    return text if len(known) == 1 else f'{text} ± {number(statistics.stdev(known), 2)}'


def curves(runs: Sequence[Run], metric: str) -> Picture:
    """The metric over training, a colour and a dash for each method (Figure 5)."""
    shown = [run for run in runs if metric in run.metrics]
    best = {run.label: best_of(run.metrics[metric], metric) for run in shown}
    choose = min if lower_is_better(metric) else max
    first = choose(best, key=lambda label: best[label][1])
    unit = shown[0].unit
    return Picture(
        'curves',
        f'{metric} over training, {count(len(shown), "run")}',
        f'{metric} on the validation set over {unit}s. '
        + ' '.join(
            f'{label} is best at {unit} {number(at, 6)} with {number(value, 4)}.'
            for label, (at, value) in best.items()
        )
        + f' The best of all is {first}.',
        partial(_draw_curves, shown, metric),
        ('run', 'method', unit, metric),
        [
            (run.label, run.group, number(x, 6), number(y, 4))
            for run in shown
            for x, y in run.metrics[metric]
        ],
        'Every run is a line; runs of one method share colour and dashes.',
    )


def _draw_curves(runs: Sequence[Run], metric: str) -> Figure:
    width, height = 960, 420
    fig = figure(width, height)
    ax = fig.add_axes((0.08, 0.13, 0.72, 0.83))
    names = list(groups(runs))
    seen = set()
    for run in runs:
        i = names.index(run.group)
        xs, ys = zip(*run.metrics[metric], strict=True)
        ax.plot(
            xs,
            ys,
            color=SERIES[i % len(SERIES)],
            ls=DASHES[i % len(DASHES)],
            marker=MARKERS[i % len(MARKERS)],
            ms=4 if len(xs) < 40 else 0,
            lw=1.7,
            label=None if run.group in seen else run.group,
        )
        seen.add(run.group)
    ax.set_xlabel(f'{runs[0].unit}s of training')
    ax.set_ylabel(metric)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    ax.legend(loc='upper left', bbox_to_anchor=(1.01, 1), handlelength=3.2)
    return fig


#: Costs of training, and the title of their axis.
COSTS = {
    'seconds': 'time of training steps and updates',
    'multiply_adds': 'average multiply-adds in training',
}


def cost_of(run: Run, cost: str) -> float | None:
    """What the training of a run cost: ``seconds``, or one of its averages."""
    return run.seconds if cost == 'seconds' else run.averages.get(cost)


def against_cost(runs: Sequence[Run], metric: str) -> Picture | None:
    """The metric against what training cost (Figure 1); None if fewer than two runs have both."""
    shown = [run for run in runs if metric in run.metrics]
    costs = []
    for cost, title in COSTS.items():
        known = [value for run in shown if (value := cost_of(run, cost)) is not None]
        if len(known) > 1:
            costs.append((cost, title, *scale_of(cost, known)))
    if not costs:
        return None
    parts, rows = [], []
    for run in shown:
        values = [scaled(cost_of(run, cost), size) for cost, _, size, _ in costs]
        best = number(best_of(run.metrics[metric], metric)[1], 4)
        rows.append((run.label, run.group, best, *map(number, values)))
        told = [
            f'{number(x)} {unit}{"" if cost == "seconds" else " multiply-adds"}'
            for x, (cost, _, _, unit) in zip(values, costs, strict=True)
            if x is not None
        ]
        parts.append(f'{run.label}: {best} for {" and ".join(told) or "an unknown cost"}.')
    return Picture(
        'cost',
        f'best {metric} against what training cost',
        ' '.join(parts),
        partial(_draw_cost, shown, metric, costs),
        ('run', 'method', metric, *(f'{title}, {unit}' for _, title, _, unit in costs)),
        rows,
    )


def _draw_cost(runs: Sequence[Run], metric: str, costs: Sequence[tuple]) -> Figure:
    width, height = 430 * len(costs) + 20, 330
    fig = figure(width, height)
    names = list(groups(runs))
    for k, (cost, title, size, unit) in enumerate(costs):
        ax = fig.add_axes(
            ((70 + 430 * k) / width, 48 / height, 340 / width, (height - 66) / height)
        )
        for run in runs:
            if (x := scaled(cost_of(run, cost), size)) is None:
                continue
            i, y = names.index(run.group), best_of(run.metrics[metric], metric)[1]
            ax.plot([x], [y], ls='', marker=MARKERS[i % 7], ms=9, color=SERIES[i % 7])
            ax.annotate(run.label, (x, y), (8, 6), textcoords='offset points', fontsize=10.5)
        ax.margins(0.28, 0.18)
        ax.set_xlabel(f'{title}, {unit}')
        if not k:
            ax.set_ylabel(f'{metric}, best')
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_locator(MaxNLocator(6))
    return fig
