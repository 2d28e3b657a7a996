"""An optimizer follows a model that changes shape.

The number of param groups never changes, so that schedulers, which know groups by position,
need no repair: a new parameter joins the group of the one it stands beside.

A parameter that a block added is in the optimizer exactly where the weight of the block's origin
is, whether it is frozen or not. Every other parameter is left in or out, as the user has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from dyrep_mm.reparam.block import has_gained_bias, origin_of
from dyrep_mm.surgery.copies import in_average
from dyrep_mm.surgery.structure import altered
from dyrep_mm.surgery.tree import any_norm, near_norm


def added_parameters(module: nn.Module) -> list[tuple[str, Parameter]]:
    """What a block, or a conv that gained a bias, has beyond the conv that it was, by name."""
    origin = origin_of(module)
    plain = {origin.weight} if has_gained_bias(origin) else {origin.weight, origin.bias}
    return [(name, p) for name, p in module.named_parameters() if p not in plain]


def donors(model: nn.Module) -> dict[Parameter, list[Parameter]]:
    """For each parameter that a block added, whose settings it should train with, best first.

    A kernel follows the conv that the block grew from, a scale or shift the scale or shift of
    the BN beside the block.
    """
    result: dict[Parameter, list[Parameter]] = {}
    spare = any_norm(model)
    for path, module in altered(model).items():
        origin, norm = origin_of(module), near_norm(model, path) or spare
        for name, parameter in added_parameters(module):
            last = name.rpartition('.')[2]
            beside: Parameter | None = getattr(norm, last, None) if parameter.ndim == 1 else None
            weight = cast(Parameter, origin.weight)
            result[parameter] = [weight] if beside is None else [beside, weight]
    return result


def _memberships(model: nn.Module, held: set[int]) -> Iterator[tuple[str, Parameter, bool]]:
    """Name of each parameter that a block added, itself, and whether it belongs in an optimizer
    that holds the parameters of these ids.

    An averaged model inside ``model`` is updated by its own code, never by the optimizer.
    """
    for path, module in altered(model).items():
        trained = id(origin_of(module).weight) in held and not in_average(model, path)
        for name, parameter in added_parameters(module):
            yield f'{path}.{name}', parameter, trained


def sync_optimizer(
    optimizer: Optimizer, model: nn.Module, settings: Mapping[Parameter, Any] | None = None
) -> None:
    """Drop parameters that left ``model``, with their state, and add those that blocks added.

    A new parameter joins the group of the one beside it; where the config would treat the two
    differently, the group of one that it treats alike, if there is any. A parameter of a block
    whose conv the optimizer does not hold stays out, like the conv.

    A group in the order of ``model.named_parameters()`` stays in it; in any other group what
    blocks added comes last. So the layout of a saved optimizer follows from the Structure alone.
    What stays keeps its state.

    Args:
        optimizer: Trained ``model`` before it changed.
        model: As it is now.
        settings: What the config gives each parameter; all the same by default.
    """
    settings = settings or {}
    order = {id(p): i for i, p in enumerate(model.parameters())}
    names = {id(p): name for name, p in model.named_parameters()}
    held = {id(p) for group in optimizer.param_groups for p in group['params']}
    member = {id(p): trained for _, p, trained in _memberships(model, held)}
    group_of: dict[int, int] = {}
    plain: list[list[Parameter]] = []
    for number, group in enumerate(optimizer.param_groups):
        plain.append([])
        for parameter in group['params']:
            if id(parameter) not in order or not member.get(id(parameter), True):
                optimizer.state.pop(parameter, None)
                continue
            group_of[id(parameter)] = number
            if id(parameter) not in member:
                plain[-1].append(parameter)
    beside = donors(model)
    old = [p for p in model.parameters() if id(p) in group_of and id(p) not in member]
    added: list[list[Parameter]] = [[] for _ in optimizer.param_groups]
    for parameter in model.parameters():
        if not member.get(id(parameter), False):
            continue
        if id(parameter) not in group_of:
            near = [p for p in beside[parameter] if id(p) in group_of]
            wanted = settings.get(parameter)
            like = next((p for p in (*near, *old) if settings.get(p) == wanted), near[0])
            group_of[id(parameter)] = group_of[id(like)]
        added[group_of[id(parameter)]].append(parameter)
    for group, first, then in zip(optimizer.param_groups, plain, added, strict=True):
        parameters, places = first + then, [order[id(p)] for p in first]
        if places == sorted(places):
            parameters.sort(key=lambda p: order[id(p)])
        group['params'] = parameters
        start_momentum(optimizer, group)
        if 'param_names' in group:
            group['param_names'] = [names[id(p)] for p in parameters]


def start_momentum(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Start parameters that have none at a momentum of zero under torch's fused SGD.

    It expects a momentum buffer for every parameter once it has one; other optimizers start the
    state of each parameter when it comes.
    """
    if not group.get('fused'):
        return
    states = [optimizer.state.get(parameter, {}) for parameter in group['params']]
    if any(state.get('momentum_buffer') is not None for state in states):
        for parameter in group['params']:
            if optimizer.state[parameter].get('momentum_buffer') is None:
                optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)


def check_optimizer(
    optimizer: Optimizer, model: nn.Module, before: Iterable[Parameter] | None = None
) -> None:
    """Assert that what was trained is trained, what was not is not, and blocks are.

    Args:
        optimizer: Trains ``model``.
        model: In any structure.
        before: What the optimizer held before the last change of structure, if that is known.
    """
    held = [p for group in optimizer.param_groups for p in group['params']]
    known = {id(p) for p in model.parameters()}
    assert len(set(held)) == len(held), 'a parameter is in two param groups'
    ids = {id(p) for p in held}
    assert ids <= known, 'the optimizer holds a parameter of no module'
    assert {id(p) for p in optimizer.state} <= known, 'the optimizer has state of no parameter'
    member = list(_memberships(model, ids))
    missing = [name for name, p, trained in member if trained and id(p) not in ids]
    assert not missing, f'not in the optimizer, where the weight of the origin is: {missing}'
    alone = [name for name, p, trained in member if not trained and id(p) in ids]
    assert not alone, f'in the optimizer, where the weight of the origin is not: {alone}'
    if before is not None:
        trained = {id(p) for p in before}
        inside = {id(p) for _, p, _ in member}
        for name, p in model.named_parameters():
            if id(p) not in inside:
                assert id(p) not in trained - ids, f'no longer in the optimizer: {name}'
                assert id(p) not in ids - trained, f'was not in the optimizer before: {name}'


class FreezeWatch:
    """Carries over to the branches of blocks that their origin is frozen or freed.

    A hook may free the parameters that it remembers from the start, which branches are not among.
    Only a change is carried over: a branch that is frozen by itself stays so until then.

    Args:
        model: In its present structure.
    """

    def __init__(self, model: nn.Module):
        self._origins = [
            (origin_of(module), [p for _, p in added_parameters(module)])
            for module in altered(model).values()
        ]
        self._flags = self._look()

    def _look(self) -> list[bool]:
        return [origin.weight.requires_grad for origin, _ in self._origins]

    def follow(self) -> None:
        """Look for changes."""
        flags = self._look()
        if flags == self._flags:
            return
        for now, before, (_, added) in zip(flags, self._flags, self._origins, strict=True):
            if now != before:
                for parameter in added:
                    parameter.requires_grad_(now)
        self._flags = flags
