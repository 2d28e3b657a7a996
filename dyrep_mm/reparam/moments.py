"""Where the norms of branches get their statistics from, without running the branch.

A source tells mean and variance of what a kernel makes of the input of a block.
:class:`BlockInput` knows them exactly for what a BN behind a 1x1 needs; :class:`Sample` finds them
for every kernel from a sample of the places.

For ``y = W x + b`` with ``W`` a 1x1, ``mean(y) = W mean(x) + b`` and ``var(y)`` is the diagonal
of ``W cov(x) W'``. So the BN of a ``1x1``, an ``identity`` or a ``1x1-avg`` folds into the
kernel of its branch in train mode too (Eq. 8, with the statistics of the batch), and the
branches of a block share the one product ``x x'``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dyrep_mm.reparam.geometry import ConvSpec, average_pool, crop, output_size, pad, subsample
from dyrep_mm.reparam.kernels import Kernel, chain, fold_bn, is_recorded, precise
from dyrep_mm.reparam.norms import tracked


class Statistics(NamedTuple):
    """Mean and biased variance (out,) of a map over ``count`` values a channel."""

    mean: Tensor
    var: Tensor
    count: int  # type: ignore[assignment]  # tuples have a method of this name


def across(found: Statistics, group: Any) -> Statistics:
    """The statistics of all processes of a group together, differentiable; each of them calls."""
    from torch.distributed.nn.functional import all_reduce  # here: not every torch has it

    reduce = partial(all_reduce, group=group or dist.group.WORLD)
    count = found.mean.new_tensor(float(found.count))
    dist.all_reduce(count, group=group)
    share = found.count / count
    mean = reduce(found.mean * share)
    var = reduce((found.var + (found.mean - mean).square()) * share)
    return Statistics(mean, var, int(count.item()))


class Source:
    """Tells what norms of a block see in a batch.

    Attributes:
        found: What was told, with the norms that have used it.
        composes: Whether :meth:`behind` works.
    """

    composes = False

    def __init__(self) -> None:
        self.found: list[tuple[_BatchNorm, Statistics]] = []

    def statistics(self, kernel: Kernel, view: str) -> Statistics | None:
        """Of what ``kernel`` makes of the input; None if that is not known.

        Args:
            kernel: Not larger than the block's, in the middle of it.
            view: Of which places: ``'output'``, those of the block; ``'padded'``, a 1x1 at all of
                the input with its padding; ``'pooled'``, a 1x1 behind averages over the windows.
        """
        raise NotImplementedError

    def behind(self, first: Kernel) -> Source:
        """For what sees the padded output of a 1x1 ``first``."""
        raise NotImplementedError

    def record(self) -> None:
        """Let the norms in train mode record what was found, once."""
        for bn, found in self.found:
            if bn.training and bn.track_running_stats:
                _record(bn, *found)
        self.found.clear()


class Average(Kernel):
    """The kernel of an average pooling, one filter per channel."""


class _Scatter(torch.autograd.Function):
    """Mean (channels,) and scatter (groups, c, c) of the channels of a map, ``c`` in a group, both
    in double precision.

    Where channels depend on one another, the variance of a sum of them is small beside the scatter
    that it is computed from: single precision would lose it. The backward keeps the map and its
    mean, not the centred copy.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        flat = x.flatten(2)
        mean = flat.mean((0, 2), dtype=precise(x))
        # Centred first: a difference of large sums would lose the variance to rounding.
        centred = (flat - mean.to(x.dtype)[:, None]).to(mean.dtype).unflatten(1, (groups, -1))
        scatter = torch.matmul(centred, centred.transpose(-1, -2)).sum(0)
        return mean, scatter

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, ctx.groups = inputs
        ctx.save_for_backward(x, output[0])
        ctx.save_for_forward(x, output[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, Tensor]:
        x, mean = ctx.saved_tensors
        shape = len(x), ctx.groups, len(mean) // ctx.groups, -1
        centred = (x - mean[:, None, None]).reshape(shape)
        # The mean of the tangent drops out: the rows of the centred map sum to zero.
        tangent = tangent.to(mean.dtype).contiguous()
        product = centred.matmul(tangent.view(shape).transpose(-1, -2)).sum(0)
        change = tangent.sum((0, 2, 3)) * (len(mean) / x.numel())
        return change, product + product.transpose(-1, -2)

    @staticmethod
    def backward(ctx: Any, mean_grad: Tensor, scatter_grad: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        batch, groups = len(x), len(scatter_grad)
        both = (scatter_grad + scatter_grad.transpose(-1, -2)).to(x.dtype)
        count = x.numel() // mean.numel()
        shift = (mean_grad.view(groups, -1, 1) / count).to(x.dtype)
        # Centred here too: what a large mean adds would cancel up to rounding.
        centred = x - mean.to(x.dtype)[:, None, None]
        maps = centred.reshape(batch * groups, mean.numel() // groups, -1)
        grad = torch.baddbmm(shift.repeat(batch, 1, 1), both.repeat(batch, 1, 1), maps)
        return grad.view(x.shape), None


@dataclass(frozen=True)
class Moments:
    """What the channels of a map have in common over a batch: ``mean`` (channels,), ``scatter``
    (groups, c, c), the sum of the products of the centred channels, over ``count`` places; in
    double precision, see :class:`_Scatter`."""

    mean: Tensor
    scatter: Tensor
    count: int

    @classmethod
    def of(cls, x: Tensor, groups: int) -> Moments:
        """Moments of ``x`` (batch, channels, h, w), differentiable."""
        run = _Scatter.forward if is_recorded() else _Scatter.apply
        mean, scatter = run(x, groups)
        return cls(mean, scatter, x.numel() // x.shape[1])

    def with_zeros(self, count: int) -> Moments:
        """Moments of the same map among zeros, ``count`` places in all."""
        if count == self.count:
            return self
        mean = self.mean.view(len(self.scatter), -1, 1)
        weight = self.count * (1 - self.count / count)
        scatter = torch.baddbmm(self.scatter, mean, mean.transpose(-1, -2), alpha=weight)
        return Moments(self.mean * (self.count / count), scatter, count)

    def through(self, kernel: Kernel) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (out,) of what a 1x1 ``kernel`` makes of the map."""
        groups = len(self.scatter)
        weight = kernel.weight.view(groups, -1, self.scatter.shape[-1]).to(self.scatter.dtype)
        mean = torch.matmul(weight, self.mean.view(groups, -1, 1)).flatten() + kernel.bias
        var = (torch.bmm(weight, self.scatter) * weight).sum(-1).flatten() / self.count
        dtype = kernel.weight.dtype
        return mean.to(dtype), var.clamp_min(0).to(dtype)  # rounding


@torch.no_grad()
def _record(bn: _BatchNorm, mean: Tensor, var: Tensor, count: int) -> None:
    """Running statistics of ``bn`` after a batch, as its own forward has them."""
    kept = tracked(bn)
    kept.batches.add_(1)
    momentum = bn.momentum
    if momentum is None:  # a cumulative average
        momentum = 1 / kept.batches.item()
    kept.mean.add_(mean - kept.mean, alpha=momentum)
    kept.var.add_(var * (count / (count - 1)) - kept.var, alpha=momentum)


def fold(
    kernel: Kernel, bn: _BatchNorm, found: Statistics | None = None, unit: Tensor | None = None
) -> Kernel:
    """``kernel`` with the BN behind it.

    Args:
        kernel: In front of the BN.
        bn: Gives scale, shift and epsilon.
        found: In the batch; by default the statistics that the BN keeps count.
        unit: Factor (out,) behind the BN.

    Raises:
        ValueError: batch statistics of a single value, as from the BN itself.
    """
    if found is None:
        mean, var, _ = tracked(bn)
    elif found.count < 2:
        raise ValueError('expected more than 1 value per channel when training')
    else:
        mean, var, _ = found
    return fold_bn(kernel, mean, var, bn.weight, bn.bias, bn.eps, unit)


class BlockInput(Source):
    """Input of a block, and the moments of what its branches see, each computed once when asked.

    Args:
        x: Map (batch, channels, h, w).
        spec: Geometry of the block.
        recompute: Keep nothing but ``x`` for the backward.
    """

    def __init__(self, x: Tensor, spec: ConvSpec, recompute: bool = False):
        super().__init__()
        self.x = x
        self.spec = spec
        self.recompute = recompute

    def _moments(self, view: Callable[[Tensor], Tensor]) -> Moments:
        def moments(x: Tensor) -> Moments:
            return Moments.of(view(x), self.spec.groups)

        if self.recompute:
            return checkpoint(moments, self.x, use_reentrant=False, preserve_rng_state=False)
        return moments(self.x)

    def statistics(self, kernel: Kernel, view: str) -> Statistics | None:
        if view == 'output':
            if kernel.weight.shape[2:] != (1, 1):
                return None
            view = 'centre'
        moments: Moments = getattr(self, view)
        mean, var = moments.through(kernel)
        return Statistics(mean, var, moments.count)

    @cached_property
    def whole(self) -> Moments:
        """Of the map as it is."""
        return Moments.of(self.x, self.spec.groups)

    @cached_property
    def padded(self) -> Moments:
        """Of the map with the padding of the block around it."""
        sides = zip(self.x.shape[2:], self.spec.padding, strict=True)
        height, width = (n + 2 * p for n, p in sides)
        return self.whole.with_zeros(len(self.x) * height * width)

    @cached_property
    def centre(self) -> Moments:
        """Of the places under the middle of the kernel."""
        margin, cut = self.spec.inset((1, 1))
        if margin == cut == (0, 0) and self.spec.stride == (1, 1):
            return self.whole
        return self._moments(lambda x: subsample(pad(crop(x, cut), margin), self.spec.stride))

    @cached_property
    def pooled(self) -> Moments:
        """Of the averages over the windows of the kernel."""
        spec = self.spec
        return self._moments(
            partial(average_pool, size=spec.kernel_size, stride=spec.stride, padding=spec.padding)
        )


#: How many values a channel a sample has at least, where the map has them: about a thousand.
SAMPLE = 750


class Sample(Source):
    """Statistics of every kernel from a sample of places, differentiable.

    It takes every m-th place in both directions, where m is the largest that leaves
    :data:`SAMPLE` values a channel; m is 1 where there are not as many. Each image starts at
    another place, so that the border has its share.

    Args:
        x: Map (batch, channels, h, w).
        spec: Geometry of the block.
    """

    composes = True

    def __init__(self, x: Tensor, spec: ConvSpec):
        super().__init__()
        self.x = x
        self.spec = spec
        self.groups = spec.groups

    def statistics(self, kernel: Kernel, view: str) -> Statistics | None:
        size = kernel.weight.shape[2:]
        if view != 'output' and size != (1, 1):
            return None
        seen = self._middle(size) if view == 'output' else getattr(self, view).flatten(2)
        weight = kernel.weight.permute(0, 2, 3, 1).reshape(len(seen), -1, seen.shape[-1])
        weight = weight.to(seen.dtype)
        var, mean = torch.var_mean(seen @ weight.transpose(-1, -2), 1, correction=0)
        return Statistics(mean.flatten() + kernel.bias, var.flatten(), seen.shape[1])

    def behind(self, first: Kernel) -> Source:
        return _Behind(self, first)

    def _middle(self, size: Sequence[int]) -> Tensor:
        """The middle of what the kernel sees, (groups, places, size * channels / groups)."""
        full = self.spec.kernel_size
        top, left = ((n - k) // 2 for n, k in zip(full, size, strict=True))
        if size[0] == full[0] and size[1] == full[1]:
            return self.output.flatten(2)
        parts: Sequence[Tensor] = self._rows[top : top + size[0]]
        if size[1] != full[1]:
            columns = self._columns[top : top + size[0]]
            parts = [part for row in columns for part in row[left : left + size[1]]]
        parts = [part.flatten(2) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    # Taken apart once: the backward of a slice is as large as what it is a slice of.

    @cached_property
    def _rows(self) -> tuple[Tensor, ...]:
        return self.output.unbind(2)

    @cached_property
    def _columns(self) -> list[tuple[Tensor, ...]]:
        return [row.unbind(2) for row in self._rows]

    @cached_property
    def output(self) -> Tensor:
        """What the kernel sees, (groups, places, kh, kw, channels / groups)."""
        return self._windows(self.spec)

    @cached_property
    def padded(self) -> Tensor:
        """The input with its padding, (groups, places, 1, 1, channels / groups)."""
        one = (1, 1)
        return self._windows(replace(self.spec, kernel_size=one, stride=one, dilation=one))

    @cached_property
    def pooled(self) -> Tensor:
        """Averages over the windows, (groups, places, 1, 1, channels / groups)."""
        return self.output.mean((2, 3), keepdim=True)

    def _windows(self, spec: ConvSpec) -> Tensor:
        x, batch, groups = self.x, len(self.x), spec.groups
        sides = output_size(spec, x.shape[2:])
        step = _largest_step(batch, sides)
        image = torch.arange(batch, device=x.device)
        starts = image, image // step
        (rows, in_rows), (cols, in_cols) = (
            _reach(spec, axis, starts[axis], sides[axis], x.shape[2 + axis], step)
            for axis in (0, 1)
        )
        at = rows[:, :, None, :, None] * x.shape[3] + cols[:, None, :, None, :]
        inside = in_rows[:, :, None, :, None] & in_cols[:, None, :, None, :]
        # Neither layout is copied.
        flat = x.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2)
        flat = x.flatten(2) if x.is_contiguous() else flat
        index = at.reshape(batch, 1, -1).expand(-1, x.shape[1], -1)
        values = flat.gather(2, index) * inside.reshape(batch, 1, -1)
        # Half precision is not enough for statistics.
        values = values.to(torch.promote_types(x.dtype, torch.float32))
        values = values.view(batch, groups, x.shape[1] // groups, -1).permute(1, 0, 3, 2)
        return values.reshape(groups, -1, *spec.kernel_size, x.shape[1] // groups)


class _Behind(Source):
    """What follows a 1x1 ``first`` on the input of another source."""

    composes = True

    def __init__(self, source: Sample | _Behind, first: Kernel):
        self.found = source.found
        self.groups: int = source.groups
        self.source = source
        self.first = first

    def statistics(self, kernel: Kernel, view: str) -> Statistics | None:
        return self.source.statistics(chain(self.first, kernel, self.groups), view)

    def behind(self, first: Kernel) -> Source:
        return _Behind(self.source, chain(self.first, first, self.groups))


def _largest_step(batch: int, sides: tuple[int, int]) -> int:
    step = 1
    while step < max(sides):
        height, width = (-(-n // (step + 1)) for n in sides)
        if batch * height * width < SAMPLE:
            break
        step += 1
    return step


def _reach(
    spec: ConvSpec, axis: int, start: Tensor, places: int, size: int, step: int
) -> tuple[Tensor, Tensor]:
    """Where the windows of sampled places lie on an axis of the input, (batch, places, k), and
    whether that is inside of it.

    Args:
        spec: Geometry of the windows.
        axis: 0 or 1.
        start: Where each image starts, (batch,); what is past the end goes on from the front.
        places: How many places the output has.
        size: Of the input.
        step: From one sampled place to the next.
    """
    steps = torch.arange(0, places, step, device=start.device)
    taps = torch.arange(spec.kernel_size[axis], device=start.device) * spec.dilation[axis]
    place = (start[:, None] + steps) % places
    at = place[..., None] * spec.stride[axis] + taps - spec.padding[axis]
    return at.clamp(0, size - 1), (at >= 0) & (at < size)
