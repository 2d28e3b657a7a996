"""What a score of operations is, gradients in, one number per operation out, and where a new one
is registered.

Scores are gathered on the device of the parameters, without a host sync per iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.operations import Operation, Operations, form_of

#: Runs a function on the loss of a few training batches, with gradients, and gives the mean of what
#: it returns, over batches and processes; None where no batches can be drawn.
OverLosses = Callable[[Callable[[Tensor], Tensor]], 'Tensor | None']


class Score(Protocol):
    """What a rule needs of a score; :class:`GradientScore` is one to build on.

    A score is made at the start of an interval for the operations that may grow, by path. One that
    has a method ``look(over_losses: OverLosses)`` is given batches of its own before ``means``.
    """

    def gather(self, loss_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Look at one iteration, between backward and optimizer step."""

    def means(self, generator: torch.Generator | None = None) -> dict[str, float]:
        """The score of each operation so far, by path; the highest grows."""

    def remark(self) -> str | None:
        """A sentence on the scores that the user should read; None if there is none."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Continue from a checkpoint; False if it scored other operations or otherwise."""


#: The classes of all scores by name; :func:`register_score` adds one.
SCORES: dict[str, Callable[[Operations], Score]] = {}


def register_score(name: str) -> Callable[[type], type]:
    """Make a class known as the score ``name``; a class decorator.

    The class takes the operations by path, see
    :class:`dyrep_mm.evolution.operations.Operation`, and has the methods of :class:`Score`.

    Raises:
        DyRepError: the name is empty or taken, or the class lacks a method.
    """
    if not isinstance(name, str) or not name:
        raise DyRepError(f'a score is registered under a name, got {name!r}')

    def register(cls: type) -> type:
        lacking = [m for m in vars(Score) if not m.startswith('_') and not hasattr(cls, m)]
        if lacking:
            raise DyRepError(f'score {name!r} lacks the method {lacking[0]}')
        taken = SCORES.get(name)
        # The same definition may run twice, as in a notebook.
        same = taken and (taken.__module__, taken.__qualname__) == (
            cls.__module__,
            cls.__qualname__,
        )
        if taken is not None and not same:
            raise DyRepError(f'score {name!r} is registered already')
        SCORES[name] = cls
        cls.metric = name  # type: ignore[attr-defined]  # any class may be a score
        return cls

    return register


def check_metric(name: str) -> None:
    """Raise ``DyRepError`` unless ``name`` is a registered score."""
    if name not in SCORES:
        raise DyRepError(f'unknown metric {name!r}: choose from {", ".join(SCORES)}')


def make_score(name: str, operations: Operations) -> Score:
    """The score ``name`` for these operations, by path."""
    check_metric(name)
    return SCORES[name](operations)


class GradientScore:
    """Means of numbers made of weights and gradients, over the iterations of an interval (lines 4
    and 7 of Algorithm 1).

    A subclass says in :meth:`measure` what the numbers are.

    Args:
        operations: What may grow, by path.

    Attributes:
        sums: Of the numbers, (rows, operations), float64.
        counts: Iterations that each operation took part in, (operations,), float64.
    """

    metric: str
    #: How many numbers :meth:`measure` makes for an operation; the first is the score.
    rows = 1
    #: With which power of the gradients they grow.
    power = 1

    def __init__(self, operations: Operations):
        self.operations = dict(operations)
        self.paths = list(self.operations)
        weights = [operation.weight for operation in self.operations.values()]
        device = weights[0].device if weights else 'cpu'
        size = len(self.paths)
        self.sums = torch.zeros(self.rows, size, dtype=torch.float64, device=device)
        self.counts = torch.zeros(size, dtype=torch.float64, device=device)
        self.started = False
        self._used: tuple[tuple[int, ...] | None, Tensor] = None, self.counts

    def measure(self, weights: list[Tensor], grads: list[Tensor]) -> Tensor:
        """The numbers of one iteration, (at most rows, operations), on the device.

        Args:
            weights: Of the plain convs that compute what the operations do.
            grads: Of these weights.
        """
        raise NotImplementedError

    def measure_all(self, operations: list[Operation]) -> Tensor:
        """As :meth:`measure`, for a score that needs more than weights and gradients."""
        weights = [operation.kernel() for operation in operations]
        return self.measure(weights, [operation.grad for operation in operations])

    @torch.no_grad()
    def gather(self, loss_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Add one iteration; one with a gradient that is not finite counts nothing.

        Gradients are complete here. Operations without one are not counted.

        Args:
            loss_scale: What the gradients are still multiplied by, if anything.
            found_inf: Not zero if the optimizer will skip this step.
        """
        used = self.used()
        if not used or not self.rows:
            return
        numbers = self.measure_all([self.operations[self.paths[i]] for i in used]).to(self.sums)
        self.started = True
        if loss_scale is not None:
            numbers = numbers / loss_scale.to(numbers) ** self.power
        good = numbers.isfinite().all()
        if found_inf is not None:
            good = good & (found_inf == 0).to(good.device).all()
        index = self.index_of(used)
        self.sums[: len(numbers)].index_add_(1, index, torch.where(good, numbers, 0.0))
        self.counts.index_add_(0, index, good.to(self.counts).expand(len(used)))

    def used(self) -> tuple[int, ...]:
        """The places in ``paths`` of the operations that have a gradient."""
        operations = enumerate(self.operations.values())
        return tuple(i for i, operation in operations if operation.weight.grad is not None)

    def index_of(self, used: tuple[int, ...]) -> Tensor:
        """``used`` as a tensor on the device."""
        # Kept, since a copy to an accelerator waits for it.
        if self._used[0] != used:
            self._used = used, torch.tensor(used, device=self.counts.device)
        return self._used[1]

    def means(self, generator: torch.Generator | None = None) -> dict[str, float]:
        """Average score per operation; operations that were never counted are left out."""
        means = (self.sums[0] / self.counts).tolist()
        return {p: m for p, m, n in zip(self.paths, means, self.counts.tolist(), strict=True) if n}

    def remark(self) -> str | None:
        """Nothing to say."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            'metric': self.metric,
            'paths': list(self.paths),
            'sums': self.sums.cpu().clone(),
            'counts': self.counts.cpu().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Continue from a checkpoint; False if it scored other operations or otherwise.

        Raises:
            DyRepError: the data is malformed.
        """
        if not isinstance(state, Mapping):
            return False
        metric, paths = state.get('metric'), state.get('paths')
        if not isinstance(metric, str) or not isinstance(paths, list):
            return False
        if metric != self.metric or paths != self.paths:
            return False
        for name, own in (('sums', self.sums), ('counts', self.counts)):
            saved = state.get(name)
            if not isinstance(saved, Tensor) or form_of(saved) != form_of(own):
                raise DyRepError(f'the scores of the checkpoint are malformed: {name}')
            own.copy_(saved)
        self.started = bool(state['counts'].any())
        return True
