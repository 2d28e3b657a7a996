"""Scores of operations, gradients in, one number per operation out, and where a new one is
registered (appendix A.3).

Scores are gathered on the device of the parameters, without a host sync per iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from dyrep_mm.errors import DyRepError


class Score(Protocol):
    """What a rule needs of a score; :class:`GradientScore` is one to build on.

    A score is made once for the operations that may grow, from their weights by path.
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
SCORES: dict[str, Callable[[Mapping[str, Tensor]], Score]] = {}


def register_score(name: str) -> Callable[[type], type]:
    """Make a class known as the score ``name``; a class decorator.

    The class takes the weights of the operations by path and has the methods of :class:`Score`.

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
        cls.metric = name
        return cls

    return register


def check_metric(name: str) -> None:
    """Raise ``DyRepError`` unless ``name`` is a registered score."""
    if name not in SCORES:
        raise DyRepError(f'unknown metric {name!r}: choose from {", ".join(SCORES)}')


def make_score(name: str, weights: Mapping[str, Tensor]) -> Score:
    """The score ``name`` for operations with these weights, by path."""
    check_metric(name)
    return SCORES[name](weights)


class GradientScore:
    """Means of numbers made of weights and gradients, over the iterations of an interval (lines 4
    and 7 of Algorithm 1).

    A subclass says in :meth:`measure` what the numbers are.

    Args:
        weights: Weight (out, in / groups, kh, kw) of each operation, by path.

    Attributes:
        sums: Of the numbers, (rows, operations), float64.
        counts: Iterations that each operation took part in, (operations,), float64.
    """

    metric: str
    #: How many numbers :meth:`measure` makes for an operation; the first is the score.
    rows = 1

    def __init__(self, weights: Mapping[str, Tensor]):
        self.weights = dict(weights)
        self.paths = list(self.weights)
        device = next(iter(self.weights.values())).device if self.weights else 'cpu'
        size = len(self.paths)
        self.sums = torch.zeros(self.rows, size, dtype=torch.float64, device=device)
        self.counts = torch.zeros(size, dtype=torch.float64, device=device)
        self.started = False
        self._used: tuple[tuple[int, ...] | None, Tensor] = None, self.counts

    def measure(self, weights: list[Tensor], grads: list[Tensor]) -> Tensor:
        """The numbers of one iteration, (at most rows, operations), on the device."""
        raise NotImplementedError

    @torch.no_grad()
    def gather(self, loss_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Add one iteration; one with a gradient that is not finite counts nothing.

        Gradients are complete here. Operations without one are not counted.

        Args:
            loss_scale: What the gradients are still multiplied by, if anything.
            found_inf: Not zero if the optimizer will skip this step.
        """
        used = [i for i, path in enumerate(self.paths) if self.weights[path].grad is not None]
        if not used or not self.rows:
            return
        weights = [self.weights[self.paths[i]] for i in used]
        numbers = self.measure(weights, [weight.grad for weight in weights]).to(self.sums)
        self.started = True
        if loss_scale is not None:
            numbers = numbers / loss_scale.to(numbers)
        good = numbers.isfinite().all()
        if found_inf is not None:
            good = good & (found_inf == 0).to(good.device).all()
        index = self._index_of(tuple(used))
        self.sums[: len(numbers)].index_add_(1, index, torch.where(good, numbers, 0.0))
        self.counts.index_add_(0, index, good.to(self.counts).expand(len(used)))

    def _index_of(self, used: tuple[int, ...]) -> Tensor:
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
        metric, paths = state.get('metric'), state.get('paths')
        if not isinstance(metric, str) or not isinstance(paths, list):
            return False
        if metric != self.metric or paths != self.paths:
            return False
        for name, own in (('sums', self.sums), ('counts', self.counts)):
            saved = state.get(name)
            if not isinstance(saved, Tensor) or _form_of(saved) != _form_of(own):
                raise DyRepError(f'the scores of the checkpoint are malformed: {name}')
            own.copy_(saved)
        self.started = bool(state['counts'].any())
        return True


def _form_of(tensor: Tensor) -> tuple:
    """What two tensors must have in common for one to take the values of the other."""
    return tensor.shape, tensor.dtype, tensor.layout, tensor.is_meta


def synflow(weights: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Eq. 4: the signed sum of gradient times weight, (operations,)."""
    pairs = zip(weights, grads, strict=True)
    return torch.stack([torch.dot(w.reshape(-1), g.reshape(-1)) for w, g in pairs])


def snip(weights: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Eq. 13: the sum of ``|gradient times weight|``, (operations,)."""
    return torch.stack(torch._foreach_norm(torch._foreach_mul(weights, grads), 1))


def grad_norm(weights: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Eq. 12: the Euclidean norm of the gradient, (operations,)."""
    return torch.stack(torch._foreach_norm(grads, 2))


#: A signed sum below this part of the absolute sum is rounding, not a measurement.
CANCELLED = 1e-5


@register_score('synflow')
class Synflow(GradientScore):
    """Eq. 4.

    It cancels for a conv in front of a BN in train mode: the loss does not change with the scale
    of such a kernel, which is what the signed sum measures. The absolute sum of the first
    iteration tells whether it does.
    """

    rows = 2

    def measure(self, weights: list[Tensor], grads: list[Tensor]) -> Tensor:
        signed = synflow(weights, grads)
        return torch.stack([signed] if self.started else [signed, snip(weights, grads)])

    def cancelled(self) -> bool:
        """Whether the signed sums are rounding for most operations."""
        signed, absolute = self.sums.abs()
        signed = signed / self.counts.clamp_min(1)
        seen = absolute > 0
        rounding = signed[seen] < CANCELLED * absolute[seen]
        return bool(rounding.float().mean() > 0.5) if seen.any() else False

    def remark(self) -> str | None:
        """Says that the sums cancel, if they do."""
        if not self.cancelled():
            return None
        return (
            'the signed sums of metric=synflow (Eq. 4) cancel to rounding in front of BN in train '
            'mode; the choice is close to random, metric=snip is not'
        )


@register_score('snip')
class Snip(GradientScore):
    """Eq. 13."""

    def measure(self, weights: list[Tensor], grads: list[Tensor]) -> Tensor:
        return snip(weights, grads)[None]


@register_score('grad_norm')
class GradNorm(GradientScore):
    """Eq. 12."""

    def measure(self, weights: list[Tensor], grads: list[Tensor]) -> Tensor:
        return grad_norm(weights, grads)[None]


@register_score('random')
class Random(GradientScore):
    """Eq. 11: draws, made when they are needed."""

    rows = 0

    def means(self, generator: torch.Generator | None = None) -> dict[str, float]:
        """A draw for each operation from ``generator``."""
        draws = torch.rand(len(self.paths), generator=generator).tolist()
        return dict(zip(self.paths, draws, strict=True))


@register_score('vote')
class Vote(GradientScore):
    """The mean rank of an operation under Eq. 4, 13 and 12: its votes are the operations it
    beats."""

    rows = 3

    def measure(self, weights: list[Tensor], grads: list[Tensor]) -> Tensor:
        return torch.stack([score(weights, grads) for score in (synflow, snip, grad_norm)])

    def means(self, generator: torch.Generator | None = None) -> dict[str, float]:
        """Mean rank per operation; operations that were never counted are left out."""
        counted = [i for i, n in enumerate(self.counts.tolist()) if n]
        means = (self.sums / self.counts).cpu()[:, counted]
        ranks = means.argsort(1).argsort(1).double().mean(0).tolist()
        return {self.paths[i]: rank for i, rank in zip(counted, ranks, strict=True)}
