"""The operations of Table 1 as modules: each equals one :class:`Kernel`, in eval mode with the
running statistics, and in train mode, where it is worth it, with those of the batch.

A branch is one or two stages, each a linear operation followed by a BN. The operation
``kxk`` is the conv itself and needs no class here.

The border: what a 1x1 ahead of a spatial operation puts out is padded before its BN, so that
the BN turns the padded zeros into what the second stage must see there. No padding layer
with a value of its own is needed, in train mode and in eval mode alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.geometry import ConvSpec, Pair, average_pool, crop, pad, sample
from dyrep_mm.reparam.kernels import (
    Kernel,
    average_weight,
    chain,
    fold_bn,
    identity_weight,
    make_kernel,
)
from dyrep_mm.reparam.moments import BlockInput, fold_batch
from dyrep_mm.reparam.norms import NormFactory


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
        """This branch as one kernel, with the running statistics."""
        merged = None
        for operation, bn in self.stages():
            if merged is not None:
                operation = chain(merged, operation, self.spec.groups)
            merged = fold_bn(operation, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
        return merged

    def batch_kernel(self, seen: BlockInput) -> Kernel | None:
        """This branch as one kernel, its norms in the mode they are in.

        They record the statistics of the batch. None where finding these without running the
        branch would cost more than it saves.
        """
        return None

    def open_kernel(self, seen: BlockInput) -> Kernel | None:
        """What comes before the last BN as a kernel of the size of the block; None where that is
        one operation already, or no kernel in train mode."""
        return None

    def _copy(self) -> Kernel:
        """The 1x1 that changes nothing."""
        spec = self.spec
        return make_kernel(identity_weight(spec.out_channels, spec.groups, self.bn.weight))

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
        # Where the kernel is one wide and the border adds nothing, what the stride passes over
        # need not reach the conv: on the CPU the backward of a stride is slow.
        self.step = tuple(
            s if k == 1 and p == 0 else 1
            for s, k, p in zip(spec.stride, size, padding, strict=True)
        )
        self.conv = _make_conv(
            (spec.in_channels, spec.out_channels),
            size,
            generator,
            stride=tuple(s // step for s, step in zip(spec.stride, self.step, strict=True)),
            padding=padding,
            dilation=spec.dilation,
            groups=spec.groups,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(sample(crop(x, self.crop), self.step)))

    def stages(self) -> list[tuple[Kernel, _BatchNorm]]:
        return [(kernel_of(self.conv), self.bn)]


class Pointwise(_ConvBranch):
    """``1x1``."""

    @classmethod
    def size(cls, spec: ConvSpec) -> Pair:
        return (1, 1)

    def batch_kernel(self, seen: BlockInput) -> Kernel:
        return fold_batch(kernel_of(self.conv), self.bn, seen.centre)


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

    def open_kernel(self, seen: BlockInput) -> Kernel | None:
        if not isinstance(self.conv, nn.Conv2d):  # a block that grew in its place
            return None
        first = fold_batch(kernel_of(self.pre), self.pre_bn, seen.padded)
        return chain(first, kernel_of(self.conv), self.spec.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.pre_bn(pad(self.pre(x), self.spec.padding))))

    def stages(self) -> list[tuple[Kernel, _BatchNorm]]:
        return [(kernel_of(self.pre), self.pre_bn), (kernel_of(self.conv), self.bn)]


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

    def batch_kernel(self, seen: BlockInput) -> Kernel:
        # A 1x1 and a pooling may change places.
        spec = self.spec
        if self.pre is None:
            kernel = self._copy()
        else:
            kernel = fold_batch(kernel_of(self.pre), self.pre_bn, seen.padded)
        return chain(fold_batch(kernel, self.bn, seen.pooled), self._average(), spec.groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre is not None:
            x = self.pre(x)
        x = pad(x, self.spec.padding)
        if self.pre is not None:
            x = self.pre_bn(x)
        return self.bn(average_pool(x, self.spec.kernel_size, self.spec.stride))

    def _average(self) -> Kernel:
        spec = self.spec
        return make_kernel(average_weight(spec.out_channels, spec.kernel_size, self.bn.weight))

    def stages(self) -> list[tuple[Kernel, _BatchNorm]]:
        if self.pre is None:
            return [(self._average(), self.bn)]
        return [(kernel_of(self.pre), self.pre_bn), (self._average(), self.bn)]


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

    def batch_kernel(self, seen: BlockInput) -> Kernel:
        return fold_batch(self._copy(), self.bn, seen.centre)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(pad(crop(x, self.crop), self.padding))

    def stages(self) -> list[tuple[Kernel, _BatchNorm]]:
        return [(self._copy(), self.bn)]


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
