"""What a structure costs in training beside the plain model, as its blocks really run."""

from __future__ import annotations

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import MERGING_DEVICES, Block, origin_of
from dyrep_mm.reparam.branches import ORIGIN, multiply_adds_of
from dyrep_mm.reparam.geometry import Pair
from dyrep_mm.reparam.norms import NormFactory, norm_like
from dyrep_mm.surgery.copies import Copies, following, with_copies
from dyrep_mm.surgery.cost import Sizes
from dyrep_mm.surgery.structure import Structure
from dyrep_mm.surgery.tree import (
    any_norm,
    blocks_of,
    get_module,
    near_norm,
    outermost,
    replace,
)


class Costs:
    """What a structure costs beside the plain model, as its blocks really run in training.

    The measure is the multiply-adds of the convs, linear layers and matrix products of one
    forward, over those of the plain model. A linear block is one conv and the merging of its
    kernels, which a batch shares; in train mode branches that merge count as the statistics and
    kernels that they need, all others as their convs. Blocks are run on torch's meta device,
    which knows shapes alone. What the maps of a batch cost besides, norms and sums, is not counted.

    Args:
        prepare: Does to a block that a change would make what a training does to new blocks.

    Attributes:
        known: Whether :meth:`learn` was called.
    """

    def __init__(self, prepare: Callable[[Block], None] = lambda _: None) -> None:
        self.prepare = prepare
        self.known = False
        self._sizes: Sizes = {}
        self._images = 1
        self._autocast = False
        self._copies: Copies = {}

    def learn(
        self, sizes: Sizes, images: int, autocast: bool = False, copies: Copies | None = None
    ) -> None:
        """Count for the maps of a training iteration.

        Args:
            sizes: From :class:`SizeWatch`.
            images: In a batch.
            autocast: Whether layers run under autocast, where no branch merges in train mode.
            copies: Momentum copies inside the model; they get the branches of what they copy.
        """
        self.known = any(sizes.values())
        self._sizes, self._images, self._autocast = sizes, images, autocast
        self._copies = dict(copies or {})

    def of(self, model: nn.Module) -> CostOf:
        """The cost of ``model`` as it is now, and of its changes."""
        copies = following(model, self._copies)
        return CostOf(model, self._sizes, self._images, self._autocast, copies, self.prepare)


class CostOf:
    """The cost of one model in its present structure and modes, and of changes to it."""

    def __init__(
        self,
        model: nn.Module,
        sizes: Sizes,
        images: int,
        autocast: bool,
        copies: Copies,
        prepare: Callable[[Block], None],
    ):
        self._model = model
        self._images = images
        self._autocast = autocast
        self._copies = copies
        self._prepare = prepare
        self._spare = any_norm(model)
        self._seen: dict[tuple, float] = {}
        self._parts = {}
        for path, calls in sizes.items():
            try:
                part = get_module(model, path)
            except DyRepError:  # from a checkpoint of another head
                continue
            self._parts[path] = part, calls

    @cached_property
    def plain(self) -> float:
        """Multiply-adds of the plain model, of one image."""
        return sum(
            n * multiply_adds_of(origin_of(part), (int(h), int(w)))
            for part, calls in self._parts.values()
            for n, h, w in calls
        )

    def __call__(
        self,
        grow: Structure | None = None,
        prune: Mapping[str, Sequence[str]] | None = None,
    ) -> float:
        """The cost after a change, in multiply-adds of the plain model.

        It is infinite where a conv grows of which no size is known.

        Args:
            grow: The blocks to make.
            prune: Branches to remove, by path of their block.
        """
        changes: dict[str, tuple[dict, dict]] = {}
        for kind, change in enumerate((grow, prune)):
            for path, names in with_copies(change or {}, self._copies).items():
                whole = outermost(self._model, path)
                changes.setdefault(whole, ({}, {}))[kind][path] = names
        if any(path not in self._parts for path in changes if changes[path][0]):
            return math.inf
        total = self.plain
        for path, (part, calls) in self._parts.items():
            if path in changes or isinstance(part, Block):
                total += self._extra(path, part, calls, *changes.get(path, ({}, {})))
        return total / self.plain

    def _extra(
        self, path: str, part: nn.Module, calls: list[list[float]], grow: dict, prune: dict
    ) -> float:
        """Multiply-adds of one image that a part has more than its conv."""
        key = (
            path,
            *((at, tuple(names)) for at, names in grow.items()),
            *((at, frozenset(names)) for at, names in prune.items()),
        )
        if key not in self._seen:
            norm = norm_like(near_norm(self._model, path) or self._spare)
            kind = origin_of(part).weight.device.type
            part = _changed(path, _on_meta(part), grow, prune, norm, self._prepare)
            conv = origin_of(part)
            _run_here(part, self._autocast, kind)
            self._seen[key] = sum(
                self._run(part, n, (int(h), int(w))) - n * multiply_adds_of(conv, (int(h), int(w)))
                for n, h, w in calls
            )
        return self._seen[key]

    def _run(self, part: nn.Module, count: float, size: Pair) -> float:
        """Multiply-adds of ``part`` on ``count`` maps for each image."""
        maps = max(round(count * self._images), 1)
        conv = origin_of(part)
        x = torch.empty(maps, conv.in_channels, *size, dtype=conv.weight.dtype, device='meta')
        if not isinstance(part, Block):
            return count * multiply_adds_of(part, size)
        with torch.no_grad(), _Counter() as counter:
            part(x)
        return counter.total / self._images


