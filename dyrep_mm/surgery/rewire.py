"""Change a model in place: grow, prune, expand, restore; and the same on an averaged copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Generator, nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block, gain_bias, lose_bias
from dyrep_mm.reparam.branches import ORIGIN, check_operations
from dyrep_mm.reparam.norms import norm_like
from dyrep_mm.surgery.candidates import holders_of, obstacle, preset
from dyrep_mm.surgery.structure import Plan, Structure, check_structure, structure_of
from dyrep_mm.surgery.tree import (
    Scope,
    blocks_of,
    check_scope,
    get_module,
    in_scope,
    neighbour_norm,
    replace,
)

#: Importance of a new branch relative to its conv (section 4.1).
INIT_SCALE = 0.01

Blocks = dict[str, Block]


def grow(
    model: nn.Module,
    path: str,
    branches: Sequence[str] | None = None,
    *,
    init_scale: float = INIT_SCALE,
    generator: Generator | None = None,
) -> Block:
    """Replace the conv at ``path`` by a block, in place (section 4.1).

    The function that the model computes in eval mode stays the same up to rounding, and the
    conv's parameters stay the same objects. The BN statistics of the new branches are those of
    white input; :func:`dyrep_mm.surgery.calibration.calibrate` measures them on data. An optimizer
    learns of the new parameters from :func:`dyrep_mm.sync_optimizer`.

    Args:
        model: The model to change.
        path: Dotted name of the conv.
        branches: Operations to add, e.g. ``['1x1', 'identity']``; all of Table 1 that fit by
            default.
        init_scale: Importance of a new branch relative to the conv.
        generator: Source of the random weights; torch's global one by default.

    Returns:
        The block now at ``path``.

    Raises:
        DyRepError: there is no such module, it cannot grow, or a branch does not fit it.
    """
    if branches is not None and not len(branches):
        raise DyRepError(f'{path} cannot grow: no branch is named')
    grown = rewire(model, {path: branches}, init_scale=init_scale, generator=lambda _: generator)
    return grown[path]


def prune(model: nn.Module, path: str, branches: Sequence[str]) -> None:
    """Remove branches of the block at ``path`` and absorb them, in place (section 4.2).

    The function that the model computes in eval mode stays the same up to rounding. A block with
    no branch left but ``kxk`` is a plain conv again; it gains a bias if it had none and a branch
    that it absorbed had one.

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


