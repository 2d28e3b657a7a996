"""An optimizer follows a model that changes shape.

The number of param groups never changes, so that schedulers, which know groups by position,
need no repair: a new parameter joins the group of the one it stands beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from dyrep_mm.reparam.block import origin_of
from dyrep_mm.surgery.structure import altered
from dyrep_mm.surgery.tree import any_norm, near_norm


def donors(model: nn.Module) -> dict[Parameter, list[Parameter]]:
    """For each parameter of a block, whose settings it should train with, best first.

    A kernel follows the conv that the block grew from, a scale or shift the scale or shift of
    the BN beside the block.
    """
    result: dict[Parameter, list[Parameter]] = {}
    spare = any_norm(model)
    for path, module in altered(model).items():
        origin, norm = origin_of(module), near_norm(model, path) or spare
        for name, parameter in module.named_parameters():
            if parameter is origin.weight:
                continue
            last = name.rpartition('.')[2]
            beside = getattr(norm, last, None) if parameter.ndim == 1 else None
            result[parameter] = [p for p in (beside, origin.weight) if p is not None]
    return result


def sync_optimizer(
    optimizer: Optimizer, model: nn.Module, settings: Mapping[Parameter, Any] | None = None
) -> None:
    """Drop parameters that left ``model``, with their state, and add those that are new.

    A new parameter joins the group of the one beside it; where the config would treat the two
    differently, the group of one that it treats alike, if there is any.

    Every group is kept in the order of ``model.named_parameters()``, so that the layout of a
    saved optimizer follows from the Structure alone. What stays keeps its state.

    Args:
        optimizer: Trained ``model`` before it changed.
        model: As it is now.
        settings: What the config gives each parameter; all the same by default.
    """
    settings = settings or {}
    order = {id(p): i for i, p in enumerate(model.parameters())}
    group_of: dict[int, int] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group['params']:
            if id(parameter) in order:
                group_of[id(parameter)] = number
            else:
                optimizer.state.pop(parameter, None)
    beside = donors(model)
    old = [p for p in model.parameters() if id(p) in group_of and p not in beside]
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in group_of:
            near = [p for p in beside.get(parameter, ()) if id(p) in group_of]
            wanted = settings.get(parameter)
            alike = (p for p in (*near, *old) if settings.get(p) == wanted)
            like = next(alike, near[0] if near else old[0])
            group_of[id(parameter)] = group_of[id(like)]
    members: list[list[Parameter]] = [[] for _ in optimizer.param_groups]
    for parameter in model.parameters():
        if id(parameter) in group_of:
            members[group_of[id(parameter)]].append(parameter)
    names = {id(p): name for name, p in model.named_parameters()}
    for group, parameters in zip(optimizer.param_groups, members, strict=True):
        group['params'] = parameters
        _start_momentum(optimizer, group)
        if 'param_names' in group:
            group['param_names'] = [names[id(p)] for p in parameters]


def _start_momentum(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Start new parameters at a momentum of zero under torch's fused SGD.

    It expects a momentum buffer for every parameter once it has one; other optimizers start the
    state of each parameter when it comes.
    """
    states = [optimizer.state.get(parameter, {}) for parameter in group['params']]
    if group.get('fused') and any(state.get('momentum_buffer') is not None for state in states):
        for parameter in group['params']:
            if optimizer.state[parameter].get('momentum_buffer') is None:
                optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Assert that the optimizer trains exactly the trainable parameters, each once."""
    held = [p for group in optimizer.param_groups for p in group['params']]
    known = {id(p) for p in model.parameters()}
    assert len(set(held)) == len(held), 'a parameter is in two param groups'
    assert {id(p) for p in held} <= known, 'the optimizer holds a parameter of no module'
    ids = {id(p) for p in held}
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ids]
    assert not missing, f'not in the optimizer: {missing}'
    assert {id(p) for p in optimizer.state} <= known, 'the optimizer has state of no parameter'
