"""Change a model in place: grow, prune, expand, restore; and the same on an averaged copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block, gain_bias, has_gained_bias, lose_bias, origin_of
from dyrep_mm.reparam.branches import ORIGIN, check_operations
from dyrep_mm.reparam.norms import change_statistics, check_branch_norm, norm_like, tracked
from dyrep_mm.surgery.candidates import holders_of, obstacle, preset
from dyrep_mm.surgery.structure import (
    Plan,
    Structure,
    check_structure,
    listed,
    misfits,
    structure_of,
)
from dyrep_mm.surgery.tree import (
    Scope,
    ancestors,
    any_norm,
    blocks_of,
    check_scope,
    get_module,
    in_scope,
    named_parts,
    near_norm,
    replace,
    upwards,
)

#: Importance of a new branch relative to its conv (section 4.1).
INIT_SCALE = 0.01

# A Structure without weights may come from a stranger's file. With every operation in every conv,
# three blocks deep, a model is 27 times as large.
MAX_GROWTH = 64

Blocks = dict[str, Block]


def grow(
    model: nn.Module,
    path: str,
    branches: Sequence[str] | None = None,
    *,
    init_scale: float = INIT_SCALE,
    generator: Generator | None = None,
    branch_norm: str | None = None,
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
        branch_norm: What the norms of the branches normalise with in train mode (docs/norms.md):
            ``'batch'``, ``'fixed'`` or ``'sampled'``; by default as in the block around the conv,
            else ``'batch'``.

    Returns:
        The block now at ``path``.

    Raises:
        DyRepError: there is no such module, it cannot grow, or a branch does not fit it.
    """
    if branches is not None and not len(branches):
        raise DyRepError(f'{path} cannot grow: no branch is named')
    grown = rewire(
        model,
        {path: branches},
        init_scale=init_scale,
        generator=lambda _: generator,
        branch_norm=branch_norm,
    )
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
    branch_norm: str | None = None,
) -> nn.Module:
    """Apply a whole Structure, in place; the function in eval mode stays the same.

    Args:
        model: The model to change.
        structure: A Structure, or a name: ``'dbb'`` (4 operations), ``'dbb7'``, ``'repvgg'``.
        kernel_sizes: With a name, the square kernel sizes to expand.
        scope: With a name, dotted prefix, or several, to look in; everywhere by default.
        init_scale: Importance of a new branch relative to its conv.
        generator: Source of the random weights; torch's global one by default.
        branch_norm: See :func:`grow`.

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
        rewire(
            model,
            missing,
            init_scale=init_scale,
            generator=lambda _: generator,
            branch_norm=branch_norm,
        )
    return model


def restore(
    model: nn.Module, structure: Structure, state: Mapping[str, Tensor] | None = None
) -> bool:
    """Give ``model`` exactly a Structure; weights are loaded afterwards. All of it or nothing.

    Blocks that the structure has not become their conv again, blocks with other operations are
    made anew; a conv stays the same object, and so does a block that is in both.

    Args:
        model: Plain or with blocks.
        structure: What it shall have.
        state: The weights that are loaded afterwards. Names and shapes of each block are compared
            before the block is put in. A conv whose bias is in ``state`` and not in the plain model
            gains it, whatever ``structure`` says of biases. What ``state`` does not name stays as
            it is.

    Returns:
        Whether anything changed.

    Raises:
        DyRepError: the structure does not fit the model, or the state does not fit the structure;
            the model is then as it was.
    """
    undo: list[Callable[[], None]] = []
    with structure_errors():
        check_structure(structure)
        present, structure = structure_of(model), dict(structure)
        biased = [path for path, names in structure.items() if not names]
        if state is not None:  # biases follow it
            kept = present.keys() - named_parts(model, present, state)
            structure |= {path: present[path] for path in kept}
            structure = {path: names for path, names in structure.items() if names}
            present = {p: names for p, names in present.items() if names or p in structure}
        try:
            gone = _make_plain(model, present, structure, undo)
            missing = {
                path: names
                for path, names in structure.items()
                if path not in present or not gone.isdisjoint(upwards(path))
            }
            insert(model, missing, lambda _: Generator(), state)
            if state is not None:
                _follow_biases(model, state, undo)
            for path in biased:
                if not has_gained_bias(get_module(model, path)):
                    raise DyRepError(f'{path} is not a conv without bias')
        except DyRepError:
            for step in reversed(undo):
                step()
            raise
    return bool(undo or missing)


def _make_plain(
    model: nn.Module, present: Structure, wanted: Structure, undo: list[Callable[[], None]]
) -> set[str]:
    """Make convs of the blocks that ``wanted`` has otherwise or not at all; returns their paths."""
    gone: set[str] = set()
    for path, names in present.items():  # outer ones before the ones inside them
        if not gone.isdisjoint(upwards(path)):
            continue
        if path in wanted and set(wanted[path]) == set(names):
            continue
        module = get_module(model, path)
        conv = origin_of(module)
        if module is not conv:
            replace(model, path, conv)
            undo.append(partial(replace, model, path, module))
        if has_gained_bias(conv):
            undo.append(partial(_regain, conv, conv.bias))
            lose_bias(conv)
        gone.add(path)
    return gone


def _regain(conv: nn.Conv2d, bias: Tensor | None) -> None:
    gain_bias(conv)
    conv.bias = cast(nn.Parameter, bias)


def _follow_biases(
    model: nn.Module, state: Mapping[str, Tensor], undo: list[Callable[[], None]]
) -> None:
    """Let every conv have the gained bias that ``state`` holds, and no other."""
    for path, conv in model.named_modules():
        if not isinstance(conv, nn.Conv2d) or math.prod(conv.kernel_size) == 1:
            continue
        weight, bias = (state.get(f'{path}.{name}') for name in ('weight', 'bias'))
        if weight is None or weight.shape != conv.weight.shape:
            continue
        if bias is None and has_gained_bias(conv):
            undo.append(partial(_regain, conv, conv.bias))
            lose_bias(conv)
        elif conv.bias is None and bias is not None and bias.shape == (conv.out_channels,):
            gain_bias(conv)
            undo.append(partial(lose_bias, conv))


def rewire(
    model: nn.Module,
    grow: Mapping[str, Sequence[str] | None],
    *,
    init_scale: float = INIT_SCALE,
    generator: Callable[[str], Generator | None] = lambda _: None,
    measure: Callable[[Blocks], Mapping[str, str]] = lambda _: {},
    branch_norm: str | None = None,
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
        branch_norm: See :func:`grow`.

    Returns:
        The blocks that were made and stand, by path.

    Raises:
        DyRepError: something cannot grow so; the model is then as it was.
    """
    if branch_norm is not None:
        check_branch_norm(branch_norm)
    blocks = insert(model, grow, generator)
    refused = list(measure(blocks))
    _put_back(model, blocks, refused, [path for path in grow if path not in blocks])
    standing = {path: b for path, b in blocks.items() if not in_scope(path, refused)}
    for path in reversed(standing):
        standing[path].settle(init_scale)
    for path, block in standing.items():  # outer ones first
        around = [m.branch_norm for m in ancestors(model, path) if isinstance(m, Block)]
        block.set_branch_norm(branch_norm or (around or ['batch'])[-1], block.training)
    return standing


