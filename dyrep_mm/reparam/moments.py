"""Statistics of a batch without the branch: a BN behind a 1x1 needs only those of its input.

For ``y = W x + b`` with ``W`` a 1x1, ``mean(y) = W mean(x) + b`` and ``var(y)`` is the diagonal
of ``W cov(x) W'``. So the BN of a ``1x1``, an ``identity`` or a ``1x1-avg`` folds into the
kernel of its branch in train mode too (Eq. 8, with the statistics of the batch), and the
branches of a block share the one product ``x x'``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dyrep_mm.reparam.geometry import ConvSpec, average_pool, crop, pad, subsample
from dyrep_mm.reparam.kernels import Kernel, fold_bn, is_recorded
from dyrep_mm.reparam.norms import check_norm


class _Scatter(torch.autograd.Function):
    """Mean (channels,) and scatter (groups, c, c) of the channels of a map, ``c`` in a group.

    The backward keeps the map and its mean, not the centred copy.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        flat = x.flatten(2)
        mean = flat.mean((0, 2))
        # Centred first: a difference of large sums would lose the variance to rounding.
        centred = (flat - mean[:, None]).unflatten(1, (groups, -1))
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
        product = centred.matmul(tangent.contiguous().view(shape).transpose(-1, -2)).sum(0)
        change = tangent.sum((0, 2, 3)) * (len(mean) / x.numel())
        return change, product + product.transpose(-1, -2)

    @staticmethod
    def backward(ctx: Any, mean_grad: Tensor, scatter_grad: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        batch, groups = len(x), len(scatter_grad)
        both = scatter_grad + scatter_grad.transpose(-1, -2)
        count = x.numel() // mean.numel()
        shift = mean_grad.view(groups, -1, 1) / count - both @ mean.view(groups, -1, 1)
        maps = x.reshape(batch * groups, mean.numel() // groups, -1)
        grad = torch.baddbmm(shift.repeat(batch, 1, 1), both.repeat(batch, 1, 1), maps)
        return grad.view(x.shape), None


@dataclass(frozen=True)
class Moments:
    """What the channels of a map have in common over a batch: ``mean`` (channels,), ``scatter``
    (groups, c, c), the sum of the products of the centred channels, over ``count`` places."""

    mean: Tensor
    scatter: Tensor
    count: int

    @classmethod
    def of(cls, x: Tensor, groups: int) -> Moments:
        """Moments of ``x`` (batch, channels, h, w), differentiable."""
        scatter = _Scatter.forward if is_recorded() else _Scatter.apply
        return cls(*scatter(x, groups), x.numel() // x.shape[1])

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
        weight = kernel.weight.view(groups, -1, self.scatter.shape[-1])
        mean = torch.matmul(weight, self.mean.view(groups, -1, 1)).flatten() + kernel.bias
        var = (torch.bmm(weight, self.scatter) * weight).sum(-1).flatten() / self.count
        return mean, var.clamp_min(0)  # rounding


@torch.no_grad()
def _record(bn: _BatchNorm, mean: Tensor, var: Tensor, count: int) -> None:
    """Running statistics of ``bn`` after a batch, as its own forward has them."""
    bn.num_batches_tracked.add_(1)
    momentum = bn.momentum
    if momentum is None:  # a cumulative average
        momentum = 1 / bn.num_batches_tracked.item()
    bn.running_mean.add_(mean - bn.running_mean, alpha=momentum)
    bn.running_var.add_(var * (count / (count - 1)) - bn.running_var, alpha=momentum)


def fold_batch(kernel: Kernel, bn: _BatchNorm, moments: Moments) -> Kernel:
    """A 1x1 ``kernel`` with the BN behind it in the mode it is in, ``moments`` its input's.

    Raises:
        ValueError: batch statistics of a single value, as from the BN itself.
        DyRepError: another tool has taken the BN out.
    """
    check_norm(bn)
    if bn.training or bn.running_mean is None:
        if moments.count < 2:
            raise ValueError('expected more than 1 value per channel when training')
        mean, var = moments.through(kernel)
        if bn.training and bn.track_running_stats:
            _record(bn, mean, var, moments.count)
    else:
        mean, var = bn.running_mean, bn.running_var
    return fold_bn(kernel, mean, var, bn.weight, bn.bias, bn.eps)


class BlockInput:
    """Input of a block, and the moments of what its branches see, each computed once when asked.

    Args:
        x: Map (batch, channels, h, w).
        spec: Geometry of the block.
        recompute: Keep nothing but ``x`` for the backward.
    """

    def __init__(self, x: Tensor, spec: ConvSpec, recompute: bool = False):
        self.x = x
        self.spec = spec
        self.recompute = recompute

    def _moments(self, view: Callable[[Tensor], Tensor]) -> Moments:
        def moments(x: Tensor) -> Moments:
            return Moments.of(view(x), self.spec.groups)

        if self.recompute:
            return checkpoint(moments, self.x, use_reentrant=False, preserve_rng_state=False)
        return moments(self.x)

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
