"""Which convs may grow, to what, and why the others may not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.branches import OPERATIONS, ORIGIN, fitting
from dyrep_mm.reparam.geometry import ConvSpec
from dyrep_mm.surgery.copies import in_average
from dyrep_mm.surgery.structure import PRESETS, Structure
from dyrep_mm.surgery.tree import Scope, ancestors, depth_of, get_module, in_scope

# By name, since mmcv need not be installed: its Conv2d only adds the handling of empty input.
_CONV_TYPES = {'torch.nn.modules.conv.Conv2d', 'mmcv.cnn.bricks.wrappers.Conv2d'}

#: The one reason that may pass: a hook of the user can free a conv later.
FROZEN = 'it is frozen'

# Name of the attribute that marks a conv.
_LEFT_ALONE = 'stays_plain'


def candidates(
    model: nn.Module,
    scope: Scope = None,
    max_depth: int | None = None,
    branches: Sequence[str] | None = None,
    *,
    frozen: bool = False,
) -> Structure:
    """The convs that can grow, and the operations that each can have, by path.

    Args:
        model: Plain or with blocks; convs inside blocks are candidates too (section 4.1).
        scope: Dotted prefix, or several, to look in; everywhere by default.
        max_depth: How deep the grown blocks may nest; 1 is no nesting.
        branches: The operations to choose from; those of Table 1 by default.
        frozen: Also those that could if they were not frozen.
    """
    reasons = (None, FROZEN) if frozen else (None,)
    return {
        path: [ORIGIN, *fits]
        for path, fits, reason in _verdicts(model, scope, branches)
        if reason in reasons and (max_depth is None or depth_of(model, path) < max_depth)
    }


def survey(
    model: nn.Module, scope: Scope = None, branches: Sequence[str] | None = None
) -> dict[str, str | None]:
    """Every KxK conv (K > 1) in ``scope``: None if it can grow, else why not."""
    return {path: reason for path, _, reason in _verdicts(model, scope, branches)}


def _verdicts(
    model: nn.Module, scope: Scope, branches: Sequence[str] | None
) -> Iterator[tuple[str, list[str], str | None]]:
    """Path, branches that fit, and what forbids to grow, of every KxK conv in ``scope``."""
    holders = holders_of(model)
    for path, module in model.named_modules():
        if not (isinstance(module, nn.Conv2d) and in_scope(path, scope)):
            continue
        if not module.kernel_size[0] == module.kernel_size[1] > 1:
            continue
        reason, fits = obstacle(model, path, module, holders), []
        if reason is None and in_average(model, path):
            reason = 'it is in an averaged model, which follows what it averages'
        if reason is None:
            fits = fitting(ConvSpec.of(module), branches)
            if not fits:
                reason = f'none of {", ".join(branches or OPERATIONS)} fits it'
        if reason is None and not module.weight.requires_grad:
            reason = FROZEN
        yield path, fits, reason


def holders_of(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by id."""
    modules = model.named_modules(remove_duplicate=False)
    return Counter(id(p) for _, module in modules for p in module._parameters.values())


def obstacle(
    model: nn.Module, path: str, conv: nn.Conv2d, holders: Mapping[int, int]
) -> str | None:
    """Why no block can stand for the conv at ``path``; None if one can.

    Args:
        model: Contains the conv.
        path: Of the conv.
        conv: The conv itself.
        holders: See :func:`holders_of`.
    """
    if reason := getattr(conv, _LEFT_ALONE, None):
        return reason
    kind = f'{type(conv).__module__}.{type(conv).__qualname__}'
    if kind not in _CONV_TYPES:
        return f'it is a {type(conv).__name__}, which computes more than a conv'
    if 'weight' not in conv._parameters:
        return 'its weight is computed from other parameters'
    if holders[id(conv.weight)] > 1:
        return 'its weight is shared with another module'
    for ancestor in ancestors(model, path):
        if 'DeformConv' in type(ancestor).__name__:
            return 'it makes the offsets of a deformable conv'
        if hasattr(ancestor, 'switch_to_deploy'):
            return f'it is inside a {type(ancestor).__name__}, which re-parameterizes itself'
    try:
        ConvSpec.of(conv)
    except DyRepError as error:
        return str(error)
    return None


def leave_alone(conv: nn.Conv2d, reason: str) -> None:
    """Mark a conv: it stays plain for ``reason``. A copy has the mark too."""
    setattr(conv, _LEFT_ALONE, reason)


def left_alone(model: nn.Module) -> dict[str, str]:
    """The reasons of :func:`leave_alone`, by path."""
    marked = {path: getattr(m, _LEFT_ALONE, None) for path, m in model.named_modules()}
    return {path: reason for path, reason in marked.items() if reason is not None}


def preset(
    model: nn.Module, name: str, kernel_sizes: Iterable[int] = (3,), scope: Scope = None
) -> Structure:
    """The Structure that gives every conv of ``kernel_sizes`` in ``scope`` the operations of
    a name in :data:`PRESETS`, as far as they fit."""
    if name not in PRESETS:
        raise DyRepError(f'unknown structure {name!r}: choose from {", ".join(PRESETS)}')
    sizes = {(k, k) for k in kernel_sizes}
    found = candidates(model, scope, max_depth=1, branches=PRESETS[name])
    return {p: names for p, names in found.items() if get_module(model, p).kernel_size in sizes}
