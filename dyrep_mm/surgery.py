"""The only file that rewires a model: grow, prune, expand, fuse, and read the structure off.

A path is a dotted module name, a model any ``nn.Module``. A Structure is JSON-able data,
``{path: [operation, ...]}``: which conv has which operations, ``kxk`` first. A conv inside a
block has a path like any other module, ``conv2.branches.1x1-kxk.conv``, so nesting needs no
notation of its own. An empty list stands for a plain conv that gained a bias.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyrep_mm.block import Block, gain_bias
from dyrep_mm.branches import (
    OPERATIONS,
    ORIGIN,
    NormFactory,
    check_operations,
    fitting,
    kernel_of,
)
from dyrep_mm.errors import DyRepError
from dyrep_mm.geometry import ConvSpec

Structure = dict[str, list[str]]
Scope = str | Sequence[str] | None

#: Structures with a name: the operations that every conv gets (Table 1).
PRESETS: dict[str, tuple[str, ...]] = {
    'dbb': (ORIGIN, '1x1', '1x1-kxk', '1x1-avg'),
    'dbb7': OPERATIONS,
    'repvgg': (ORIGIN, '1x1', 'identity'),
}

# By name, since mmcv need not be installed: its Conv2d only adds the handling of empty input.
_CONV_TYPES = {'torch.nn.modules.conv.Conv2d', 'mmcv.cnn.bricks.wrappers.Conv2d'}

_NORMALISE = (_BatchNorm.forward, nn.SyncBatchNorm.forward)

# A Structure may come from a stranger's file.
_MAX_BLOCKS = 10_000

#: How deep blocks may nest.
MAX_DEPTH = 16


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``.

    Raises:
        DyRepError: there is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise DyRepError(f'{type(model).__name__} has no module named {path!r}') from None


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path``."""
    parent, _, name = path.rpartition('.')
    setattr(get_module(model, parent), name, module)


def blocks_of(model: nn.Module) -> dict[str, Block]:
    """All blocks by path, outer ones before the ones inside them."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Block)}


def structure_of(model: nn.Module) -> Structure:
    """The Structure of ``model``; empty for a plain model."""
    structure = {}
    for path, module in model.named_modules():
        if isinstance(module, Block):
            structure[path] = module.names
        elif getattr(module, 'gained_bias', False):
            structure[path] = []
    return structure


def ancestors(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that contain the one at ``path``, from the model inwards."""
    module = model
    for name in path.split('.') if path else ():
        yield module
        module = getattr(module, name)


def depth_of(model: nn.Module, path: str) -> int:
    """How many blocks the module at ``path`` lies in."""
    return sum(isinstance(module, Block) for module in ancestors(model, path))


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


def outermost(model: nn.Module, path: str) -> str:
    """Path of the outermost block that the module at ``path`` is or lies in, else ``path``."""
    names = path.split('.')
    for i, module in enumerate(ancestors(model, path)):
        if isinstance(module, Block):
            return '.'.join(names[:i])
    return path


def neighbour_norm(model: nn.Module, path: str) -> _BatchNorm | None:
    """The BN beside the conv or block at ``path``: the model for the BNs of its branches.

    Among its siblings the next one of as many channels, else an earlier one, else any BN of
    the model. Nothing that is computed depends on this choice.
    """
    path = outermost(model, path)
    channels = get_module(model, path).out_channels
    parent, _, name = path.rpartition('.')
    siblings = list(get_module(model, parent).named_children())
    at = [sibling for sibling, _ in siblings].index(name)
    near = [module for _, module in siblings[at + 1 :] + siblings[:at]]
    for module in near:
        if _takes_images(module) and module.num_features == channels:
            return module
    inside = {id(m) for block in blocks_of(model).values() for m in block.modules()}
    return next((m for m in model.modules() if _takes_images(m) and id(m) not in inside), None)


