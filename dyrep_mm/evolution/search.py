"""A search among branches that are all there: the rule of RepNAS (arXiv 2109.03508).

Every branch has an architecture parameter, ``alpha``. In each iteration all branches of all blocks
compete in one ranking, by ``alpha`` and noise; those within the budget are on. A gate is 1 where a
branch is on, and its gradient reaches ``alpha`` straight through the step. At the end what is
outside of the budget without noise is pruned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Generator, Tensor, nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.gates import Place, path_of_place
from dyrep_mm.surgery.structure import Plan
from dyrep_mm.surgery.tree import Scope, blocks_of, depth_of, in_scope

#: How far noise can go: a uniform number is never 0 or 1.
_EPS = 1e-12

#: Makes the optimizer of the architecture parameters.
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Budget(Protocol):
    """Says which branches are on."""

    def choose(self, rank: Tensor, order: Tensor) -> list[bool]:
        """The mask (n,) for the ranks (n,); of equal ranks the first of ``order`` is better."""

    def told(self) -> dict[str, float]:
        """Its number, by the name of the option."""


class KeepPart:
    """A part of all branches: the number that is on is always the same.

    Args:
        keep: The part, above 0 and at most 1.
    """

    def __init__(self, keep: float):
        self.keep = keep

    def count(self, of: int) -> int:
        """How many branches are on, of so many; at least one."""
        return max(math.floor(self.keep * of + 1e-9), 1)

    def choose(self, rank: Tensor, order: Tensor) -> list[bool]:
        mask = torch.zeros(len(rank), dtype=torch.bool)
        mask[_descending(rank, order)[: self.count(len(rank))]] = True
        return mask.tolist()

    def told(self) -> dict[str, float]:
        return {'keep': self.keep}


class KeepCost:
    """As many as a cost allows, those of the largest gate for their cost first; one that does not
    fit is passed over.

    Args:
        limit: Multiply-adds of the model over those of the plain one, above 1.

    Attributes:
        costs: What each branch adds to that ratio, (n,); infinite until it is known.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.costs: Tensor | None = None

    def choose(self, rank: Tensor, order: Tensor) -> list[bool]:
        costs = torch.full_like(rank, math.inf) if self.costs is None else self.costs
        left, mask = self.limit - 1, [False] * len(rank)
        added = costs.tolist()
        for place in _descending(rank.sigmoid() / costs, order).tolist():
            if added[place] <= left:
                left -= added[place]
                mask[place] = True
        return mask

    def told(self) -> dict[str, float]:
        return {'keep_cost': self.limit}


def _descending(values: Tensor, order: Tensor) -> Tensor:
    """Places of ``values`` from the largest; equal ones in ``order``."""
    return order[torch.sort(values[order], descending=True, stable=True).indices]


class Sampler:
    """Architecture parameters, their optimizer, and the generator of the noise; all on the CPU, and
    the same on every rank.

    Args:
        count: How many branches compete.
        budget: Says which of them are on.
        make_optimizer: See :data:`MakeOptimizer`.
        seed: Of the noise.

    Attributes:
        alphas: (n,), zero at the start.
    """

    def __init__(self, count: int, budget: Budget, make_optimizer: MakeOptimizer, seed: int):
        self.budget = budget
        self.alphas = nn.Parameter(torch.zeros(count, dtype=torch.float64))
        self.optimizer = make_optimizer([self.alphas])
        self._decay = [group.get('weight_decay', 0) for group in self.optimizer.param_groups]
        self._generator = Generator().manual_seed(seed)
        # Of equal alphas, as at the start, the first one is no better than another.
        self._order = torch.randperm(count, generator=self._generator)

    def draw(self) -> tuple[list[bool], Tensor]:
        """The mask (n,) of an iteration, and the gates of what is on, differentiable."""
        uniform = torch.rand(len(self.alphas), dtype=self.alphas.dtype, generator=self._generator)
        # The difference of two Gumbel noises is logistic.
        rank = self.alphas + torch.logit(uniform, eps=_EPS)
        mask = self.budget.choose(rank.detach(), self._order)
        soft = rank[torch.tensor(mask)].sigmoid()
        return mask, 1 + (soft - soft.detach())

    def best(self) -> list[bool]:
        """The mask (n,) without noise."""
        return self.budget.choose(self.alphas.detach(), self._order)

    def step(self, grad: Tensor, progress: float) -> None:
        """Step the alphas.

        Args:
            grad: Of the alphas, the same on every rank; one that is not finite is passed over.
            progress: Part of the search that is over; weight decay falls by a cosine with it.
        """
        if grad.isfinite().all():
            self.alphas.grad = grad
            fall = (1 + math.cos(math.pi * min(progress, 1))) / 2
            for group, decay in zip(self.optimizer.param_groups, self._decay, strict=True):
                if decay:
                    group['weight_decay'] = decay * fall
            self.optimizer.step()
        self.alphas.grad = None

    def state_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            'alphas': self.alphas.detach().clone(),
            'optimizer': self.optimizer.state_dict(),
            'generator': self._generator.get_state(),
            'order': self._order.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        for own, saved in ((self.alphas, state['alphas']), (self._order, state['order'])):
            if saved.shape != own.shape:
                raise ValueError(f'{len(own)} branches, got {tuple(saved.shape)}')
        with torch.no_grad():
            self.alphas.copy_(state['alphas'])
        self.optimizer.load_state_dict(state['optimizer'])
        self._generator.set_state(state['generator'])
        self._order.copy_(state['order'])


