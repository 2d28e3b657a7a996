"""Structure and Plan as plain data: form, checks, presets, read off a model.

A Structure is JSON-able data, ``{path: [operation, ...]}``: which conv has which operations,
``kxk`` first. A conv inside a block has a path like any other module,
``conv2.branches.1x1-kxk.conv``, so nesting needs no notation of its own. An empty list stands
for a plain conv that gained a bias.

A ``state_dict`` tells the Structure of its model by its names, see :func:`structure_from_names`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block, has_gained_bias
from dyrep_mm.reparam.branches import (
    OPERATIONS,
    ORIGIN,
    UNIT,
    check_operations,
    known_operations,
)
from dyrep_mm.surgery.tree import depth_of

Structure = dict[str, list[str]]


#: Structures with a name: the operations that every conv gets (Table 1).
PRESETS: dict[str, tuple[str, ...]] = {
    'dbb': (ORIGIN, '1x1', '1x1-kxk', '1x1-avg'),
    'dbb7': OPERATIONS,
    'repvgg': (ORIGIN, '1x1', 'identity'),
}


# A Structure may come from a stranger's file.
MAX_BLOCKS = 10_000


#: How deep blocks may nest.
MAX_DEPTH = 16


@dataclass(frozen=True)
class Plan:
    """What one change of structure does, and the evidence it was decided from.

    Attributes:
        grow: The blocks to make, in the form of a Structure.
        prune: Branches to remove, by path of their block.
        scores: Every operation that was scored, by path.
        importances: Eq. 9 for the added branches of every block, by path of the block.
        remark: A sentence on the evidence that the user should read; None if there is none.
        reasons: For every block that loses branches the numbers that say why, by their names: for
            the paper's rule ``mean`` and ``spread`` of its importances, and ``threshold``, which
            the spread is above.
    """

    grow: Structure = field(default_factory=dict)
    prune: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    importances: dict[str, dict[str, float]] = field(default_factory=dict)
    remark: str | None = None
    reasons: dict[str, dict[str, float]] = field(default_factory=dict)


def structure_of(model: nn.Module) -> Structure:
    """The Structure of ``model``; empty for a plain model."""
    structure = {}
    for path, module in model.named_modules():
        if isinstance(module, Block):
            structure[path] = module.names
        elif has_gained_bias(module):
            structure[path] = []
    return structure


def altered(model: nn.Module) -> dict[str, nn.Module]:
    """The parts in which ``model`` differs from a plain one, by path: outermost blocks, and convs
    outside of blocks that gained a bias."""
    return {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, Block) or has_gained_bias(module)) and depth_of(model, path) == 0
    }


def structure_from_names(names: Iterable[str]) -> Structure:
    """The blocks of the model whose ``state_dict`` has these names.

    A block is what has a ``branches.kxk``: the models of other projects may have branches too.
    Whether a conv gained a bias depends on the plain model, see
    :func:`dyrep_mm.surgery.rewire.restore`.

    Args:
        names: Without the ``module.`` of DDP.

    Raises:
        DyRepError: the names are of no Structure: an operation that is not known, too many
            blocks, or too deep ones.
    """
    found: dict[str, set[str]] = {}
    for name in names:
        parts = name.split('.')
        if parts.count('branches') > MAX_DEPTH:
            raise DyRepError(f'a structure is at most {MAX_DEPTH} blocks deep, got {_short(name)}')
        for i, part in enumerate(parts[:-1]):
            if part == 'branches':
                found.setdefault('.'.join(parts[:i]), set()).add(parts[i + 1])
    place = {operation: i for i, operation in enumerate(known_operations())}
    structure = {
        path: sorted(operations, key=lambda name: (place.get(name, len(place)), name))
        for path, operations in found.items()
        if ORIGIN in operations
    }
    check_structure(structure)
    return structure


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``state`` from giving each tensor of ``own`` its values, one phrase for each.

    The unit of a branch may be missing: it is one then.
    """
    return [
        *(
            f'{name} is missing'
            for name in own
            if name not in state and name.rpartition('.')[2] != UNIT
        ),
        *(
            f'{name} has shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}'
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ),
    ]


def listed(wrong: list[str]) -> str:
    """The first of many phrases, and how many more there are."""
    return '; '.join(wrong[:3]) + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else '')


def check_structure(structure: Any) -> None:
    """Raise ``DyRepError`` unless ``structure`` has the form of a Structure."""
    if not isinstance(structure, Mapping):
        raise DyRepError(f'a structure maps paths to operations, got a {type(structure).__name__}')
    if len(structure) > MAX_BLOCKS:
        raise DyRepError(f'a structure has at most {MAX_BLOCKS} blocks, got {len(structure)}')
    for path, names in structure.items():
        if not isinstance(path, str) or not isinstance(names, (list, tuple)):
            raise DyRepError(
                f'a structure maps paths to lists, got {_short(path)}: {_short(names)}'
            )
        if not all(isinstance(name, str) for name in names):
            raise DyRepError(f'structure, {_short(path)}: it is not a list of names')
        if len(set(names)) != len(names) or (names and names[0] != ORIGIN):
            raise DyRepError(
                f'structure, {_short(path)}: operations start with kxk and differ: {names!r:.200}'
            )
        try:
            check_operations(names)
        except DyRepError as error:
            raise DyRepError(f'structure, {_short(path)}: {error}') from None
        if path.split('.').count('branches') >= MAX_DEPTH:
            raise DyRepError(f'a structure is at most {MAX_DEPTH} blocks deep, got {_short(path)}')


def _short(value: Any) -> str:
    """A text on one line, cut; of other things, which may be long and deep, the type."""
    return f'{value!r:.200}' if isinstance(value, str) else f'a {type(value).__name__}'
