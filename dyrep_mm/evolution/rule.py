"""A rule: it watches a model in training and decides what to grow and what to prune."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from dyrep_mm.evolution.budget import Budget, CostAfter, forms_of, outside
from dyrep_mm.evolution.gain import Gain, best_names
from dyrep_mm.evolution.operations import (
    Operation,
    besides_in,
    operations_of,
    restore_besides,
)
from dyrep_mm.evolution.saliency import OverLosses, Score, check_metric, make_score
from dyrep_mm.reparam.branches import ORIGIN
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.charge import Costs
from dyrep_mm.surgery.structure import Plan, Structure
from dyrep_mm.surgery.tree import Scope, blocks_of, in_scope


class Rule(Protocol):
    """What the hook asks of a rule, on every rank; the plan of rank 0 is carried out."""

    def watch(self, model: nn.Module) -> None:
        """Start to observe ``model`` in its present structure."""

    def observe(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at one iteration: gradients are complete, the optimizer has not stepped."""

    def decide(self, model: nn.Module, generator: torch.Generator) -> Plan:
        """What to change now; draws from ``generator`` are the same after a resume."""

    def state_dict(self) -> dict[str, Any] | None:
        """What was observed since :meth:`watch`, as plain data; None if nothing was."""

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Continue from a checkpoint; False if the state is of other observations."""


class DyRepRule:
    """The rule of the paper: the operations of the highest score grow, weak branches go.

    Args:
        metric: Name of a registered score (section 4.1, A.3).
        scope: Dotted prefix, or several, inside which convs may grow and branches be pruned;
            everywhere by default.
        branches: The operations that a block gets, as far as they fit; Table 1 by default.
        pick: How many of these it gets, those that gain most; ``'best'``: those that gain at least
            half of what the best one does; None: all.
        over_losses: Gives losses to scores that need batches of their own.
        max_depth: How deep blocks may nest; None sets no limit.
        grow_per_update: How many of the best operations grow at once (Algorithm 1: 1).
        prune_threshold: lambda (section 4.2); None prunes nothing.
        prune_relative: See :func:`weak_branches`.
        prune_below: See :func:`weak_branches`.
        costs: What structures cost; the hook tells it the sizes of the training.
        max_cost: The budget, see :func:`make_plan`; None sets no limit.

    Attributes:
        operations: The convs that may grow, with the operations that each would have. Those that
            are frozen are among them: a hook may free one at any time.
        score: Of these; None if nothing may grow.
    """

    def __init__(
        self,
        metric: str,
        *,
        scope: Scope = None,
        branches: Sequence[str] | None = None,
        pick: int | str | None = None,
        over_losses: OverLosses | None = None,
        max_depth: int | None,
        grow_per_update: int,
        prune_threshold: float | None,
        prune_relative: bool = False,
        prune_below: float | None = None,
        costs: Costs | None = None,
        max_cost: float | None = None,
    ):
        check_metric(metric)
        self.metric = metric
        self.scope = scope
        self.branches = branches
        self.pick = pick
        self.over_losses = over_losses
        self.max_depth = max_depth
        self.grow_per_update = grow_per_update
        self.prune_threshold = prune_threshold
        self.prune_relative = prune_relative
        self.prune_below = prune_below
        self.costs = costs
        self.max_cost = max_cost
        self.operations: Structure = {}
        self.score: Score | None = None
        self._seen: dict[str, Operation] = {}
        self._gain: Gain | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def watch(self, model: nn.Module) -> None:
        """Score the present candidates from now on."""
        self.operations = candidates(model, self.scope, self.max_depth, self.branches, frozen=True)
        self._seen = operations_of(model, self.operations)
        self.score = make_score(self.metric, self._seen) if self._seen else None
        self._gain = self.score if isinstance(self.score, Gain) else None
        if self.pick is not None and self._gain is None and self._seen:
            self._gain = Gain(self._seen)

    def observe(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the scores of one iteration, of what trains in it."""
        self._optimizer = optimizer
        if self.score is None:
            return
        trained = self._trained()
        # Nobody sets the gradient of a weight to zero that is not in the optimizer.
        weights = {path: operation.weight for path, operation in self._seen.items()}
        idle = [(w, w.grad) for path, w in weights.items() if path not in trained]
        for weight, _ in idle:
            weight.grad = None
        # A fused optimizer unscales gradients by itself and leaves these two attributes.
        scale = getattr(optimizer, 'grad_scale', None), getattr(optimizer, 'found_inf', None)
        self.score.gather(*scale)
        if self._gain is not None and self._gain is not self.score:
            self._gain.gather(*scale)
        for weight, grad in idle:
            weight.grad = grad

    def decide(self, model: nn.Module, generator: torch.Generator) -> Plan:
        """One update of Algorithm 1 (lines 8 to 10)."""
        return make_plan(
            self._means(generator),
            {
                path: block.importances()
                for path, block in blocks_of(model).items()
                if in_scope(path, self.scope)
            },
            self._chosen(),
            count=self.grow_per_update,
            threshold=self.prune_threshold,
            relative=self.prune_relative,
            below=self.prune_below,
            cost=self._cost(model),
            gains=self.gains(),
            max_cost=self.max_cost,
            remark=self._remark(),
        )

    def _remark(self) -> str | None:
        if self.max_cost is not None and (self.costs is None or not self.costs.known):
            return 'max_cost: no layer of the model was seen at work, so that nothing grows'
        return self.score.remark() if self.score else None

    def _cost(self, model: nn.Module) -> CostAfter | None:
        if self.max_cost is None:
            return None
        if self.costs is None or not self.costs.known:
            return lambda grow, prune: math.inf if grow else 1.0
        return self.costs.of(model)

    def _trained(self) -> set[str]:
        """The operations that train now: branches train where their conv does."""
        seen = self._seen.items()
        weights = {path: o.weight for path, o in seen if o.weight.requires_grad}
        if self._optimizer is None:
            return set(weights)
        held = {id(p) for group in self._optimizer.param_groups for p in group['params']}
        return {path for path, weight in weights.items() if id(weight) in held}

    def _means(self, generator: torch.Generator) -> dict[str, float]:
        if self.score is None:
            return {}
        if hasattr(self.score, 'look') and self.over_losses is not None:
            self.score.look(self.over_losses)
        means, trained = self.score.means(generator), self._trained()
        if self.score is self._gain and self.pick is not None:  # of what it would get
            gains, chosen = self.gains(), self._chosen()
            means = {p: sum(gains[p].get(n, 0.0) for n in chosen[p]) for p in means}
        return {path: mean for path, mean in means.items() if path in trained}

    def gains(self) -> dict[str, dict[str, float]]:
        """What each operation would gain, by path of the conv and name; empty if that is not
        gathered."""
        return self._gain.gains() if self._gain is not None else {}

    def _chosen(self) -> Structure:
        """What each conv would grow to."""
        if self.pick is None:
            return self.operations
        count = self.pick if isinstance(self.pick, int) else None  # 'best' takes what pays
        best = {path: best_names(gains, count) for path, gains in self.gains().items()}
        return {
            path: [name for name in names if name == ORIGIN or name in best.get(path, names)]
            for path, names in self.operations.items()
        }

    def state_dict(self) -> dict[str, Any] | None:
        """The scores so far."""
        if self.score is None:
            return None
        state = {**self.score.state_dict(), 'beside': besides_in(self._seen)}
        if self._gain is not None and self._gain is not self.score:
            state['gain'] = self._gain.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Continue with the scores of a checkpoint; False if they are of other operations."""
        if self.score is None:
            return True
        if not self.score.load_state_dict(state):
            return False
        restore_besides(self._seen, state.get('beside'))
        if self._gain is not None and self._gain is not self.score:
            # Without one, as after a change of the option, the gain starts here.
            self._gain.load_state_dict(state.get('gain') or {})
        return True


def weak_branches(
    importances: Mapping[str, float],
    threshold: float,
    *,
    relative: bool = False,
    below: float | None = None,
) -> list[str]:
    """Branches to cut (section 4.2): less important than the mean, where the standard deviation is
    above ``threshold``. The best branch stays; with fewer than two there is no spread.

    Args:
        importances: Eq. 9, of the branches of one block.
        threshold: lambda.
        relative: ``threshold`` is a part of the mean importance.
        below: Only branches below this importance go too, as in the authors' code, which has 0.1.
            As there the deviation is then the unbiased one.
    """
    values = list(importances.values())
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return []
    mean = statistics.fmean(values)
    if _spread(values, below) <= threshold * (mean if relative else 1):
        return []
    bound = mean if below is None else min(mean, below)
    return [name for name, value in importances.items() if value < bound]


def _spread(values: Sequence[float], below: float | None) -> float:
    return statistics.pstdev(values) if below is None else statistics.stdev(values)


def make_plan(
    scores: Mapping[str, float],
    importances: Mapping[str, Mapping[str, float]],
    operations: Structure,
    *,
    count: int,
    threshold: float | None,
    relative: bool = False,
    below: float | None = None,
    cost: CostAfter | None = None,
    max_cost: float | None = None,
    gains: Mapping[str, Mapping[str, float]] | None = None,
    remark: str | None = None,
) -> Plan:
    """One update of Algorithm 1 (lines 8 to 10).

    With a budget, the operations of the highest score for what they add to the cost grow first.
    One that does not fit is passed over. Where none fits, pruning makes room for the best of
    them. Where the model itself costs too much, pruning brings it back.

    Args:
        scores: Average score of every operation that may grow, by path.
        importances: Eq. 9 for the added branches of every block, by path of the block.
        operations: What each of the scored convs would grow to.
        count: How many of the best operations grow.
        threshold: lambda; None prunes nothing.
        relative: See :func:`weak_branches`.
        below: See :func:`weak_branches`.
        cost: What the model costs after a change; None: no budget.
        max_cost: What it may cost.
        gains: What each operation of a conv would bring, where the score knows: then a conv that
            does not fit whole grows with fewer.
        remark: On the scores.
    """
    cuts: dict[str, list[str]] = {}
    reasons: dict[str, dict[str, float]] = {}
    if threshold is not None:
        for path, values in importances.items():
            if weak := weak_branches(values, threshold, relative=relative, below=below):
                cuts[path], reasons[path] = weak, _reason(values, threshold, below)
    usable = {path: score for path, score in scores.items() if math.isfinite(score)}
    if cost is None or max_cost is None:
        best = sorted(outside(usable, cuts), key=usable.__getitem__, reverse=True)
        grow = {path: operations[path] for path in best[:count]}
    else:
        budget = Budget(cost, max_cost, importances if threshold is not None else {})
        cuts = budget.keep(cuts)
        forms = {path: forms_of(operations[path], (gains or {}).get(path)) for path in usable}
        grow, cuts = budget.spend(usable, forms, cuts, count)
    budgeted = {} if max_cost is None else {'max_cost': max_cost}
    prune = {path: cuts[path] for path in outside(cuts, cuts)}
    return Plan(
        grow=grow,
        prune=prune,
        scores=dict(scores),
        importances={path: dict(values) for path, values in importances.items()},
        remark=remark,
        reasons={path: reasons.get(path, budgeted) for path in prune},
    )


def _reason(
    importances: Mapping[str, float], threshold: float, below: float | None
) -> dict[str, float]:
    """The numbers that :func:`weak_branches` decides by."""
    values = list(importances.values())
    numbers = {
        'mean': statistics.fmean(values),
        'spread': _spread(values, below),
        'threshold': threshold,
    }
    return numbers if below is None else {**numbers, 'below': below}