def expand(
    model: nn.Module,
    structure: Structure | str,
    *,
    kernel_sizes: Iterable[int] = (3,),
    scope: Scope = None,
    init_scale: float = INIT_SCALE,
    generator: Generator | None = None,
) -> nn.Module:
    """Apply a whole Structure, in place; the function in eval mode stays the same.

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
    with structure_errors():
        missing = absent(model, structure)
        rewire(model, missing, init_scale=init_scale, generator=lambda _: generator)
    return model


def restore(model: nn.Module, structure: Structure) -> Blocks:
    """Give ``model`` a Structure whose weights are loaded afterwards; all of it or nothing.

    Returns:
        The blocks that were inserted, by path.

    Raises:
        DyRepError: the structure does not fit the model, which is then as it was.
    """
    with structure_errors():
        return insert(model, absent(model, structure), lambda _: Generator())


def rewire(
    model: nn.Module,
    grow: Mapping[str, Sequence[str] | None],
    *,
    init_scale: float = INIT_SCALE,
    generator: Callable[[str], Generator | None] = lambda _: None,
    measure: Callable[[Blocks], Mapping[str, str]] = lambda _: {},
) -> Blocks:
    """Make blocks in place: insert all of them, measure, settle the inner ones first.

    What cannot be measured becomes the conv that it was.

    The function in eval mode stays the same up to rounding. Every way to grow is this one.

    Args:
        model: The model to change.
        grow: Operations by path, as in a Structure; None: all of Table 1 that fit.
        init_scale: Importance of a new branch relative to its conv.
        generator: Gives the source of the random weights for a path; torch's global one by
            default.
        measure: Sets the BN statistics and ``origin_std`` of the inserted blocks; by default both
            are those of white input. It returns the blocks that must go, each with the reason.

    Returns:
        The blocks that were made and stand, by path.

    Raises:
        DyRepError: something cannot grow so; the model is then as it was.
    """
    blocks = insert(model, grow, generator)
    refused = list(measure(blocks))
    _put_back(model, blocks, refused, [path for path in grow if path not in blocks])
    standing = {path: b for path, b in blocks.items() if not in_scope(path, refused)}
    for path in reversed(standing):
        standing[path].settle(init_scale)
    return standing


def mirror(averaged: nn.Module, model: nn.Module, plan: Plan) -> None:
    """Carry out on an averaged copy of ``model`` a plan whose blocks the model has already.

    The function that the copy computes in eval mode stays the same. New branches start with the
    model's values: there is nothing to average yet.
    """
    blocks = insert(averaged, plan.grow, lambda _: Generator())
    for path in reversed(blocks):
        source, block = get_module(model, path), blocks[path]
        for name, branch in source.branches.items():
            if name != ORIGIN:
                block.branches[name].load_state_dict(branch.state_dict())
        block.origin_std.copy_(source.origin_std)
        block.compensate()
    for path, names in plan.prune.items():
        prune(averaged, path, names)


def set_recompute(model: nn.Module, recompute: bool) -> None:
    """Say of all blocks of ``model`` whether they compute branch outputs again in the backward."""
    for block in blocks_of(model).values():
        block.recompute = recompute


def absent(model: nn.Module, structure: Structure) -> Structure:
    """What ``structure`` has and ``model`` lacks.

    Raises:
        DyRepError: the structure is malformed, or a block of the model has other operations.
    """
    check_structure(structure)
    present = structure_of(model)
    for path in structure.keys() & present.keys():
        if set(present[path]) != set(structure[path]):
            raise DyRepError(
                f'{path} has the operations {present[path]}, the structure says {structure[path]}'
            )
    return {path: names for path, names in structure.items() if path not in present}


def insert(
    model: nn.Module,
    structure: Mapping[str, Sequence[str] | None],
    generator: Callable[[str], Generator | None] = lambda _: None,
) -> Blocks:
    """Put blocks, not settled yet, around convs, outer ones first; all of them or none.

    See :func:`rewire` for the arguments.
    """
    blocks: Blocks = {}
    gained: list[nn.Conv2d] = []
    try:
        for path in sorted(structure, key=lambda path: path.count('.')):
            names = structure[path]
            if names is None or len(names):
                blocks[path] = _make_block(model, path, names, generator(path))
                replace(model, path, blocks[path])
            else:
                conv = get_module(model, path)
                if not isinstance(conv, nn.Conv2d) or conv.bias is not None:
                    raise DyRepError(f'{path} is not a conv without bias')
                gain_bias(conv)
                gained.append(conv)
    except DyRepError:
        _put_back(model, blocks, list(blocks))
        for conv in gained:
            lose_bias(conv)
        raise
    return blocks


def _put_back(
    model: nn.Module, blocks: Blocks, paths: Sequence[str], gained: Sequence[str] = ()
) -> None:
    """Make convs again of those of ``blocks`` that are at ``paths`` or below, inner ones first;
    what is below and ``gained`` a bias loses it."""
    for path in gained:
        if in_scope(path, paths):
            lose_bias(get_module(model, path))
    for path in reversed(blocks):
        if in_scope(path, paths):
            replace(model, path, blocks[path].branches[ORIGIN])


def _make_block(
    model: nn.Module, path: str, branches: Sequence[str] | None, generator: Generator | None
) -> Block:
    conv = get_module(model, path)
    if not isinstance(conv, nn.Conv2d):
        raise DyRepError(f'{path} is a {type(conv).__name__}, only a conv can grow')
    if not path:
        raise DyRepError('the model itself is the conv: only a conv inside a model can grow')
    if reason := obstacle(model, path, conv, holders_of(model)):
        raise DyRepError(f'{path} cannot grow: {reason}')
    try:
        return Block(conv, branches, norm_like(neighbour_norm(model, path)), generator)
    except DyRepError as error:
        raise DyRepError(f'{path} cannot grow: {error}') from None


@contextmanager
def structure_errors() -> Iterator[None]:
    """Say in a ``DyRepError`` that a structure is at fault."""
    try:
        yield
    except DyRepError as error:
        raise DyRepError(f'the structure does not fit the model: {error}') from None
