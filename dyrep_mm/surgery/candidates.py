"""Which convs may grow, to what, and why the others may not."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.branches import OPERATIONS, ORIGIN, Branch, fitting
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

# Methods with which a module makes itself plain: the names of RepVGG, MobileOne, RepLKNet, RepMLP,
# FastViT, YOLOv6, YOLOv7 and those who follow them.
_REPARAMETERIZES = re.compile(
    r'switch_to_deploy|structural_reparam\w*|_?re_?param\w*|merge_kernels?|repvgg_convert'
    r'|fuse_repvgg_block|_?get_equivalent_\w+|_?fuse_(conv_)?bn(_tensor)?'
)

# The same words serve for what a module does with features, but then it is called with some; and a
# whole network has them to call its blocks.
_MAY_REPARAMETERIZE = re.compile(
    r'_?fuse(_\w+)?|_?convert_to_deploy|_?merge_\w+|(un)?merge|to_deploy'
)

# Methods that networks have and blocks do not, in timm and in OpenMMLab.
_OF_NETWORKS = ('forward_features', 'extract_feat')

# What one may hang on a module or on a tensor, and a block would not call.
_HOOKS = (
    '_forward_hooks',
    '_forward_pre_hooks',
    '_backward_hooks',
    '_backward_pre_hooks',
    '_state_dict_hooks',
    '_state_dict_pre_hooks',
    '_load_state_dict_pre_hooks',
    '_load_state_dict_post_hooks',
)
_TENSOR_HOOKS = ('_backward_hooks', '_post_accumulate_grad_hooks')


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
    """Every conv above 1x1 in ``scope``, of any class: None if it can grow, else why not."""
    return {path: reason for path, _, reason in _verdicts(model, scope, branches)}


def _verdicts(
    model: nn.Module, scope: Scope, branches: Sequence[str] | None
) -> Iterator[tuple[str, list[str], str | None]]:
    """Path, branches that fit, and what forbids to grow, of every conv above 1x1 in ``scope``."""
    holders = holders_of(model)
    for path, module in model.named_modules():
        if not in_scope(path, scope):
            continue
        if not isinstance(module, nn.Conv2d):
            if _has_kernel(module):
                yield path, [], f'it is a {_name_of(type(module))}, and only a Conv2d can grow'
            continue
        height, width = module.kernel_size
        if not height == width > 1:
            if height != width:
                yield path, [], f'its kernel is {height}x{width}, and only square ones are chosen'
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


def _has_kernel(module: nn.Module) -> bool:
    """Whether a module holds a kernel above 1x1, as convs of any class and dimension do."""
    weight = module._parameters.get('weight')
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        return False
    sizes = getattr(module, 'kernel_size', None)
    return sizes is not None and weight.ndim > 2 and weight[0, 0].numel() > 1


def _name_of(kind: type) -> str:
    """The name of a class, with that of its module where it is not torch's own ``Conv2d``."""
    return f'{kind.__module__}.Conv2d' if kind.__name__ == 'Conv2d' else kind.__name__


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
        return f'it is a {_name_of(type(conv))}, which computes more than a conv'
    if reason := _more_than_a_conv(conv):
        return reason
    if holders[id(conv.weight)] > 1:
        return 'its weight is shared with another module'
    for ancestor in ancestors(model, path):
        if isinstance(ancestor, (Block, Branch)):  # they merge too, and count on what is inside
            continue
        if 'DeformConv' in type(ancestor).__name__:
            return 'it makes the offsets of a deformable conv'
        whole = ancestor is model or any(hasattr(ancestor, name) for name in _OF_NETWORKS)
        if method := _own_method(type(ancestor), whole):
            kind = type(ancestor).__name__
            return f'it is inside a {kind}, which re-parameterizes itself by {method}()'
    try:
        ConvSpec.of(conv)
    except DyRepError as error:
        return str(error)
    return None


def leave_alone(conv: nn.Module, reason: str) -> None:
    """Mark a conv: it stays plain for ``reason``. A copy has the mark too."""
    setattr(conv, _LEFT_ALONE, reason)


def left_alone(model: nn.Module) -> dict[str, str]:
    """The reasons of :func:`leave_alone`, by path."""
    marked = {path: getattr(m, _LEFT_ALONE, None) for path, m in model.named_modules()}
    return {path: reason for path, reason in marked.items() if reason is not None}


def _more_than_a_conv(conv: nn.Conv2d) -> str | None:
    """Why ``conv`` does, or is made of, more than its class says; None if it does not."""
    for name in ('weight', 'bias'):
        if name not in conv._parameters:
            return f'its {name} is computed from other parameters'
    extra = (conv._parameters.keys() - {'weight', 'bias'}, conv._buffers, conv._modules)
    if names := sorted(name for held in extra for name in held):
        return f'it holds {", ".join(names)} besides weight and bias'
    if names := [name for name in vars(conv) if callable(getattr(type(conv), name, None))]:
        return f'its {", ".join(sorted(names))} is not that of its class'
    if any(getattr(conv, hooks, None) for hooks in _HOOKS):
        return 'hooks hang on it, which a block in its place would not call'
    for parameter in conv.parameters():
        if any(getattr(parameter, hooks, None) for hooks in _TENSOR_HOOKS):
            return 'hooks hang on its parameters, and branches have others'
        if type(parameter) is not nn.Parameter:
            return f'its parameters are of the type {type(parameter).__name__}'
    return None


def _own_method(kind: type[nn.Module], whole: bool) -> str | None:
    """Name of the method with which modules of this class re-parameterize themselves.

    Args:
        kind: The class; what it has from torch itself does not count.
        whole: It is the class of a network, not of a part of one.
    """
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            if not inspect.isroutine(value):
                continue
            if _REPARAMETERIZES.fullmatch(name):
                return name
            if not whole and _MAY_REPARAMETERIZE.fullmatch(name) and _asks_for_nothing(value):
                return name
    return None


def _asks_for_nothing(method: Callable | staticmethod | classmethod) -> bool:
    """Whether a module alone is enough to call ``method`` of its class."""
    if isinstance(method, staticmethod):
        return False  # it sees no module
    function: Any = getattr(method, '__func__', method)
    parameters = list(inspect.signature(function).parameters.values())
    return all(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        for p in parameters[1:]
    )


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
