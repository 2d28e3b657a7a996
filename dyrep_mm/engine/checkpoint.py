"""Checkpoint files: read safely, load strictly, find the newest whole one, write atomically."""

from __future__ import annotations

import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from mmengine.logging import print_log
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor, nn

from dyrep_mm.engine.stock import AVERAGED, from_stock
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Record
from dyrep_mm.surgery.structure import (
    PRESETS,
    Structure,
    check_structure,
    listed,
    misfits,
    structure_from_names,
)
from dyrep_mm.surgery.tree import blocks_of, named_parts, upwards

#: Types of numpy's numbers: the metrics of mmseg are such, and message hubs keep metrics. mmengine
#: allows the numbers themselves and three of these.
_NUMBERS = [type(numpy.dtype(kind)) for kind in '?bBhHiIlLqQefd']


def load_structure(source: str | Path | Mapping) -> Structure:
    """A Structure from data, a JSON file, or a checkpoint (any other file).

    Raises:
        DyRepError: there is no such file, or no Structure in it.
    """
    if isinstance(source, Mapping):
        data: Any = source
    elif not isinstance(source, (str, Path)):
        raise DyRepError(
            f'a structure is one of {", ".join(PRESETS)}, a mapping or a file, '
            f'got a {type(source).__name__}'
        )
    elif Path(source).suffix == '.json':
        try:
            data = json.loads(Path(source).read_text())
        except (OSError, ValueError) as error:
            raise DyRepError(f'structure file {source}: {error}') from None
        except RecursionError:
            raise DyRepError(f'structure file {source}: it is nested too deep') from None
    elif not os.path.isfile(source):
        raise DyRepError(
            f'there is no checkpoint file {str(source)!r:.300} and no structure of that name: '
            f'choose from {", ".join(PRESETS)}'
        )
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

    Returns:
        The checkpoint, with its branches in ``state_dict``, and a ``meta`` in any case, and
        :func:`structure_in` it.

    Raises:
        DyRepError: it cannot be read, or it is of a plain run.
    """
    return grown_in(load_checkpoint(path, trust=trust), path, advice)


def grown_in(
    checkpoint: dict[str, Any], path: str | Path, advice: str = ''
) -> tuple[dict[str, Any], Structure]:
    """What :func:`load_grown` gives, of a checkpoint that was read from ``path``."""
    try:
        checkpoint = from_stock(checkpoint)
        structure = structure_in(checkpoint)
    except DyRepError as error:
        raise DyRepError(f'{path}: {error}') from None
    if structure is None:
        raise DyRepError(f'{path} holds no structure: it is a checkpoint of a plain run{advice}')
    if 'state_dict' not in checkpoint:
        checkpoint = {'state_dict': checkpoint}
    return {'meta': {}, **checkpoint}, structure


def structure_in(checkpoint: Mapping[str, Any]) -> Structure | None:
    """The Structure of the weights in a checkpoint, as their names tell; None for a plain run.

    A stock checkpoint has its branches elsewhere: :func:`from_stock` puts them in first.

    Biases that convs gained are in it where the checkpoint records them; without a record, the
    model tells them, see :func:`dyrep_mm.surgery.rewire.restore`.

    Raises:
        DyRepError: it is no checkpoint, its record names other blocks than its weights, or its
            weights are not all in the file.
    """
    recorded = Record.from_checkpoint(as_mapping(checkpoint)).structure
    if recorded is not None and checkpoint.get('state_dict', {}) == {}:
        return recorded  # a Structure, and no weights to be wrong about
    weights = weights_of(checkpoint)
    structure = structure_from_names(weights)
    _check_that_all_is_there(structure, weights)
    if recorded is None:
        return structure or None
    for path in [*recorded, *structure]:
        said, seen = recorded.get(path), structure.get(path)
        if said == [] and seen is None and f'{path}.bias' in weights:
            continue
        if seen is None or said is None or set(said) != set(seen):
            raise DyRepError(
                'the structure record of the checkpoint is not that of its weights: '
                f'{path!r:.200} has {said or "no operations"} in the one and '
                f'{seen or "no operations"} in the other'
            )
    return recorded


def _check_that_all_is_there(structure: Structure, weights: Mapping[str, Tensor]) -> None:
    """Raise ``DyRepError`` if the tensors of blocks are larger than what the file holds of them: a
    small file must not make large blocks."""
    inside = [
        (name, tensor)
        for name, tensor in weights.items()
        if any(parent in structure for parent in upwards(name))
    ]
    for name, tensor in inside:
        if tensor.layout != torch.strided or tensor.is_meta:
            raise DyRepError(f'{name!r:.200} is not a dense tensor with values')
    storages = [tensor.untyped_storage() for _, tensor in inside]
    held = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    needed = sum(tensor.numel() * tensor.element_size() for _, tensor in inside)
    if needed > held:
        raise DyRepError(f'the blocks have {needed} bytes and the file has {held} bytes of them')


def as_mapping(checkpoint: Any) -> Mapping[str, Any]:
    """``checkpoint`` itself.

    Raises:
        DyRepError: it is something else than a mapping.
    """
    if not isinstance(checkpoint, Mapping):
        raise DyRepError(f'the file holds a {type(checkpoint).__name__}, a checkpoint is a dict')
    return checkpoint


def weights_of(checkpoint: Mapping[str, Any], prefix: str = '') -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, those of DDP and those below ``prefix`` without it.

    Args:
        checkpoint: As mmengine writes it, or a bare ``state_dict``.
        prefix: Part of the names.

    Raises:
        DyRepError: it holds no ``state_dict``, or one that is of no model.
    """
    checkpoint = as_mapping(checkpoint)
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, Mapping):
        raise DyRepError(f'the state_dict of the checkpoint is a {type(state).__name__}')
    for name in state:
        if not isinstance(name, str):
            raise DyRepError(
                f'the names in the checkpoint must be strings, one is a {type(name).__name__}'
            )
    tensors = {n.removeprefix('module.'): t for n, t in state.items() if isinstance(t, Tensor)}
    if not tensors:
        raise DyRepError('the checkpoint holds no state_dict with tensors')
    return below(prefix, tensors)


