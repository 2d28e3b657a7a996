"""Momentum copies inside a model, such as BYOL's target network and MoCo's key encoder: what each
is a copy of, and plans that reach them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.structure import Plan
from dyrep_mm.surgery.tree import Scope, ancestors, get_module, in_scope

T = TypeVar('T')

#: What is copied by path of the copy.
Copies = dict[str, str]

# By name, since mmengine need not be installed. Both keep the copy as `module`.
_AVERAGES = {
    'mmengine.model.averaged_model.BaseAveragedModel',
    'torch.optim.swa_utils.AveragedModel',
}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def is_average(module: nn.Module) -> bool:
    """Whether ``module`` is an averaged model, which its own code updates."""
    return any(f'{c.__module__}.{c.__qualname__}' in _AVERAGES for c in type(module).__mro__)


def in_average(model: nn.Module, path: str) -> bool:
    """Whether the module at ``path`` lies in an averaged model inside ``model``."""
    return any(is_average(module) for module in ancestors(model, path))


def find_copies(model: nn.Module, scope: Scope = None) -> Copies:
    """The momentum copies inside ``model``, before it trains.

    Of an averaged model it is what has the classes, names and shapes of another part of the
    model. Any other module is a copy if, besides, all of it is frozen and has the values of a
    part that trains: the constructor has copied it.

    Args:
        model: As it was constructed.
        scope: Dotted prefix, or several, inside which convs may grow; everywhere by default.

    Raises:
        DyRepError: an averaged model fits several parts of the model that may grow.
    """
    averages = [path for path, module in model.named_modules() if is_average(module)]
    sources: dict[tuple, list[str]] = defaultdict(list)
    kinds = set()
    for path, module in model.named_modules():
        if path and _has_conv(module) and not in_average(model, path) and path not in averages:
            sources[_signature(module)].append(path)
            kinds.add(type(module))

    copies: Copies = {}

    def visit(path: str, averaged: bool) -> None:
        module = get_module(model, path)
        if not _has_conv(module):
            return
        same = [p for p in sources[_signature(module)] if not in_scope(p, path)]
        if not averaged:
            same = [p for p in same if not _is_frozen(get_module(model, p))]
        equal = [p for p in same if _has_values_of(module, get_module(model, p))]
        found = equal or (same if averaged else [])
        if len(found) > 1:
            found = [p for p in found if path.endswith(f'.{p}')] or found
        if len(found) == 1:
            copies[path] = found[0]
        elif not found and (type(module) not in kinds or isinstance(module, _CONTAINERS)):
            for name, _ in module.named_children():
                visit(f'{path}.{name}', averaged)
        elif averaged and any(_may_grow(model, p, scope) for p in found):
            raise DyRepError(
                f'{path} averages one of {", ".join(found)}, which look the same: average modules '
                'that differ, or take them out of `scope`'
            )

    for path in averages:
        visit(f'{path}.module', averaged=True)
    for path in _frozen_parts(model):
        visit(path, averaged=False)
    return copies


def _has_conv(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) for m in module.modules())


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def _signature(module: nn.Module) -> tuple:
    shapes = ((name, tuple(p.shape)) for name, p in module.named_parameters())
    return (type(module), *shapes)


def _has_values_of(copied: nn.Module, source: nn.Module) -> bool:
    pairs = zip(copied.parameters(), source.parameters(), strict=True)
    return all(torch.equal(p, q.to(p.device)) for p, q in pairs)


def _may_grow(model: nn.Module, path: str, scope: Scope) -> bool:
    inside = get_module(model, path).named_modules(prefix=path)
    return any(isinstance(m, nn.Conv2d) and in_scope(p, scope) for p, m in inside)


def _frozen_parts(model: nn.Module, path: str = '') -> Iterator[str]:
    """Paths of the largest modules all of which is frozen, outside of averaged models."""
    module = get_module(model, path)
    if is_average(module):
        return
    if path and _is_frozen(module):
        yield path
        return
    for name, _ in module.named_children():
        yield from _frozen_parts(model, f'{path}.{name}' if path else name)


def following(model: nn.Module, copies: Copies) -> Copies:
    """Those of ``copies`` that follow what they copy: a part that trains now is no copy."""
    return {
        copied: source
        for copied, source in copies.items()
        if in_average(model, copied) or _is_frozen(get_module(model, copied))
    }


def own_part(plan: Plan, copies: Copies) -> Plan:
    """``plan`` without what it does in copies, which only follow."""

    def outside(by_path: Mapping) -> dict:
        return {p: value for p, value in by_path.items() if not in_scope(p, list(copies))}

    return dataclasses.replace(
        plan,
        grow=outside(plan.grow),
        prune=outside(plan.prune),
        scores=outside(plan.scores),
        importances=outside(plan.importances),
    )


def places_in(copies: Copies, path: str) -> list[str]:
    """Where the copies have what is at ``path``."""
    return [
        copied + path[len(source) :] for copied, source in copies.items() if in_scope(path, source)
    ]


def with_copies(by_path: Mapping[str, T], copies: Copies) -> dict[str, T]:
    """What there is by path, a Structure or a ``state_dict``, and the same in the copies."""
    return {
        **by_path,
        **{at: value for path, value in by_path.items() for at in places_in(copies, path)},
    }