class RepNASRule:
    """Branches that compete until the end of the search, when those within the budget stay.

    Args:
        budget: Says which branches are on.
        make_optimizer: Of the alphas.
        complete: Makes of the gradient of the alphas in this process, scaled as the loss was, that
            of all processes.
        scope: Dotted prefix, or several, inside which branches compete; everywhere by default.

    Attributes:
        progress: Part of the search that is over: below 0 while alphas wait, 1 at the end. The hook
            sets this and the next three.
        is_over: Whether the path is fixed, for :meth:`watch`.
        seed: Of the noise, for :meth:`watch`.
        copies: Paths of momentum copies inside the model, whose branches follow.
        places: The branches that compete; empty once the path is fixed.
        sampler: Of these; None where nothing competes.
    """

    def __init__(
        self,
        budget: Budget,
        make_optimizer: MakeOptimizer,
        *,
        complete: Callable[[Tensor], Tensor] = lambda grad: grad,
        scope: Scope = None,
    ):
        self.budget = budget
        self.make_optimizer = make_optimizer
        self.complete = complete
        self.scope = scope
        self.progress = -1.0
        self.is_over = False
        self.seed = 0
        self.copies: list[str] = []
        self.places: list[Place] = []
        self.sampler: Sampler | None = None

    def watch(self, model: nn.Module) -> None:
        """Let the branches of the outermost blocks of ``model`` compete; they go on where they are
        the same as before. What is nested in a branch is on with it."""
        if self.is_over:
            self.places, self.sampler = [], None
            return
        places = [
            (path, name)
            for path, block in blocks_of(model).items()
            if in_scope(path, self.scope) and not in_scope(path, self.copies)
            if depth_of(model, path) == 0
            for name in block.names[1:]
        ]
        if places != self.places or self.sampler is None:
            self.places = places
            self.sampler = None
            if places:
                self.sampler = Sampler(len(places), self.budget, self.make_optimizer, self.seed)

    def observe(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the alphas on the gradients of one step of the weights, behind the warm-up."""
        if self.sampler is None or self.progress < 0:
            return
        grad = self.sampler.alphas.grad
        grad = torch.zeros_like(self.sampler.alphas) if grad is None else grad
        self.sampler.step(self.complete(grad.detach()), self.progress)

    def draw(self) -> tuple[list[bool], Tensor | None]:
        """The mask of an iteration and, behind the warm-up, the gates of what is on."""
        mask, gates = cast(Sampler, self.sampler).draw()
        return mask, (gates if self.progress >= 0 else None)

    def best(self) -> list[bool]:
        """The mask without noise, to test and to keep."""
        return cast(Sampler, self.sampler).best()

    def forget(self) -> None:
        """Drop the gradients of alphas: a step has taken them, or has not come."""
        cast(Sampler, self.sampler).alphas.grad = None

    def decide(self, model: nn.Module, generator: Generator) -> Plan:
        """Tell the alphas; at the end, prune what is off without noise."""
        if self.sampler is None:
            return Plan()
        mask, alphas = self.sampler.best(), self.sampler.alphas.tolist()
        blocks = blocks_of(model)
        off: dict[str, list[str]] = {}
        if self.progress >= 1:
            for (path, name), on in zip(self.places, mask, strict=True):
                if not on:
                    off.setdefault(path, []).append(name)
        inside = dict.fromkeys(path for path, _ in self.places)
        least = min((a for a, on in zip(alphas, mask, strict=True) if on), default=math.inf)
        reason = {**self.budget.told(), 'least alpha kept': least}
        return Plan(
            prune=off,
            scores={
                path_of_place(place): alpha
                for place, alpha in zip(self.places, alphas, strict=True)
            },
            importances={path: blocks[path].importances() for path in inside},
            reasons=dict.fromkeys(off, reason),
        )

    def state_dict(self) -> dict[str, Any] | None:
        """The search so far."""
        if self.sampler is None:
            return None
        return {'places': [path_of_place(p) for p in self.places], **self.sampler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Continue a search; False if it was among other branches, or by another rule.

        Raises:
            DyRepError: the data is malformed.
        """
        if self.sampler is None:
            return True
        if state.get('places') != [path_of_place(place) for place in self.places]:
            return False
        try:
            self.sampler.load_state_dict(state)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DyRepError(f'the search of the checkpoint is malformed: {error}') from None
        return True
