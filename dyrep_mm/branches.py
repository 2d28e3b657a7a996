"""The operations of Table 1 as modules: each equals one :class:`Kernel` in eval mode.

A branch is one or two stages, each a linear operation followed by a BN. The operation
``kxk`` is the conv itself and needs no class here.

The border: what a 1x1 ahead of a spatial operation puts out is padded before its BN, so that
the BN turns the padded zeros into what the second stage must see there. No padding layer
with a value of its own is needed, in train mode and in eval mode alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dyrep_mm.errors import DyRepError
from dyrep_mm.transforms import (
    Kernel,
    average_weight,
    chain,
    fold_bn,
    identity_weight,
    make_kernel,
    pad_to,
)

Pair = tuple[int, int]
NormFactory = Callable[[int], _BatchNorm]


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
        padding = conv.padding
        if padding == 'valid':
            padding = (0, 0)
        elif padding == 'same':
            spans = zip(conv.kernel_size, conv.dilation, strict=True)
            padding = tuple(d * (k - 1) // 2 for k, d in spans)
        return cls(
            conv.in_channels,
            conv.out_channels,
            tuple(conv.kernel_size),
            tuple(conv.stride),
            tuple(padding),
            tuple(conv.dilation),
            conv.groups,
        )

    @property
    def depthwise(self) -> bool:
        """One filter per channel."""
        return self.groups == self.in_channels == self.out_channels

    def inset(self, size: Pair) -> tuple[Pair, Pair]:
        """``(padding, crop)`` of a kernel of ``size`` that sits in the middle of this one."""
        margins = [
            p - d * (k - s) // 2
            for p, d, k, s in zip(self.padding, self.dilation, self.kernel_size, size, strict=True)
        ]
        return tuple(max(m, 0) for m in margins), tuple(max(-m, 0) for m in margins)


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


def kernel_of(module: nn.Module) -> Kernel:
    """Kernel of a conv, a branch or a block, in eval mode."""
    if isinstance(module, nn.Conv2d):
        return make_kernel(module.weight, module.bias)
    return module.kernel()


def _make_conv(channels: Pair, size: Pair, generator: Generator | None, **geometry) -> nn.Conv2d:
    """A conv without bias, initialised from ``generator`` as torch does from its own."""
    conv = nn.utils.skip_init(nn.Conv2d, *channels, size, bias=False, **geometry)
    nn.init.kaiming_uniform_(conv.weight, a=math.sqrt(5), generator=generator)
    return conv


class Branch(nn.Module):
    """One operation of a block; its last BN, ``bn``, holds the importance (Eq. 9).

    Args:
        spec: Geometry of the conv that the block replaces.
        norm: Makes a BN for a number of channels.
        generator: Source of the random weights; torch's global one by default.
    """

    def __init__(self, spec: ConvSpec, norm: NormFactory, generator: Generator | None = None):
        super().__init__()
        self.spec = spec
        self.build(norm, generator)
        self.bn = norm(spec.out_channels)

    @classmethod
    def misfit(cls, spec: ConvSpec) -> str | None:
        """Why this operation cannot be exact on ``spec``; None if it can."""
        return None

    def build(self, norm: NormFactory, generator: Generator | None) -> None:
        """Make what comes before the last BN."""

    def stages(self) -> list[tuple[Kernel, _BatchNorm]]:
        """The linear operations in order, each with the BN behind it."""
        raise NotImplementedError

    def kernel(self) -> Kernel:
        """This branch as one kernel of the size of the block, with the running statistics."""
        merged = None
        for operation, bn in self.stages():
            if merged is not None:
                operation = chain(merged, operation, self.spec.groups)
            merged = fold_bn(operation, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
        return pad_to(merged, self.spec.kernel_size)

    @torch.no_grad()
    def assume_white_input(self) -> None:
        """Set the running statistics that white input of unit variance would give."""
        for operation, bn in self.stages():
            bn.reset_running_stats()
            bn.running_var.copy_(operation.weight.square().sum((1, 2, 3)))


class _ConvBranch(Branch):
    """A smaller conv in the middle of the kernel."""

    @classmethod
    def size(cls, spec: ConvSpec) -> Pair:
        """Kernel size of the conv."""
        raise NotImplementedError

    def build(self, norm: NormFactory, generator: Generator | None) -> None:
        spec, size = self.spec, self.size(self.spec)
        padding, self.crop = spec.inset(size)
        self.conv = _make_conv(
            (spec.in_channels, spec.out_channels),
            size,
            generator,
            stride=spec.stride,
            padding=padding,
            dilation=spec.dilation,
            groups=spec.groups,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(crop(x, self.crop)))

    def stages(self) -> list[tuple[Kernel, _BatchNorm]]:
        return [(kernel_of(self.conv), self.bn)]


class Pointwise(_ConvBranch):
    """``1x1``."""

    @classmethod
    def size(cls, spec: ConvSpec) -> Pair:
        return (1, 1)


class _Strip(_ConvBranch):
    @classmethod
    def misfit(cls, spec: ConvSpec) -> str | None:
        if 1 in spec.kernel_size:
            return f'the kernel {spec.kernel_size} is a strip already'
        return None


class Horizontal(_Strip):
    """``1xk``."""

    @classmethod
    def size(cls, spec: ConvSpec) -> Pair:
        return (1, spec.kernel_size[1])


class Vertical(_Strip):
    """``kx1``."""

    @classmethod
    def size(cls, spec: ConvSpec) -> Pair:
        return (spec.kernel_size[0], 1)


class PointwiseSpatial(Branch):
    """``1x1-kxk``: a 1x1 conv, a BN, then a conv of the full kernel size."""

    def build(self, norm: NormFactory, generator: Generator | None) -> None:
        spec = self.spec
        # DBB doubles the channels between on a depthwise conv; Table 3 counts no such thing.
        middle = spec.in_channels
        self.pre = _make_conv((middle, middle), (1, 1), generator, groups=spec.groups)
        self.pre_bn = norm(middle)
        self.conv = _make_conv(
            (middle, spec.out_channels),
            spec.kernel_size,
            generator,
            stride=spec.stride,
            dilation=spec.dilation,
            groups=spec.groups,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.pre_bn(pad(self.pre(x), self.spec.padding))))

    def stages(self) -> list[tuple[Kernel, _BatchNorm]]:
        return [(kernel_of(self.pre), self.pre_bn), (kernel_of(self.conv), self.bn)]


class _AveragePool(torch.autograd.Function):
    """Average pooling without padding that keeps no input: its backward needs only the size.

    On the CPU it runs as a depthwise conv, which is several times faster there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Pair, stride: Pair) -> Tensor:
        ctx.shape, ctx.size, ctx.stride = x.shape, size, stride
        if x.device.type != 'cpu':
            return F.avg_pool2d(x, size, stride)
        channels = x.shape[1]
        return F.conv2d(x, average_weight(channels, size, x), stride=stride, groups=channels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        size, stride = ctx.size, ctx.stride
        if grad.device.type != 'cpu':
            like = grad.new_empty(()).expand(ctx.shape)
            pool = torch.ops.aten.avg_pool2d_backward
            return pool(grad, like, size, stride, [0, 0], False, True, None), None, None
        channels = grad.shape[1]
        # What no window reached at the end got nothing.
        rest = [
            n - (g - 1) * s - k
            for n, g, s, k in zip(ctx.shape[2:], grad.shape[2:], stride, size, strict=True)
        ]
        weight = average_weight(channels, size, grad)
        spread = F.conv_transpose2d(grad, weight, None, stride, 0, rest, channels)
        return spread, None, None


class PointwiseAverage(Branch):
    """``1x1-avg``: a 1x1 conv, a BN, then an average pooling; depthwise: the pooling alone."""

    @classmethod
    def misfit(cls, spec: ConvSpec) -> str | None:
        if spec.dilation != (1, 1):
            return f'an average pooling has no dilation, the conv has {spec.dilation}'
        return None

    def build(self, norm: NormFactory, generator: Generator | None) -> None:
        spec = self.spec
        if spec.depthwise:
            self.pre = self.pre_bn = None
            return
        self.pre = _make_conv(
            (spec.in_channels, spec.out_channels), (1, 1), generator, groups=spec.groups
        )
        self.pre_bn = norm(spec.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre is not None:
            x = self.pre(x)
        x = pad(x, self.spec.padding)
        if self.pre is not None:
            x = self.pre_bn(x)
        return self.bn(_AveragePool.apply(x, self.spec.kernel_size, self.spec.stride))

    def stages(self) -> list[tuple[Kernel, _BatchNorm]]:
        spec = self.spec
        average = make_kernel(average_weight(spec.out_channels, spec.kernel_size, self.bn.weight))
        if self.pre is None:
            return [(average, self.bn)]
        return [(kernel_of(self.pre), self.pre_bn), (average, self.bn)]


class Identity(Branch):
    """``identity``: the input itself, through a BN."""

    @classmethod
    def misfit(cls, spec: ConvSpec) -> str | None:
        if spec.in_channels != spec.out_channels:
            return f'{spec.in_channels} channels come in and {spec.out_channels} go out'
        if spec.stride != (1, 1):
            return f'the stride is {spec.stride}'
        return None

    def build(self, norm: NormFactory, generator: Generator | None) -> None:
        self.padding, self.crop = self.spec.inset((1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(pad(crop(x, self.crop), self.padding))

    def stages(self) -> list[tuple[Kernel, _BatchNorm]]:
        spec = self.spec
        weight = identity_weight(spec.out_channels, spec.groups, self.bn.weight)
        return [(make_kernel(weight), self.bn)]


#: The operation that is the conv itself; every block has it.
ORIGIN = 'kxk'

#: The operations that a block adds to it, in the order in which a block holds them.
BRANCHES: dict[str, type[Branch]] = {
    '1x1': Pointwise,
    '1x1-kxk': PointwiseSpatial,
    '1x1-avg': PointwiseAverage,
    '1xk': Horizontal,
    'kx1': Vertical,
    'identity': Identity,
}

#: All operations of Table 1.
OPERATIONS: tuple[str, ...] = (ORIGIN, *BRANCHES)


def check_operations(names: Sequence[str]) -> None:
    """Raise ``DyRepError`` if a name is not one of :data:`OPERATIONS`."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise DyRepError(f'branches must be a list of names, got {names!r}')
    for name in names:
        if name not in OPERATIONS:
            raise DyRepError(f'unknown branch {name!r}: choose from {", ".join(OPERATIONS)}')


def fitting(spec: ConvSpec, names: Sequence[str] | None = None) -> list[str]:
    """Those of ``names`` (all by default) that are exact on ``spec``, without ``kxk``."""
    wanted = OPERATIONS if names is None else names
    return [n for n, cls in BRANCHES.items() if n in wanted and cls.misfit(spec) is None]