def mirror(averaged: nn.Module, model: nn.Module, plan: Plan) -> None:
    """Carry out on an averaged copy of ``model`` a plan whose blocks the model has already.

    The function that the copy computes in eval mode stays the same. New branches start with the
    model's values: there is nothing to average yet.
    """
    blocks = insert(averaged, plan.grow, lambda _: Generator())
    for path in reversed(blocks):
        adopt(blocks[path], cast(Block, get_module(model, path)))
    for path, names in plan.prune.items():
        prune(averaged, path, names)


def adopt(block: Block, source: Block) -> None:
    """Settle ``block`` on a copy of what ``source`` grew from, with the branches of ``source``."""
    for name, branch in source.branches.items():
        if name != ORIGIN:
            block.branches[name].load_state_dict(branch.state_dict())
    block.origin_std.copy_(source.origin_std)
    block.compensate()


def set_recompute(model: nn.Module, recompute: bool) -> None:
    """Say of all blocks of ``model`` whether they compute branch outputs again in the backward."""
    for block in blocks_of(model).values():
        block.recompute = recompute


def set_branch_norm(model: nn.Module, branch_norm: str) -> None:
    """Say what the norms of branches normalise with in train mode, in all blocks of ``model``.

    Norms that were fixed and are not any more have the mode of the norm beside their block.

    Raises:
        DyRepError: there is no such choice.
    """
    check_branch_norm(branch_norm)
    spare = any_norm(model)
    for path, block in blocks_of(model).items():
        beside = near_norm(model, path) or spare or block
        block.set_branch_norm(branch_norm, beside.training)


