"""The block: a conv and the branches beside it, summed, in the place of the conv."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.branches import (
    BRANCHES,
    ORIGIN,
    Branch,
    check_operations,
    fitting,
    kernel_of,
    multiply_adds_of,
    path_of,
)
from dyrep_mm.reparam.geometry import ConvSpec, Pair, output_size
from dyrep_mm.reparam.kernels import Kernel, add, is_recorded, make_kernel, merge, precise
from dyrep_mm.reparam.moments import BlockInput, Sample, Source
from dyrep_mm.reparam.norms import (
    NormFactory,
    check_branch_norm,
    counts_other_processes,
    several_processes,
    statistics_kept,
)

#: The least unit of a channel, relative to the mean of its block.
LEAST_UNIT = 0.01

#: Devices on which merging with the statistics of a batch pays. It saves maps, and launches about
#: four times as many operations as running the branches does; a GPU waits for them. ``meta`` has
#: neither: who counts there says what is counted.
MERGING_DEVICES = {'cpu', 'meta'}


def gain_bias(conv: nn.Conv2d) -> None:
    """Give a conv without bias one, of zeros, and mark it: the plain model has none there."""
    zeros = conv.weight.new_zeros(conv.out_channels)
    conv.bias = nn.Parameter(zeros, requires_grad=conv.weight.requires_grad)
    conv.gained_bias = True  # type: ignore[assignment]  # a flag, neither tensor nor module


def has_gained_bias(module: nn.Module) -> bool:
    """Whether :func:`gain_bias` gave ``module`` its bias."""
    return getattr(module, 'gained_bias', False)


def lose_bias(conv: nn.Conv2d) -> None:
    """Undo :func:`gain_bias`."""
    conv.bias = None
    del conv.gained_bias


def origin_of(module: nn.Module) -> nn.Conv2d:
    """The conv that a block grew from; a conv itself."""
    return module.origin if isinstance(module, Block) else cast(nn.Conv2d, module)


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _is_autocast(kind: str) -> bool:
    # A compiler knows the second question alone.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


class _Kept(NamedTuple):
    """A merged kernel, and the tensors that it was merged from as they were."""

    state: list[tuple[int, int, int]]  # which object, where its values lie, how often changed
    held: list[tuple[Tensor, Tensor]]  # so that no id and no address is given to another
    kernel: Kernel


class _Zero(torch.autograd.Function):
    """A zero (), of which each of the tensors that it is given has a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


