"""A run as plain data, from its work directory or from one checkpoint of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from dyrep_mm.engine.checkpoint import is_whole, load_checkpoint, weights_of
from dyrep_mm.engine.stock import from_stock
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Entry, Record
from dyrep_mm.reparam.branches import ORIGIN
from dyrep_mm.reparam.geometry import pair
from dyrep_mm.report.history import Life, first_structure, last_importances, lives, outermost
from dyrep_mm.report.logs import Log, counts_epochs, read_log, settings_in
from dyrep_mm.surgery.structure import PRESETS, Structure

Points = list[tuple[float, float]]

#: Metrics that tell most of a task, the first that a run has is shown.
_MAIN = (
    *('accuracy/top1', 'coco/bbox_mAP', 'coco/segm_mAP', 'pascal_voc/mAP', 'mIoU'),
    *('single-label/f1-score', 'multi-label/mAP'),
)


@dataclass
class Run:
    """What is known of one run; what is not known is empty or None.

    Attributes:
        label: What the page calls it.
        group: The method: runs of one group differ in their seed.
        source: Where it was read.
        unit: ``'epoch'`` or ``'iteration'``, of every time here.
        reached: How much of the training is known.
        recorded: How much of it the journal covers.
        planned: How long the training is to be.
        seed: Of the run.
        facts: Sentences of the summary, by name.
        journal: One entry for an update.
        structure: At the end of what the journal covers.
        start: Structure at the beginning.
        lives: All branches that ever were.
        layers: Convs from input to output, as far as they are known.
        importances: Of the branches at the end, by path of their block.
        measured: When they were, by path of the block.
        kernels: Height and width of the kernel of a conv that has a block, pixels.
        left_alone: Why convs stay plain.
        metrics: Every validation metric over time.
        loss: Of the training, over time.
        seconds: Of training steps and updates; a run with DyRep leaves out waiting for data.
        steps: How many steps they are.
        plain: Parameters and multiply-adds of the plain model, ``parameters`` and
            ``multiply_adds``.
        first: The same of the model at the first iteration.
        averages: The same over the training, and ``time``, the time of training relative to
            plain.
    """

    label: str
    group: str
    source: str = ''
    unit: str = 'epoch'
    reached: float = 0
    recorded: float = 0
    planned: int | None = None
    seed: int | None = None
    facts: dict[str, str] = field(default_factory=dict)
    journal: list[Entry] = field(default_factory=list)
    structure: Structure = field(default_factory=dict)
    start: Structure = field(default_factory=dict)
    lives: list[Life] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    importances: dict[str, dict[str, float]] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, tuple[int, int]] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Points] = field(default_factory=dict)
    loss: Points = field(default_factory=list)
    seconds: float | None = None
    steps: int = 0
    plain: dict[str, float] = field(default_factory=dict)
    first: dict[str, float | None] = field(default_factory=dict)
    averages: dict[str, float] = field(default_factory=dict)

    @property
    def has_structure(self) -> bool:
        """Whether there is anything to draw but curves."""
        return bool(self.journal or self.lives)

    @property
    def is_over(self) -> bool:
        """Whether the training came to its planned end, as far as that is known."""
        return self.planned is None or self.reached >= self.planned

    def main_metric(self, wanted: str | None = None) -> str | None:
        """Name of the metric to show."""
        names = [wanted, *_MAIN, *self.metrics]
        return next((name for name in names if name in self.metrics), None)


def lower_is_better(metric: str) -> bool:
    """Whether a metric is an error."""
    return any(word in metric.lower() for word in ('loss', 'error', 'mae', 'mse'))


def best_of(points: Points, metric: str) -> tuple[float, float]:
    """The time and the value at which a metric was best."""
    return (min if lower_is_better(metric) else max)(points, key=lambda point: point[1])


def read_runs(sources: Sequence[str], *, trust: bool = False) -> list[Run]:
    """Read runs to lay side by side.

    Args:
        sources: Work directories and checkpoints, each as ``PATH`` or ``LABEL=PATH``.
        trust: Unpickle any class in checkpoints.

    Raises:
        DyRepError: one cannot be read, or none has a journal.
    """
    runs = [read_run(source, trust=trust) for source in sources]
    if not any(run.has_structure for run in runs):
        raise DyRepError(
            f'there is no journal in {", ".join(run.source for run in runs)}: no DyRep run has '
            'saved a checkpoint there'
        )
    share_plain_costs(runs)
    taken: dict[str, int] = {}
    for run in runs:
        taken[run.label] = taken.get(run.label, 0) + 1
        if taken[run.label] > 1:
            run.label += f' ({taken[run.label]})'
    return runs


def read_run(source: str, *, trust: bool = False) -> Run:
    """Read one run, see :func:`read_runs`."""
    label, _, path = source.rpartition('=')
    if not label or Path(source).exists():
        label, path = '', source
    place = Path(path)
    if not place.exists():
        raise DyRepError(f'there is no folder and no checkpoint {path}')
    if place.is_file():
        return make_run(label or place.stem, path, load_checkpoint(place, trust=trust), Log())
    log, file = read_log(place), newest_checkpoint(place)
    checkpoint = {} if file is None else load_checkpoint(file, trust=trust)
    if file is None and not log.validations:
        raise DyRepError(
            f'there is no journal in {path}: it holds no whole checkpoint and no validation; '
            'name the work directory of a run'
        )
    return make_run(label or place.resolve().name, path, checkpoint, log)


def newest_checkpoint(work_dir: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end."""
    files = [file for file in work_dir.glob('*.pth') if is_whole(file)]
    # A run writes its best checkpoint before the last one anew.
    return max(
        files,
        key=lambda file: (not file.name.startswith('best_'), file.stat().st_mtime_ns),
        default=None,
    )


