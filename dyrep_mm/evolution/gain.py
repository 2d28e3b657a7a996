"""How much growing would gain: the first-order decrease of the loss by a branch that is not there.

A branch adds ``gamma * K / sigma`` to the kernel of its conv: ``K`` is random at the start,
``sigma`` the deviation of what it puts out. For white input that is the norm of ``K``, and the
deviation of the conv's own output the norm of its kernel ``W``. With ``gamma`` in units of the
latter the loss has, for each output channel, the derivative ``|W| <dL/dW, K> / |K|``. Its expected
square over ``K`` is ``|W|**2`` times the mean square of what the branch can reach of the gradient,
see :meth:`dyrep_mm.reparam.branches.Branch.reach`. A step of SGD of learning rate ``lr`` lowers
the loss by ``lr`` times the sum of these squares over the output channels. So the gain is a
decrease of the loss, per step and unit of the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.operations import Operation, Operations, form_of
from dyrep_mm.evolution.saliency import GradientScore, register_score
from dyrep_mm.reparam.branches import BRANCHES, ORIGIN


def gains_of(operation: Operation, slope: Tensor) -> dict[str, float]:
    """Gain of each operation that a conv would get, by name.

    Args:
        operation: The conv.
        slope: Norm of the kernel of each output channel times the gradient of the loss with respect
            to that kernel, (out, in / groups, kh, kw).
    """
    names = [name for name in operation.names if name != ORIGIN]
    if not names:
        return {}
    reached = [BRANCHES[name].reach(operation.spec, slope) for name in names]
    gains = torch.stack([part.square().mean(1).sum() for part in reached])
    return dict(zip(names, gains.tolist(), strict=True))


@register_score('gain')
class Gain(GradientScore):
    """What the branches that a conv would get gain together, of the mean gradient of an interval.

    The mean is taken before the square: a gradient that changes its sign from batch to batch, which
    is most of it late in a training, gains nothing.

    Attributes:
        slopes: Sums of what :func:`gains_of` takes, by path.
    """

    rows = 0

    def __init__(self, operations: Operations):
        super().__init__(operations)
        self.slopes = {p: torch.zeros_like(o.weight) for p, o in self.operations.items()}

    @torch.no_grad()
    def gather(self, loss_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Add one iteration, see :meth:`GradientScore.gather`."""
        used = self.used()
        if not used:
            return
        operations = [self.operations[self.paths[i]] for i in used]
        slopes = [self.slopes[self.paths[i]] for i in used]
        grads = [operation.weight.grad for operation in operations]
        self.started = True
        if loss_scale is not None:
            grads = torch._foreach_div(grads, loss_scale.to(grads[0]))
        good = torch.stack(torch._foreach_norm(grads, torch.inf)).isfinite().all()
        if found_inf is not None:
            good = good & (found_inf == 0).to(good.device).all()
        kernels = [operation.kernel() for operation in operations]
        units = [torch.linalg.vector_norm(k, dim=(1, 2, 3), keepdim=True) for k in kernels]
        # Not a product with 0, which leaves NaN.
        steps = [torch.where(good, g, 0.0) for g in torch._foreach_mul(grads, units)]
        torch._foreach_add_(slopes, steps)
        self.counts.index_add_(0, self.index_of(used), good.to(self.counts).expand(len(used)))

    @torch.no_grad()
    def gains(self) -> dict[str, dict[str, float]]:
        """Gain of each operation that a conv would get, by path; without convs that were never
        counted."""
        counts = zip(self.operations.items(), self.counts.tolist(), strict=True)
        return {
            path: gains_of(operation, self.slopes[path] / n) for (path, operation), n in counts if n
        }

    def means(self, generator: torch.Generator | None = None) -> dict[str, float]:
        """What all operations that a conv would get gain together."""
        return {path: sum(values.values()) for path, values in self.gains().items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint; as large as the kernels."""
        slopes = {path: slope.cpu().clone() for path, slope in self.slopes.items()}
        return {**super().state_dict(), 'slopes': slopes}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Continue from a checkpoint, see :meth:`GradientScore.load_state_dict`."""
        if not super().load_state_dict(state):
            return False
        saved = state.get('slopes')
        for path, own in self.slopes.items():
            slope = saved.get(path) if isinstance(saved, Mapping) else None
            if not isinstance(slope, Tensor) or form_of(slope) != form_of(own):
                raise DyRepError('the scores of the checkpoint are malformed: slopes')
            own.copy_(slope)
        return True


#: ``branches='best'`` takes the operations with at least this part of the best gain of their conv.
WORTHWHILE = 0.5


def best_names(gains: Mapping[str, float], count: int | None) -> list[str]:
    """The names of the operations that pay, the best gain first.

    Args:
        gains: By name, of one conv.
        count: At most so many; None: all that gain at least half of what the best one does.
    """
    names = sorted(gains, key=lambda name: gains[name], reverse=True)
    if count is not None:
        return names[:count]
    return [name for name in names if gains[name] >= WORTHWHILE * gains[names[0]]]
