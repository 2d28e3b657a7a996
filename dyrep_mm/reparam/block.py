"""The block: a conv and the branches beside it, summed, in the place of the conv."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.branches import BRANCHES, ORIGIN, Branch, check_operations, fitting, kernel_of
from dyrep_mm.reparam.geometry import ConvSpec
from dyrep_mm.reparam.kernels import Kernel, add
from dyrep_mm.reparam.moments import BlockInput
from dyrep_mm.reparam.norms import NormFactory, statistics_kept


def gain_bias(conv: nn.Conv2d) -> None:
    """Give a conv without bias one, of zeros, and mark it: the plain model has none there."""
    zeros = conv.weight.new_zeros(conv.out_channels)
    conv.bias = nn.Parameter(zeros, requires_grad=conv.weight.requires_grad)
    conv.gained_bias = True


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


class Block(nn.Module):
    """Parallel branches that stand for one conv (section 4.1).

    ``branches['kxk']`` is the replaced conv, the very module, or a block that grew from it.
    The other branches are absorbed by it or grown around it without a change of what the
    block computes in eval mode.

    Where no norm of the block uses batch statistics (``norm_eval=True``, inference) the block
    is linear and runs as one conv with the merged kernel, differentiably. In train mode the
    branches whose batch statistics follow from those of the input (:mod:`dyrep_mm.reparam.moments`)
    merge into that conv, the others run beside it. On small maps, in half precision, under
    autocast, in a trace, with SyncBN, or while hooks watch a module of the block, all run.

    Args:
        conv: The conv to stand for; its parameters stay the same objects.
        names: Branches to add; all that fit by default. ``kxk`` may be named or not.
        norm: Makes a BN for a number of channels.
        generator: Source of the random weights; torch's global one by default.

    Raises:
        DyRepError: an unknown branch, or one that cannot be exact on this conv.
    """

    # Who reads a conv's attributes (mmcv's ConvModule, say) must find them on the block.
    transposed = False
    output_padding = (0, 0)
    padding_mode = 'zeros'

    #: Compute branch outputs again in the backward instead of keeping them: less memory, more
    #: time. In train mode only; a linear block keeps nothing anyway.
    recompute = False

    def __init__(
        self,
        conv: nn.Conv2d,
        names: Sequence[str] | None,
        norm: NormFactory,
        generator: Generator | None = None,
    ):
        super().__init__()
        self.spec = spec = ConvSpec.of(conv)
        if names is not None:
            check_operations(names)
            for name in names:
                if name != ORIGIN and (reason := BRANCHES[name].misfit(spec)):
                    raise DyRepError(f'branch {name!r} does not fit: {reason}')
        fits = fitting(spec, names)
        if not fits:
            raise DyRepError(f'no branch besides {ORIGIN!r} is named that fits')
        self.branches = nn.ModuleDict({ORIGIN: conv})
        for name in fits:
            branch = BRANCHES[name](spec, norm, generator).to(conv.weight)
            branch.assume_white_input()
            # Until it is settled a block computes what its conv did.
            nn.init.zeros_(branch.bn.weight)
            # A frozen conv (frozen_stages, an EMA copy) has frozen branches.
            self.branches[name] = branch.requires_grad_(conv.weight.requires_grad)
        # What importances are relative to: the standard deviation of the conv's output.
        self.register_buffer('origin_std', conv.weight.detach().square().sum((1, 2, 3)).sqrt())
        self._merged: tuple[list, Kernel] | None = None
        if not conv.training:
            self.eval()

    # Geometry, as on a conv.
    in_channels = property(lambda self: self.spec.in_channels)
    out_channels = property(lambda self: self.spec.out_channels)
    kernel_size = property(lambda self: self.spec.kernel_size)
    stride = property(lambda self: self.spec.stride)
    padding = property(lambda self: self.spec.padding)
    dilation = property(lambda self: self.spec.dilation)
    groups = property(lambda self: self.spec.groups)

    @property
    def weight(self) -> Tensor:
        """Merged weight (out, in / groups, kh, kw)."""
        return self.kernel().weight

    @property
    def bias(self) -> Tensor:
        """Merged bias (out,)."""
        return self.kernel().bias

    @property
    def names(self) -> list[str]:
        """Operations in order, ``kxk`` first."""
        return list(self.branches)

    @property
    def added(self) -> list[Branch]:
        """The branches besides ``kxk``."""
        return [self.branches[name] for name in self.names if name != ORIGIN]

    @property
    def origin(self) -> nn.Conv2d:
        """The conv that this block, and a block in the place of its ``kxk``, grew from."""
        module = self.branches[ORIGIN]
        return module.origin if isinstance(module, Block) else module

    @property
    def is_linear(self) -> bool:
        """No norm uses batch statistics."""
        return all(
            not m.training and m.running_mean is not None
            for m in self.modules()
            if isinstance(m, _BatchNorm)
        )

    def kernel(self) -> Kernel:
        """The whole block as one kernel, with the running statistics (Eq. 2)."""
        with torch.autocast(self.origin_std.device.type, enabled=False):
            return add(map(kernel_of, self.branches.values()), self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_linear:
            return self.spec.convolve(x, self._kernel_for_use())
        if self._may_merge(x):
            kernels, running = self._batch_kernels(BlockInput(x, self.spec, self.recompute))
            out = self.spec.convolve(x, add(kernels, self.kernel_size))
        else:
            running = [(branch, None) for branch in self.added]
            out = self.branches[ORIGIN](x)
        # In place: neither a conv nor a BN needs its output for the backward. Who keeps what a
        # forward hook on `branches.kxk` shows must clone it.
        for branch, opened in running:
            out += self._output(branch, x, opened)
        return out

    def _may_merge(self, x: Tensor) -> bool:
        """Whether norms may fold with the statistics of the batch: these are known in full, it
        pays, and nobody watches the branches."""
        kind, spec = x.device.type, self.spec
        # Kernels cost c^3 multiply-adds whatever the map; what merging saves grows with the map.
        # On the CPU both are equal at about 8 places for each channel.
        return (
            x.numel() >= 8 * spec.in_channels**2 // spec.groups
            and x.dtype == self.origin.weight.dtype
            and x.dtype in (torch.float32, torch.float64)
            and not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))
            and not torch.jit.is_tracing()
            and not any(_is_watched(m) for child in self.children() for m in child.modules())
            # A BN across processes, for one, has a forward of its own.
            and all(
                type(m).forward is _BatchNorm.forward
                for m in self.modules()
                if isinstance(m, _BatchNorm)
            )
        )

    def _batch_kernels(
        self, seen: BlockInput
    ) -> tuple[list[Kernel], list[tuple[Branch, Kernel | None]]]:
        """The kernels of what merges in train mode, and the branches that have to run, each with
        what comes before its last BN if that merges."""
        inner = self.branches[ORIGIN]
        if isinstance(inner, Block):
            kernels, running = inner._batch_kernels(seen)
        else:
            kernels, running = [kernel_of(inner)], []
        for branch in self.added:
            kernel = branch.batch_kernel(seen)
            if kernel is None:
                running.append((branch, branch.open_kernel(seen)))
            else:
                kernels.append(kernel)
        return kernels, running

    def _output(self, branch: Branch, x: Tensor, opened: Kernel | None) -> Tensor:
        """Output of ``branch``, of which the backward keeps ``x`` alone if it may recompute."""

        def output(x: Tensor) -> Tensor:
            return branch(x) if opened is None else branch.bn(self.spec.convolve(x, opened))

        if not self.recompute:
            return output(x)
        return checkpoint(
            output,
            x,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), statistics_kept(branch)),
        )

    def _kernel_for_use(self) -> Kernel:
        """The merged kernel, kept between calls without gradients until a tensor changes.

        A change through ``tensor.data`` bypasses torch's version counter; mmengine's EMA swap
        does that, and calls ``eval()`` after it, which drops the kept kernel too.
        """
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return self.kernel()
        state = [(id(t), t._version) for t in (*self.parameters(), *self.buffers())]
        if self._merged is None or self._merged[0] != state:
            self._merged = state, self.kernel()
        return self._merged[1]

    def train(self, mode: bool = True) -> Block:
        self._merged = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_merged': None}

    def importances(self) -> dict[str, float]:
        """Eq. 9 for each added branch: mean ``|gamma|`` of its last BN, in units of the output
        of the original conv."""
        unit = self.origin_std.mean().clamp_min(torch.finfo(self.origin_std.dtype).tiny)
        values = torch.stack([branch.bn.weight.detach().abs().mean() for branch in self.added])
        return dict(zip(self.names[1:], (values / unit).tolist(), strict=True))

    @torch.no_grad()
    def compensate(self) -> None:
        """Take the kernels of the added branches out of ``kxk`` (Eq. 6)."""
        kernel = add(map(kernel_of, self.added), self.kernel_size)
        self.origin.weight.sub_(kernel.weight)

    @torch.no_grad()
    def settle(self, init_scale: float) -> None:
        """Give every added branch its starting importance, then :meth:`compensate`.

        The scale of each new branch is ``init_scale`` times ``origin_std``, and its shift is
        what makes its merged bias zero: the conv needs no bias of its own to make up for it.
        """
        for branch in self.added:
            branch.bn.weight.copy_(self.origin_std * init_scale)
            branch.bn.bias.zero_()
            branch.bn.bias.sub_(branch.kernel().bias)
        self.compensate()

    @torch.no_grad()
    def absorb(self, names: Sequence[str]) -> None:
        """Remove branches and add their kernels to ``kxk`` (Eq. 10).

        Their bias goes to the conv if it has one, else to the shift of a branch that stays,
        else the conv gains a bias.

        Raises:
            DyRepError: a name is no added branch of this block.
        """
        for name in names:
            if name == ORIGIN or name not in self.branches:
                raise DyRepError(
                    f'no branch {name!r} to remove: the block has {", ".join(self.names[1:])}'
                )
        if not (names := list(dict.fromkeys(names))):
            return
        weight, bias = add((self.branches[name].kernel() for name in names), self.kernel_size)
        for name in names:
            del self.branches[name]
        self._merged = None
        self.origin.weight.add_(weight)
        self._shift(bias)

    def _shift(self, bias: Tensor) -> None:
        """Add ``bias`` (out,) to the output of the block."""
        inner = self.branches[ORIGIN]
        if self.origin.bias is not None:
            self.origin.bias.add_(bias)
        elif self.added:
            self.added[0].bn.bias.add_(bias)
        elif isinstance(inner, Block):
            inner._shift(bias)
        elif bias.any():
            gain_bias(inner)
            inner.bias.add_(bias)
