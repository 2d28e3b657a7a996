"""What a run knows of itself: its structure, its journal, and the progress of an interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from typing import Any

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.norms import BRANCH_NORMS
from dyrep_mm.surgery.cost import Sizes, are_sizes
from dyrep_mm.surgery.structure import Structure, check_structure
from dyrep_mm.version import __version__

KEY = 'dyrep_mm'

UNITS = ('epoch', 'iteration')


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

    @classmethod
    def from_data(cls, data: Any) -> Entry:
        """Read and check what :func:`dataclasses.asdict` made, here or in version 0.1.0.

        Raises:
            DyRepError: it is something else.
        """
        _check(isinstance(data, Mapping), 'journal')
        data = dict(data)
        for unit in UNITS:  # 0.1.0
            if unit in data:
                data |= {'unit': unit, 'at': data.pop(unit)}
        data = {**dict.fromkeys(('update', 'unit', 'at')), **data}
        entry = cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})
        _check(type(entry.update) is int and type(entry.at) is int, 'journal')
        _check(entry.unit in UNITS, 'journal')
        for paths in (entry.grown, entry.pruned, entry.scores, entry.importances):
            _check(isinstance(paths, Mapping) and all(isinstance(p, str) for p in paths), 'journal')
        sizes = (entry.blocks, entry.branches, entry.parameters, entry.multiply_adds)
        _check(all(n is None or isinstance(n, Real) for n in sizes), 'journal')
        return entry

    def summary(self) -> str:
        """The update as a line of a log."""
        parts = [
            f'grew {path} '
            + (f'(score {self.scores[path]:.3g}) ' if path in self.scores else '')
            + f'to {", ".join(names)}'
            for path, names in self.grown.items()
        ]
        parts += [f'pruned {", ".join(names)} of {path}' for path, names in self.pruned.items()]
        sizes = [f'{self.blocks} blocks, {self.branches} branches']
        if self.parameters is not None:
            sizes.append(f'{self.parameters / 1e6:.2f} M parameters')
        if self.multiply_adds is not None:
            sizes.append(f'{self.multiply_adds / 1e9:.3g} G multiply-adds')
        return (
            f'update {self.update} at {self.unit} {self.at}: {"; ".join(parts) or "no change"} | '
            + ', '.join(sizes)
        )


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
        left_alone: Why convs that were tried stay plain, by path.
        branch_norm: What the norms of branches normalised with, see docs/norms.md.
    """

    structure: Structure | None = None
    journal: list[Entry] = field(default_factory=list)
    updates: int = 0
    by_epoch: bool | None = None
    last: int = 0
    scores: dict[str, Any] | None = None
    warned: bool = False
    sizes: Sizes | None = None
    left_alone: dict[str, str] = field(default_factory=dict)
    branch_norm: str = 'batch'

    def to_checkpoint(self, checkpoint: dict) -> None:
        """Write into ``meta``, which publishing keeps, and beside it what a resume needs."""
        checkpoint['meta'][KEY] = {
            'version': __version__,
            'structure': self.structure,
            'journal': [asdict(entry) for entry in self.journal],
        }
        checkpoint[KEY] = {f.name: getattr(self, f.name) for f in fields(self)[2:]}

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
            **{f.name: progress[f.name] for f in fields(cls)[2:] if f.name in progress},
        )
        counts = record.updates, record.last
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
        if record.sizes is not None:
            _check(are_sizes(record.sizes), 'sizes')
        return record


def _check(condition: bool, part: str) -> None:
    if not condition:
        raise DyRepError(f'the DyRep record of the checkpoint is malformed: {part}')
