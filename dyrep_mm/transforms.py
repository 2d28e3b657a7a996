"""Pure maths on kernels: every linear operation of a block as one convolution kernel.

A :class:`Kernel` is the pair ``(weight, bias)`` of a convolution with the geometry of the
conv that the block replaces: weight ``(out, in / groups, kh, kw)``, bias ``(out,)``. All
functions are differentiable and keep dtype and device (section 3 of the paper, Eq. 1-2, 6,
8, 10).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

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
    kernel: Kernel, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Kernel:
    """Kernel of ``BN(conv(x))`` with fixed statistics (Eq. 8); every BN tensor is (out,)."""
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma
    bias = (kernel.bias - mean) * scale
    if beta is not None:
        bias = bias + beta
    return Kernel(kernel.weight * scale.view(-1, 1, 1, 1), bias)


def add(kernels: Iterable[Kernel]) -> Kernel:
    """Sum of kernels of one shape: parallel branches (Eq. 2)."""
    weights, biases = zip(*kernels, strict=True)
    return Kernel(sum(weights[1:], weights[0]), sum(biases[1:], biases[0]))


def chain(first: Kernel, second: Kernel, groups: int = 1) -> Kernel:
    """Kernel of ``second(first(x))``: a ``1x1`` followed by a ``kxk``, both with ``groups``.

    ``first`` has weight (mid, in / groups, 1, 1), ``second`` (out, mid / groups, kh, kw) or,
    one filter per channel, (mid, 1, kh, kw); the result is (out, in / groups, kh, kw). Exact
    at the border too if the padding of ``second`` holds what ``first`` makes of zeros, see
    :mod:`dyrep_mm.branches`.
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
    return Kernel(weight.reshape(out, narrow, kh, kw), bias.reshape(out) + second.bias)


def identity_weight(channels: int, groups: int, like: Tensor) -> Tensor:
    """Weight (channels, channels / groups, 1, 1) that copies its input."""
    narrow = channels // groups
    eye = torch.eye(narrow, dtype=like.dtype, device=like.device)
    return eye.repeat(groups, 1).view(channels, narrow, 1, 1)


def average_weight(channels: int, size: tuple[int, int], like: Tensor) -> Tensor:
    """Weight (channels, 1, kh, kw) of an average pooling, padding counted."""
    return like.new_full((channels, 1, *size), 1 / math.prod(size))


def pad_to(kernel: Kernel, size: tuple[int, int]) -> Kernel:
    """Kernel zero-padded to ``size`` (kh, kw) around its centre; all sizes are odd."""
    kh, kw = kernel.weight.shape[-2:]
    if (kh, kw) == size:
        return kernel
    rows, cols = (size[0] - kh) // 2, (size[1] - kw) // 2
    return Kernel(F.pad(kernel.weight, (cols, cols, rows, rows)), kernel.bias)
