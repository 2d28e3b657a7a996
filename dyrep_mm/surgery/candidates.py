"""Which convs may grow, to what, and why the others may not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.branches import ORIGIN, fitting
from dyrep_mm.reparam.geometry import ConvSpec
from dyrep_mm.surgery.structure import PRESETS, Structure
from dyrep_mm.surgery.tree import Scope, ancestors, depth_of, get_module, in_scope

# By name, since mmcv need not be installed: its Conv2d only adds the handling of empty input.
_CONV_TYPES = {'torch.nn.modules.conv.Conv2d', 'mmcv.cnn.bricks.wrappers.Conv2d'}


def survey(model: nn.Module, scope: Scope = None) -> dict[str, str | None]:
    """Every KxK conv (K > 1) in ``scope``: None if it can grow, else why not."""
    uses = _uses(model)
    return {
        path: _obstacle(model, path, module, uses)
        or (None if module.weight.requires_grad else 'it is frozen')
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and in_scope(path, scope)
        and module.kernel_size[0] == module.kernel_size[1] > 1
    }


def _uses(model: nn.Module) -> Mapping[int, int]:
    """How many modules hold each parameter, by id."""
    modules = model.named_modules(remove_duplicate=False)
    return Counter(id(p) for _, module in modules for p in module._parameters.values())


def _obstacle(model: nn.Module, path: str, conv: nn.Conv2d, uses: Mapping[int, int]) -> str | None:
    """Why no block can stand for the conv at ``path``; None if one can."""
    kind = f'{type(conv).__module__}.{type(conv).__qualname__}'
    if kind not in _CONV_TYPES:
        return f'it is a {type(conv).__name__}, which computes more than a conv'
    if 'weight' not in conv._parameters:
        return 'its weight is computed from other parameters'
    if uses[id(conv.weight)] > 1:
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


def candidates(model: nn.Module, scope: Scope = None, max_depth: int | None = None) -> list[str]:
    """Paths of the convs that can grow.

    Args:
        model: Plain or with blocks; convs inside blocks are candidates too (section 4.1).
        scope: Dotted prefix, or several, to look in; everywhere by default.
        max_depth: How deep the grown blocks may nest; 1 is no nesting.
    """
    return [
        path
        for path, obstacle in survey(model, scope).items()
        if obstacle is None and (max_depth is None or depth_of(model, path) < max_depth)
    ]


def preset(
    model: nn.Module, name: str, kernel_sizes: Iterable[int] = (3,), scope: Scope = None
) -> Structure:
    """The Structure that gives every conv of ``kernel_sizes`` in ``scope`` the operations of
    a name in :data:`PRESETS`, as far as they fit."""
    if name not in PRESETS:
        raise DyRepError(f'unknown structure {name!r}: choose from {", ".join(PRESETS)}')
    sizes = {(k, k) for k in kernel_sizes}
    structure = {}
    for path in candidates(model, scope, max_depth=1):
        spec = ConvSpec.of(get_module(model, path))
        if spec.kernel_size in sizes and (fits := fitting(spec, PRESETS[name])):
            structure[path] = [ORIGIN, *fits]
    return structure
