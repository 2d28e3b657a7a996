"""What a checkpoint says of DyRep: structure and journal for all, progress for a resume."""

from __future__ import annotations

import json
import logging
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.runner import checkpoint as mmengine_checkpoint

from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery import Structure, check_structure
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


def load_structure(source: str | Path | Mapping) -> Structure:
    """A Structure from data, a JSON file, or a checkpoint (any other file).

    Raises:
        DyRepError: there is no such file, or no Structure in it.
    """
    if isinstance(source, Mapping):
        data: Any = source
    elif Path(source).suffix == '.json':
        try:
            data = json.loads(Path(source).read_text())
        except (OSError, ValueError) as error:
            raise DyRepError(f'structure file {source}: {error}') from None
    else:
        data = Record.from_checkpoint(load_checkpoint(source)).structure
        if data is None:
            raise DyRepError(f'{source} holds no structure: it is a checkpoint of a plain run')
    check_structure(data)
    return {path: list(names) for path, names in data.items()}


def load_checkpoint(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU.

    Args:
        path: The file.
        trust: Unpickle any class, which can run code; by default only plain data and what
            mmengine itself puts into checkpoints.

    Raises:
        DyRepError: the file is missing, truncated, holds other classes, or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise DyRepError(f'there is no checkpoint file {path}')
    # What mmengine's own message hub pickles to; the original line has no such list.
    allowed = getattr(mmengine_checkpoint, 'get_torch_safe_globals', lambda: [HistoryBuffer])
    try:
        with torch.serialization.safe_globals(allowed()):
            checkpoint = torch.load(path, map_location='cpu', weights_only=not trust)
    except pickle.UnpicklingError as error:
        reason = str(error).split('\n')[0]
        raise DyRepError(f'{path} does not load as plain data: {reason}') from None
    except Exception as error:  # other bytes than torch's can make it raise anything
        reason = f'{type(error).__name__} {error}'.split('\n')[0]
        raise DyRepError(f'{path} is truncated or no checkpoint: {reason}') from None
    if not isinstance(checkpoint, dict):
        raise DyRepError(f'{path} holds a {type(checkpoint).__name__}, a checkpoint is a dict')
    return checkpoint


def is_whole(path: str | Path) -> bool:
    """Whether ``torch.save`` has finished ``path``: it writes the table of contents last."""
    try:
        with zipfile.ZipFile(path):
            return True
    except (OSError, zipfile.BadZipFile):
        return False


def latest_checkpoint(work_dir: str | Path) -> str | None:
    """The checkpoint to resume a run from; None where a run starts anew.

    It is the one that mmengine would take, but for a process that was killed while writing it:
    then the newest whole one beside it.
    """
    pointer = Path(work_dir) / 'last_checkpoint'
    if not pointer.is_file():
        return None
    named = pointer.read_text().strip()
    if '://' in named or is_whole(named):
        return named
    beside = {Path(work_dir), Path(named).parent}
    files = [path for folder in beside for path in folder.glob('*.pth')]
    # A best checkpoint holds no optimizer.
    whole = [path for path in files if not path.name.startswith('best_') and is_whole(path)]
    newest = max(whole, key=lambda path: path.stat().st_mtime_ns, default=None)
    print_log(
        f'DyRep: {named or "the last checkpoint"} is missing or was not written to its end; '
        + (f'resuming from {newest}' if newest else 'there is no other: starting anew'),
        logger='current',
        level=logging.WARNING,
    )
    return None if newest is None else str(newest)
