"""The metrics of the paper (Eq. 4 and appendix A.3), each of an operation as a whole.

No metric depends on the scale of a kernel that a norm follows, on whether the operation is a plain
conv or the ``kxk`` of a block, or on how often maps repeat each other. Where the formula of the
paper does, the docstring says what is added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.operations import Operation, Operations
from dyrep_mm.evolution.saliency import GradientScore, OverLosses, register_score


def synflow(operations: list[Operation]) -> Tensor:
    """Eq. 4: the signed sum of gradient times weight, over all parameters of each operation."""
    parameters = [(operation.weight, *operation.shares) for operation in operations]
    pairs = [
        (i, p.detach().reshape(-1), p.grad.reshape(-1))
        for i, group in enumerate(parameters)
        for p in group
        if p.grad is not None
    ]
    sums: dict[int, Tensor] = {}
    for i, values, grads in pairs:
        product = torch.dot(values, grads)
        sums[i] = sums[i] + product if i in sums else product
    return torch.stack([sums[i] for i in range(len(operations))])


def snip(weights: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Eq. 13: the sum of ``|gradient times weight|``, (operations,)."""
    return torch.stack(torch._foreach_norm(torch._foreach_mul(weights, grads), 1))


def grad_norm(weights: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Eq. 12, the Euclidean norm of the gradient, in units of the kernel: times its norm."""
    norms = torch._foreach_mul(torch._foreach_norm(grads, 2), torch._foreach_norm(weights, 2))
    return torch.stack(norms)


def _weights_and_grads(operations: list[Operation]) -> tuple[list[Tensor], list[Tensor]]:
    return [o.kernel() for o in operations], [o.grad for o in operations]


#: A signed sum below this part of the absolute sum is rounding, not a measurement.
CANCELLED = 1e-5


@register_score('synflow')
class Synflow(GradientScore):
    """Eq. 4.

    It cancels for an operation in front of a BN in train mode: the loss does not change with the
    scale of its output, which is what the signed sum measures. The absolute sum of the first
    iteration tells whether it does.

    The parameters of a ``kxk`` alone would not cancel: it is one term of the sum that the BN
    scales. With the scales and shifts of the branches beside it they do.
    """

    rows = 2

    def measure_all(self, operations: list[Operation]) -> Tensor:
        signed = synflow(operations)
        if self.started:
            return signed[None]
        return torch.stack([signed, snip(*_weights_and_grads(operations))])

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
            'mode; the choice is close to random, those of metric=snip and metric=gain are not'
        )


@register_score('snip')
class Snip(GradientScore):
    """Eq. 13, of the merged kernel."""

    def measure(self, weights: list[Tensor], grads: list[Tensor]) -> Tensor:
        return snip(weights, grads)[None]


@register_score('grad_norm')
class GradNorm(GradientScore):
    """Eq. 12 times the norm of the merged kernel.

    A kernel that a BN follows may be scaled freely, and its gradient changes inversely.
    """

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


def grasp(loss: Tensor, operations: list[Operation]) -> Tensor:
    """Eq. 14 for one loss, (operations,), float64: minus the sum of weight times the product of
    Hessian and gradient.

    The gradient is in units of the kernels, as in :func:`grad_norm`: that of each is times the
    square of its norm. The Hessian is that of all operations together.

    Args:
        loss: With its graph.
        operations: Those without a gradient have the score 0.

    Raises:
        DyRepError: the model has no second derivatives.
    """
    weights = [operation.weight for operation in operations]
    kernels = [operation.kernel() for operation in operations]
    try:
        grads = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        slopes = [
            (grad * (grad.detach() * kernel.square().sum())).sum()
            for grad, kernel in zip(grads, kernels, strict=True)
            if grad is not None and grad.requires_grad
        ]
        products: tuple = (None,) * len(weights)
        if slopes:
            slope = sum(slopes[1:], slopes[0])
            _check_graph(slope)
            products = torch.autograd.grad(slope, weights, allow_unused=True)
    except RuntimeError as error:
        reason = str(error).strip().split('\n')[0]
        raise DyRepError(
            'metric=grasp needs second derivatives of the loss, which this model does not give: '
            f'{reason}; choose another metric'
        ) from None
    scores = [
        kernel.new_zeros(()) if product is None else -(kernel * product).sum()
        for kernel, product in zip(kernels, products, strict=True)
    ]
    return torch.stack(scores).double()


def _check_graph(value: Tensor) -> None:
    """Raise ``RuntimeError`` if a function that ``value`` comes from has no further derivative.

    A backward towards certain tensors passes such functions over without a word.
    """
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == 'torch::autograd::Error':
            raise RuntimeError('a function in it is differentiable once only')
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]


class _CurvatureScore(GradientScore):
    """A score that needs batches of its own when it is asked for.

    Attributes:
        curvatures: Eq. 14, (operations,), NaN where an operation does not train; None if no batch
            could be drawn, or before :meth:`look`.
    """

    def __init__(self, operations: Operations):
        super().__init__(operations)
        self.curvatures: Tensor | None = None

    def look(self, over_losses: OverLosses) -> None:
        """Take the mean of Eq. 14 over batches."""
        trained = [i for i, o in enumerate(self.operations.values()) if o.weight.requires_grad]
        if not trained:
            return
        operations = [self.operations[self.paths[i]] for i in trained]
        mean = over_losses(lambda loss: grasp(loss, operations))
        if mean is not None:
            everything = torch.full((len(self.paths),), torch.nan, dtype=torch.float64)
            everything[trained] = mean.cpu()
            self.curvatures = everything


@register_score('grasp')
class Grasp(_CurvatureScore):
    """Eq. 14, on a few batches at the update; nothing is gathered in the iterations before."""

    rows = 0
    #: The hook refuses training data of which none can be drawn.
    needs_batches = True

    def means(self, generator: torch.Generator | None = None) -> dict[str, float]:
        """What :meth:`look` saw; empty before it."""
        if self.curvatures is None:
            return {}
        values = zip(self.paths, self.curvatures.tolist(), strict=True)
        return {path: value for path, value in values if not math.isnan(value)}


@register_score('vote')
class Vote(_CurvatureScore):
    """The mean rank of an operation under Eq. 4, 13, 12 and, where batches can be drawn, 14: its
    votes are the operations that it beats."""

    rows = 3

    def measure_all(self, operations: list[Operation]) -> Tensor:
        pair = _weights_and_grads(operations)
        return torch.stack([synflow(operations), snip(*pair), grad_norm(*pair)])

    def means(self, generator: torch.Generator | None = None) -> dict[str, float]:
        """Mean rank per operation; operations that were never counted are left out."""
        counted = [i for i, n in enumerate(self.counts.tolist()) if n]
        means = (self.sums / self.counts).cpu()[:, counted]
        if self.curvatures is not None:
            means = torch.cat([means, self.curvatures[counted][None].nan_to_num(0.0)])
        ranks = means.argsort(1).argsort(1).double().mean(0).tolist()
        return {self.paths[i]: rank for i, rank in zip(counted, ranks, strict=True)}
