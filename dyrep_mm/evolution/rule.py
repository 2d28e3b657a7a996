"""A rule: it watches a model in training and decides what to grow and what to prune."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dyrep_mm.evolution.saliency import Score, check_metric, make_score
from dyrep_mm.reparam.branches import ORIGIN
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.cost import Costs
from dyrep_mm.surgery.structure import Plan, Structure
from dyrep_mm.surgery.tree import Scope, blocks_of, get_module, in_scope

#: Branches to remove, by path of their block.
Cuts = Mapping[str, Sequence[str]]

#: Multiply-adds in training after a change, blocks to make and branches to remove, over plain.
CostAfter = Callable[[Structure, Cuts], float]


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
        self.max_depth = max_depth
        self.grow_per_update = grow_per_update
        self.prune_threshold = prune_threshold
        self.prune_relative = prune_relative
        self.prune_below = prune_below
        self.costs = costs
        self.max_cost = max_cost
        self.operations: Structure = {}
        self.score: Score | None = None
        self._weights: dict[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    def watch(self, model: nn.Module) -> None:
        """Score the present candidates from now on."""
        self.operations = candidates(model, self.scope, self.max_depth, self.branches, frozen=True)
        self._weights = {path: get_module(model, path).weight for path in self.operations}
        self.score = make_score(self.metric, self._weights) if self._weights else None

    def observe(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the scores of one iteration, of what trains in it."""
        self._optimizer = optimizer
        if self.score is None:
            return
        trained = self._trained()
        # Nobody sets the gradient of a weight to zero that is not in the optimizer.
        idle = [(w, w.grad) for path, w in self._weights.items() if path not in trained]
        for weight, _ in idle:
            weight.grad = None
        # A fused optimizer unscales gradients by itself and leaves these two attributes.
        self.score.gather(
            getattr(optimizer, 'grad_scale', None), getattr(optimizer, 'found_inf', None)
        )
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
            self.operations,
            count=self.grow_per_update,
            threshold=self.prune_threshold,
            relative=self.prune_relative,
            below=self.prune_below,
            cost=self._cost(model),
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
        weights = {path: w for path, w in self._weights.items() if w.requires_grad}
        if self._optimizer is None:
            return set(weights)
        held = {id(p) for group in self._optimizer.param_groups for p in group['params']}
        return {path for path, weight in weights.items() if id(weight) in held}

    def _means(self, generator: torch.Generator) -> dict[str, float]:
        means, trained = self.score.means(generator) if self.score else {}, self._trained()
        return {path: mean for path, mean in means.items() if path in trained}

    def state_dict(self) -> dict[str, Any] | None:
        """The scores so far."""
        return self.score.state_dict() if self.score else None

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Continue with the scores of a checkpoint; False if they are of other operations."""
        return self.score is None or self.score.load_state_dict(state)


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
    spread = statistics.pstdev(values) if below is None else statistics.stdev(values)
    if spread <= threshold * (mean if relative else 1):
        return []
    bound = mean if below is None else min(mean, below)
    return [name for name, value in importances.items() if value < bound]


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
    if threshold is not None:
        for path, values in importances.items():
            if weak := weak_branches(values, threshold, relative=relative, below=below):
                cuts[path] = weak
    usable = {path: score for path, score in scores.items() if math.isfinite(score)}
    if cost is None:
        best = sorted(_outside(usable, cuts), key=usable.__getitem__, reverse=True)
        grow = {path: operations[path] for path in best[:count]}
    else:
        budget = _Budget(cost, max_cost, importances if threshold is not None else {})
        cuts = budget.keep(cuts)
        forms = {path: _forms(operations[path], (gains or {}).get(path)) for path in usable}
        grow, cuts = budget.spend(usable, forms, cuts, count)
    return Plan(
        grow=grow,
        prune={path: cuts[path] for path in _outside(cuts, cuts)},
        scores=dict(scores),
        importances={path: dict(values) for path, values in importances.items()},
        remark=remark,
    )


def _outside(paths: Iterable[str], cuts: Cuts) -> list[str]:
    """Those of ``paths`` that do not go with a branch that is cut."""
    gone = [f'{path}.branches.{name}' for path, names in cuts.items() for name in names]
    return [path for path in paths if not gone or not in_scope(path, gone)]


def _forms(names: Sequence[str], gains: Mapping[str, float] | None) -> list[list[str]]:
    """What a conv may grow to: all of ``names``, then always one less, the least gain first."""
    forms = [list(names)]
    if gains is not None:
        by_gain = sorted(gains.keys() & set(names), key=lambda n: (gains[n], n))
        for name in by_gain[:-1]:
            forms.append([other for other in forms[-1] if other != name])
    return [form for form in forms if set(form) - {ORIGIN}]


class _Budget:
    """Chooses what grows and what goes within a budget.

    Args:
        cost: What the model costs after a change.
        limit: What it may cost.
        importances: Of the branches that may go for others, by path of their block.
    """

    def __init__(
        self, cost: CostAfter, limit: float, importances: Mapping[str, Mapping[str, float]]
    ):
        self.cost = cost
        self.limit = limit
        self.importances = {
            path: values
            for path, values in importances.items()
            if all(map(math.isfinite, values.values()))
        }

    def keep(self, cuts: Cuts) -> dict[str, list[str]]:
        """``cuts`` and what must go besides for the model to cost no more than the limit; the best
        branches of blocks go last."""
        for also_best in (False, True):
            if self.cost({}, cuts) <= self.limit:
                break
            for cut in self._weakest(cuts, also_best):
                if self.cost({}, cuts) <= self.limit:
                    break
                cuts = _and(cuts, [cut])
        return dict(cuts)

    def spend(
        self,
        scores: Mapping[str, float],
        forms: Mapping[str, list[list[str]]],
        cuts: Cuts,
        count: int,
    ) -> tuple[Structure, dict[str, list[str]]]:
        """What grows, and ``cuts`` with what goes for it.

        Args:
            scores: Of what may grow, by path.
            forms: The operations that each may have, the best choice first.
            cuts: What goes anyway.
            count: How many may grow.
        """
        base = self.cost({}, cuts)
        added = {p: self.cost({p: forms[p][0]}, cuts) - base for p in _outside(scores, cuts)}
        added = {path: more for path, more in added.items() if more < math.inf}
        best = sorted(added, key=lambda path: _worth(scores[path], added[path]), reverse=True)
        grow: Structure = {}
        for path in best:
            if len(grow) == count:
                break
            for form in forms[path]:
                if self.cost({**grow, path: form}, cuts) <= self.limit:
                    grow[path] = form
                    break
        if grow or not count:
            return grow, dict(cuts)
        weakest = list(self._weakest(cuts))
        for path in best:
            for form in forms[path]:
                room = self._room({path: form}, cuts, weakest)
                if room is not None:
                    return {path: form}, _and(cuts, room)
        return {}, dict(cuts)

    def _room(
        self, grow: Structure, cuts: Cuts, weakest: list[tuple[str, str]]
    ) -> list[tuple[str, str]] | None:
        """Which of ``weakest`` must go for ``grow``; None if it does not fit then either."""

        def fits(room: list[tuple[str, str]]) -> bool:
            return self.cost(grow, _and(cuts, room)) <= self.limit

        weakest = [(p, name) for p, name in weakest if _outside(grow, {p: [name]})]
        if not fits(weakest):
            return None
        sizes = range(1, len(weakest) + 1)
        room = weakest[: sizes[bisect_left(sizes, True, key=lambda n: fits(weakest[:n]))]]
        for cut in reversed(room):  # large ones may have made small ones needless
            if fits(rest := [other for other in room if other != cut]):
                room = rest
        return room

    def _weakest(self, cuts: Cuts, also_best: bool = False) -> list[tuple[str, str]]:
        """Branches as (path of block, name), the least importance for the cost that it saves first.

        Without ``also_best`` only those below the mean of their block: the best stays, and so do
        the branches of a new block, which nothing tells apart yet.
        """
        base, found = self.cost({}, cuts), []
        for path in _outside(self.importances, cuts):
            gone = cuts.get(path, ())
            left = {n: value for n, value in self.importances[path].items() if n not in gone}
            mean = math.inf if also_best or not left else statistics.fmean(left.values())
            for name, value in left.items():
                saved = base - self.cost({}, _and(cuts, [(path, name)]))
                if value < mean and saved > 0:
                    found.append((value / saved, path, name))
        return [(path, name) for _, path, name in sorted(found)]


def _and(cuts: Cuts, more: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """``cuts`` and ``more`` branches, as (path of block, name)."""
    both = {path: list(names) for path, names in cuts.items()}
    for path, name in more:
        both.setdefault(path, []).append(name)
    return both


def _worth(score: float, added: float) -> tuple[float, float]:
    """Score for the cost that it adds, to compare; what costs nothing comes first, and of scores
    below zero the one of least cost."""
    if score > 0:
        return (score / added if added > 0 else math.inf), score
    return score * max(added, 0.0), score
