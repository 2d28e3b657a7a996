"""A grid of configs and seeds: every config against the first one, seed by seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dyrep_mm.errors import DyRepError
from dyrep_mm.report.drawing import BLUE, GREY, INK, MUTED, Picture, figure
from dyrep_mm.report.words import count, number, scale_of, scaled

#: The file of a study in its folder: a line of JSON for each config and seed.
ROWS = 'study.jsonl'

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """One config of a study.

    Attributes:
        name: Of the config.
        rows: Of its seeds, as ``tools/study.py`` writes them.
        pairs: Each of them beside the row of the first config with the same seed.
    """

    name: str
    rows: list[Row]
    pairs: list[tuple[Row, Row]]

    @property
    def values(self) -> list[float]:
        """The metric of every seed."""
        return [row['value'] for row in self.rows]

    @property
    def difference(self) -> tuple[float, float] | None:
        """See :func:`interval`; None for the first config itself."""
        if all(row is first for row, first in self.pairs):
            return None
        return interval([row['value'] - first['value'] for row, first in self.pairs])

    @property
    def time(self) -> float | None:
        """Median of the wall time over that of the first config with the same seed."""
        ratios = [
            row['seconds'] / first['seconds']
            for row, first in self.pairs
            if row['seconds'] and first['seconds']
        ]
        return statistics.median(ratios) if ratios else None

    def mean(self, name: str) -> float | None:
        """Of a number in the rows; None where no row has it."""
        known = [row[name] for row in self.rows if row.get(name) is not None]
        return statistics.fmean(known) if known else None


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Mean of paired differences, and half the width of its 95% interval (Student's t); None for
    fewer than two pairs."""
    if len(differences) < 2:
        return None
    from scipy.stats import t  # mmdet brings it

    error = statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.fmean(differences), float(t.ppf(0.975, len(differences) - 1)) * error


def methods_of(rows: Sequence[Row], names: Sequence[str] | None = None) -> list[Method]:
    """The configs of a study, each beside the first.

    Args:
        rows: Of all configs and seeds.
        names: All configs, also those without a row yet; by default those of the rows, as they
            come.
    """
    names = list(dict.fromkeys(row['config'] for row in rows)) if names is None else names
    first = {row['seed']: row for row in rows if row['config'] == names[0]} if names else {}
    methods = []
    for name in names:
        own = [row for row in rows if row['config'] == name]
        methods.append(
            Method(name, own, [(row, first[row['seed']]) for row in own if row['seed'] in first])
        )
    return methods


def is_study(source: str) -> bool:
    """Whether ``source``, a folder or a file, holds the rows of a study."""
    path = Path(source)
    return path.suffix == '.jsonl' or (path / ROWS).is_file()


def read_study(source: str) -> list[Row]:
    """The rows of a study.

    Raises:
        DyRepError: the file cannot be read, or has other lines.
    """
    path = Path(source)
    path = path / ROWS if path.is_dir() else path
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        wanted: dict[str, Any] = {'config': str, 'seed': int, 'metric': str, 'value': (int, float)}
        for row in rows:
            for key, kind in wanted.items():
                if not isinstance(row[key], kind):
                    raise TypeError(f'{key} is {row[key]!r}')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DyRepError(
            f'{source} does not hold the rows of a study: {type(error).__name__} {error}'
        ) from None
    if not rows:
        raise DyRepError(f'{source} holds no row: no cell of the study is done')
    return rows


def decimals(methods: Sequence[Method]) -> int:
    """Of a metric: two where it is in %, four where it is a part of 1, as the box mAP of COCO."""
    return 4 if all(abs(value) <= 1 for method in methods for value in method.values) else 2


def table(methods: Sequence[Method], metric: str) -> tuple[list[str], list[list[str]]]:
    """What ``tools/study.py`` prints: a row for each config."""
    columns, scales = ['config', 'seeds', metric, 'difference', 'training loss'], []
    for cost, title in (('multiply_adds', 'multiply-adds'), ('parameters', 'parameters')):
        names = (cost, f'final_{cost}')
        size, unit = scale_of(cost, [m.mean(name) for m in methods for name in names])
        scales += [(name, size) for name in names]
        columns += [f'{title}, {unit}', f'final {title}, {unit}']
    rows, places = [], decimals(methods)
    for method in methods:
        values, found, time = method.values, method.difference, method.time
        spread = f' ± {statistics.stdev(values):.{places}f}' if len(values) > 1 else ''
        rows.append(
            [
                method.name,
                str(len(values)),
                f'{statistics.fmean(values):.{places}f}{spread}' if values else '',
                f'{found[0]:+.{places}f} ± {found[1]:.{places}f}' if found else '',
                _text(method.mean('loss')),
                *(_text(scaled(method.mean(name), size)) for name, size in scales),
                '' if time is None else f'{time:.2f}',
            ]
        )
    return [*columns, 'time'], rows


def _text(value: float | None) -> str:
    return '' if value is None else number(value)


def picture(methods: Sequence[Method], metric: str, name: str = 'study') -> Picture:
    """Every seed as a dot, and the 95% interval of the difference to the first config around the
    mean of that config."""
    shown = [method for method in methods if method.values]
    said, places = [], decimals(shown)
    for method in shown:
        text = f'{method.name}: {number(statistics.fmean(method.values), 4)}'
        if found := method.difference:
            text += f', {found[0]:+.{places}f} ± {found[1]:.{places}f} against {shown[0].name}'
        said.append(f'{text}.')
    return Picture(
        name,
        f'{metric} of {count(len(shown), "config")}, {count(len(shown[0].values), "seed")}',
        ' '.join(said),
        partial(_draw, shown, metric),
        ('config', 'seed', metric, 'training loss', 'seconds'),
        [
            (
                method.name,
                str(row['seed']),
                number(row['value'], 4),
                number(row.get('loss')),
                number(row.get('seconds')),
            )
            for method in shown
            for row in method.rows
        ],
        'A grey dot is a seed. The bar is the 95% interval of the paired difference, drawn around '
        'the mean; one that reaches the line of the first config is within noise.',
    )


def _draw(methods: Sequence[Method], metric: str) -> Figure:
    width, height = 960, 70 + 26 * len(methods)
    fig = figure(width, height)
    ax = fig.add_axes((0.3, 46 / height, 0.58, (height - 58) / height))
    base = statistics.fmean(methods[0].values)
    ax.axvline(base, color=MUTED, lw=1)
    for y, method in enumerate(methods):
        ax.plot(method.values, [y] * len(method.values), 'o', color=GREY, ms=5, alpha=0.7)
        mean, found = statistics.fmean(method.values), method.difference
        if found:
            at = base + found[0]
            clear = abs(found[0]) > found[1]
            ax.plot([at - found[1], at + found[1]], [y, y], color=BLUE if clear else MUTED, lw=2.4)
            mean = at
        ax.plot([mean], [y], 'D', color=INK, ms=6)
        if method.time is not None:
            ax.annotate(
                f'{method.time:.2f} of the time',
                (1.02, y),
                xycoords=('axes fraction', 'data'),
                va='center',
                fontsize=10.5,
            )
    ax.set_yticks(range(len(methods)), [method.name for method in methods])
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.grid(axis='y', visible=False)
    ax.set_xlabel(metric)
    ax.xaxis.set_major_locator(MaxNLocator(8))
    return fig
