"""Branches that a search switches on and off: in the model, its copies and averages, and in files.

A gate is the factor of a branch from outside, see :class:`dyrep_mm.reparam.branches.Branch`. It is
no part of a ``state_dict``. A file holds a branch that is off with a unit of zero. So a reader who
fuses it, tests it or starts from it has the function that the run tests, and needs to know of no
search. The units themselves lie beside the weights, for a resume.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.branches import UNIT, Branch
from dyrep_mm.surgery.copies import Copies, places_in
from dyrep_mm.surgery.tree import blocks_of

#: A branch, by path of its block and its name.
Place = tuple[str, str]


def path_of_place(place: Place) -> str:
    """Path of the module of a branch."""
    return f'{place[0]}.branches.{place[1]}'


class Gates:
    """The branches of a model that a search switches, with those that follow them.

    It is built once for a structure: a switch must not walk the model.

    Args:
        model: With blocks.
        places: The branches, in the order in which they are spoken of.
        copies: Momentum copies inside the model.
        averages: Averaged models, of the same structure.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Sequence[Place],
        copies: Copies | None = None,
        averages: Iterable[nn.Module] = (),
    ):
        self._inside = [
            [(path, name), *((at, name) for at in places_in(copies or {}, path))]
            for path, name in places
        ]
        blocks = [blocks_of(module) for module in (model, *averages)]
        self._branches: list[list[Branch]] = [
            [cast(Branch, found[path].branches[name]) for found in blocks for path, name in same]
            for same in self._inside
        ]
        self._parameters = [list(branches[0].parameters()) for branches in self._branches]
        self._was_on = [False] * len(places)

    def show(self, mask: Sequence[bool]) -> None:
        """Switch branches on and off, without a gradient: to evaluate, to prune."""
        for branches, on in zip(self._branches, mask, strict=True):
            for branch in branches:
                branch.gate = 1.0 if on else 0.0

    def open(self, mask: Sequence[bool], factors: Tensor | None = None) -> None:
        """Switch branches for a training iteration.

        Args:
            mask: Of all branches.
            factors: Of those that are on, differentiable; 1 by default.
        """
        self.show(mask)
        self._was_on = [was or on for was, on in zip(self._was_on, mask, strict=True)]
        if factors is None or not any(mask):
            return
        like = self._branches[0][0].unit
        on = [branches for branches, is_on in zip(self._branches, mask, strict=True) if is_on]
        # One copy to the device, and one back in the backward.
        for branches, factor in zip(on, factors.to(like).unbind(), strict=True):
            for branch in branches:
                branch.gate = factor

    def drop_gradients(self) -> None:
        """Take the gradients, zeros where there are any, of what was not on since :meth:`stepped`:
        the optimizer passes it over, momentum and decay too."""
        for parameters, was_on in zip(self._parameters, self._was_on, strict=True):
            if not was_on:
                for parameter in parameters:
                    parameter.grad = None

    def stepped(self) -> None:
        """The optimizer has stepped, or would have: gradients are gathered anew."""
        self._was_on = [False] * len(self._was_on)

    def units_off(self) -> dict[str, Tensor]:
        """The units of the branches that are off now, by their names in the ``state_dict``."""
        return {
            f'{path_of_place(place)}.{UNIT}': branches[0].unit.detach().cpu().clone()
            for same, branches in zip(self._inside, self._branches, strict=True)
            for place in same
            if not branches[0].is_on
        }


def close_in(state: dict[str, Tensor], units: Mapping[str, Tensor], prefix: str = '') -> None:
    """Let a ``state_dict`` for a file have the branches off whose ``units`` are named."""
    for name in units:
        if prefix + name in state:
            state[prefix + name] = torch.zeros_like(state[prefix + name])


def open_in(state: dict[str, Tensor], units: Mapping[str, Tensor], prefix: str = '') -> None:
    """Undo :func:`close_in`.

    Raises:
        DyRepError: a unit is not of these weights.
    """
    for name, unit in units.items():
        if (held := state.get(prefix + name)) is None:
            continue
        if unit.shape != held.shape:
            raise DyRepError(f'the DyRep record of the checkpoint is malformed: units, {name}')
        state[prefix + name] = unit.to(held)


@torch.no_grad()
def closed_in(model: nn.Module) -> dict[str, list[str]]:
    """The branches whose unit is zero, by path of their block: a file had them off."""
    closed = {
        path: [
            name for name in block.names[1:] if not cast(Branch, block.branches[name]).unit.any()
        ]
        for path, block in blocks_of(model).items()
    }
    return {path: names for path, names in closed.items() if names}
