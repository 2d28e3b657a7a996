"""Structure and Plan as plain data: form, checks, presets, read off a model.

A Structure is JSON-able data, ``{path: [operation, ...]}``: which conv has which operations,
``kxk`` first. A conv inside a block has a path like any other module,
``conv2.branches.1x1-kxk.conv``, so nesting needs no notation of its own. An empty list stands
for a plain conv that gained a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block, has_gained_bias
from dyrep_mm.reparam.branches import OPERATIONS, ORIGIN, check_operations
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
    """

    grow: Structure = field(default_factory=dict)
    prune: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    importances: dict[str, dict[str, float]] = field(default_factory=dict)
    remark: str | None = None


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


def check_structure(structure: Any) -> None:
    """Raise ``DyRepError`` unless ``structure`` has the form of a Structure."""
    if not isinstance(structure, Mapping):
        raise DyRepError(f'a structure maps paths to operations, got a {type(structure).__name__}')
    if len(structure) > MAX_BLOCKS:
        raise DyRepError(f'a structure has at most {MAX_BLOCKS} blocks, got {len(structure)}')
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
