"""A rule: it watches a model in training and decides what to grow and what to prune."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dyrep_mm.evolution.saliency import Score, check_metric, make_score
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.structure import Plan, Structure
from dyrep_mm.surgery.tree import Scope, blocks_of, get_module, in_scope


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
            remark=self.score.remark() if self.score else None,
        )

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
    remark: str | None = None,
) -> Plan:
    """One update of Algorithm 1 (lines 8 to 10).

    Args:
        scores: Average score of every operation that may grow, by path.
        importances: Eq. 9 for the added branches of every block, by path of the block.
        operations: What each of the scored convs would grow to.
        count: How many of the best operations grow.
        threshold: lambda; None prunes nothing.
        relative: See :func:`weak_branches`.
        below: See :func:`weak_branches`.
        remark: On the scores.
    """
    prune: dict[str, list[str]] = {}
    if threshold is not None:
        for path, values in importances.items():
            if weak := weak_branches(values, threshold, relative=relative, below=below):
                prune[path] = weak
    cut = [f'{path}.branches.{name}' for path, names in prune.items() for name in names]

    def survives(path: str) -> bool:
        # A branch that goes takes along what lies in it.
        return not any(path == c or path.startswith(f'{c}.') for c in cut)

    usable = {path: s for path, s in scores.items() if math.isfinite(s) and survives(path)}
    best = sorted(usable, key=usable.__getitem__, reverse=True)
    return Plan(
        grow={path: operations[path] for path in best[:count]},
        prune={path: names for path, names in prune.items() if survives(path)},
        scores=dict(scores),
        importances={path: dict(values) for path, values in importances.items()},
        remark=remark,
    )
