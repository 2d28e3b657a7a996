"""The operations of Table 1 as modules, and where a new one is registered.

Each branch equals one :class:`Kernel`, as soon as the statistics of its norms are known: those
that they keep, or those of a batch, see :mod:`dyrep_mm.reparam.moments`. A branch is one or two
stages, each a linear operation followed by a BN. The operation ``kxk`` is the conv itself and
needs no class here.

At the border: the output of a leading 1x1 is padded before its BN. The BN then maps the padded
zeros to the value that the second stage has to see outside the image. No padding layer with a
value of its own is needed, in train mode and in eval mode alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

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
    pair,
    subsample,
)
from dyrep_mm.reparam.kernels import (
    NO_BIAS,
    Kernel,
    Norm,
    Stage,
    average_weight,
    chain,
    identity_weight,
    make_kernel,
)
from dyrep_mm.reparam.moments import Average, Source, Statistics, across, fold
from dyrep_mm.reparam.norms import NormFactory, check_norm, counts_other_processes, tracked


def kernel_of(module: nn.Module | Kernel) -> Kernel:
    """Kernel of a conv, a branch or a block, in eval mode; of half precision in single."""
    if not isinstance(module, (nn.Conv2d, Kernel)):
        return cast(Any, module).kernel()
    weight, bias = make_kernel(module.weight, module.bias)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return Kernel(weight.to(wide), bias.to(wide))


def path_of(module: nn.Module) -> list[Stage]:
    """A conv, a branch or a block for :func:`~dyrep_mm.reparam.kernels.merge`, in eval mode."""
    return module.path() if isinstance(module, Branch) else [_stage_of(module)]


def _stage_of(module: nn.Module | Kernel, norm: Norm | None = None) -> Stage:
    if isinstance(module, (nn.Conv2d, Kernel)) and module.bias is None:
        weight = module.weight
        return Stage(weight.to(torch.promote_types(weight.dtype, torch.float32)), None, norm)
    return Stage(*kernel_of(module), norm)


def multiply_adds_of(module: nn.Module, size: Pair) -> int:
    """Multiply-adds of a conv, a branch or a block for one map of ``size`` (h, w), every conv run
    by itself; of a linear layer for one row."""
    if isinstance(module, nn.Linear):
        return module.weight.numel()
    if isinstance(module, nn.Conv2d):
        height, width = output_size(module, size)
        return module.weight.numel() * height * width
    return cast(Any, module).multiply_adds(size)


def _make_conv(
    channels: Pair, size: Pair, generator: Generator | None, **geometry: Any
) -> nn.Conv2d:
    """A conv without bias, initialised from ``generator``: normal, with the variance 2 / fan-out of
    the authors' code. A smaller start learns faster, by the square of how much smaller it is."""
    conv = nn.utils.skip_init(nn.Conv2d, *channels, size, bias=False, **geometry)
    fan_out = conv.out_channels // conv.groups * math.prod(size)
    nn.init.normal_(conv.weight, std=(2 / fan_out) ** 0.5, generator=generator)
    return conv


#: The operation that is the conv itself; every block has it.
ORIGIN = 'kxk'

#: Name of the buffer of a branch that checkpoints of 0.1.0 do not have.
UNIT = 'unit'

#: The operations of Table 1, in the order in which a block holds them. Defaults and presets mean
#: these alone; others are named by whoever registered them.
OPERATIONS = (ORIGIN, '1x1', '1x1-kxk', '1x1-avg', '1xk', 'kx1', 'identity')

#: The classes of all known operations but ``kxk``; :func:`register_branch` adds one.
BRANCHES: dict[str, type[Branch]] = {}


