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

from dyrep_mm.evolution.operations import Operation, Operations
from dyrep_mm.evolution.saliency import GradientScore, register_score
from dyrep_mm.reparam.branches import BRANCHES, ORIGIN


def gains_of(operation: Operation) -> dict[str, Tensor]:
    """Gain of each operation that a conv would get, by name, by its present gradient."""
    kernel, grad = operation.kernel(), operation.grad
    if grad.dtype.itemsize < 4:  # squares
        kernel, grad = kernel.float(), grad.float()
    names = [name for name in operation.names if name != ORIGIN]
    if not names:
        return {}
    reached = [BRANCHES[name].reach(operation.spec, grad) for name in names]
    slopes = [torch.linalg.vector_norm(part, dim=1) / part.shape[1] ** 0.5 for part in reached]
    unit = torch.linalg.vector_norm(kernel, dim=(1, 2, 3))
    gains = (torch.stack(slopes) * unit).square().sum(1)
    return dict(zip(names, gains.unbind(), strict=True))


@register_score('gain')
class Gain(GradientScore):
    """What the branches that a conv would get gain together: the mean over an interval of
    :func:`gains_of`.

    The square is taken of the gradient of each batch. That of the mean gradient foretells less:
    where the weights oscillate around a valley it cancels, see ``docs/scores.md``.

    Attributes:
        names: Of the rows of ``sums``.
        met: Iterations that were met, of which every :data:`EVERY`-th is looked at.
    """

    power = 2

    def __init__(self, operations: Operations):
        names = (name for operation in operations.values() for name in operation.names)
        self.names = [name for name in dict.fromkeys(names) if name != ORIGIN]
        self.rows, self.met = len(self.names), 0
        super().__init__(operations)

    def gather(self, loss_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Look at one iteration of :data:`EVERY`, see :meth:`GradientScore.gather`."""
        if self.met % EVERY == 0:
            super().gather(loss_scale, found_inf)
        self.met += 1

    def measure_all(self, operations: list[Operation]) -> Tensor:
        nothing = operations[0].weight.new_zeros(())
        columns = [gains_of(operation) for operation in operations]
        values = [column.get(name, nothing) for name in self.names for column in columns]
        return torch.stack(values).view(self.rows, len(operations))

    def gains(self) -> dict[str, dict[str, float]]:
        """Gain of each operation that a conv would get, by path; without convs that were never
        counted."""
        counts, rows = self.counts.tolist(), (self.sums / self.counts).tolist()
        return {
            path: {
                name: row[i]
                for name, row in zip(self.names, rows, strict=True)
                if name in operation.names
            }
            for i, (path, operation) in enumerate(self.operations.items())
            if counts[i]
        }

    def means(self, generator: torch.Generator | None = None) -> dict[str, float]:
        """What all operations that a conv would get gain together."""
        return {path: sum(values.values()) for path, values in self.gains().items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {**super().state_dict(), 'names': list(self.names), 'met': self.met}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Continue from a checkpoint; False if it scored other operations or otherwise."""
        if not isinstance(state, Mapping) or state.get('names') != self.names:
            return False
        if type(state.get('met')) is not int or not super().load_state_dict(state):
            return False
        self.met = state['met']
        return True


#: Of how many iterations the gain looks at one: it costs more than other scores, and varies little.
EVERY = 4

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
