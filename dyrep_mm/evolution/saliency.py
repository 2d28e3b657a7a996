"""Saliency scores of operations: gradients in, one number per operation out (appendix A.3).

Scores are gathered on the device of the parameters, without a host sync per iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dyrep_mm.errors import DyRepError

Metric = Callable[[list[Tensor], list[Tensor]], Tensor]


def synflow(weights: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Eq. 4: the signed sum of gradient times weight.

    It cancels for a conv in front of a BN in train mode: the loss does not change with the
    scale of such a kernel, which is what this sum measures.
    """
    pairs = zip(weights, grads, strict=True)
    return torch.stack([torch.dot(w.reshape(-1), g.reshape(-1)) for w, g in pairs])


def snip(weights: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Eq. 13: the sum of ``|gradient times weight|``."""
    return torch.stack(torch._foreach_norm(torch._foreach_mul(weights, grads), 1))


def grad_norm(weights: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Eq. 12: the Euclidean norm of the gradient."""
    return torch.stack(torch._foreach_norm(grads, 2))


#: Gradient-based metrics by name; ``random`` (Eq. 11) and ``vote`` are made of scores.
METRICS: dict[str, Metric] = {'synflow': synflow, 'snip': snip, 'grad_norm': grad_norm}


NAMES = (*METRICS, 'random', 'vote')


#: A signed sum below this part of the absolute sum is rounding, not a measurement.
CANCELLED = 1e-5


def check_metric(name: str) -> None:
    """Raise ``DyRepError`` unless ``name`` is a metric."""
    if name not in NAMES:
        raise DyRepError(f'unknown metric {name!r}: choose from {", ".join(NAMES)}')


class Saliency:
    """Sums of scores over the iterations of an interval (line 4 and 7 of Algorithm 1).

    Args:
        metric: One of :data:`NAMES`.
        paths: The operations to score, by path.
        device: Where to keep the sums.
    """

    def __init__(self, metric: str, paths: Sequence[str], device: torch.device | str = 'cpu'):
        check_metric(metric)
        self.metric = metric
        self.paths = list(paths)
        # `vote` needs all metrics; the absolute sum of the first iteration tells whether the
        # signed ones cancel.
        wanted = {'vote': tuple(METRICS), 'random': (), 'synflow': ('synflow', 'snip')}
        self._metrics = wanted.get(metric, (metric,))
        self._sums = torch.zeros(
            len(self._metrics), len(self.paths), dtype=torch.float64, device=device
        )
        self._counts = torch.zeros(len(self.paths), dtype=torch.float64, device=device)
        self._started = False
        self._used: tuple[tuple[int, ...] | None, Tensor] = None, self._counts

    @torch.no_grad()
    def gather(
        self,
        weights: Mapping[str, Tensor],
        loss_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Add one iteration's scores; one with a gradient that is not finite counts nothing.

        Args:
            weights: The weight of each operation, its gradient complete. Operations without
                a gradient are not counted.
            loss_scale: What the gradients are still multiplied by, if anything.
            found_inf: Not zero if the optimizer will skip this step.
        """
        used = [i for i, path in enumerate(self.paths) if weights[path].grad is not None]
        if not used or not self._metrics:
            return
        kernels = [weights[self.paths[i]] for i in used]
        grads = [kernel.grad for kernel in kernels]
        wanted = self._metrics[:1] if self.metric == 'synflow' and self._started else self._metrics
        self._started = True
        rows = [METRICS[name](kernels, grads) for name in wanted]
        scores = torch.stack(rows).to(self._sums)
        if loss_scale is not None:
            scores = scores / loss_scale.to(scores)
        good = scores.isfinite().all()
        if found_inf is not None:
            good = good & (found_inf == 0).to(good.device).all()
        index = self._index_of(tuple(used))
        self._sums[: len(rows)].index_add_(1, index, torch.where(good, scores, 0.0))
        self._counts.index_add_(0, index, good.to(self._counts).expand(len(used)))

    def _index_of(self, used: tuple[int, ...]) -> Tensor:
        # Kept, since a copy to an accelerator waits for it.
        if self._used[0] != used:
            self._used = used, torch.tensor(used, device=self._counts.device)
        return self._used[1]

    def means(self, generator: torch.Generator | None = None) -> dict[str, float]:
        """Average score per operation; operations that were never counted are left out.

        Args:
            generator: Draws the scores of ``random``.
        """
        if self.metric == 'random':
            draws = torch.rand(len(self.paths), generator=generator).tolist()
            return dict(zip(self.paths, draws, strict=True))
        means = (self._sums / self._counts).cpu()
        counted = [i for i, n in enumerate(self._counts.tolist()) if n]
        if self.metric == 'vote' and counted:
            # Mean of the ranks: an operation's votes are the operations it beats.
            ranks = means[:, counted].argsort(1).argsort(1).double().mean(0).tolist()
            return {self.paths[i]: rank for i, rank in zip(counted, ranks, strict=True)}
        return {self.paths[i]: means[0, i].item() for i in counted}

    def cancelled(self) -> bool:
        """Whether the signed sums of ``synflow`` are rounding for most operations."""
        if self.metric != 'synflow' or not self.paths:
            return False
        signed, absolute = self._sums.abs()
        signed = signed / self._counts.clamp_min(1)
        seen = absolute > 0
        rounding = signed[seen] < CANCELLED * absolute[seen]
        return bool(rounding.float().mean() > 0.5) if seen.any() else False

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            'metric': self.metric,
            'paths': list(self.paths),
            'sums': self._sums.cpu().clone(),
            'counts': self._counts.cpu().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Continue from a checkpoint; False if it scored other operations or otherwise.

        Raises:
            DyRepError: what is there is no scores.
        """
        if state.get('metric') != self.metric or state.get('paths') != self.paths:
            return False
        for name, own in (('sums', self._sums), ('counts', self._counts)):
            saved = state.get(name)
            if not isinstance(saved, Tensor) or saved.shape != own.shape:
                raise DyRepError(f'the scores of the checkpoint are malformed: {name}')
            own.copy_(saved)
        self._started = bool(state['counts'].any())
        return True
