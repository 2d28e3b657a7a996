"""How unevenly the channels of a kernel are spread: what int8 with one scale for a kernel costs it.

A symmetric int8 grid spans the largest absolute weight. With one grid for a whole kernel, a
channel whose own largest weight is ``r`` times smaller is left with ``255 / r`` of the 255 levels.
Re-parameterized kernels are known for large ``r``: branches with norms of their own scale each
channel in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyrep_mm.surgery.outputs import following_norms
from dyrep_mm.surgery.tree import get_module

#: By path of a conv the norms that take its output, each with its path and its ``eps``.
Norms = dict[str, list[tuple[str, float]]]


@dataclass(frozen=True)
class Spread:
    """:func:`channel_spread` of a conv.

    Attributes:
        kernel: Of its kernel as the checkpoint holds it.
        folded: Of the kernel that a runtime quantizes, with the norm that follows folded into it;
            the worst of several norms. Without a norm it is that of the kernel.
    """

    kernel: float
    folded: float


def channel_ranges(weight: Tensor) -> Tensor:
    """The largest absolute weight of each output channel (out,), in float64.

    Args:
        weight: Of a conv (out, in / groups, kh, kw).
    """
    return weight.detach().double().flatten(1).abs().amax(1)


def channel_spread(weight: Tensor) -> float:
    """Ratio of the largest to the median channel range of a kernel.

    It is at least 1, 1 for a kernel of zeros, and infinite where half of the channels are zeros
    and others are not.

    Args:
        weight: Of a conv (out, in / groups, kh, kw).
    """
    ranges = channel_ranges(weight)
    largest, median = ranges.max().item(), ranges.quantile(0.5).item()
    if largest == 0:
        return 1.0
    return largest / median if median > 0 else float('inf')


def norms_behind(
    model: nn.Module,
    paths: Iterable[str],
    inputs: Any,
    forward: Callable[[nn.Module, Any], Any],
) -> Norms:
    """The norms that take the outputs of the convs at ``paths``, see
    :func:`dyrep_mm.surgery.outputs.following_norms`; an empty list where there is none."""
    paths = list(paths)
    found = following_norms(model, paths, inputs, forward)
    return {
        path: [(n, cast(_BatchNorm, get_module(model, n)).eps) for n in found.get(path, [])]
        for path in paths
    }


def channel_spreads(state: Mapping[str, Tensor], norms: Norms) -> dict[str, Spread]:
    """The :class:`Spread` of every conv of ``norms`` that ``state`` holds, by path.

    Args:
        state: Weights and statistics by name, of the plain model.
        norms: Which convs, and the norms behind them. A norm that ``state`` does not hold does not
            count.
    """
    spreads = {}
    for path, behind in norms.items():
        weight = state.get(f'{path}.weight')
        if weight is None or weight.ndim != 4:
            continue
        kernel = channel_spread(weight)
        scales = [_scale_of(state, norm, eps) for norm, eps in behind]
        folded = [
            channel_spread(weight.detach().double() * scale.view(-1, 1, 1, 1))
            for scale in scales
            if scale is not None and len(scale) == len(weight)
        ]
        spreads[path] = Spread(kernel, max(folded, default=kernel))
    return spreads


def _scale_of(state: Mapping[str, Tensor], norm: str, eps: float) -> Tensor | None:
    """The factor (out,) of the norm at a path in eval mode, in float64."""
    variance = state.get(f'{norm}.running_var')
    if variance is None:
        return None
    gamma = state.get(f'{norm}.weight')
    scale = torch.rsqrt(variance.detach().double() + eps)
    return scale if gamma is None else scale * gamma.detach().double()


def at_risk(spreads: Mapping[str, Spread]) -> list[str]:
    """The paths of ``spreads``, the conv that int8 costs most first."""
    return sorted(spreads, key=lambda path: (-spreads[path].folded, -spreads[path].kernel, path))


def named_as(state: Mapping[str, Tensor], paths: Iterable[str]) -> dict[str, Tensor]:
    """``state`` with the prefix that its names lack: a checkpoint of a backbone alone has no
    ``backbone.`` in them.

    Args:
        state: Weights by name.
        paths: Of convs that may be in it.
    """
    wanted = list(paths)
    prefixes = dict.fromkeys(['', *(f'{path.split(".")[0]}.' for path in wanted)])

    def found(prefix: str) -> int:
        return sum(
            path.startswith(prefix) and f'{path.removeprefix(prefix)}.weight' in state
            for path in wanted
        )

    best = max(prefixes, key=found)
    return {f'{best}{name}': tensor for name, tensor in state.items()}