def _takes_images(module: nn.Module) -> bool:
    """Whether ``module`` is a BN of images; mmengine's that replaces SyncBN takes anything."""
    vectors_or_volumes = (nn.BatchNorm1d, nn.BatchNorm3d)
    return isinstance(module, _BatchNorm) and not isinstance(module, vectors_or_volumes)


def _norm_like(norm: _BatchNorm | None) -> NormFactory:
    def make(channels: int) -> _BatchNorm:
        if norm is None:
            return nn.BatchNorm2d(channels)
        # The nearest class that only normalises: timm's BatchNormAct2d activates as well.
        pure = next(cls for cls in type(norm).__mro__ if cls.forward in _NORMALISE)
        return pure(channels, eps=norm.eps, momentum=norm.momentum).train(norm.training)

    return make


def insert(
    model: nn.Module,
    path: str,
    branches: Sequence[str] | None = None,
    generator: Generator | None = None,
) -> Block:
    """Put a block around the conv at ``path``; :meth:`Block.settle` is still to be called."""
    conv = get_module(model, path)
    if not isinstance(conv, nn.Conv2d):
        raise DyRepError(f'{path} is a {type(conv).__name__}, only a conv can grow')
    if not path:
        raise DyRepError('the model itself is the conv: only a conv inside a model can grow')
    if reason := _obstacle(model, path, conv, _uses(model)):
        raise DyRepError(f'{path} cannot grow: {reason}')
    try:
        block = Block(conv, branches, _norm_like(neighbour_norm(model, path)), generator)
    except DyRepError as error:
        raise DyRepError(f'{path} cannot grow: {error}') from None
    replace(model, path, block)
    return block


def grow(
    model: nn.Module,
    path: str,
    branches: Sequence[str] | None = None,
    *,
    init_scale: float = 0.01,
    generator: Generator | None = None,
) -> Block:
    """Replace the conv at ``path`` by a block, in place (section 4.1).

    What the model computes in eval mode stays the same up to rounding, and the conv's
    parameters stay the same objects. The BN statistics of the new branches are those of
    white input; :func:`dyrep_mm.calibration.calibrate` measures them on data.

    Args:
        model: The model to change.
        path: Dotted name of the conv.
        branches: Operations of Table 1 to add, e.g. ``['1x1', 'identity']``; all that fit
            by default.
        init_scale: Importance of a new branch relative to the conv.
        generator: Source of the random weights; torch's global one by default.

    Returns:
        The block now at ``path``.

    Raises:
        DyRepError: there is no such module, it cannot grow, or a branch does not fit it.
    """
    block = insert(model, path, branches, generator)
    block.settle(init_scale)
    return block


def prune(model: nn.Module, path: str, branches: Sequence[str]) -> None:
    """Remove branches of the block at ``path`` and absorb them, in place (section 4.2).

    What the model computes in eval mode stays the same up to rounding. A block with no branch
    left but ``kxk`` is a plain conv again; it gains a bias if it had none and what it absorbed
    had one.

    Raises:
        DyRepError: there is no block at ``path``, or it has no such branch.
    """
    block = get_module(model, path)
    if not isinstance(block, Block):
        raise DyRepError(f'{path} is a {type(block).__name__}, only a block can be pruned')
    check_operations(branches)
    try:
        block.absorb(branches)
    except DyRepError as error:
        raise DyRepError(f'{path}: {error}') from None
    if block.names == [ORIGIN]:
        replace(model, path, block.branches[ORIGIN])


