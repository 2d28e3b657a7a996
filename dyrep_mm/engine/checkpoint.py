"""Checkpoint files: read safely, load strictly, find the newest whole one, write atomically."""

from __future__ import annotations

import json
import logging
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor, nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Record
from dyrep_mm.surgery.structure import Structure, check_structure
from dyrep_mm.surgery.tree import blocks_of, in_scope


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
        _, data = load_grown(source)
    check_structure(data)
    return {path: list(names) for path, names in data.items()}


def load_grown(
    path: str | Path, *, trust: bool = False, advice: str = ''
) -> tuple[dict[str, Any], Structure]:
    """Read a checkpoint of a run with DyRep, and its Structure; see :func:`load_checkpoint`.

    Args:
        path: The file.
        trust: Unpickle any class.
        advice: What a user with a checkpoint of a plain run should do.

    Raises:
        DyRepError: it cannot be read, or it is of a plain run.
    """
    checkpoint = load_checkpoint(path, trust=trust)
    structure = Record.from_checkpoint(checkpoint).structure
    if structure is None:
        raise DyRepError(f'{path} holds no structure: it is a checkpoint of a plain run{advice}')
    return checkpoint, structure


def weights_of(checkpoint: Mapping[str, Any], prefix: str = '') -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, those of DDP and those below ``prefix`` without it.

    Raises:
        DyRepError: it holds no ``state_dict``.
    """
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, Mapping):
        raise DyRepError('the checkpoint holds no state_dict')
    return below(prefix, {name.removeprefix('module.'): t for name, t in state.items()})


def below(prefix: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``names`` that start with ``prefix``, without it."""
    return {n.removeprefix(prefix): v for n, v in names.items() if n.startswith(prefix)}


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


def check_keys(
    model: nn.Module, checkpoint: dict, resume: bool, optional: Iterable[str] = ()
) -> None:
    """Refuse a checkpoint whose weights are not this model's: mmengine would only warn.

    Args:
        model: In the structure of the checkpoint.
        checkpoint: As it was read.
        resume: Whether all weights must be there, or those of blocks alone.
        optional: Paths of modules whose weights need not be there.
    """
    names, own = weights_of(checkpoint).keys(), model.state_dict().keys()
    inner = {f'{path}.' for path in blocks_of(model) if not in_scope(path, list(optional))}
    missing = sorted(
        name for name in own - names if resume or any(name.startswith(prefix) for prefix in inner)
    )
    if not own & names:
        raise DyRepError(
            f'the checkpoint is of another model: no name in it is one of {type(model).__name__}'
        )
    if missing:
        raise DyRepError(
            f'the checkpoint lacks {len(missing)} tensors of the model, {missing[0]} first: '
            'it is of another model, or its structure record is not its own'
        )


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """``load_state_dict(strict=True)`` with one sentence for what does not fit.

    Args:
        model: Takes the weights.
        state: By name, see :func:`weights_of`.
        source: Where they come from.
    """
    own = model.state_dict()
    wrong = [
        *(f'{name} is missing' for name in own if name not in state),
        *(f'{name} is unknown' for name in state if name not in own),
        *(
            f'{name} has shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}'
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ),
    ]
    if wrong:
        raise DyRepError(
            f'{source} is not of this model: {"; ".join(wrong[:3])}'
            + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else '')
        )
    model.load_state_dict(state)


def save_atomically(checkpoint: dict[str, Any], path: str | Path) -> None:
    """``torch.save`` that leaves either the whole file or none."""
    partial = Path(f'{path}.partial')
    try:
        torch.save(checkpoint, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
