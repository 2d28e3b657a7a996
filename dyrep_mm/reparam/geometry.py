"""Geometry of the conv that a block replaces, and the operations on maps that follow it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.kernels import Kernel, average_weight, is_recorded

Pair = tuple[int, int]


def pair(values: Iterable[int]) -> Pair:
    """Two values as a pair."""
    vertical, horizontal = values
    return vertical, horizontal


def padding_of(conv: nn.Conv2d) -> Pair:
    """Padding of ``conv`` in rows and columns on each side, of an odd kernel if it is a word."""
    if not isinstance(conv.padding, str):
        return pair(conv.padding)
    if conv.padding == 'valid':
        return (0, 0)
    return pair(d * (k - 1) // 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))


def output_size(conv: nn.Conv2d | ConvSpec, size: Sequence[int]) -> Pair:
    """Height and width of what ``conv`` makes of a map of ``size`` (h, w)."""
    padding = conv.padding if isinstance(conv, ConvSpec) else padding_of(conv)
    axes = zip(size, padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
    return pair((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in axes)


@dataclass(frozen=True)
class ConvSpec:
    """Geometry of a conv, read once; pairs are (vertical, horizontal)."""

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> ConvSpec:
        """Read the geometry of ``conv``.

        Raises:
            DyRepError: the conv is one that no block can replace exactly.
        """
        if conv.padding_mode != 'zeros':
            raise DyRepError(f'padding_mode {conv.padding_mode!r} is not "zeros"')
        if math.prod(conv.kernel_size) == 1:
            raise DyRepError('kernel size 1x1 has nothing to add to')
        if any(k % 2 == 0 for k in conv.kernel_size):
            raise DyRepError(f'kernel size {tuple(conv.kernel_size)} is not odd')
        return cls(
            conv.in_channels,
            conv.out_channels,
            pair(conv.kernel_size),
            pair(conv.stride),
            padding_of(conv),
            pair(conv.dilation),
            conv.groups,
        )

    @property
    def depthwise(self) -> bool:
        """One filter per channel."""
        return self.groups == self.in_channels == self.out_channels

    def convolve(self, x: Tensor, kernel: Kernel) -> Tensor:
        """``x`` (batch, in, h, w) through a conv of this geometry."""
        return F.conv2d(x, *kernel, self.stride, self.padding, self.dilation, self.groups)

    def inset(self, size: Pair) -> tuple[Pair, Pair]:
        """``(padding, crop)`` of a kernel of ``size`` that sits in the middle of this one."""
        margins = [
            p - d * (k - s) // 2
            for p, d, k, s in zip(self.padding, self.dilation, self.kernel_size, size, strict=True)
        ]
        return pair(max(m, 0) for m in margins), pair(max(-m, 0) for m in margins)


def pad(x: Tensor, margin: Pair) -> Tensor:
    """``x`` (..., h, w) with ``margin`` rows and columns of zeros on each side."""
    rows, cols = margin
    return F.pad(x, (cols, cols, rows, rows)) if rows or cols else x


def crop(x: Tensor, margin: Pair) -> Tensor:
    """``x`` (..., h, w) without ``margin`` rows and columns on each side."""
    rows, cols = margin
    if not rows and not cols:
        return x
    return x[..., rows : x.shape[-2] - rows, cols : x.shape[-1] - cols]


def subsample(x: Tensor, step: Pair) -> Tensor:
    """``x`` (..., h, w) at every so many rows and columns, from the first."""
    rows, cols = step
    return x if rows == cols == 1 else x[..., ::rows, ::cols]


class _AveragePool(torch.autograd.Function):
    """Keeps no input: the backward needs only its size."""

    @staticmethod
    def forward(x: Tensor, size: Pair, stride: Pair, padding: Pair) -> Tensor:
        if x.device.type != 'cpu':
            return F.avg_pool2d(pad(x, padding), size, stride)
        channels = x.shape[1]
        weight = average_weight(channels, size, x)
        return F.conv2d(x, weight, None, stride, padding, groups=channels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, *ctx.geometry = inputs
        ctx.shape = x.shape

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _AveragePool.apply(tangent, *ctx.geometry)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, *geometry: Pair) -> tuple[Tensor, int]:
        maps = x.movedim(in_dims[0], 0)
        pooled = _AveragePool.apply(maps.flatten(0, 1), *geometry)
        return pooled.unflatten(0, maps.shape[:2]), 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (size, stride, padding), channels = ctx.geometry, grad.shape[1]
        padded = [n + 2 * p for n, p in zip(ctx.shape[2:], padding, strict=True)]
        if grad.device.type != 'cpu':
            like = grad.new_empty(()).expand(*ctx.shape[:2], *padded)
            pool = torch.ops.aten.avg_pool2d_backward
            spread = pool(grad, like, size, stride, [0, 0], False, True, None)
            return crop(spread, padding), None, None, None
        # What no window reached at the end got nothing.
        rest = [
            n - (g - 1) * s - k
            for n, g, s, k in zip(padded, grad.shape[2:], stride, size, strict=True)
        ]
        weight = average_weight(channels, size, grad)
        spread = F.conv_transpose2d(grad, weight, None, stride, padding, rest, channels)
        return spread, None, None, None


def average_pool(x: Tensor, size: Pair, stride: Pair, padding: Pair = (0, 0)) -> Tensor:
    """Average pooling of ``x`` (batch, channels, h, w), the zeros of the padding counted.

    On the CPU it runs as a depthwise conv, which is several times faster there. The input is
    not kept for the backward.
    """
    pool = _AveragePool.forward if is_recorded() else _AveragePool.apply
    return pool(x, size, stride, padding)
