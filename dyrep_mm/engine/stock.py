"""Checkpoints as the stock model reads them: the fused weights under the stock names, and beside
them what only a training needs.

``state_dict`` and ``ema_state_dict`` of a run hold the fused model. The tensors in which the model
with branches differs lie beside them, each once: those of ``state_dict`` in ``meta``, since
``CheckpointHook(published_keys=...)`` and the publish tools of the libraries keep of a file what is
in these two keys (mmpretrain's drops a list of others instead); those of ``ema_state_dict`` at the
top, where they go when it goes. mmengine never copies, compares or prints ``meta`` as a whole.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor, nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import KEY
from dyrep_mm.surgery.fuse import fused_state
from dyrep_mm.surgery.outputs import Norms
from dyrep_mm.surgery.structure import altered, structure_from_names
from dyrep_mm.surgery.tree import upwards

#: Where the tensors lie that only a training needs, in ``meta`` and at the top.
BRANCHES = 'dyrep_mm_branches'

#: How mmengine's averaged models name the tensors of the model that they average.
AVERAGED = 'module.'


class LastHook(Hook):
    """Sees a checkpoint after all hooks that write into it, as ``EMAHook`` does.

    Args:
        call: Takes the runner and the checkpoint.
    """

    priority = 'LOWEST'

    def __init__(self, call: Callable[[Any, dict], None]):
        self._call = call

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        self._call(runner, checkpoint)


def to_stock(
    checkpoint: dict[str, Any], model: nn.Module, norms: Mapping[str, Sequence[str]]
) -> list[str]:
    """Turn a checkpoint with branches, which says so in ``meta``, into a stock one, in place.

    Args:
        checkpoint: As mmengine and ``Record.to_checkpoint`` made it.
        model: The model of its ``state_dict``; is not run and not changed.
        norms: The norms that follow, by path of the conv.

    Returns:
        The convs that have a bias in it and none in the stock model: no norm that follows is known.
    """
    said, parts = checkpoint['meta'][KEY], altered(model)
    averaged = 'ema_state_dict' in checkpoint
    said['fused'] = 'by the run'
    said['weights'] = 'averaged' if averaged else 'raw'
    said['norms'] = {path: list(norms[path]) for path in parts if path in norms}
    said['biased'] = []
    if not parts:
        return []
    checkpoint['state_dict'], stored, said['biased'] = _split(
        checkpoint['state_dict'], model, norms, said['weights']
    )
    checkpoint['meta'][BRANCHES] = stored
    if averaged:
        checkpoint['ema_state_dict'], checkpoint[BRANCHES], _ = _split(
            checkpoint['ema_state_dict'], model, norms, 'raw', AVERAGED
        )
    return said['biased']


def from_stock(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint with branches that became a stock one; any other one as it is.

    Raises:
        DyRepError: the two parts of it do not belong together, or what is beside the weights is no
            plain data of ours.
    """
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    if not isinstance(meta, Mapping) or BRANCHES not in meta:
        return checkpoint
    if not isinstance(checkpoint.get('state_dict'), Mapping):
        return checkpoint  # whoever reads it says so
    places = [place[BRANCHES] for place in (meta, checkpoint) if BRANCHES in place]
    for stored in places:
        _check_form(stored)
    # mmpretrain's publish tool may put the weights of one state_dict into the other.
    state, stored = _joined(checkpoint, 'state_dict', places)
    result = {name: value for name, value in checkpoint.items() if name != BRANCHES}
    result['meta'] = {name: value for name, value in meta.items() if name != BRANCHES}
    if isinstance(meta.get(KEY), Mapping):
        result['meta'][KEY] = {**meta[KEY], 'weights': stored['weights']}
    result['state_dict'] = state
    # Without the branches of its own no run can resume from an average, see `check_resumable`.
    if isinstance(checkpoint.get('ema_state_dict'), Mapping) and BRANCHES in checkpoint:
        result['ema_state_dict'], _ = _joined(checkpoint, 'ema_state_dict', places, AVERAGED)
    return result