def adopt_statistics(block: Block, source: Block) -> None:
    """Give a copy of ``source`` the statistics of its norms; it computes in eval mode what it
    did."""
    pairs = zip(block.added_norms, source.added_norms, strict=True)
    for norm, measured in pairs:
        mean, var, _ = tracked(measured)
        change_statistics(norm, mean, var)
    block.origin_std.copy_(source.origin_std)


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
    state: Mapping[str, Tensor] | None = None,
) -> Blocks:
    """Put blocks, not settled yet, around convs, outer ones first; all of them or none.

    It takes as long as there are blocks and modules: the model is walked once.

    Args:
        model: See :func:`rewire`.
        structure: See :func:`rewire`.
        generator: See :func:`rewire`.
        state: Has the tensors of the blocks by name; without it their size is bounded by that of
            the model.
    """
    blocks: Blocks = {}
    gained: list[nn.Conv2d] = []
    holders, spare = holders_of(model), any_norm(model)
    room = MAX_GROWTH * sum(parameter.numel() for parameter in model.parameters())
    try:
        for path in sorted(structure, key=lambda path: path.count('.')):
            names = structure[path]
            if names is None or len(names):
                block = _make_block(model, path, names, generator(path), holders, spare)
                if state is not None:
                    _check_state(path, block, structure, state)
                else:
                    room -= sum(p.numel() for branch in block.added for p in branch.parameters())
                if room < 0:
                    raise DyRepError(f'it makes the model more than {MAX_GROWTH} times as large')
                blocks[path] = block
                replace(model, path, block)
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
            lose_bias(cast(nn.Conv2d, get_module(model, path)))
    for path in reversed(blocks):
        if in_scope(path, paths):
            replace(model, path, blocks[path].branches[ORIGIN])


def _make_block(
    model: nn.Module,
    path: str,
    branches: Sequence[str] | None,
    generator: Generator | None,
    holders: Mapping[int, int],
    spare: _BatchNorm | None,
) -> Block:
    """A block around the conv at ``path``; its norms are like the one beside it, else ``spare``."""
    conv = get_module(model, path)
    if not isinstance(conv, nn.Conv2d):
        raise DyRepError(f'{path} is a {type(conv).__name__}, only a conv can grow')
    if not path:
        raise DyRepError('the model itself is the conv: only a conv inside a model can grow')
    if reason := obstacle(model, path, conv, holders):
        raise DyRepError(f'{path} cannot grow: {reason}')
    try:
        return Block(conv, branches, norm_like(near_norm(model, path) or spare), generator)
    except DyRepError as error:
        raise DyRepError(f'{path} cannot grow: {error}') from None


def _check_state(
    path: str, block: Block, structure: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Raise ``DyRepError`` unless ``state`` has what the block at ``path`` holds, but for convs
    that become blocks in their turn."""
    own = block.state_dict(prefix=f'{path}.')
    inner = {name for name in own if structure.get(name.rpartition('.')[0])}
    wrong = misfits({name: tensor for name, tensor in own.items() if name not in inner}, state)
    if wrong:
        raise DyRepError(listed(wrong))


@contextmanager
def structure_errors() -> Iterator[None]:
    """Say in a ``DyRepError`` that a structure is at fault."""
    try:
        yield
    except DyRepError as error:
        raise DyRepError(f'the structure does not fit the model: {error}') from None