class Branch(nn.Module):
    """One operation of a block; its last BN, ``bn``, holds the importance (Eq. 9).

    A subclass says in :meth:`build` what comes before that BN, runs it in ``forward``, gives it as
    kernels in :meth:`stages`, and names in :meth:`misfit` the convs on which it is not exact.

    The block adds ``unit`` (out,) times what ``forward`` gives. It is the deviation that the output
    of the conv had when the branch was added. So scale and shift of the last BN are in units of the
    conv's output, and learn alike whatever the size of these outputs is.

    Args:
        spec: Geometry of the conv that the block replaces.
        norm: Makes a BN for a number of channels.
        generator: Source of the random weights; torch's global one by default.
    """

    #: The first of two BNs sees the output of a 1x1 without bias with the padding of the conv
    #: around it, as the head of this file says: what it sees follows from the input of the block.
    pads_first = False

    unit: Tensor
    #: Factor of the output, which a search sets from outside: 0.0 where the branch is off, or a
    #: tensor () of which the gradient is asked. It is no part of the state.
    gate: Tensor | float = 1.0

    def __init__(self, spec: ConvSpec, norm: NormFactory, generator: Generator | None = None):
        super().__init__()
        self.spec = spec
        self.build(norm, generator)
        self.bn = norm(spec.out_channels)
        self.register_buffer(UNIT, torch.ones(spec.out_channels))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if (scale := state_dict.get(f'{prefix}bn.weight')) is not None:
            state_dict.setdefault(prefix + UNIT, torch.ones_like(scale))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def is_on(self) -> bool:
        """Whether the branch is computed."""
        return isinstance(self.gate, Tensor) or self.gate != 0

    @property
    def factor(self) -> Tensor:
        """What the block multiplies the output of ``forward`` with, (out,)."""
        searched = isinstance(self.gate, Tensor) or self.gate != 1
        return self.unit * self.gate if searched else self.unit

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

    def stages(self) -> list[tuple[Kernel | nn.Module, _BatchNorm]]:
        """The linear operations in order, each with the BN behind it.

        An operation is a kernel, of which the bias may be None, or a conv. A conv in which a block
        may grow is better given itself: the block then merges as the branch does.
        """
        raise NotImplementedError

    def kernel(self) -> Kernel:
        """This branch as one kernel, as the block adds it, with the statistics that norms keep."""
        kernel, _ = cast(tuple[Kernel, bool], self.merge())  # without a source it always can
        return kernel

    def path(self) -> list[Stage]:
        """This branch as the block adds it, with the statistics that norms keep, not merged."""
        path = []
        for part, bn in self.stages():
            check_norm(bn)
            unit = self.factor if bn is self.bn else None
            mean, var, _ = tracked(bn)
            path.append(_stage_of(part, Norm(mean, var, bn.weight, bn.bias, bn.eps, unit)))
        return path

    def merge(self, source: Source | None = None) -> tuple[Kernel, bool] | None:
        """This branch as one kernel, as the block adds it, its norms in the mode they are in.

        Args:
            source: Of batch statistics; without it all norms use those that they keep.

        Returns:
            The kernel and True; what comes before the last BN and False, where the source does not
            know the statistics of that one alone; None where the branch has to run.
        """
        linear = source is None or all(is_linear(child) for child in self.children())
        if source is not None and not linear and not source.composes:
            return None
        merged: Kernel | None = None
        found: list[tuple[_BatchNorm, Statistics]] = []
        for part, bn in self.stages():
            check_norm(bn)
            is_last = bn is self.bn
            if isinstance(part, Average):  # the scale of a channel may come before it
                kernel, view = merged or kernel_of(self._copy()), 'pooled'
            else:
                operation = (
                    kernel_of(part) if linear or source is None else _merged(part, source, merged)
                )
                if operation is None:
                    return None
                kernel = chain(merged, operation, self.spec.groups) if merged else operation
                view = 'output' if is_last else 'padded'
            seen = None
            if source is not None and (bn.training or bn.running_mean is None):
                known = is_last or self.pads_first
                seen = source.statistics(kernel, view) if known else None
                if seen is None and not (is_last and merged):
                    return None
                if seen is None:
                    source.found += found
                    return kernel, False
                if counts_other_processes(bn):
                    seen = across(seen, bn.process_group)
                found.append((bn, seen))
            merged = fold(kernel, bn, seen, self.factor if is_last else None)
            if isinstance(part, Average):
                merged = chain(merged, part, self.spec.groups)
        if source is not None:
            source.found += found
        return cast(Kernel, merged), True

    def multiply_adds(self, size: Pair) -> int:
        """Of the convs of this branch for one map of ``size`` (h, w)."""
        return sum(multiply_adds_of(conv, size) for conv in self.children() if _is_conv(conv))

    def _copy(self) -> Kernel:
        """The 1x1 that changes nothing, without a bias."""
        spec = self.spec
        return Kernel(identity_weight(spec.out_channels, spec.groups, self.bn.weight), NO_BIAS)

    @torch.no_grad()
    def assume_white_input(self) -> None:
        """Set the running statistics that white input of unit variance would give."""
        for part, bn in self.stages():
            bn.reset_running_stats()
            tracked(bn).var.copy_(kernel_of(part).weight.square().sum((1, 2, 3)))


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


