"""The operations of Table 1 as modules, and where a new one is registered.

Each branch equals one :class:`Kernel`: in eval mode with its running statistics; in train
mode, where merging pays off, with those of the batch. A branch is one or two stages, each a
linear operation followed by a BN. The operation ``kxk`` is the conv itself and needs no class
here.

At the border: the output of a leading 1x1 is padded before its BN. The BN then maps the padded
zeros to the value that the second stage has to see outside the image. No padding layer with a
value of its own is needed, in train mode and in eval mode alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.geometry import (
    ConvSpec,
    Pair,
    average_pool,
    crop,
    output_size,
    pad,
    subsample,
)
from dyrep_mm.reparam.kernels import (
    Kernel,
    average_weight,
    chain,
    fold_bn,
    identity_weight,
    make_kernel,
)
from dyrep_mm.reparam.moments import BlockInput, fold_batch
from dyrep_mm.reparam.norms import NormFactory, check_norm


def kernel_of(module: nn.Module) -> Kernel:
    """Kernel of a conv, a branch or a block, in eval mode."""
    if isinstance(module, nn.Conv2d):
        return make_kernel(module.weight, module.bias)
    return module.kernel()


def multiply_adds_of(module: nn.Module, size: Pair) -> int:
    """Multiply-adds of a conv, a branch or a block for one map of ``size`` (h, w), every conv run
    by itself; of a linear layer for one row."""
    if isinstance(module, nn.Linear):
        return module.weight.numel()
    if isinstance(module, nn.Conv2d):
        height, width = output_size(module, size)
        return module.weight.numel() * height * width
    return module.multiply_adds(size)


def _make_conv(channels: Pair, size: Pair, generator: Generator | None, **geometry) -> nn.Conv2d:
    """A conv without bias, initialised from ``generator`` as torch does from its own."""
    conv = nn.utils.skip_init(nn.Conv2d, *channels, size, bias=False, **geometry)
    nn.init.kaiming_uniform_(conv.weight, a=math.sqrt(5), generator=generator)
    return conv


#: The operation that is the conv itself; every block has it.
ORIGIN = 'kxk'

#: The operations of Table 1, in the order in which a block holds them. Defaults and presets mean
#: these alone; others are named by whoever registered them.
OPERATIONS = (ORIGIN, '1x1', '1x1-kxk', '1x1-avg', '1xk', 'kx1', 'identity')

#: The classes of all known operations but ``kxk``; :func:`register_branch` adds one.
BRANCHES: dict[str, type[Branch]] = {}


class Branch(nn.Module):
    """One operation of a block; its last BN, ``bn``, holds the importance (Eq. 9).

    A subclass says in :meth:`build` what comes before that BN, runs it in ``forward``, gives it as
    kernels in :meth:`stages`, and names in :meth:`misfit` the convs on which it is not exact.

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

    @classmethod
    def reach(cls, spec: ConvSpec, grad: Tensor) -> Tensor:
        """What this operation, before it is there, would feel of the gradient of a conv.

        Args:
            spec: Geometry of the conv.
            grad: Gradient (out, in / groups, kh, kw) of its weight.

        Returns:
            Coordinates (out, n) of the gradient in an orthonormal basis of the kernels that the
            operation may start with; by default these may be any. The mean square of the
            coordinates is the expected square of the gradient along a random kernel of norm 1.
        """
        return grad.flatten(1)

    def build(self, norm: NormFactory, generator: Generator | None) -> None:
        """Make what comes before the last BN."""

    def stages(self) -> list[tuple[Kernel, _BatchNorm]]:
        """The linear operations in order, each with the BN behind it."""
        raise NotImplementedError

    def kernel(self) -> Kernel:
        """This branch as one kernel, with the running statistics."""
        merged = None
        for operation, bn in self.stages():
            check_norm(bn)
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

    def inner_kernel(self, seen: BlockInput) -> Kernel | None:
        """What comes before the last BN as a kernel of the size of the block; None where that is
        one operation already, or no kernel in train mode."""
        return None

    def multiply_adds(self, size: Pair) -> int:
        """Of the convs of this branch for one map of ``size`` (h, w)."""
        return sum(multiply_adds_of(conv, size) for conv in self.children() if _is_conv(conv))

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