_ELEMENTWISE = ('add', 'sub', 'mul', 'div', 'rsqrt', 'clamp_min')


class _Counter(TorchDispatchMode):
    """Adds up the multiply-adds of convs and matrix products that run inside, on the meta device.

    torch's own counter takes every other operation apart, which takes far longer.
    """

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        # What is written in Python for this device.
        if name in _ELEMENTWISE:
            tensors = [value for value in args if isinstance(value, Tensor)]
            shape = torch.broadcast_shapes(*(t.shape for t in tensors))
            dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
            return tensors[0].new_empty(shape, dtype=dtype)
        if 'batch_norm' in name:
            x = args[0]
            rest = [x.new_empty(x.shape[1]) for _ in func._schema.returns[1:]]
            return torch.empty_like(x), *rest
        out = func(*args, **(kwargs or {}))
        if name == 'convolution':
            self.total += out.numel() * args[1][0].numel()
        elif name in ('mm', 'bmm'):
            self.total += out.numel() * args[0].shape[-1]
        elif name in ('addmm', 'baddbmm'):
            self.total += out.numel() * args[1].shape[-1]
        return out


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy without values, and without what hangs on the modules."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        for name, value in vars(inner).items():
            if name.endswith('_hooks') and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
    for tensor in (*module.parameters(), *module.buffers()):
        like = torch.empty_like(tensor, device='meta', requires_grad=False)
        memo[id(tensor)] = nn.Parameter(like) if isinstance(tensor, nn.Parameter) else like
    return copy.deepcopy(module, memo)


def _run_here(part: nn.Module, autocast: bool, kind: str) -> None:
    """Make a part on the meta device run as the real one does on a device of this ``kind``: across
    processes and under autocast no branch merges with the statistics of the batch."""
    across = [m for m in part.modules() if isinstance(m, nn.SyncBatchNorm)]
    for norm in across:  # it refuses this device
        norm.__class__ = cast(Any, nn.BatchNorm2d)
    if autocast or across or kind not in MERGING_DEVICES:
        for block in blocks_of(part).values():
            vars(block)['may_merge'] = lambda _: False


def _changed(
    path: str,
    part: nn.Module,
    grow: dict,
    prune: dict,
    norm: NormFactory,
    prepare: Callable[[Block], None],
) -> nn.Module:
    """``part``, a copy on the meta device of what is at ``path``, after a change."""
    holder = nn.ModuleDict({'part': part})

    def at(inside: str) -> str:
        return 'part' + inside[len(path) :]

    # A branch of another project may draw from torch's own generator.
    with torch.random.fork_rng(devices=[]), torch.device('meta'):
        for inside in sorted(grow, key=lambda inside: inside.count('.')):
            conv = cast(nn.Conv2d, get_module(holder, at(inside)))
            block = Block(conv, grow[inside], norm)
            prepare(block)
            replace(holder, at(inside), block)
    for inside in sorted(prune, key=lambda inside: inside.count('.'), reverse=True):
        block = cast(Block, get_module(holder, at(inside)))
        for name in set(prune[inside]):
            del block.branches[name]
        if block.names == [ORIGIN]:
            replace(holder, at(inside), block.branches[ORIGIN])
    return holder['part']