def below(prefix: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``names`` that start with ``prefix``, without it."""
    return {n.removeprefix(prefix): v for n, v in names.items() if n.startswith(prefix)}


def _in_message_hub() -> list[Any]:
    """What the pickle of a message hub refers to, as the maintained line of mmengine lists it:
    buffers with arrays in them, and their methods."""
    reduced: Any = numpy.arange(0).__reduce__()
    make, (array, *_) = reduced[:2]
    scalar = numpy.float64(0).__reduce__()[0]
    return [HistoryBuffer, getattr, make, array, numpy.dtype, scalar]


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
    if not os.path.isfile(path):  # a name that no file can have is no error for it
        raise DyRepError(f'there is no checkpoint file {path}')
    # What mmengine's own message hub pickles to; the original line has no such list.
    allowed = getattr(mmengine_checkpoint, 'get_torch_safe_globals', _in_message_hub)
    try:
        with torch.serialization.safe_globals([*allowed(), *_NUMBERS]):
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


def check_weights(model: nn.Module, state: Mapping[str, Tensor], resume: bool) -> None:
    """Refuse weights that are not this model's: mmengine would only warn.

    Args:
        model: In the structure of the weights.
        state: By name, see :func:`weights_of`.
        resume: Whether all weights must be there, or those of the blocks that it names.
    """
    own = model.state_dict()
    if own.keys().isdisjoint(state):
        raise DyRepError(
            f'the checkpoint is of another model: no name in it is one of {type(model).__name__}'
        )
    inside = named_parts(model, blocks_of(model), state)
    blocks = {name: t for name, t in own.items() if not inside.isdisjoint(upwards(name))}
    wrong = misfits(blocks, state)
    if resume:
        rest = {name: tensor for name, tensor in own.items() if name not in blocks}
        wrong += [f'{name} is missing' for name in rest if name not in state]
        # A buffer may have another shape from one iteration to the next.
        trained = {name: t for name, t in model.named_parameters() if name in rest}
        wrong += misfits({name: t for name, t in trained.items() if name in state}, state)
    if wrong:
        raise DyRepError(f'the checkpoint is not of this model: {listed(wrong)}')


def check_resumable(checkpoint: Mapping[str, Any]) -> None:
    """Raise ``DyRepError`` if a checkpoint holds weights and no run."""
    meta = checkpoint.get('meta')
    known = meta if isinstance(meta, Mapping) else {}
    lacking = [f'meta.{name}' for name in ('epoch', 'iter') if name not in known]
    if 'message_hub' not in checkpoint:
        lacking.append('message_hub')
    if lacking:
        raise DyRepError(
            f'no run can resume from this checkpoint, it has no {lacking[0]}: '
            'load_from (resume=False) starts from its weights'
        )
    averaged = checkpoint.get('ema_state_dict')
    names = averaged if isinstance(averaged, Mapping) else ()
    inside = [str(n).removeprefix(AVERAGED) for n in names if str(n).startswith(AVERAGED)]
    if missing := [name for name in inside if name not in checkpoint.get('state_dict', ())]:
        raise DyRepError(
            f'no run can resume from this checkpoint, its ema_state_dict has {missing[0]} and its '
            'state_dict has not: load_from (resume=False) starts from its weights'
        )


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """``load_state_dict(strict=True)`` with one sentence for what does not fit.

    Args:
        model: Takes the weights.
        state: By name, see :func:`weights_of`.
        source: Where they come from.
    """
    own = model.state_dict()
    wrong = [*misfits(own, state), *(f'{name} is unknown' for name in state if name not in own)]
    if wrong:
        raise DyRepError(f'{source} is not of this model: {listed(wrong)}')
    model.load_state_dict(state)


class Once:
    """Lets a model tell, once, what it is about to load, after mmengine has renamed it.

    Used up, it can stay on the model: a copy or a pickle of it holds nothing.

    Args:
        call: Takes the ``state_dict``.
    """

    def __init__(self, call: Callable[[dict[str, Any]], None]):
        self.call: Callable[[dict[str, Any]], None] | None = call

    def __call__(self, _module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        call, self.call = self.call, None
        if call is not None:
            call(state)


def save_atomically(checkpoint: dict[str, Any], path: str | Path) -> None:
    """``torch.save`` that leaves either the whole file or none."""
    partial = Path(f'{path}.partial')
    try:
        torch.save(checkpoint, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