class Block(nn.Module):
    """Parallel branches that stand for one conv (section 4.1).

    ``branches['kxk']`` is the replaced conv, the very module, or a block that grew from it.
    The other branches are absorbed by it or grown around it without a change of what the
    block computes in eval mode.

    Where no norm of the block uses batch statistics (``branch_norm='fixed'``, ``norm_eval=True``,
    inference) the block is linear and runs as one conv with the merged kernel, differentiably. With
    ``branch_norm='sampled'`` it does so too, with the statistics of a sample of the batch. With
    ``'batch'`` the branches whose statistics follow from those of the input merge into that conv
    (:mod:`dyrep_mm.reparam.moments`), the others run beside it; on a GPU, on small maps, in half
    precision, under autocast, in a trace, with SyncBN, or while hooks watch a module of the block,
    all run. A batch with fewer than two values a channel has no statistics: the block then
    computes, and trains, what it is in eval mode.

    A block stands in the place of a conv: it is called as one, has its geometry, and ``weight``
    and ``bias`` to read. Both are merged from the branches, so nobody can set them.

    Args:
        conv: The conv to stand for; its parameters stay the same objects.
        names: Branches to add; all that fit by default. ``kxk`` may be named or not.
        norm: Makes a BN for a number of channels.
        generator: Source of the random weights; torch's global one by default.

    Raises:
        DyRepError: an unknown branch, or one that cannot be exact on this conv.
    """

    # Code that reads a conv's attributes, such as mmcv's ConvModule, finds them on the block.
    transposed = False
    output_padding = (0, 0)
    padding_mode = 'zeros'

    #: Compute branch outputs again in the backward instead of keeping them: less memory, more
    #: time. In train mode only; a linear block keeps nothing anyway.
    recompute = False

    #: What the norms of the branches normalise with in train mode, see :meth:`set_branch_norm`.
    branch_norm = 'batch'

    _keeps_kernel = False
    _kept: _Kept | None = None

    origin_std: Tensor

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
        return self.kernel().weight.to(self.origin.weight.dtype)

    @property
    def bias(self) -> Tensor:
        """Merged bias (out,)."""
        return self.kernel().bias.to(self.origin.weight.dtype)

    @property
    def names(self) -> list[str]:
        """Operations in order, ``kxk`` first."""
        return list(self.branches)

    @property
    def added(self) -> list[Branch]:
        """The branches besides ``kxk``."""
        return [cast(Branch, self.branches[name]) for name in self.names if name != ORIGIN]

    @property
    def active(self) -> list[Branch]:
        """Those of :attr:`added` that are on: no other is computed."""
        return [branch for branch in self.added if branch.is_on]

    @property
    def added_norms(self) -> list[_BatchNorm]:
        """The norms of the branches besides ``kxk``, and of what is nested in them."""
        modules = (module for branch in self.added for module in branch.modules())
        return [module for module in modules if isinstance(module, _BatchNorm)]

    @property
    def origin(self) -> nn.Conv2d:
        """The conv that this block, and a block in the place of its ``kxk``, grew from."""
        return origin_of(self.branches[ORIGIN])

    @property
    def is_linear(self) -> bool:
        """No norm uses batch statistics."""
        return self.branch_norm == 'fixed' or all(
            not m.training and m.running_mean is not None
            for m in self.modules()
            if isinstance(m, _BatchNorm)
        )

    def kernel(self) -> Kernel:
        """The whole block as one kernel, with the running statistics (Eq. 2)."""
        with self._precisely():
            return cast(Kernel, self.merge())  # without a source it always can

    def _precisely(self) -> AbstractContextManager:
        """Kernels and statistics are computed without autocast."""
        kind = self.origin_std.device.type
        # An export would record the context too.
        return torch.autocast(kind, enabled=False) if _is_autocast(kind) else nullcontext()

    def multiply_adds(self, size: Pair) -> int:
        """Of ``kxk`` and the branches that are on, each run by itself, for one map of ``size``
        (h, w)."""
        parts = [self.branches[ORIGIN], *self.active]
        return sum(multiply_adds_of(part, size) for part in parts)

    def forward(self, input: Tensor) -> Tensor:
        """What the block makes of ``input`` (batch, in, h, w), or of one image (in, h, w)."""
        x = input  # the name that a conv knows it by
        if self.is_linear:
            return self._convolve(x, self._kernel_for_use())
        if x.ndim == 3:
            return self.forward(x[None])[0]
        if not self._finds_statistics(x):
            return self._convolve(x, self.kernel())
        if (source := self._source(x)) is None:
            running: list[tuple[Branch, Kernel | None]] = [(b, None) for b in self.active]
            out = self.branches[ORIGIN](x)
            if (idle := self._idle()) is not None:
                out += idle
        else:
            with self._precisely():
                kernels, running = self._parts(source)
                source.record()
                kernel = add(kernels, self.kernel_size)
            out = self._convolve(x, kernel)
        # In place: neither a conv nor a BN needs its output for the backward. A forward hook that
        # keeps the output of `branches.kxk` must clone it.
        for branch, inner in running:
            out += self._output(branch, x, inner)
        return out

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As a conv's, for those who compute a weight of their own from a conv's."""
        return self.spec.convolve(input, make_kernel(weight, bias))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        raise DyRepError(
            f'a block has no parameters of its own, so its {name} cannot be set: make the model '
            'plain by dyrep_mm.fuse first'
        )

    def _finds_statistics(self, x: Tensor) -> bool:
        """Whether the batch ``x`` has two values a channel; not either if no conv would take it."""
        if torch.jit.is_tracing():
            return True
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            return False
        height, width = output_size(self.spec, x.shape[2:])
        if len(x) * max(height, 0) * max(width, 0) >= 2:
            return True
        return any(counts_other_processes(module) for module in self.modules())

    def _source(self, x: Tensor) -> Source | None:
        """Where norms get the statistics of ``x`` from; None if all branches have to run."""
        if self.branch_norm == 'sampled':
            return Sample(x, self.spec)
        return BlockInput(x, self.spec, self.recompute) if self.may_merge(x) else None

    def may_merge(self, x: Tensor) -> bool:
        """Whether norms may fold with the statistics of the batch: these are known in full, it
        pays, and nobody watches the branches."""
        kind, spec = x.device.type, self.spec
        # Kernels cost c^3 multiply-adds whatever the map; what merging saves grows with the map.
        # Both are equal at about 8 places for each channel.
        return (
            not torch.jit.is_tracing()
            and kind in MERGING_DEVICES
            and x.numel() >= 8 * spec.in_channels**2 // spec.groups
            and x.dtype == self.origin.weight.dtype
            and x.dtype in (torch.float32, torch.float64)
            and not _is_autocast(kind)
            and not any(_is_watched(m) for child in self.children() for m in child.modules())
            # A BN across processes, for one, has a forward of its own.
            and all(
                type(m).forward is _BatchNorm.forward
                for m in self.modules()
                if isinstance(m, _BatchNorm)
            )
        )

    def _parts(
        self, source: Source | None = None
    ) -> tuple[list[Kernel], list[tuple[Branch, Kernel | None]]]:
        """The kernels of what merges, and the branches that have to run, each with what comes
        before its last BN if that merges; see :meth:`merge`."""
        inner = self.branches[ORIGIN]
        if isinstance(inner, Block):
            kernels, running = inner._parts(None if inner.is_linear else source)
        else:
            kernels, running = [kernel_of(inner)], []
        for branch in self.active:
            kernel, whole = branch.merge(source) or (None, False)
            if whole and kernel is not None:
                kernels.append(kernel)
            else:
                running.append((branch, kernel))
        return kernels, running

    def merge(self, source: Source | None = None) -> Kernel | None:
        """The whole block as one kernel (Eq. 2), its norms in the mode they are in.

        Args:
            source: Of batch statistics; without it all norms use those that they keep.

        Returns:
            None if the source does not know all that they need.
        """
        if source is None:
            parts = [self.branches[ORIGIN], *self.active]
            return merge(map(path_of, parts), self.kernel_size, self.groups)
        kernels, running = self._parts(source)
        return None if running else add(kernels, self.kernel_size)

    def _convolve(self, x: Tensor, kernel: Kernel) -> Tensor:
        dtype = self.origin.weight.dtype  # half precision merges in single
        if (idle := self._idle()) is not None:
            kernel = Kernel(kernel.weight, kernel.bias + idle)
        return self.spec.convolve(x, Kernel(kernel.weight.to(dtype), kernel.bias.to(dtype)))

    def _idle(self) -> Tensor | None:
        """A zero () of which the parameters of branches that are off have a gradient of zero, where
        several processes train: DDP waits for one of every parameter."""
        if not (torch.is_grad_enabled() and several_processes()):
            return None
        off = [branch for branch in self.added if not branch.is_on]
        idle = [p for branch in off for p in branch.parameters() if p.requires_grad]
        return _Zero.apply(*idle) if idle else None

    def _output(self, branch: Branch, x: Tensor, inner: Kernel | None) -> Tensor:
        """Output of ``branch`` in its unit, of which the backward keeps ``x`` alone if it may
        recompute."""

        factor = branch.factor

        def output(x: Tensor) -> Tensor:
            module, prefix, y = cast(nn.Module, branch), 'bn.', x
            if inner is not None:
                module, prefix, y = branch.bn, '', self.spec.convolve(x, inner)
            if is_recorded():  # a trace knows the parameters of a module alone
                return module(y) * factor.view(-1, 1, 1)
            # Behind the norm the unit would cost a map.
            scaled = {
                f'{prefix}{name}': getattr(branch.bn, name) * factor for name in ('weight', 'bias')
            }
            return functional_call(module, scaled, (y,))

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
        """The merged kernel, kept only inside :func:`kernels_kept`."""
        if not self._keeps_kernel or torch.is_grad_enabled() or is_recorded():
            return self.kernel()
        tensors = [*self.parameters(), *self.buffers()]
        try:
            state = [(id(t), t.data_ptr(), t._version) for t in tensors]
        except RuntimeError:  # made in inference mode, or by a functional transform
            return self.kernel()
        if self._kept is None or self._kept.state != state:
            self._kept = _Kept(state, [(t, t.detach()) for t in tensors], self.kernel())
        return self._kept.kernel

    def _keep_kernel(self, keep: bool) -> None:
        self._keeps_kernel, self._kept = keep, None

    def train(self, mode: bool = True) -> Block:
        # Where training starts, weights will change.
        self._keep_kernel(self._keeps_kernel and not mode)
        super().train(mode)
        if self.branch_norm == 'fixed':
            self._set_norms(False)
        return self

    def set_branch_norm(self, branch_norm: str, training: bool) -> None:
        """Say what the norms of the branches normalise with in train mode.

        Args:
            branch_norm: One of :data:`dyrep_mm.reparam.norms.BRANCH_NORMS`.
            training: Mode of norms that are no longer fixed.
        """
        if 'fixed' in (branch_norm, self.branch_norm):
            self._set_norms(branch_norm != 'fixed' and training)
        self.branch_norm = check_branch_norm(branch_norm)

    def _set_norms(self, training: bool) -> None:
        for norm in self.added_norms:
            norm.train(training)

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_keeps_kernel': False, '_kept': None}

    def importances(self) -> dict[str, float]:
        """Eq. 9 for each added branch: mean ``|gamma|`` of its last BN, in units of the output
        of the original conv as that was measured last."""
        unit = self.origin_std.mean().clamp_min(torch.finfo(self.origin_std.dtype).tiny)
        values = [(branch.bn.weight.detach() * branch.unit).abs().mean() for branch in self.added]
        shares = torch.stack(values) / unit
        return dict(zip(self.names[1:], shares.tolist(), strict=True))

    @torch.no_grad()
    def compensate(self) -> None:
        """Take the kernels of the added branches out of ``kxk`` (Eq. 6)."""
        kernel = add(map(_exact_kernel, self.added), self.kernel_size)
        weight = self.origin.weight
        weight.copy_(weight - kernel.weight)

    @torch.no_grad()
    def settle(self, init_scale: float) -> None:
        """Give every added branch its starting importance, then :meth:`compensate`.

        The unit of each new branch is ``origin_std``, its scale is ``init_scale``, and its shift is
        what makes its merged bias zero: the conv needs no bias of its own to make up for it.
        """
        # A branch of a dead channel, with a unit of zero, could never wake it. Where all are dead,
        # nothing says how large a start would be small.
        mean = self.origin_std.mean()
        alive = mean > 0
        unit = torch.where(alive, self.origin_std.clamp_min(mean * LEAST_UNIT), 1.0)
        scale = alive.to(unit.dtype) * init_scale
        for branch in self.added:
            branch.unit.fill_(1)
            branch.bn.weight.fill_(scale)
            branch.bn.bias.zero_()
            branch.bn.bias.copy_(-_exact_kernel(branch).bias)
            branch.unit.copy_(unit)
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
        gone = [self.branches.pop(name) for name in names]
        # One that is off adds nothing.
        if kernels := [_exact_kernel(branch) for branch in gone if branch.is_on]:
            kernel, weight = add(kernels, self.kernel_size), self.origin.weight
            weight.copy_(weight + kernel.weight)
            self._shift(kernel.bias)

    def _shift(self, bias: Tensor) -> None:
        """Add ``bias`` (out,) to the output of the block."""
        inner = self.branches[ORIGIN]
        if self.origin.bias is not None:
            self.origin.bias.add_(bias)
        elif takes := [branch for branch in self.added if branch.unit.all()]:
            takes[0].bn.bias.add_(bias / takes[0].unit)
        elif isinstance(inner, Block):
            inner._shift(bias)
        elif bias.any():
            origin = self.origin
            gain_bias(origin)
            cast(Tensor, origin.bias).add_(bias)

    # The names under which tools make modules plain.

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """A new conv that computes what the block does in eval mode; the block stays as it is.

        Which norm follows is not known here, so the bias stays on the conv, exactly. Where the
        plain model has none it is marked as gained: :func:`dyrep_mm.fuse` can move it on.
        """
        conv = copy.deepcopy(self.origin).train(self.training)
        dtype = conv.weight.dtype
        weight, bias = _exact_kernel(self)
        conv.weight.data = weight.to(dtype)
        if conv.bias is None and bias.any():
            gain_bias(conv)
        if conv.bias is not None:
            conv.bias.data = bias.to(dtype)
        return conv

    def switch_to_deploy(self) -> None:
        """Become the conv of :meth:`fuse` in place, for tools that leave modules where they are.

        The class changes too, as that of a lazy module of torch does: the model is plain
        afterwards, by its types and by the names of its weights. Hooks on the block stay.
        """
        conv = self.fuse()
        hooks = {name: value for name, value in vars(self).items() if 'ward_' in name}
        vars(self).clear()
        vars(self).update({**vars(conv), **hooks})
        self.__class__ = cast(Any, type(conv))

    reparameterize = switch_to_deploy


def _exact_kernel(module: nn.Module) -> Kernel:
    """Its kernel in double precision, so that the only rounding is that of where it goes: a GPU may
    round products of single precision to TF32."""
    return kernel_of(copy.deepcopy(module).to(precise(next(module.parameters()))))


@contextmanager
def kernels_kept(model: nn.Module) -> Iterator[None]:
    """Inside, without gradients, every block of ``model`` in eval mode merges once.

    For repeated inference. Outside, a block merges at every call, and no way to change a weight
    can make it answer with an old one. Inside, weights must not change: of the ways to change one
    only that in place through ``tensor.data`` goes unnoticed. ``train()`` ends it.

    Args:
        model: Any model; blocks that are made inside are not meant.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    before = [block._keeps_kernel for block in blocks]
    for block in blocks:
        block._keep_kernel(True)

    def drop(*_: Any) -> None:
        for block in blocks:
            block._kept = None

    # A fused optimizer leaves the versions of tensors as they were.
    handle = register_optimizer_step_post_hook(drop)
    try:
        yield
    finally:
        handle.remove()
        for block, keep in zip(blocks, before, strict=True):
            if isinstance(block, Block):  # it may have become a conv
                block._keep_kernel(keep)
