"""A model as a tree: find, replace, walk up, scope, the norm beside, modes kept.

A path is a dotted module name, a model any ``nn.Module``.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.norms import takes_images

Scope = str | Sequence[str] | None


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``, by the names under which modules are registered.

    Raises:
        DyRepError: there is none.
    """
    module = model
    for name in path.split('.') if path else ():
        # Not `getattr`: a property such as `Block.origin` is a second name of a module.
        inner = module._modules.get(name)
        if inner is None:
            raise DyRepError(f'{type(model).__name__} has no module named {path!r:.300}')
        module = inner
    return module


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path``."""
    parent, _, name = path.rpartition('.')
    setattr(get_module(model, parent), name, module)


def blocks_of(model: nn.Module) -> dict[str, Block]:
    """All blocks by path, outer ones before the ones inside them."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Block)}


def ancestors(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that contain the one at ``path``, from the model inwards."""
    module = model
    for name in path.split('.') if path else ():
        yield module
        module = cast(nn.Module, module._modules[name])


def depth_of(model: nn.Module, path: str) -> int:
    """How many blocks the module at ``path`` lies in."""
    return sum(isinstance(module, Block) for module in ancestors(model, path))


def outermost(model: nn.Module, path: str) -> str:
    """Path of the outermost block that the module at ``path`` is or lies in, else ``path``."""
    names = path.split('.')
    for i, module in enumerate(ancestors(model, path)):
        if isinstance(module, Block):
            return '.'.join(names[:i])
    return path


def upwards(path: str) -> Iterator[str]:
    """``path`` and the paths of what contains it, but for the model."""
    while path:
        yield path
        path = path.rpartition('.')[0]


def named_parts(model: nn.Module, parts: Iterable[str], state: Iterable[str]) -> set[str]:
    """Those of the blocks and convs at ``parts`` of which ``state`` names any tensor."""
    named = {path for name in state for path in upwards(name)}
    return {path for path in parts if outermost(model, path) in named}


def in_scope(path: str, scope: Scope) -> bool:
    """Whether ``path`` is one of the prefixes of ``scope`` or below it."""
    if scope is None:
        return True
    prefixes = [scope] if isinstance(scope, str) else scope
    return any(not p or path == p or path.startswith(p + '.') for p in prefixes)


def check_scope(model: nn.Module, scope: Scope) -> None:
    """Raise ``DyRepError`` if a prefix of ``scope`` names no module."""
    for prefix in [scope] if isinstance(scope, str) else scope or ():
        try:
            get_module(model, prefix)
        except DyRepError as error:
            names = ', '.join(name for name, _ in model.named_children())
            raise DyRepError(f'scope: {error}; at its top it has {names}') from None


def neighbour_norm(model: nn.Module, path: str) -> _BatchNorm | None:
    """The BN beside the conv or block at ``path``: the model for the BNs of its branches.

    It is :func:`near_norm`, else :func:`any_norm`. The norm gives class, ``eps``, ``momentum`` and
    mode of new norms, and decides their group in the optimizer.
    """
    return near_norm(model, path) or any_norm(model)


def near_norm(model: nn.Module, path: str) -> _BatchNorm | None:
    """Among the siblings of the conv or block at ``path`` the next BN of as many channels, else an
    earlier one."""
    path = outermost(model, path)
    channels = get_module(model, path).out_channels
    parent, _, name = path.rpartition('.')
    siblings = list(get_module(model, parent).named_children())
    at = [sibling for sibling, _ in siblings].index(name)
    near = [module for _, module in siblings[at + 1 :] + siblings[:at]]
    return next((m for m in near if takes_images(m) and m.num_features == channels), None)


def any_norm(model: nn.Module) -> _BatchNorm | None:
    """The first BN of ``model`` that no block contains; a walk over the whole model."""
    inside = {id(m) for block in blocks_of(model).values() for m in block.modules()}
    return next((m for m in model.modules() if takes_images(m) and id(m) not in inside), None)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the train/eval mode of every module on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def state_kept(model: nn.Module, but: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restore on leaving what a forward may change in ``model``: modes, parameters, buffers, and
    the plain attributes of its modules with the tensors and containers in them.

    Args:
        model: Its tree of modules must be on leaving what it was.
        but: Tensors that are not restored.
    """
    left = {id(tensor) for tensor in but}
    attributes = []
    values: dict[int, tuple[Any, Any, Any]] = {}
    for module in model.modules():
        plain = {name: v for name, v in vars(module).items() if name not in _OF_EVERY_MODULE}
        tables: list[Any] = [(t, dict(t)) for t in (module._parameters, module._buffers)]
        attributes.append((module, plain, tables))
        for value in (*plain.values(), *tables[0][1].values(), *tables[1][1].values()):
            _remember(value, left, values)
    try:
        with modes_kept(model):
            yield
    finally:
        for module, plain, tables in attributes:
            for name in vars(module).keys() - plain.keys() - _OF_EVERY_MODULE:
                del vars(module)[name]
            vars(module).update(plain)
            for table, entries in tables:
                table.clear()
                table.update(entries)
        for value, storage, kept in values.values():
            _recall(value, storage, kept)


#: Attributes that torch gives to a module.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)


def _remember(value: Any, left: set[int], values: dict[int, tuple[Any, Any, Any]]) -> None:
    """Note content and storage of a tensor, and of what is in a container, by id."""
    if id(value) in values or id(value) in left:
        return
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            values[id(value)] = value, value.detach(), value.detach().clone()
    elif type(value) in _CONTAINERS:
        values[id(value)] = value, None, copy.copy(value)
        for item in value.values() if isinstance(value, dict) else value:
            _remember(item, left, values)


@torch.no_grad()
def _recall(value: Any, storage: Any, kept: Any) -> None:
    if isinstance(value, Tensor):
        if not torch.equal(storage, kept):
            storage.copy_(kept)
        if value.data_ptr() != storage.data_ptr() or value.shape != storage.shape:
            value.data = storage
    elif isinstance(value, list):
        value[:] = kept
    else:
        value.clear()
        (value.extend if isinstance(value, deque) else value.update)(kept)