def register_branch(name: str) -> Callable[[type[Branch]], type[Branch]]:
    """Make a subclass of :class:`Branch` known as the operation ``name``; a class decorator.

    A checkpoint names the operations of its structure: the class must be registered before the
    checkpoint is resumed or fused.

    Args:
        name: Letters, digits, ``-`` and ``_``. It becomes a part of parameter names.

    Raises:
        DyRepError: the name has another form or is taken, or the class is no branch.
    """
    if not isinstance(name, str) or not re.fullmatch(r'[A-Za-z0-9_-]+', name):
        raise DyRepError(f'a branch name is made of letters, digits, - and _, got {name!r}')
    if hasattr(nn.ModuleDict, name):
        raise DyRepError(
            f'a branch cannot be named {name!r}: nn.ModuleDict has an attribute so named'
        )

    def register(cls: type[Branch]) -> type[Branch]:
        if not (isinstance(cls, type) and issubclass(cls, Branch)):
            raise DyRepError(f'branch {name!r} must be a subclass of Branch, got {cls!r}')
        taken = BRANCHES.get(name)
        # The same definition may run twice, as in a notebook.
        again = taken is not None and _definition(taken) == _definition(cls)
        if name == ORIGIN or (taken is not None and not again):
            raise DyRepError(f'branch {name!r} is registered already')
        BRANCHES[name] = cls
        return cls

    return register


def _is_conv(module: nn.Module) -> bool:
    """Whether ``module`` is a conv or a block in its place."""
    return hasattr(module, 'kernel_size')


