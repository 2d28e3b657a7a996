"""Pure maths on kernels: every linear operation of a block as one convolution kernel.

A :class:`Kernel` is the pair ``(weight, bias)`` of a convolution with the geometry of the
conv that the block replaces: weight ``(out, in / groups, kh, kw)``, bias ``(out,)``. All
functions are differentiable and keep dtype and device (section 3 of the paper, Eq. 1-2, 6,
8, 10).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Kernel(NamedTuple):
    """One linear operation: ``weight`` (out, in / groups, kh, kw) and ``bias`` (out,)."""

    weight: Tensor
    bias: Tensor


def make_kernel(weight: Tensor, bias: Tensor | None = None) -> Kernel:
    """Kernel of a conv that may have no bias."""
    return Kernel(weight, weight.new_zeros(weight.shape[0]) if bias is None else bias)


def fold_bn(
    kernel: Kernel,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    unit: Tensor | None = None,
) -> Kernel:
    """Kernel of ``unit * BN(conv(x))`` with fixed statistics (Eq. 8); every BN tensor is (out,)."""
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma
    bias = (kernel.bias - mean) * scale
    if beta is not None:
        bias = bias + beta
    if unit is not None:  # last, so that a bias of zero stays zero
        scale, bias = scale * unit, bias * unit
    return Kernel(kernel.weight * scale.view(-1, 1, 1, 1), bias)


def _middle(weight: Tensor, size: Sequence[int]) -> Tensor:
    """View of the ``size`` (kh, kw) in the middle of ``weight`` (..., kh, kw)."""
    rows, cols = ((n - k) // 2 for n, k in zip(weight.shape[-2:], size, strict=True))
    return weight.narrow(-2, rows, size[0]).narrow(-1, cols, size[1])


def is_recorded() -> bool:
    """Whether a trace, an export or a compiler records what runs: then operations of torch alone
    run, for a Function of our own means nothing to whoever reads the record."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


class _Sum(torch.autograd.Function):
    """Sum of weights of several sizes: nothing is padded, and the gradients are views."""

    @staticmethod
    def forward(size: tuple[int, int], *weights: Tensor) -> Tensor:
        if weights[0].shape[-2:] == size:
            total, *weights = weights[0].clone(), *weights[1:]
        else:
            total = weights[0].new_zeros(*weights[0].shape[:-2], *size)
        for weight in weights:
            _middle(total, weight.shape[-2:]).add_(weight)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.size, *weights = inputs
        ctx.sizes = [weight.shape[-2:] for weight in weights]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(_middle(grad, size) for size in ctx.sizes)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        return _sum(ctx.size, *(tangent for tangent in tangents if tangent is not None))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, size: tuple, *weights: Tensor) -> tuple[Tensor, int]:
        # In place only what has the extra dimension can be added to.
        wide = [
            weight.expand(info.batch_size, *weight.shape) if dim is None else weight.movedim(dim, 0)
            for weight, dim in zip(weights, in_dims[1:], strict=True)
        ]
        return _Sum.apply(size, *wide), 0


def _sum(size: tuple[int, int], *weights: Tensor) -> Tensor:
    """What :class:`_Sum` computes, of operations of torch alone."""
    total: Any = 0
    for weight in weights:
        rows, cols = ((n - k) // 2 for n, k in zip(size, weight.shape[-2:], strict=True))
        total = total + F.pad(weight, (cols, cols, rows, rows))
    return total


def add(kernels: Iterable[Kernel], size: tuple[int, int]) -> Kernel:
    """Sum of kernels, each in the middle of ``size`` (kh, kw): parallel branches (Eq. 2).

    All sizes are odd.
    """
    weights, biases = zip(*kernels, strict=True)
    weight = _sum(size, *weights) if is_recorded() else _Sum.apply(size, *weights)
    return Kernel(weight, sum(biases[1:], biases[0]))


def chain(first: Kernel, second: Kernel, groups: int = 1) -> Kernel:
    """Kernel of ``second(first(x))``: a ``1x1`` followed by a ``kxk``, both with ``groups``.

    ``first`` has weight (mid, in / groups, 1, 1), ``second`` (out, mid / groups, kh, kw) or,
    one filter per channel, (mid, 1, kh, kw); the result is (out, in / groups, kh, kw). Exact
    at the border too if the padding of ``second`` holds what ``first`` makes of zeros, see
    :mod:`dyrep_mm.reparam.branches`.
    """
    mid, narrow = first.weight.shape[:2]
    out, wide, kh, kw = second.weight.shape
    if wide == 1 and out == mid:
        bias = first.bias * second.weight.sum((1, 2, 3)) + second.bias
        return Kernel(first.weight * second.weight, bias)
    pointwise = first.weight.reshape(groups, mid // groups, narrow)
    spatial = second.weight.reshape(groups, out // groups, mid // groups, kh, kw)
    weight = torch.einsum('gomhw,gmi->goihw', spatial, pointwise)
    bias = torch.einsum('gomhw,gm->go', spatial, first.bias.reshape(groups, mid // groups))
    # A conv takes the memory format of its weight over to its output.
    weight = weight.reshape(out, narrow, kh, kw).contiguous()
    return Kernel(weight, bias.reshape(out) + second.bias)


def identity_weight(channels: int, groups: int, like: Tensor) -> Tensor:
    """Weight (channels, channels / groups, 1, 1) that copies its input."""
    narrow = channels // groups
    eye = torch.eye(narrow, dtype=like.dtype, device=like.device)
    return eye.repeat(groups, 1).view(channels, narrow, 1, 1)


def average_weight(channels: int, size: tuple[int, int], like: Tensor) -> Tensor:
    """Weight (channels, 1, kh, kw) of an average pooling, padding counted."""
    return like.new_full((channels, 1, *size), 1 / math.prod(size))