def make_run(label: str, source: str, checkpoint: Mapping[str, Any], log: Log) -> Run:
    """Put together what a checkpoint and a log tell.

    Args:
        label: Name of the run.
        source: Where it was read.
        checkpoint: Empty if there is none yet.
        log: Empty if there is none.

    Raises:
        DyRepError: the record in the checkpoint is malformed.
    """
    try:
        checkpoint = from_stock(dict(checkpoint))
        record = Record.from_checkpoint(checkpoint)
    except DyRepError as error:
        raise DyRepError(f'{source}: {error}') from None
    meta = checkpoint.get('meta') or {}
    config = log.config or settings_in(str(meta.get('cfg', '')))
    structure = record.structure or {}
    start = first_structure(structure, record.journal)
    run = Run(
        label,
        _group(record, start),
        source,
        seed=_seed(meta, config),
        journal=record.journal,
        structure=structure,
        start=start,
        lives=lives(start, record.journal),
        left_alone=dict(record.left_alone),
    )
    run.layers = _layers(record, structure)
    _set_times(run, record, meta, config, log)
    _set_importances(run, checkpoint)
    _set_costs(run, record, checkpoint)
    run.facts = _facts(run, meta, config, log)
    return run


def _group(record: Record, start: Structure) -> str:
    if record.structure is None:
        return 'plain'
    if record.journal or not start:
        return record.method
    shapes = {frozenset(names) for names in start.values()}
    whole = frozenset().union(*shapes)
    by_names = {frozenset(names): preset for preset, names in PRESETS.items()}
    titles = {'dbb': 'DBB', 'dbb7': 'DBB, all operations', 'repvgg': 'RepVGG'}
    return titles.get(by_names.get(whole, ''), 'fixed structure')