def is_linear(module: nn.Module) -> bool:
    """Whether ``module``, a part of a branch, is anything but a block that needs a batch."""
    return getattr(module, 'is_linear', True)


def _merged(part: nn.Module | Kernel, source: Source, before: Kernel | None) -> Kernel | None:
    """The kernel of a part of a branch behind a 1x1 ``before``; None if the source cannot tell
    it, or if it may be that of a block with the statistics that norms keep."""
    if isinstance(part, Kernel):
        return None
    if is_linear(part):
        return kernel_of(part)
    if before is None:
        return None
    return cast(Any, part).merge(source.behind(before))


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
    return crop(weight, pair((n - k) // 2 for n, k in zip(weight.shape[-2:], size, strict=True)))


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
        self.step = pair(
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
        return multiply_adds_of(self.conv, pair(-((2 * cut - n) // step) for n, cut, step in spans))

    def stages(self) -> list[tuple[Kernel | nn.Module, _BatchNorm]]:
        return [(self.conv, self.bn)]


@register_branch('1x1')
class Pointwise(_ConvBranch):
    """``1x1``."""

    @classmethod
    def size(cls, spec: ConvSpec) -> Pair:
        return (1, 1)


@register_branch('1x1-kxk')
class PointwiseSpatial(Branch):
    """``1x1-kxk``: a 1x1 conv, a BN, then a conv of the full kernel size."""

    pads_first = True

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

    def multiply_adds(self, size: Pair) -> int:
        padded = pair(n + 2 * p for n, p in zip(size, self.spec.padding, strict=True))
        return multiply_adds_of(self.pre, size) + multiply_adds_of(self.conv, padded)

    def stages(self) -> list[tuple[Kernel | nn.Module, _BatchNorm]]:
        return [(self.pre, self.pre_bn), (self.conv, self.bn)]


@register_branch('1x1-avg')
class PointwiseAverage(Branch):
    """``1x1-avg``: a 1x1 conv, a BN, then an average pooling; depthwise: the pooling alone."""

    pads_first = True

    pre: nn.Conv2d | None
    pre_bn: _BatchNorm | None

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

    def forward(self, x: Tensor) -> Tensor:
        if self.pre is not None:
            x = self.pre(x)
        x = pad(x, self.spec.padding)
        if self.pre_bn is not None:
            x = self.pre_bn(x)
        return self.bn(average_pool(x, self.spec.kernel_size, self.spec.stride))

    def stages(self) -> list[tuple[Kernel | nn.Module, _BatchNorm]]:
        spec = self.spec
        weight = average_weight(spec.out_channels, spec.kernel_size, self.bn.weight)
        average = Average(weight, NO_BIAS)
        if self.pre is None or self.pre_bn is None:
            return [(average, self.bn)]
        return [(self.pre, self.pre_bn), (average, self.bn)]


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

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(pad(crop(x, self.crop), self.padding))

    def stages(self) -> list[tuple[Kernel | nn.Module, _BatchNorm]]:
        return [(self._copy(), self.bn)]
