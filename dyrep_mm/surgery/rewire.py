"""Change a model: grow, prune, expand; give it a Structure; the same on an averaged copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Generator, nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block, gain_bias
from dyrep_mm.reparam.branches import ORIGIN, check_operations
from dyrep_mm.reparam.norms import norm_like
from dyrep_mm.surgery.candidates import _obstacle, _uses, preset
from dyrep_mm.surgery.structure import Plan, Structure, check_structure, structure_of
from dyrep_mm.surgery.tree import Scope, check_scope, get_module, neighbour_norm, replace


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
        block = Block(conv, branches, norm_like(neighbour_norm(model, path)), generator)
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
    white input; :func:`dyrep_mm.surgery.calibration.calibrate` measures them on data.

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


def mirror(averaged: nn.Module, model: nn.Module, plan: Plan) -> None:
    """Give an averaged copy of ``model`` the blocks that ``plan`` has grown in the model, and
    prune what it prunes; what the copy computes in eval mode stays the same.

    New branches start with the model's values: there is nothing to average yet.
    """
    blocks = {path: insert(averaged, path, get_module(model, path).names) for path in plan.grow}
    for path in reversed(blocks):  # inner ones first
        grown, block = get_module(model, path), blocks[path]
        for name, branch in grown.branches.items():
            if name != ORIGIN:
                block.branches[name].load_state_dict(branch.state_dict())
        block.origin_std.copy_(grown.origin_std)
        block.compensate()
    for path, names in plan.prune.items():
        prune(averaged, path, names)