def _seed(meta: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    seed = meta.get('seed')
    if type(seed) is not int:
        seed = (config.get('randomness') or {}).get('seed')
    return seed if type(seed) is int else None


def _layers(record: Record, structure: Structure) -> list[str]:
    """Convs of the plain model from input to output: in the order in which training called them,
    else in that of the model."""
    scored = [path for entry in record.journal for path in entry.scores]
    known = {outermost(path) for path in [*scored, *structure, *record.left_alone]}
    called = [outermost(path) for path in record.sizes or ()]
    model = [outermost(path) for path in [*scored, *structure]]
    return [path for path in dict.fromkeys([*called, *model]) if path in known]


def _set_times(
    run: Run, record: Record, meta: Mapping[str, Any], config: Mapping[str, Any], log: Log
) -> None:
    epochs, iterations = (meta.get(name) for name in ('epoch', 'iter'))
    per_epoch = None  # iterations of an epoch
    if type(epochs) is int and type(iterations) is int and epochs > 0:
        per_epoch = iterations / epochs
    elif pairs := [(step, epoch) for step, epoch, _ in log.steps if epoch]:
        per_epoch = max(step / epoch for step, epoch in pairs)
    if run.journal:
        run.unit = run.journal[-1].unit
    else:
        by_epoch = counts_epochs(config)
        if by_epoch is None:
            by_epoch = any(epoch is not None for _, _, epoch in _heads(log))
        run.unit = 'epoch' if by_epoch else 'iteration'
    in_epochs = run.unit == 'epoch'

    def time(step: float, epoch: float | None = None) -> float:
        if not in_epochs:
            return step if epoch is None or not per_epoch else epoch * per_epoch
        return epoch if epoch is not None else step / (per_epoch or 1)

    for step, epoch, metrics in log.validations:
        for name, value in metrics.items():
            run.metrics.setdefault(name, []).append((time(step, epoch), value))
    run.loss = [(time(step), values['loss']) for step, _, values in log.steps if 'loss' in values]
    saved = epochs if in_epochs else iterations
    run.recorded = max([saved if type(saved) is int else 0, *(entry.at for entry in run.journal)])
    ends = [time(step) for step, _, _ in log.steps[-1:]]
    ends += [points[-1][0] for points in run.metrics.values()]
    run.reached = max([run.recorded, *ends])
    loop = config.get('train_cfg') or {}
    key = 'max_epochs' if in_epochs else 'max_iters'
    planned = loop.get(key) if isinstance(loop, Mapping) else None
    if planned is None and not in_epochs and per_epoch and type(loop.get('max_epochs')) is int:
        planned = round(loop['max_epochs'] * per_epoch)
    run.planned = planned if type(planned) is int else None
    _set_seconds(run, record, log, time)


def _heads(log: Log) -> list[tuple[str, int, int | None]]:
    return [('', step, epoch) for step, epoch, _ in log.steps]


def _set_seconds(run: Run, record: Record, log: Log, time: Callable[[int], float]) -> None:
    """By the record where it has them, else by the log; without the waiting for data. The ``time``
    of a line of the log is the mean of the last iterations before it alone, and has an update in
    it or not by chance."""
    timing = record.timing
    last, seconds, plain = 0, 0.0, []
    first = min((entry.at for entry in run.journal if entry.grown), default=None)
    for step, _, values in log.steps:
        if 'time' not in values or step <= last:
            continue
        spent = values['time'] - values.get('data_time', 0)
        seconds += spent * (step - last)
        if first is not None and time(step) <= first and not run.start:
            plain.append((spent, step - last))
        last = step
    if timing.step is not None:
        # The log of a run that goes on is ahead of its checkpoint.
        run.steps = max(last, timing.steps)
        run.seconds = timing.step * run.steps + timing.update_seconds
        return
    if not last:
        return
    run.seconds, run.steps = seconds, last
    if len(plain) > 1:
        # The first line has the start of everything in it.
        step_time = sum(t * n for t, n in plain[1:]) / sum(n for _, n in plain[1:])
        run.averages['time'] = seconds / last / step_time


def _set_importances(run: Run, checkpoint: Mapping[str, Any]) -> None:
    """Those of the weights, else the last ones of the journal."""
    try:
        weights = weights_of(checkpoint) if checkpoint.get('state_dict') else {}
    except DyRepError:
        weights = {}
    journal = last_importances(run.journal)
    for path, names in run.structure.items():
        if (shape := _kernel(weights, path)) is not None:
            run.kernels[path] = shape
        added = [name for name in names if name != ORIGIN]
        if (now := importances_in(weights, path, added)) is not None:
            run.importances[path], run.measured[path] = now, run.recorded
        elif path in journal:
            at, values = journal[path]
            run.importances[path] = {name: values[name] for name in added if name in values}
            run.measured[path] = at


def importances_in(
    weights: Mapping[str, Tensor], path: str, names: Sequence[str]
) -> dict[str, float] | None:
    """Eq. 9 for the branches of a block, as :meth:`dyrep_mm.reparam.block.Block.importances`.

    Args:
        weights: Of a model, by name.
        path: Of the block.
        names: Its added branches.

    Returns:
        None if the weights of the block are not all there.
    """
    std = weights.get(f'{path}.origin_std')
    found = [weights.get(f'{path}.branches.{name}.bn.weight') for name in names]
    scales = [scale for scale in found if scale is not None]
    if std is None or len(scales) < len(found):
        return None
    unit = max(float(std.double().mean()), 1e-37)
    units = [weights.get(f'{path}.branches.{name}.unit', 1.0) for name in names]  # 0.1.0 has none
    values = (float((s.double() * u).abs().mean()) for s, u in zip(scales, units, strict=True))
    return {name: value / unit for name, value in zip(names, values, strict=True)}


def _kernel(weights: Mapping[str, Tensor], path: str) -> tuple[int, int] | None:
    pattern = re.compile(re.escape(path) + r'(\.branches\.kxk)*\.weight')
    for name, tensor in weights.items():
        if pattern.fullmatch(name) and tensor.ndim == 4:
            return pair(tensor.shape[2:])
    return None


def _set_costs(run: Run, record: Record, checkpoint: Mapping[str, Any]) -> None:
    """Plain costs and averages, as far as the record has them."""
    names = ('parameters', 'multiply_adds')
    if record.structure is None:  # a plain run
        if (count := _parameters(checkpoint)) is not None:
            run.plain['parameters'] = run.averages['parameters'] = float(count)
            run.averages['time'] = 1.0
        return
    row = record.averages()
    run.averages |= {name: float(row[name]) for name in names if row[name] is not None}
    plain = {name: row[f'plain_{name}'] for name in names}
    run.plain |= {name: float(value) for name, value in plain.items() if value is not None}
    if record.timing.relative is not None:
        run.averages['time'] = record.timing.relative
    if record.start is not None:
        run.first = {name: getattr(record.start, name) for name in names}


def _parameters(checkpoint: Mapping[str, Any]) -> int | None:
    if not checkpoint.get('state_dict'):
        return None
    buffers = ('.running_mean', '.running_var', '.num_batches_tracked')
    return sum(t.numel() for n, t in weights_of(checkpoint).items() if not n.endswith(buffers))


def share_plain_costs(runs: Sequence[Run]) -> None:
    """Let runs of the same model know of each other what they do not know themselves: the
    multiply-adds of the plain model, and the time of its steps."""
    for run in runs:
        same = [r for r in runs if r.plain.get('parameters') == run.plain.get('parameters')]
        if 'parameters' not in run.plain:
            continue
        for other in same:
            if 'multiply_adds' not in run.plain and 'multiply_adds' in other.plain:
                run.plain['multiply_adds'] = other.plain['multiply_adds']
                if run.group == 'plain':
                    run.averages['multiply_adds'] = other.plain['multiply_adds']
        plain = [r.seconds / r.steps for r in same if r.group == 'plain' and r.seconds]
        if 'time' not in run.averages and plain and run.seconds:
            run.averages['time'] = run.seconds / run.steps / (sum(plain) / len(plain))


def _facts(
    run: Run, meta: Mapping[str, Any], config: Mapping[str, Any], log: Log
) -> dict[str, str]:
    facts = {'read from': run.source}
    if (model := _model(config.get('model'))) is not None:
        facts['model'] = model
    if isinstance(meta.get('experiment_name'), str):
        # mmengine adds the time, which stands below.
        facts['experiment'] = re.sub(r'_\d{8}_\d{6}$', '', meta['experiment_name'])
    if run.seed is not None:
        facts['seed'] = str(run.seed)
    if log.started is not None:
        facts['started'] = f'{log.started:%Y-%m-%d %H:%M}'
    saved = _date(meta.get('time'))
    if saved is not None:
        facts['checkpoint written'] = f'{saved:%Y-%m-%d %H:%M}'
    if log.touched is not None:
        facts['last line of the log'] = f'{log.touched:%Y-%m-%d %H:%M}'
    return facts


def _date(value: Any) -> datetime | None:
    try:
        return datetime.strptime(value, '%Y%m%d_%H%M%S')
    except (TypeError, ValueError):
        return None


def _model(model: Any) -> str | None:
    if not isinstance(model, Mapping) or not isinstance(model.get('type'), str):
        return None
    backbone, parts = model.get('backbone'), [model['type']]
    if isinstance(backbone, Mapping) and isinstance(backbone.get('type'), str):
        about = [str(backbone[key]) for key in ('depth', 'arch') if key in backbone]
        parts.append('-'.join([backbone['type'], *about]))
    return ', '.join(parts)
