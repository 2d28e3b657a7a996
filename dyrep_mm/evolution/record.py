"""What a run knows of itself: its structure, its journal, what it costs, and the progress of an
interval.

All that a clock measured is under a name ``timing``, of entries and of records: two runs that are
otherwise the same differ in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from math import isfinite
from numbers import Real
from typing import Any

from torch import Tensor

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.norms import BRANCH_NORMS
from dyrep_mm.surgery.cost import Cost, Sizes, are_sizes
from dyrep_mm.surgery.structure import Structure, check_structure
from dyrep_mm.surgery.tree import in_scope
from dyrep_mm.version import __version__

KEY = 'dyrep_mm'

UNITS = ('epoch', 'iteration')

#: Attributes of a Record that ``meta`` has; a resume alone needs the others.
IN_META = ('structure', 'journal', 'plain', 'start', 'iteration', 'timing', 'method')


@dataclass(frozen=True)
class Entry:
    """One update of a run.

    Attributes:
        update: Number of the update, from 1.
        unit: ``'epoch'`` or ``'iteration'``, the unit of ``at``.
        at: When it happened.
        grown: The blocks that were made, with their operations.
        pruned: The branches that were removed, by path of their block.
        scores: Of every operation that was scored, by path.
        importances: Eq. 9, before the update, of every added branch, by path of its block.
        blocks: How many blocks there are after it.
        branches: How many added branches there are after it.
        parameters: How many the model has after it; None in a journal of version 0.1.0.
        multiply_adds: Of one image in training after it, see :mod:`dyrep_mm.surgery.cost`; None
            where they are not known.
        reasons: Why branches were pruned, see :class:`dyrep_mm.surgery.structure.Plan`.
        iteration: Iterations that were complete; None in older journals that count epochs.
        epoch: How often the training set had been seen, in parts too; None where it has no length.
        average_parameters: Average over the iterations until then; None where it is not known.
        average_multiply_adds: The same of ``multiply_adds``.
        timing: ``steps`` since the last update; ``step_seconds``, the median of a training
            iteration in them, without what loads data, validates or updates; ``update_seconds``,
            of this update. Empty in older journals. Entries that differ in it alone are equal.
        cost_ratio: Multiply-adds of one forward in training after it, as blocks really run, over
            those of the plain model, see :class:`dyrep_mm.surgery.charge.Costs`; None where they
            are not known.
    """

    update: int
    unit: str
    at: int
    grown: Structure = field(default_factory=dict)
    pruned: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    importances: dict[str, dict[str, float]] = field(default_factory=dict)
    blocks: int | None = None
    branches: int | None = None
    parameters: int | None = None
    multiply_adds: float | None = None
    reasons: dict[str, dict[str, float]] = field(default_factory=dict)
    iteration: int | None = None
    epoch: float | None = None
    average_parameters: float | None = None
    average_multiply_adds: float | None = None
    timing: dict[str, float] = field(default_factory=dict, compare=False)
    cost_ratio: float | None = None

    @classmethod
    def from_data(cls, data: Any) -> Entry:
        """Read and check what :func:`dataclasses.asdict` made, here or in version 0.1.0.

        Raises:
            DyRepError: it is something else.
        """
        _check(isinstance(data, Mapping), 'journal')
        data = dict(data)
        for unit in UNITS if 'unit' not in data else ():  # 0.1.0
            if unit in data:
                data |= {'unit': unit, 'at': data.pop(unit)}
        data = {**dict.fromkeys(('update', 'unit', 'at')), **data}
        if data['unit'] == 'iteration':
            data.setdefault('iteration', data['at'])
        entry = cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})
        _check(type(entry.update) is int and type(entry.at) is int, 'journal')
        _check(entry.unit in UNITS, 'journal')
        _check(entry.iteration is None or type(entry.iteration) is int, 'journal')
        maps = (entry.scores, entry.importances, entry.reasons, entry.timing)
        for paths in (entry.grown, entry.pruned, *maps):
            _check(isinstance(paths, Mapping) and all(isinstance(p, str) for p in paths), 'journal')
        sizes = (
            *(entry.blocks, entry.branches, entry.parameters, entry.multiply_adds),
            *(entry.cost_ratio, entry.epoch),
            *(entry.average_parameters, entry.average_multiply_adds),
        )
        _check(all(n is None or isinstance(n, Real) for n in sizes), 'journal')
        _check(all(isinstance(n, Real) for n in entry.timing.values()), 'journal')
        return entry

    @property
    def runner_up(self) -> tuple[str, float] | None:
        """Path and score of the best operation that did not grow and is still there."""
        gone = [f'{path}.branches.{name}' for path, names in self.pruned.items() for name in names]
        left = {
            path: score
            for path, score in self.scores.items()
            if path not in self.grown and isfinite(score) and not in_scope(path, gone)
        }
        return max(left.items(), key=lambda item: item[1], default=None)

    def summary(self, plain: Cost | None = None, plain_step: float | None = None) -> str:
        """The update as two lines of a log: what changed and why, and what it costs.

        Args:
            plain: The cost of the plain model, to compare with.
            plain_step: Seconds of one of its training iterations.
        """
        parts = [self._growth(path) for path in self.grown]
        parts += [self._pruning(path) for path in self.pruned]
        blocks, branches = (
            'block' + 's' * (self.blocks != 1),
            'branch' + 'es' * (self.branches != 1),
        )
        costs = [f'{self.blocks} {blocks}, {self.branches} {branches}']
        for name, unit, size in (('parameters', 'M', 1e6), ('multiply_adds', 'G', 1e9)):
            now, mean = getattr(self, name), getattr(self, f'average_{name}')
            if now is not None:
                what, base = name.replace('_', '-'), None if plain is None else getattr(plain, name)
                costs.append(_compared(what, unit, size, now, average=mean, plain=base))
        if self.cost_ratio is not None:
            costs.append(f'{self.cost_ratio:.3f} times the cost of plain')
        if 'step_seconds' in self.timing:
            step = self.timing['step_seconds']
            costs.append('until now ' + _compared('a step', 's', 1, step, plain=plain_step))
        return (
            f'update {self.update} at {self.unit} {self.at}: {"; ".join(parts) or "no change"}\n'
            f'    {", ".join(costs)}'
        )

    def _growth(self, path: str) -> str:
        why = ''
        if path in self.scores:
            then = self.runner_up
            behind = '' if then is None else f', runner-up {then[0]} {then[1]:.3g}'
            why = f' (score {self.scores[path]:.3g}{behind})'
        return f'grew {path}{why} to {", ".join(self.grown[path])}'

    def _pruning(self, path: str) -> str:
        known = self.importances.get(path, {})
        names = [
            f'{name} ({known[name]:.3g})' if name in known else name for name in self.pruned[path]
        ]
        numbers = [f'{name} {value:.3g}' for name, value in self.reasons.get(path, {}).items()]
        why = f' ({", ".join(numbers)})' if numbers else ''
        return f'pruned {", ".join(names)} of {path}{why}'


def _compared(what: str, unit: str, size: float, now: float, **others: float | None) -> str:
    """``5.05 G multiply-adds (average 4.3, plain 4.1)``."""
    known = [f'{name} {n / size:.4g}' for name, n in others.items() if n is not None]
    return f'{now / size:.4g} {unit} {what}' + (f' ({", ".join(known)})' if known else '')


@dataclass(frozen=True)
class Timing:
    """Training iterations that a clock measured, without what loads data, validates or updates.

    A stretch without a change of structure counts as its number of iterations times their median,
    so that a slow first iteration counts nothing.

    Attributes:
        steps: How many were measured in the run.
        seconds: That they took.
        plain_steps: How many of them were of a plain model: before the first growth.
        plain_seconds: That those took.
        interval_steps: How many of them came after the last update.
        interval_seconds: That those took.
        update_seconds: That all updates took.
    """

    steps: int = 0
    seconds: float = 0.0
    plain_steps: int = 0
    plain_seconds: float = 0.0
    interval_steps: int = 0
    interval_seconds: float = 0.0
    update_seconds: float = 0.0

    def plus(self, steps: int, median: float, plain: bool) -> Timing:
        """With another stretch, of iterations that took ``median`` seconds."""
        seconds = steps * median
        return replace(
            self,
            steps=self.steps + steps,
            seconds=self.seconds + seconds,
            plain_steps=self.plain_steps + plain * steps,
            plain_seconds=self.plain_seconds + plain * seconds,
            interval_steps=self.interval_steps + steps,
            interval_seconds=self.interval_seconds + seconds,
        )

    def updated(self, seconds: float) -> Timing:
        """After an update that took ``seconds``."""
        return replace(
            self,
            interval_steps=0,
            interval_seconds=0.0,
            update_seconds=self.update_seconds + seconds,
        )

    @property
    def step(self) -> float | None:
        """Seconds of an iteration; None if none was measured."""
        return self.seconds / self.steps if self.steps else None

    @property
    def plain_step(self) -> float | None:
        """Seconds of an iteration of the plain model; None if the run never trained it."""
        return self.plain_seconds / self.plain_steps if self.plain_steps else None

    @property
    def interval_step(self) -> float | None:
        """Seconds of an iteration since the last update; None if none was measured."""
        return self.interval_seconds / self.interval_steps if self.interval_steps else None

    @property
    def relative(self) -> float | None:
        """The time of training with all updates, relative to as many plain iterations."""
        plain = self.plain_step
        if not plain:
            return None
        return (self.seconds + self.update_seconds) / (self.steps * plain)


@dataclass
class Record:
    """Plain data only: ``torch.load(weights_only=True)`` accepts it.

    Attributes:
        structure: Of the model; None if the checkpoint is not of DyRep.
        journal: One entry per update.
        updates: How many updates there were.
        by_epoch: Whether ``last`` counts epochs; None if nothing is known of it.
        last: Epoch or iteration of the last update.
        scores: State of the rule, see :meth:`dyrep_mm.evolution.rule.Rule.state_dict`.
        warned: The log has shown the remark of the rule.
        sizes: Of the maps that the layers see in training, see
            :class:`dyrep_mm.surgery.cost.SizeWatch`; None if not known yet.
        images: How many one process had in the batch in which the sizes were noted.
        autocast: Whether layers ran under autocast there.
        left_alone: Why convs that were tried stay plain, by path.
        plain: The cost of the plain model; None if not known yet.
        start: The cost of the model at the first iteration; None if it is not known, as in a run
            that an older version began.
        iteration: Iterations that are complete.
        timing: What a clock measured.
        branch_norm: What the norms of branches normalised with, see docs/norms.md.
        method: What a person calls the rule that decides: ``'DyRep'`` or ``'RepNAS'``.
        units: Of branches that a search had off, by name, see :mod:`dyrep_mm.surgery.gates`.
    """

    structure: Structure | None = None
    journal: list[Entry] = field(default_factory=list)
    updates: int = 0
    by_epoch: bool | None = None
    last: int = 0
    scores: dict[str, Any] | None = None
    warned: bool = False
    sizes: Sizes | None = None
    images: int | None = None
    autocast: bool = False
    left_alone: dict[str, str] = field(default_factory=dict)
    branch_norm: str = 'batch'
    method: str = 'DyRep'
    units: dict[str, Any] = field(default_factory=dict)
    plain: Cost | None = None
    start: Cost | None = None
    iteration: int = 0
    timing: Timing = field(default_factory=Timing, compare=False)

    def know_costs(self, now: Cost, plain: Cost) -> None:
        """Note what the model costs at the start, ``now``, and what it did when it was ``plain``.

        Costs that are known already stay, but for multiply-adds that were not.
        """
        if self.plain is None or self.plain.multiply_adds is None:
            self.plain = plain
        if not self.journal and (self.start is None or self.start.multiply_adds is None):
            self.start = now

    @property
    def is_plain(self) -> bool:
        """Whether the run has trained nothing but the plain model."""
        grown = any(entry.grown for entry in self.journal)
        return not grown and self.start is not None and self.start == self.plain

    def average(self, name: str) -> float | None:
        """Average of ``parameters`` or ``multiply_adds`` over the iterations until now; None if a
        part of them is not known."""
        updates = [entry.iteration for entry in self.journal if entry.iteration is not None]
        costs: Any = (self.start, *self.journal)
        values = [getattr(cost, name) for cost in costs if cost is not None]
        values = [value for value in values if value is not None]
        if not self.iteration or len(updates) < len(self.journal) or len(values) < len(costs):
            return None
        lengths = [end - begin for begin, end in pairwise([0, *updates, self.iteration])]
        return sum(n * value for n, value in zip(lengths, values, strict=True)) / self.iteration

    def averages(self) -> dict[str, Any]:
        """The training so far as a row of Tables 2 and 3: averages over its iterations, and the
        plain model beside them. What is not known is None."""
        plain, timing = self.plain or Cost(0), self.timing
        means = {name: self.average(name) for name in ('parameters', 'multiply_adds')}
        return {
            'iterations': self.iteration,
            **means,
            'plain_parameters': plain.parameters or None,
            'plain_multiply_adds': plain.multiply_adds,
            'timing': {
                'step_seconds': timing.step,
                'plain_step_seconds': timing.plain_step,
                'update_seconds': timing.update_seconds,
                'relative': timing.relative,
            },
        }

    def summary(self) -> str:
        """:meth:`averages` as a line of a log."""
        row, timing = self.averages(), self.timing
        parts = []
        for name, unit, size in (('parameters', 'M', 1e6), ('multiply_adds', 'G', 1e9)):
            if row[name] is not None:
                what, plain = name.replace('_', '-'), row[f'plain_{name}']
                parts.append(_compared(what, unit, size, row[name], plain=plain))
        if timing.step is not None:
            parts.append(_compared('a step', 's', 1, timing.step, plain=timing.plain_step))
            parts.append(f'{timing.update_seconds:.3g} s in updates')
        if timing.relative is not None:
            parts.append(f'{timing.relative:.3g} times the time of plain training')
        parts = parts or ['costs are not known']
        return f'average of {self.iteration} iterations: {", ".join(parts)}'

    @classmethod
    def _progress(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.name not in IN_META]

    def to_checkpoint(self, checkpoint: dict) -> None:
        """Write into ``meta``, which publishing keeps, and beside it what a resume needs."""
        checkpoint['meta'][KEY] = {
            'version': __version__,
            'method': self.method,
            'structure': self.structure,
            'journal': [asdict(entry) for entry in self.journal],
            'plain': None if self.plain is None else asdict(self.plain),
            'start': None if self.start is None else asdict(self.start),
            'iteration': self.iteration,
            'averages': self.averages(),
            'timing': asdict(self.timing),
        }
        checkpoint[KEY] = {name: getattr(self, name) for name in self._progress()}

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Record:
        """Read and check; an empty record for a checkpoint of a plain run.

        Raises:
            DyRepError: the data is malformed.
        """
        meta = checkpoint.get('meta') or {}
        said = meta.get(KEY) if isinstance(meta, Mapping) else None
        if said is None:
            return cls()
        progress = checkpoint.get(KEY, {})
        _check(isinstance(said, Mapping) and isinstance(progress, Mapping), 'not a mapping')
        check_structure(said.get('structure'))
        journal = said.get('journal', [])
        _check(type(journal) is list, 'journal')
        record = cls(
            {path: list(names) for path, names in said['structure'].items()},
            [Entry.from_data(entry) for entry in journal],
            **{name: progress[name] for name in cls._progress() if name in progress},
            plain=_read(Cost, said.get('plain'), 'plain'),
            start=_read(Cost, said.get('start'), 'start'),
            iteration=said.get('iteration', 0),
            timing=_read(Timing, said.get('timing', {}), 'timing'),
            method=said.get('method', 'DyRep'),
        )
        if 'iteration' not in said and type(meta.get('iter')) is int:
            record.iteration = meta['iter']
        counts = record.updates, record.last, record.iteration
        _check(all(type(n) is int and n >= 0 for n in counts), f'counts {counts!r:.200}')
        _check(
            record.by_epoch is None or type(record.by_epoch) is bool,
            f'by_epoch {record.by_epoch!r:.200}',
        )
        _check(type(record.warned) is bool, f'warned {record.warned!r:.200}')
        _check(record.scores is None or isinstance(record.scores, Mapping), 'scores')
        _check(isinstance(record.left_alone, Mapping), 'left_alone')
        for path, reason in record.left_alone.items():
            _check(isinstance(path, str) and isinstance(reason, str), 'left_alone')
        _check(record.branch_norm in BRANCH_NORMS, 'branch_norm')
        _check(isinstance(record.method, str), 'method')
        _check(isinstance(record.units, Mapping), 'units')
        for name, unit in record.units.items():
            _check(isinstance(name, str) and isinstance(unit, Tensor) and unit.ndim == 1, 'units')
        if record.sizes is not None:
            _check(are_sizes(record.sizes), 'sizes')
        images = record.images
        _check(images is None or (type(images) is int and images > 0), f'images {images!r:.200}')
        _check(type(record.autocast) is bool, f'autocast {record.autocast!r:.200}')
        return record


def _check(condition: bool, part: str) -> None:
    if not condition:
        raise DyRepError(f'the DyRep record of the checkpoint is malformed: {part}')


def _read(cls: type, data: Any, part: str) -> Any:
    """A ``cls`` of numbers from what :func:`dataclasses.asdict` made of one; None of None."""
    if data is None:
        return None
    _check(isinstance(data, Mapping), part)
    known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
    _check(all(n is None or isinstance(n, Real) for n in known.values()), part)
    try:
        return cls(**known)
    except TypeError:
        _check(False, part)
