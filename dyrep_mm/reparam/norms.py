"""BNs of branches: made like another one, their statistics kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyrep_mm.errors import DyRepError

NormFactory = Callable[[int], _BatchNorm]

#: What the norms of branches normalise with: the statistics of the batch, those that they were
#: calibrated with, or those of a sample of the batch.
BRANCH_NORMS = ('batch', 'fixed', 'sampled')


def check_branch_norm(branch_norm: Any) -> str:
    """``branch_norm`` if it is one of :data:`BRANCH_NORMS`, else ``DyRepError``."""
    if branch_norm not in BRANCH_NORMS:
        raise DyRepError(
            f'branch_norm must be one of {", ".join(BRANCH_NORMS)}, got {branch_norm!r}'
        )
    return branch_norm


_NORMALISE = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def takes_images(module: nn.Module | None) -> TypeGuard[_BatchNorm]:
    """Whether ``module`` is a BN of images; mmengine's that replaces SyncBN takes anything."""
    vectors_or_volumes = (nn.BatchNorm1d, nn.BatchNorm3d)
    return isinstance(module, _BatchNorm) and not isinstance(module, vectors_or_volumes)


def check_norm(norm: nn.Module) -> None:
    """Raise ``DyRepError`` if another tool has taken the norm of a branch out."""
    if isinstance(norm, nn.Identity):
        raise DyRepError(
            'a tool that folds norms into convs, as fuse_conv_bn of mmcv, has changed the inside '
            'of a block: make the model plain by dyrep_mm.fuse first, then use the tool'
        )


def several_processes() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def counts_other_processes(norm: nn.Module) -> bool:
    """Whether the batch statistics of ``norm`` are those of all processes, of which each must
    take part."""
    return isinstance(norm, nn.SyncBatchNorm) and several_processes()


def norm_like(norm: _BatchNorm | None) -> NormFactory:
    def make(channels: int) -> _BatchNorm:
        if norm is None:
            return nn.BatchNorm2d(channels)
        # The nearest class that only normalises: timm's BatchNormAct2d activates as well.
        classes = (cls for cls in type(norm).__mro__ if issubclass(cls, _BatchNorm))
        pure = next(cls for cls in classes if cls.forward in _NORMALISE)
        return pure(channels, eps=norm.eps, momentum=norm.momentum).train(norm.training)

    return make


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch statistics are used and not recorded: the first forward has done that."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [(norm, norm.momentum, tracked(norm).batches.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum = momentum
            tracked(norm).batches.copy_(batches)


class Tracked(NamedTuple):
    """The buffers of a norm: ``mean`` and ``var`` (channels,), ``batches`` a count."""

    mean: Tensor
    var: Tensor
    batches: Tensor


def tracked(norm: _BatchNorm) -> Tracked:
    """What ``norm`` keeps of the batches that it met.

    Raises:
        DyRepError: it keeps nothing.
    """
    mean, var, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean is None or var is None or batches is None:
        raise DyRepError('the norm of a branch keeps no statistics: track_running_stats is off')
    return Tracked(mean, var, batches)


@torch.no_grad()
def change_statistics(norm: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Give ``norm`` other running statistics, and the scale and shift with which it computes
    in eval mode what it did."""
    kept = tracked(norm)
    before, after = (v.add(norm.eps).sqrt() for v in (kept.var, var))
    norm.bias.add_(norm.weight * (mean - kept.mean) / before)
    norm.weight.mul_(after / before)
    kept.mean.copy_(mean)
    kept.var.copy_(var)
