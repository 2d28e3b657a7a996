"""BNs of branches: made like another one, their statistics kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

NormFactory = Callable[[int], _BatchNorm]


_NORMALISE = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def takes_images(module: nn.Module) -> bool:
    """Whether ``module`` is a BN of images; mmengine's that replaces SyncBN takes anything."""
    vectors_or_volumes = (nn.BatchNorm1d, nn.BatchNorm3d)
    return isinstance(module, _BatchNorm) and not isinstance(module, vectors_or_volumes)


def norm_like(norm: _BatchNorm | None) -> NormFactory:
    def make(channels: int) -> _BatchNorm:
        if norm is None:
            return nn.BatchNorm2d(channels)
        # The nearest class that only normalises: timm's BatchNormAct2d activates as well.
        pure = next(cls for cls in type(norm).__mro__ if cls.forward in _NORMALISE)
        return pure(channels, eps=norm.eps, momentum=norm.momentum).train(norm.training)

    return make


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch statistics are used and not recorded: the first forward has done that."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)
