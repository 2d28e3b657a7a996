"""``DyRepHook``: Algorithm 1 of the paper inside an mmengine training run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from mmengine.runner import Runner
from torch import Tensor

from dyrep_mm.engine.base import StructureHook
from dyrep_mm.engine.batches import can_draw, mean_over_losses
from dyrep_mm.engine.options import (
    check_branches,
    check_budget,
    check_count,
    check_flag,
    check_number,
    check_pick,
    check_score,
    check_start,
    with_presets,
)
from dyrep_mm.engine.runner import make_seed, unwrap
from dyrep_mm.engine.schedule import LEFT_OUT, Schedule, UpdateCost
from dyrep_mm.engine.start import check_that_something_can_change
from dyrep_mm.engine.transaction import Transaction
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.rule import DyRepRule, Rule
from dyrep_mm.evolution.saliency import SCORES
from dyrep_mm.registry import HOOKS
from dyrep_mm.surgery.rewire import INIT_SCALE
from dyrep_mm.surgery.structure import MAX_DEPTH, Plan


@HOOKS.register_module()
class DyRepHook(StructureHook):
    """Grows the convs that matter into multi-branch blocks and prunes branches that do not.

    Every training iteration is scored between backward and optimizer step. Every ``interval``
    the best operation grows and weak branches go; optimizer, EMA copies, DDP and checkpoints
    follow.

    Args:
        interval: t of Algorithm 1, epochs or iterations between two updates; None never
            changes the structure. By default 5 epochs; where iterations are counted there is no
            default.
        by_epoch: Unit of ``interval`` and ``end``; by default that of the training loop.
        end: No change of structure after this epoch or iteration, and no scoring (A.4).
        scope: Dotted prefix, or several, inside which convs may grow and branches be pruned;
            None is everywhere.
        metric: Saliency score: ``synflow`` (Eq. 4), ``snip``, ``grad_norm``, ``grasp``, ``random``,
            ``vote`` (A.3), or ``gain``, what growing would gain.
        grow_per_update: How many of the best operations grow at an update (Algorithm 1: 1).
        branches: What a grown operation gets, as far as it fits (Table 1: all seven). A number is
            how many of the seven, those that gain most; ``'best'``: those that gain at least half
            of what the best one does.
        init_scale: Starting importance of a new branch relative to its conv (section 4.1).
        calibration_batches: Training batches for the BN statistics of new branches (section
            4.1); 0 starts from the statistics of white input.
        prune: De-parameterization (section 4.2).
        prune_threshold: lambda: prune only in blocks whose importances spread more than this.
        prune_relative: ``prune_threshold`` is a part of the mean importance of the block, so that
            it means the same wherever importances start.
        prune_below: Prune only branches of less importance than this, as the authors' code does
            at 0.1, whose deviation is the unbiased one; None is the rule of the paper.
        max_cost: Budget: multiply-adds of a training step, as blocks really run, over those of the
            plain model. Within it the best scores for what they add grow first, and pruning makes
            room. None sets no limit.
        max_depth: How deep blocks may nest; 1 is no nesting, which cost more than it gave
            (docs/results.md).
        structure: What to start from: ``'dbb'``, ``'dbb7'``, ``'repvgg'``, a Structure file
            or a checkpoint.
        compensate: False: the kernel of a conv stays as it is where branches of ``structure`` join
            it, as DBB starts from scratch. By default the model computes what it did without.
        seed: Of new branches and calibration; by default the runner's.
        recompute: Compute the outputs of branches again in the backward instead of keeping
            them: training takes less memory and more time.
        branch_norm: What the norms of branches normalise with while they train: ``'batch'``, the
            statistics of the batch (the paper); ``'fixed'``, those that they were calibrated
            with, so that every block is one conv; ``'sampled'``, those of a sample of the batch.
        remeasure: Before every so many-th update all blocks are measured again: the outputs that
            importances are relative to, and the statistics of fixed norms; 0 never does it.
        stop_on_invalid_loss: End the run at a loss that is NaN or infinite. By default the log
            tells of the first one, and updates wait for a loss that is finite.
        preset: ``'paper'``: options that are not given have the numbers of the paper, whatever the
            defaults are.

    Raises:
        DyRepError: an option has no meaning; at the start of training, the runner, the scope
            or the loop does not allow what the options ask for.
    """

    @with_presets
    def __init__(
        self,
        interval: int | None = LEFT_OUT,
        by_epoch: bool | None = None,
        end: int | None = None,
        scope: str | Sequence[str] | None = 'backbone',
        metric: str = 'synflow',
        grow_per_update: int = 1,
        branches: Sequence[str] | int | str | None = None,
        init_scale: float = INIT_SCALE,
        calibration_batches: int = 20,
        prune: bool = True,
        prune_threshold: float = 0.02,
        prune_relative: bool = False,
        prune_below: float | None = None,
        max_cost: float | None = None,
        max_depth: int = 1,
        structure: str | os.PathLike | Mapping[str, Sequence[str]] | None = None,
        compensate: bool = True,
        seed: int | None = None,
        recompute: bool = False,
        branch_norm: str = 'batch',
        remeasure: int = 1,
        stop_on_invalid_loss: bool = False,
        preset: str | None = None,
    ):
        if interval is not None and interval is not LEFT_OUT:
            check_count('interval', interval, 1)
        if by_epoch is not None:
            check_flag('by_epoch', by_epoch)
        if end is not None:
            check_count('end', end, 0)
        self.metric = check_score(metric)
        self.grow_per_update = check_count('grow_per_update', grow_per_update, 0)
        self.branches = check_branches(branches)
        self.pick = check_pick(branches)
        check_number('prune_threshold', prune_threshold)
        self.prune_threshold = prune_threshold if check_flag('prune', prune) else None
        self.prune_relative = check_flag('prune_relative', prune_relative)
        if prune_below is not None:
            check_number('prune_below', prune_below)
        self.prune_below = prune_below
        self.max_cost = check_budget(max_cost)
        self.max_depth = check_count('max_depth', max_depth, 1, MAX_DEPTH)
        self.structure = check_start(structure)
        if structure is None and not check_flag('compensate', compensate):
            raise DyRepError('compensate=False is for branches to start with: set structure')
        self._cost: UpdateCost | None = None
        super().__init__(
            Schedule(interval, by_epoch, end),
            scope=scope,
            init_scale=init_scale,
            compensate=compensate,
            calibration_batches=calibration_batches,
            seed=seed,
            recompute=recompute,
            branch_norm=branch_norm,
            remeasure=remeasure,
            stop_on_invalid_loss=stop_on_invalid_loss,
        )

    def make_rule(self) -> Rule:
        """The rule that decides; a subclass may return another one."""
        return DyRepRule(
            self.metric,
            scope=self.scope,
            branches=self.branches,
            pick=self.pick,
            over_losses=self._over_losses,
            max_depth=self.max_depth,
            grow_per_update=self.grow_per_update,
            prune_threshold=self.prune_threshold,
            prune_relative=self.prune_relative,
            prune_below=self.prune_below,
            costs=self.costs,
            max_cost=self.max_cost,
        )

    def start_structure(self, runner: Runner) -> Any:
        """The option ``structure``, for a model that has none of its own."""
        return None if self._started else self.structure

    def before_train(self, runner: Runner) -> None:
        if getattr(SCORES[self.metric], 'needs_batches', False) and not can_draw(runner):
            raise DyRepError(
                f'metric={self.metric} needs batches of its own, which an IterableDataset does not '
                'give: choose another metric'
            )
        super().before_train(runner)
        if self.schedule.changes:
            self._cost = UpdateCost(runner, self.schedule, self.calibration_batches)
            self._warn(runner, self._cost.foresee())

    def check_changes(self, runner: Runner) -> None:
        model = unwrap(runner.model)
        trouble = check_that_something_can_change(model, self.scope, self.max_depth, self.branches)
        self._warn(runner, trouble)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        if self._cost is not None:
            self._cost.trained += 1
        super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def update(self, runner: Runner) -> Plan:
        """One update of Algorithm 1 (lines 6 to 11), see :meth:`StructureHook.update`."""
        start = time.monotonic()
        plan = super().update(runner)
        if plan.grow and self._cost is not None:
            self._warn(runner, self._cost.measure(time.monotonic() - start))
        return plan

    def _over_losses(self, measure: Callable[[Tensor], Tensor]) -> Tensor | None:
        """See :data:`dyrep_mm.evolution.saliency.OverLosses`."""
        transaction = cast(Transaction, self._transaction)
        runner, before = transaction.runner, transaction.batch_sampler
        seed = make_seed(self.seed, self._record.updates, 'losses')
        return mean_over_losses(runner, measure, seed, before)