def check_structure(structure: Any) -> None:
    """Raise ``DyRepError`` unless ``structure`` has the form of a Structure."""
    if not isinstance(structure, Mapping):
        raise DyRepError(f'a structure maps paths to operations, got a {type(structure).__name__}')
    if len(structure) > _MAX_BLOCKS:
        raise DyRepError(f'a structure has at most {_MAX_BLOCKS} blocks, got {len(structure)}')
    for path, names in structure.items():
        if not isinstance(path, str) or not isinstance(names, (list, tuple)):
            raise DyRepError(f'a structure maps paths to lists, got {path!r}: {names!r}')
        try:
            check_operations(names)
        except DyRepError as error:
            raise DyRepError(f'structure, {path}: {error}') from None
        if len(set(names)) != len(names) or (names and names[0] != ORIGIN):
            raise DyRepError(f'structure, {path}: operations start with kxk and differ: {names}')
        if path.split('.').count('branches') >= MAX_DEPTH:
            raise DyRepError(f'a structure is at most {MAX_DEPTH} blocks deep, got {path[:200]}')


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


def apply_structure(
    model: nn.Module, structure: Structure, generator: Generator | None = None
) -> list[Block]:
    """Give a model a Structure, without settling the new blocks; all of it or nothing.

    Returns:
        The blocks that were inserted.

    Raises:
        DyRepError: the structure does not fit the model, which is then as it was.
    """
    check_structure(structure)
    present = structure_of(model)
    inserted: dict[str, Block] = {}
    gained: list[nn.Conv2d] = []
    try:
        for path in sorted(structure, key=lambda p: p.count('.')):
            names = list(structure[path])
            if path in present:
                if set(present[path]) != set(names):
                    raise DyRepError(
                        f'{path} has the operations {present[path]}, the structure says {names}'
                    )
            elif names:
                inserted[path] = insert(model, path, names, generator)
            else:
                conv = get_module(model, path)
                if not isinstance(conv, nn.Conv2d) or conv.bias is not None:
                    raise DyRepError(f'{path} is not a conv without bias')
                gain_bias(conv)
                gained.append(conv)
    except DyRepError as error:
        for path in reversed(inserted):
            replace(model, path, inserted[path].branches[ORIGIN])
        for conv in gained:
            conv.bias, conv.gained_bias = None, False
        raise DyRepError(f'the structure does not fit the model: {error}') from None
    return list(inserted.values())


def expand(
    model: nn.Module,
    structure: Structure | str,
    *,
    kernel_sizes: Iterable[int] = (3,),
    scope: Scope = None,
    init_scale: float = 0.01,
    generator: Generator | None = None,
) -> nn.Module:
    """Apply a whole Structure, in place; what the model computes in eval mode stays the same.

    Args:
        model: The model to change.
        structure: A Structure, or a name: ``'dbb'`` (4 operations), ``'dbb7'``, ``'repvgg'``.
        kernel_sizes: With a name, the square kernel sizes to expand.
        scope: With a name, dotted prefix, or several, to look in; everywhere by default.
        init_scale: Importance of a new branch relative to its conv.
        generator: Source of the random weights; torch's global one by default.

    Returns:
        ``model``.

    Raises:
        DyRepError: unknown name, or the structure does not fit; the model is then as it was.
    """
    if isinstance(structure, str):
        check_scope(model, scope)
        structure = preset(model, structure, kernel_sizes, scope)
    for block in reversed(apply_structure(model, structure, generator)):
        block.settle(init_scale)
    return model


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the train/eval mode of every module on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _biased(model: nn.Module) -> dict[str, nn.Module]:
    """What fusing may leave a bias on: outermost blocks, and convs that gained one."""
    return {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, Block) or getattr(module, 'gained_bias', False))
        and depth_of(model, path) == 0
    }


