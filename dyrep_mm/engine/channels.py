"""Every update, told to the visualiser backends that the user configured: TensorBoard, W&B, files.

Scalars and the image carry the number of complete iterations, as the loss does. Their names do not
enter mmengine's message hub, so that its own log stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from mmengine.dist import is_main_process
from mmengine.runner import Runner

from dyrep_mm.evolution.record import Entry
from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.branches import BRANCHES, ORIGIN

#: Of every scalar. With a slash no reader of mmengine's logs takes a line for one of training.
PREFIX = 'dyrep/'

#: Name of the image. With a slash the local backend would write no file.
IMAGE = 'dyrep_structure'

DPI = 100  # pixels an inch

CONV, GROWN, PRUNED = (
    '\N{BLACK CIRCLE}',
    '\N{BLACK RIGHT-POINTING TRIANGLE}',
    '\N{MULTIPLICATION SIGN}',
)
INSIDE = '\N{DOWNWARDS ARROW WITH TIP RIGHTWARDS}'


def tell_backends(runner: Runner, entry: Entry, blocks: Mapping[str, Block]) -> None:
    """Give an update to the visualiser of ``runner``; the first rank does.

    Args:
        runner: Where it happened.
        entry: The update.
        blocks: Of the model after it, by path.
    """
    if not is_main_process() or not runner.visualizer._vis_backends:
        return
    # 'step', which a backend adds, comes last: readers of logs look at the first names.
    runner.visualizer.add_scalars(scalars_of(entry), step=entry.iteration)
    importances = {path: block.importances() for path, block in blocks.items()}
    runner.visualizer.add_image(IMAGE, structure_image(entry, importances), step=entry.iteration)


def scalars_of(entry: Entry) -> dict[str, float]:
    """The numbers of an update, by name; what is not known is left out."""
    best = [entry.scores[path] for path in entry.grown if path in entry.scores]
    numbers = {
        'parameters': entry.parameters,
        'multiply_adds': entry.multiply_adds,
        'average_parameters': entry.average_parameters,
        'average_multiply_adds': entry.average_multiply_adds,
        'blocks': entry.blocks,
        'branches': entry.branches,
        'grown_score': max(best, default=None),
        'runner_up_score': entry.runner_up and entry.runner_up[1],
        'step_seconds': entry.timing.get('step_seconds'),
        'update_seconds': entry.timing.get('update_seconds'),
    }
    return {f'{PREFIX}{name}': value for name, value in numbers.items() if value is not None}


def structure_image(entry: Entry, importances: Mapping[str, Mapping[str, float]]) -> np.ndarray:
    """The structure after an update as a picture (height, width, 3), uint8.

    A row is a block, in the order of the model, a column an operation. A cell tells the importance
    of a branch, as a number and as a colour that colour-blind people can tell apart; a cross is a
    branch that this update pruned, a triangle a block that it grew.

    Args:
        entry: The update.
        importances: Of the added branches after it, by path of their block.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Blocks that lost their last branch are convs again, and are shown once more.
    ended: Mapping[str, Mapping[str, float]] = {
        path: {} for path in entry.pruned if path not in importances
    }
    rows = {**importances, **ended}
    names = [ORIGIN, *BRANCHES]
    table = np.full((max(len(rows), 1), len(names)), np.nan)
    for at, values in enumerate(rows.values()):
        for name, value in values.items():
            table[at, names.index(name)] = value
    labels = [
        f'{GROWN} {text}' if path in entry.grown else text
        for path, text in zip(rows, labels_of(list(rows)), strict=True)
    ]
    # By hand: a layout engine would draw it all several times.
    left, below, above = 0.075 * max(map(len, labels), default=0) + 0.15, 0.3, 0.5
    width, height = left + 0.62 * len(names) + 0.1, 0.2 * len(table) + below + above
    figure = Figure((width, height), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (left / width, below / height, 1 - (left + 0.1) / width, 0.2 * len(table) / height)
    )
    top = max(table[np.isfinite(table)], default=0.0)
    axes.imshow(table, cmap='cividis', vmin=0.0, vmax=top or 1.0, aspect='auto')
    for at, path in enumerate(rows):
        if path in importances:
            axes.text(0, at, CONV, ha='center', va='center', fontsize=8)
        for column, name in enumerate(names[1:], 1):
            value = table[at, column]
            if name in entry.pruned.get(path, ()):
                axes.text(column, at, PRUNED, ha='center', va='center', fontsize=9)
            elif name in rows[path]:
                tone = 'white' if value < top / 2 else 'black'
                text = axes.text(column, at, f'{value:.3g}', color=tone, fontsize=7)
                text.set(ha='center', va='center')
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_yticks(range(len(rows)), labels, fontsize=7, fontfamily='monospace')
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xlabel(
        f'importance of branches;  {CONV} the conv itself,  {GROWN} grown,  {PRUNED} pruned',
        fontsize=7,
    )
    axes.set_title(f'Blocks after update {entry.update}, {entry.unit} {entry.at}', fontsize=9)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def labels_of(paths: list[str]) -> list[str]:
    """A short name for each block: without what all paths begin with, and what lies in a block
    marked below it."""
    outer = [path for path in paths if not any(_lies_in(path, other) for other in paths)]
    shared = 0
    parts = [path.split('.')[:-1] for path in outer]
    while parts and all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    labels = []
    for path in paths:
        around = [other for other in paths if _lies_in(path, other)]
        if around:
            inner = path.removeprefix(max(around, key=len)).removeprefix('.branches.')
            labels.append(INSIDE * len(around) + ' ' + inner.removesuffix('.conv'))
        else:
            labels.append('.'.join(path.split('.')[shared:]))
    return labels


def _lies_in(path: str, block: str) -> bool:
    return path.startswith(f'{block}.branches.')
