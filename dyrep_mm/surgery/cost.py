"""Multiply-adds of a model with blocks in training, from the sizes of the maps that its layers see.

Counters that trace a model (mmengine's, fvcore's) need a forward for every structure, and a
detector in training cannot be traced. Here one training iteration is watched, and every later
structure is counted from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block, has_gained_bias, origin_of
from dyrep_mm.reparam.branches import multiply_adds_of
from dyrep_mm.reparam.geometry import pair
from dyrep_mm.surgery.tree import blocks_of, depth_of, get_module

#: By path of a conv, block or linear layer, its calls: how many maps for one image, their height
#: and width in pixels; for a linear layer how many rows, 1 and 1.
Sizes = dict[str, list[list[float]]]


class SizeWatch:
    """Notes the sizes of the maps that convs, linear layers and outermost blocks of ``model`` see.

    It watches from its construction until :meth:`finish`.

    Attributes:
        images: How many a batch has, by the first call of a layer; None before it.
        autocast: Whether layers run under autocast.
    """

    def __init__(self, model: nn.Module):
        self._calls: dict[str, dict[tuple[int, int], int]] = {}
        self.images: int | None = None
        self.autocast = False
        self._handles = [
            module.register_forward_pre_hook(self._noter(path), with_kwargs=True)
            for path, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear, Block)) and depth_of(model, path) == 0
        ]

    def _noter(self, path: str) -> Callable:
        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            # Activation checkpointing runs a layer again in the backward.
            if not inputs or torch._C._current_graph_task_id() != -1:
                return
            x = inputs[0]
            linear = isinstance(module, nn.Linear)
            size = (1, 1) if linear else pair(x.shape[-2:])
            count = x.numel() // max(x.shape[-1] if linear else x.shape[-3:].numel(), 1)
            if self.images is None:
                self.images = max(len(x), 1)
            kind = x.device.type
            self.autocast |= torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(
                kind
            )
            calls = self._calls.setdefault(path, {})
            calls[size] = calls.get(size, 0) + count

        return note

    def finish(self) -> Sizes:
        """Stop watching; the sizes that were seen."""
        for handle in self._handles:
            handle.remove()
        images = self.images or 1  # none where nothing ran
        return {
            path: [[count / images, *size] for size, count in calls.items()]
            for path, calls in self._calls.items()
        }


def are_sizes(value: Any) -> bool:
    """Whether ``value``, from a file, has the form of :data:`Sizes`."""
    return isinstance(value, dict) and all(
        isinstance(path, str)
        and isinstance(calls, list)
        and all(
            isinstance(call, list)
            and len(call) == 3
            and all(type(n) in (int, float) and n >= 0 for n in call)
            for call in calls
        )
        for path, calls in value.items()
    )


def multiply_adds(model: nn.Module, sizes: Sizes, *, plain: bool = False) -> float:
    """Multiply-adds of one forward of one image through the convs and linear layers of ``model``.

    Every conv of every branch is counted by itself, as in the paper's tables.

    Args:
        model: In any structure that grew from the one that was watched.
        sizes: From :class:`SizeWatch`. Layers that it did not see count nothing.
        plain: Count the conv that a block grew from in the place of the block.
    """
    total = 0.0
    for path, calls in sizes.items():
        try:
            module = get_module(model, path)
        except DyRepError:  # from a checkpoint of another head
            continue
        if plain:
            module = origin_of(module)
        total += sum(n * multiply_adds_of(module, (int(h), int(w))) for n, h, w in calls)
    return total


def branch_costs(model: nn.Module, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Multiply-adds of one forward of one image through each branch, by path of its outermost block
    and name, as :func:`multiply_adds` counts them; nothing of blocks that were not seen."""
    blocks = blocks_of(model)
    return {
        path: {
            name: sum(
                n * multiply_adds_of(blocks[path].branches[name], (int(h), int(w)))
                for n, h, w in calls
            )
            for name in blocks[path].names[1:]
        }
        for path, calls in sizes.items()
        if path in blocks
    }


@dataclass(frozen=True)
class Cost:
    """What a model costs in training.

    Attributes:
        parameters: How many it has.
        multiply_adds: Of one image, see :func:`multiply_adds`; None where sizes are not known.
    """

    parameters: int
    multiply_adds: float | None = None


def cost_of(model: nn.Module, sizes: Sizes | None) -> Cost:
    """The cost of ``model`` as it is."""
    return Cost(
        sum(parameter.numel() for parameter in model.parameters()),
        None if sizes is None else multiply_adds(model, sizes),
    )


def plain_cost_of(model: nn.Module, sizes: Sizes | None) -> Cost:
    """The cost of the plain model that ``model`` grew from."""
    branches = [branch for block in blocks_of(model).values() for branch in block.added]
    gained = {id(parameter) for branch in branches for parameter in branch.parameters()}
    gained |= {id(module.bias) for module in model.modules() if has_gained_bias(module)}
    return Cost(
        sum(p.numel() for p in model.parameters() if id(p) not in gained),
        None if sizes is None else multiply_adds(model, sizes, plain=True),
    )
