"""What a checkpoint says of DyRep: structure and journal for all, progress for a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.structure import Structure, check_structure
from dyrep_mm.version import __version__

KEY = 'dyrep_mm'


@dataclass
class Record:
    """Plain data only: ``torch.load(weights_only=True)`` accepts it.

    Attributes:
        structure: Of the model; None if the checkpoint is not of DyRep.
        journal: One entry per update, for people.
        updates: How many updates there were.
        by_epoch: Whether ``last`` counts epochs; None if nothing is known of it.
        last: Epoch or iteration of the last update.
        scores: Those gathered since, see :meth:`Saliency.state_dict`.
        warned: The log has said that the scores cancel.
    """

    structure: Structure | None = None
    journal: list[dict[str, Any]] = field(default_factory=list)
    updates: int = 0
    by_epoch: bool | None = None
    last: int = 0
    scores: dict[str, Any] | None = None
    warned: bool = False

    def to_checkpoint(self, checkpoint: dict) -> None:
        """Write into ``meta``, which publishing keeps, and beside it what a resume needs."""
        checkpoint['meta'][KEY] = {
            'version': __version__,
            'structure': self.structure,
            'journal': self.journal,
        }
        checkpoint[KEY] = {
            'updates': self.updates,
            'by_epoch': self.by_epoch,
            'last': self.last,
            'scores': self.scores,
            'warned': self.warned,
        }

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Record:
        """Read and check; an empty record for a checkpoint of a plain run.

        Raises:
            DyRepError: what is there is malformed.
        """
        meta = checkpoint.get('meta') or {}
        said = meta.get(KEY) if isinstance(meta, Mapping) else None
        if said is None:
            return cls()
        progress = checkpoint.get(KEY, {})
        _check(isinstance(said, Mapping) and isinstance(progress, Mapping), 'not a mapping')
        check_structure(said.get('structure'))
        record = cls(
            {path: list(names) for path, names in said['structure'].items()},
            said.get('journal', []),
            **{f.name: progress[f.name] for f in fields(cls)[2:] if f.name in progress},
        )
        counts = record.updates, record.last
        _check(all(type(n) is int and n >= 0 for n in counts), f'counts {counts}')
        _check(record.by_epoch in (None, True, False), f'by_epoch {record.by_epoch!r}')
        _check(type(record.warned) is bool, f'warned {record.warned!r}')
        _check(record.scores is None or isinstance(record.scores, Mapping), 'scores')
        _check(type(record.journal) is list, 'journal')
        _check(all(isinstance(entry, Mapping) for entry in record.journal), 'journal')
        return record


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise DyRepError(f'the DyRep record of the checkpoint is malformed: {what}')