def _definition(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def known_operations() -> tuple[str, ...]:
    """All operations that a block can have, in the order in which it holds them.

    Table 1 comes first, then the others by name: the order decides the layout of a saved
    optimizer and must not depend on the order of imports.
    """
    return (*OPERATIONS, *sorted(BRANCHES.keys() - set(OPERATIONS)))


def check_operations(names: Sequence[str]) -> None:
    """Raise ``DyRepError`` if a name is not one of :func:`known_operations`."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise DyRepError(f'branches must be a list of names, got {names!r}')
    known = known_operations()
    for name in names:
        if name not in known:
            raise DyRepError(f'unknown branch {name!r}: choose from {", ".join(known)}')


def fitting(spec: ConvSpec, names: Sequence[str] | None = None) -> list[str]:
    """Those of ``names`` (Table 1 by default) that are exact on ``spec``, in order, without
    ``kxk``."""
    wanted = OPERATIONS if names is None else names
    return [
        name
        for name in known_operations()
        if name in wanted and name != ORIGIN and BRANCHES[name].misfit(spec) is None
    ]


def _inner(weight: Tensor, size: Pair) -> Tensor:
    """The ``size`` (kh, kw) in the middle of ``weight`` (..., kh, kw)."""
    return crop(weight, tuple((n - k) // 2 for n, k in zip(weight.shape[-2:], size, strict=True)))


class _ConvBranch(Branch):
    """A smaller conv in the middle of the kernel."""

    @classmethod
    def size(cls, spec: ConvSpec) -> Pair:
        """Kernel size of the conv."""
        raise NotImplementedError

    @classmethod
    def reach(cls, spec: ConvSpec, grad: Tensor) -> Tensor:
        return _inner(grad, cls.size(spec)).flatten(1)

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
        return self.bn(self.conv(subsample(crop(x, self.crop), self.step)))

    def multiply_adds(self, size: Pair) -> int:
        spans = zip(size, self.crop, self.step, strict=True)
        return multiply_adds_of(
            self.conv, tuple(-((2 * cut - n) // step) for n, cut, step in spans)
        )

    def stages(self) -> list[tuple[Kernel, _BatchNorm]]:
        return [(kernel_of(self.conv), self.bn)]


@register_branch('1x1')
class Pointwise(_ConvBranch):
    """``1x1``."""

    @classmethod
    def size(cls, spec: ConvSpec) -> Pair:
        return (1, 1)

    def batch_kernel(self, seen: BlockInput) -> Kernel:
        return fold_batch(kernel_of(self.conv), self.bn, seen.centre)


@register_branch('1x1-kxk')
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

    def inner_kernel(self, seen: BlockInput) -> Kernel | None:
        if not isinstance(self.conv, nn.Conv2d):  # a block that grew in its place
            return None
        first = fold_batch(kernel_of(self.pre), self.pre_bn, seen.padded)
        return chain(first, kernel_of(self.conv), self.spec.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.pre_bn(pad(self.pre(x), self.spec.padding))))

    def multiply_adds(self, size: Pair) -> int:
        padded = tuple(n + 2 * p for n, p in zip(size, self.spec.padding, strict=True))
        return multiply_adds_of(self.pre, size) + multiply_adds_of(self.conv, padded)

    def stages(self) -> list[tuple[Kernel, _BatchNorm]]:
        return [(kernel_of(self.pre), self.pre_bn), (kernel_of(self.conv), self.bn)]


@register_branch('1x1-avg')
class PointwiseAverage(Branch):
    """``1x1-avg``: a 1x1 conv, a BN, then an average pooling; depthwise: the pooling alone."""

    @classmethod
    def misfit(cls, spec: ConvSpec) -> str | None:
        if spec.dilation != (1, 1):
            return f'an average pooling has no dilation, the conv has {spec.dilation}'
        return None

    @classmethod
    def reach(cls, spec: ConvSpec, grad: Tensor) -> Tensor:
        return grad.sum((2, 3)) / math.prod(spec.kernel_size) ** 0.5

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


class _Strip(_ConvBranch):
    @classmethod
    def misfit(cls, spec: ConvSpec) -> str | None:
        if 1 in spec.kernel_size:
            return f'the kernel {spec.kernel_size} is a strip already'
        return None


@register_branch('1xk')
class Horizontal(_Strip):
    """``1xk``."""

    @classmethod
    def size(cls, spec: ConvSpec) -> Pair:
        return (1, spec.kernel_size[1])


@register_branch('kx1')
class Vertical(_Strip):
    """``kx1``."""

    @classmethod
    def size(cls, spec: ConvSpec) -> Pair:
        return (spec.kernel_size[0], 1)


@register_branch('identity')
class Identity(Branch):
    """``identity``: the input itself, through a BN."""

    @classmethod
    def misfit(cls, spec: ConvSpec) -> str | None:
        if spec.in_channels != spec.out_channels:
            return f'{spec.in_channels} channels come in and {spec.out_channels} go out'
        if spec.stride != (1, 1):
            return f'the stride is {spec.stride}'
        return None

    @classmethod
    def reach(cls, spec: ConvSpec, grad: Tensor) -> Tensor:
        narrow = spec.in_channels // spec.groups
        copies = _inner(grad, (1, 1)).reshape(spec.groups, narrow, narrow)
        return copies.diagonal(dim1=1, dim2=2).reshape(-1, 1)

    def build(self, norm: NormFactory, generator: Generator | None) -> None:
        self.padding, self.crop = self.spec.inset((1, 1))

    def batch_kernel(self, seen: BlockInput) -> Kernel:
        return fold_batch(self._copy(), self.bn, seen.centre)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(pad(crop(x, self.crop), self.padding))

    def stages(self) -> list[tuple[Kernel, _BatchNorm]]:
        return [(self._copy(), self.bn)]
