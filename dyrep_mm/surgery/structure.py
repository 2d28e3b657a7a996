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
from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.branches import OPERATIONS, ORIGIN, check_operations

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
    """What one update changes.

    Attributes:
        grow: Paths of the convs that become blocks.
        prune: Branches to remove, by path of their block.
    """

    grow: list[str] = field(default_factory=list)
    prune: dict[str, list[str]] = field(default_factory=dict)


def structure_of(model: nn.Module) -> Structure:
    """The Structure of ``model``; empty for a plain model."""
    structure = {}
    for path, module in model.named_modules():
        if isinstance(module, Block):
            structure[path] = module.names
        elif getattr(module, 'gained_bias', False):
            structure[path] = []
    return structure


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