def is_stock(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the weights of a checkpoint are fused, and branches lie beside them."""
    meta = checkpoint.get('meta')
    return isinstance(meta, Mapping) and BRANCHES in meta


def weights_said(checkpoint: Mapping[str, Any]) -> str:
    """Whether the weights of a checkpoint are ``averaged`` or ``raw``, as the run said or, of a
    file that does not say, as ``EMAHook`` leaves it."""
    meta = checkpoint.get('meta')
    said = meta.get(KEY) if isinstance(meta, Mapping) else None
    weights = said.get('weights') if isinstance(said, Mapping) else None
    if weights in ('raw', 'averaged'):
        return weights
    return 'averaged' if 'ema_state_dict' in checkpoint or weights == 'EMA weights' else 'raw'


def norms_in(checkpoint: Mapping[str, Any]) -> Norms:
    """The norms that follow convs, as the run saw them that wrote the checkpoint.

    Raises:
        DyRepError: they have another form.
    """
    meta = checkpoint.get('meta')
    said = meta.get(KEY) if isinstance(meta, Mapping) else None
    norms = said.get('norms', {}) if isinstance(said, Mapping) else {}
    _check(isinstance(norms, Mapping), 'norms')
    for path, names in norms.items():
        _check(isinstance(path, str) and type(names) is list, 'norms')
        _check(all(isinstance(name, str) for name in names), 'norms')
    return dict(norms)


def _split(
    full: Mapping[str, Tensor],
    model: nn.Module,
    norms: Mapping[str, Sequence[str]],
    weights: str,
    prefix: str = '',
) -> tuple[OrderedDict[str, Tensor], dict[str, Any], list[str]]:
    """The fused state, what ``full`` has besides, and the convs that gain a bias."""
    fused, biased = fused_state(model, norms, full, prefix)
    _carry_versions(full, fused)
    own = {name: t for name, t in full.items() if fused.get(name) is not t}
    made = {name: t for name, t in fused.items() if full.get(name) is not t}
    tensors = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
    stored = {'weights': weights, 'tensors': tensors, 'digest': _digest(tensors, made.values())}
    return fused, stored, biased


def _joined(
    checkpoint: Mapping[str, Any], key: str, places: list[Mapping], prefix: str = ''
) -> tuple[OrderedDict[str, Any], Mapping]:
    """The state with branches, and which of the stored parts it was made with.

    Raises:
        DyRepError: no stored part belongs to the state.
    """
    for stored in places:
        state, made = _join(checkpoint[key], stored['tensors'], prefix)
        if state is not None and _digest(stored['tensors'], made) == stored['digest']:
            return state, stored
    raise DyRepError(
        f'the fused weights in {key} are not those of the branches beside them, one of both was '
        f"changed: take meta['{KEY}'] and meta['{BRANCHES}'] out of the file to start from the "
        'fused weights, without branches and without a resume'
    )


def _join(
    fused: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str
) -> tuple[OrderedDict[str, Any] | None, list[Tensor]]:
    """The state with branches, in the order of its model, and the tensors of ``fused`` that it
    replaces; None if there is no place for one of ``tensors``."""
    blocks = set(structure_from_names(tensors))
    inside: dict[str, dict[str, Tensor]] = defaultdict(dict)  # of the outermost blocks
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        outer = [path for path in upwards(name) if path in blocks]
        (inside[outer[-1]] if outer else rest)[prefix + name] = tensor
    state: OrderedDict[str, Any] = OrderedDict()
    made = []
    for name, value in fused.items():
        path, _, last = str(name).removeprefix(prefix).rpartition('.')
        if path in blocks and last in ('weight', 'bias'):
            made.append(value)
            state.update(inside.pop(path, {}))
            continue
        if name in rest:
            made.append(value)
        state[name] = rest.pop(name, value)
        if last == 'weight' and f'{prefix}{path}.bias' not in fused:  # it was folded
            bias = f'{prefix}{path}.bias'
            state.update({bias: rest.pop(bias)} if bias in rest else {})
    _carry_versions(fused, state)
    complete = not inside and not rest and all(isinstance(t, Tensor) for t in made)
    return (state if complete else None), made


def _carry_versions(state: Any, other: Any) -> None:
    """Let ``other`` have the versions of modules that torch keeps on ``state``."""
    if hasattr(state, '_metadata'):
        there = {'', *(path for name in other for path in upwards(name.rpartition('.')[0]))}
        kept = ((path, value) for path, value in state._metadata.items() if path in there)
        other._metadata = OrderedDict(kept)


def _digest(tensors: Mapping[str, Tensor], made: Any) -> str:
    """A fingerprint of the tensors with branches and of the fused ones that stand for them."""
    digest = hashlib.sha256()
    for name, tensor in [*tensors.items(), *(('', tensor) for tensor in made)]:
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        if tensor.layout == torch.strided and not tensor.is_meta:
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(plain.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _check_form(stored: Any) -> None:
    """Raise ``DyRepError`` unless ``stored`` is what :func:`_split` makes."""
    _check(isinstance(stored, Mapping), BRANCHES)
    _check(stored.get('weights') in ('raw', 'averaged'), 'weights')
    _check(isinstance(stored.get('digest'), str), 'digest')
    tensors = stored.get('tensors')
    _check(isinstance(tensors, Mapping), 'tensors')
    for name, tensor in tensors.items():
        _check(isinstance(name, str) and isinstance(tensor, Tensor), 'tensors')


def _check(condition: bool, part: str) -> None:
    if not condition:
        raise DyRepError(f'what lies beside the weights of the checkpoint is malformed: {part}')