class _Uses(TorchDispatchMode):
    """Notes which watched tensors are used by anything but a norm, views and in-place changes
    included."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, str] = {}  # storage of an output -> path of its module
        self.kept: list[Tensor] = []  # alive, so that a storage means one output
        self.elsewhere: set[str] = set()
        self.in_norm = False

    def watch(self, path: str, output: Tensor) -> None:
        self.made[output.untyped_storage().data_ptr()] = path
        self.kept.append(output)

    def maker(self, value: Any) -> str | None:
        """Path of the module that made ``value``, if it is a watched tensor."""
        if not isinstance(value, Tensor):
            return None
        return self.made.get(value.untyped_storage().data_ptr())

    def note(self, values: Any) -> None:
        self.elsewhere.update(p for v in tree_leaves(values) if (p := self.maker(v)) is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.in_norm:
            self.note((args, kwargs))
        return func(*args, **(kwargs or {}))


def following_norms(
    model: nn.Module,
    paths: Iterable[str],
    inputs: Any,
    forward: Callable[[nn.Module, Any], Any],
) -> dict[str, list[_BatchNorm]]:
    """The BNs that take the outputs of the modules at ``paths``, found by watching one forward.

    A path is listed if every output of its module goes into BNs that take nothing else, and
    nowhere but there.
    """
    uses = _Uses()
    taken: dict[_BatchNorm, list[str | None]] = defaultdict(list)
    absorbed: dict[str, set[int]] = defaultdict(set)

    def on_output(path: str) -> Callable:
        return lambda _module, _args, output: uses.watch(path, output)

    def before_norm(norm: _BatchNorm, args: tuple) -> None:
        uses.in_norm = True
        path = uses.maker(args[0])
        taken[norm].append(path)
        if path is not None:
            absorbed[path].add(args[0].untyped_storage().data_ptr())

    def after_norm(*_: Any) -> None:
        uses.in_norm = False

    sources = {path: get_module(model, path) for path in paths}
    inside = {id(m) for source in sources.values() for m in source.modules()}
    handles = [m.register_forward_hook(on_output(path)) for path, m in sources.items()]
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            if id(norm) not in inside:
                handles.append(norm.register_forward_pre_hook(before_norm))
                handles.append(norm.register_forward_hook(after_norm))
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            with uses:
                result = forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    uses.note(result)

    norms: dict[str, list[_BatchNorm]] = defaultdict(list)
    unclear = set(uses.elsewhere)
    for norm, makers in taken.items():
        if len(set(makers)) > 1:
            unclear.update(path for path in makers if path is not None)
        elif makers[0] is not None:
            norms[makers[0]].append(norm)
    outputs = Counter(uses.made.values())
    return {
        path: found
        for path, found in norms.items()
        if path not in unclear and len(absorbed[path]) == outputs[path]
    }


@torch.no_grad()
def fuse(
    model: nn.Module,
    inputs: Any = None,
    *,
    forward: Callable[[nn.Module, Any], Any] = lambda model, inputs: model(inputs),
) -> nn.Module:
    """A plain copy of ``model``: every block is one conv again, the same in eval mode.

    Args:
        model: Is left alone.
        inputs: A tensor for one forward. With it the bias of a fused conv moves into the BN
            that follows (``running_mean -= bias``), so that the copy has the parameters of the
            model that never grew; without it, or where no BN follows, the bias stays on the
            conv.
        forward: How to call the model with ``inputs``.
    """
    fused = copy.deepcopy(model)
    biased = _biased(fused)
    norms = {} if inputs is None else following_norms(fused, biased, inputs, forward)
    for path, module in biased.items():
        conv = module.origin if isinstance(module, Block) else module
        had_bias = conv.bias is not None and not getattr(conv, 'gained_bias', False)
        dtype = conv.weight.dtype
        # In float64, so that the only rounding is that of the result.
        weight, bias = kernel_of(module.to(torch.float64))
        conv.to(dtype).weight.data = weight.to(dtype)
        if not had_bias:
            for norm in norms.get(path, ()):
                norm.running_mean.copy_(norm.running_mean.double() - bias)
            folded = path in norms or not bias.any()
            conv.bias = None if folded else nn.Parameter(bias.to(dtype))
            vars(conv).pop('gained_bias', None)
        else:
            conv.bias.data = bias.to(dtype)
        if not path:
            return conv
        replace(fused, path, conv)
    return fused
