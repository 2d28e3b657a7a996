"""A model as a tree: find, replace, walk up, scope, the norm beside, modes kept.

A path is a dotted module name, a model any ``nn.Module``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.norms import takes_images

Scope = str | Sequence[str] | None


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``.

    Raises:
        DyRepError: there is none.
    """
    module: nn.Module | None = model
    for name in path.split('.') if path else ():
        # Modules alone: a property may give one that has another path already.
        module = module._modules.get(name)
        if module is None:
            raise DyRepError(f'{type(model).__name__} has no module named {path!r}')
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
        module = module._modules[name]


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

    Among its siblings the next one of as many channels, else an earlier one, else any BN of
    the model. The norm gives class, ``eps``, ``momentum`` and mode of new norms, and decides their
    group in the optimizer.
    """
    path = outermost(model, path)
    channels = get_module(model, path).out_channels
    parent, _, name = path.rpartition('.')
    siblings = list(get_module(model, parent).named_children())
    at = [sibling for sibling, _ in siblings].index(name)
    near = [module for _, module in siblings[at + 1 :] + siblings[:at]]
    for module in near:
        if takes_images(module) and module.num_features == channels:
            return module
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
