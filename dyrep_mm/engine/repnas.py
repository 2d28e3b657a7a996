"""``RepNASHook``: a search among branches that are all there, inside an mmengine training run."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import OPTIMIZERS
from mmengine.runner import Runner
from torch import Tensor, nn

from dyrep_mm.engine.base import StructureHook
from dyrep_mm.engine.options import (
    check_branches,
    check_count,
    check_flag,
    check_part,
    check_pick,
    check_ratio,
)
from dyrep_mm.engine.runner import make_seed, unwrap
from dyrep_mm.engine.schedule import LEFT_OUT, SearchSchedule
from dyrep_mm.engine.start import check_that_something_can_change
from dyrep_mm.engine.stock import AVERAGED
from dyrep_mm.engine.transaction import Transaction
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.search import KeepCost, KeepPart, RepNASRule
from dyrep_mm.registry import HOOKS
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.cost import branch_costs, multiply_adds
from dyrep_mm.surgery.gates import Gates, close_in, open_in
from dyrep_mm.surgery.optimizer import start_momentum
from dyrep_mm.surgery.structure import Plan, Structure

#: The part of all branches that is on, as in the public code of RepNAS.
KEEP = 0.34

#: The optimizer of the architecture parameters, as in the public code of RepNAS.
ALPHA_OPTIMIZER = {'type': 'Adam', 'lr': 1e-4, 'betas': (0.5, 0.999), 'weight_decay': 5e-4}

#: The states of weights in a checkpoint, and what the names of an averaged model begin with.
WEIGHTS = (('state_dict', ''), ('ema_state_dict', AVERAGED))


@HOOKS.register_module()
class RepNASHook(StructureHook):
    """Searches the branches of blocks instead of growing them, as RepNAS does (arXiv 2109.03508).

    All convs of the scope become blocks of all operations at the start. In every iteration all
    branches of all blocks compete in one ranking, and only those within the budget are computed. At
    the end of the search the best ones stay, the others are pruned, and training goes on. A block
    that keeps no branch is its ``kxk`` again.

    Args:
        keep: Part of all branches that is on, above 0 and at most 1.
        warmup: Epochs or iterations in which branches are drawn at random and weights alone train.
            By default 15 epochs; where iterations are counted there is no default.
        fixed: Epochs or iterations at the end in which the path is fixed. By default 100 epochs;
            where iterations are counted there is no default.
        by_epoch: Unit of ``warmup``, ``fixed`` and ``interval``; by default that of the training
            loop.
        keep_cost: Instead of ``keep``, a budget of cost: multiply-adds of the model with the
            branches that are on, over those of the plain model, every conv counted by itself. The
            branches of the largest gate for their cost are on.
        interval: Epochs or iterations between two entries of the journal in the search; blocks are
            measured again there. None: none between the ends of warm-up and search.
        scope: Dotted prefix, or several, inside which convs become blocks and branches compete;
            None is everywhere.
        branches: What blocks have, as far as it fits (Table 1: all seven); ``kxk`` always stays.
        init_scale: Starting importance of a branch relative to its conv. Branches join what the
            conv computes: 1 is for a training from scratch, 0.01 for weights that are trained.
        alpha_optimizer: Config of the optimizer of the architecture parameters; its weight decay
            falls to 0 over the search by a cosine.
        calibration_batches: See :class:`dyrep_mm.DyRepHook`.
        seed: Of branches, calibration and the search; by default the runner's.
        recompute: See :class:`dyrep_mm.DyRepHook`.
        branch_norm: See :class:`dyrep_mm.DyRepHook`. With ``'fixed'`` a gate is one factor in the
            merged kernel of its block.
        remeasure: Before every so many-th update blocks are measured again; 0 never does it.
        stop_on_invalid_loss: See :class:`dyrep_mm.DyRepHook`.

    Raises:
        DyRepError: an option has no meaning; at the start of training, the runner, the scope
            or the loop does not allow what the options ask for.
    """

    method = 'RepNAS'

    rule: RepNASRule
    schedule: SearchSchedule

    other_scores = (
        'the checkpoint has no search among these branches; their search starts anew in the phase '
        'that the run is in'
    )

    def __init__(
        self,
        keep: float = LEFT_OUT,
        warmup: int = LEFT_OUT,
        fixed: int = LEFT_OUT,
        by_epoch: bool | None = None,
        keep_cost: float | None = None,
        interval: int | None = None,
        scope: str | Sequence[str] | None = 'backbone',
        branches: Sequence[str] | None = None,
        init_scale: float = 1.0,
        alpha_optimizer: Mapping[str, Any] | None = None,
        calibration_batches: int = 20,
        seed: int | None = None,
        recompute: bool = False,
        branch_norm: str = 'batch',
        remeasure: int = 1,
        stop_on_invalid_loss: bool = False,
    ):
        if warmup is not LEFT_OUT:
            check_count('warmup', warmup, 0)
        if fixed is not LEFT_OUT:
            check_count('fixed', fixed, 1)
        if by_epoch is not None:
            check_flag('by_epoch', by_epoch)
        if interval is not None:
            check_count('interval', interval, 1)
        if check_pick(branches) is not None:
            raise DyRepError(f'branches must be a list of names, got {branches!r}')
        self.branches = check_branches(branches)
        if keep_cost is not None and keep is not LEFT_OUT:
            raise DyRepError('keep and keep_cost are two budgets: give one of them')
        self.budget = (
            KeepPart(check_part('keep', KEEP if keep is LEFT_OUT else keep))
            if keep_cost is None
            else KeepCost(check_ratio('keep_cost', keep_cost))
        )
        self.alpha_optimizer = dict(ALPHA_OPTIMIZER if alpha_optimizer is None else alpha_optimizer)
        self._gates: Gates | None = None
        self._goes_on = False  # the run had its start already
        super().__init__(
            SearchSchedule(warmup, fixed, by_epoch, interval),
            scope=scope,
            init_scale=init_scale,
            compensate=False,
            calibration_batches=calibration_batches,
            seed=seed,
            recompute=recompute,
            branch_norm=branch_norm,
            remeasure=remeasure,
            stop_on_invalid_loss=stop_on_invalid_loss,
        )

    def make_rule(self) -> RepNASRule:
        """The rule that decides."""
        return RepNASRule(self.budget, self._make_optimizer, scope=self.scope)

    def start_structure(self, runner: Runner) -> Structure | None:
        """All convs of the scope that are no block yet, with all operations."""
        if self._goes_on or self.schedule.is_over(runner, self._record.last):
            return None
        model = unwrap(runner.model)
        check_that_something_can_change(model, self.scope, 1, self.branches)
        structure = candidates(model, self.scope, 1, self.branches)
        if not structure and not self._started:
            raise DyRepError(f'no conv in scope {self.scope!r} can become a block: all are frozen')
        self._goes_on = True
        return structure

    # The moments of a run, in order.

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        super().after_load_checkpoint(runner, checkpoint)
        if runner._resume and not runner._has_loaded:
            self._goes_on = self._record.structure is not None
            for key, prefix in WEIGHTS:
                if key in checkpoint:
                    open_in(checkpoint[key], self._record.units, prefix)

    def before_train(self, runner: Runner) -> None:
        self.rule.complete = lambda grad: _complete(runner, grad)
        super().before_train(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        super().before_train_iter(runner, batch_idx, data_batch)
        if self._gates is not None:
            self.rule.progress = self.schedule.progress(self.schedule.now(runner) - 1)
            self._gates.open(*self.rule.draw())

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        if self._gates is not None:
            # To test, save and prune: without noise. An AMP wrapper may not have stepped.
            self._gates.show(self.rule.best())
            if runner.optim_wrapper.should_update():
                self._gates.stepped()
                self.rule.forget()
        super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._record.units = {} if self._gates is None else self._gates.units_off()
        super().before_save_checkpoint(runner, checkpoint)

    # What happens at them.

    def watch(self, runner: Runner, scores: Mapping[str, Any] | None = None) -> None:
        transaction, rule = self._transaction_of(runner), self.rule
        rule.seed = make_seed(self.seed, 'search')
        rule.copies = list(transaction.copies)
        rule.is_over = self.schedule.is_over(runner, self._record.last)
        super().watch(runner, scores)
        self._gates = None
        if rule.places:
            averages = [averaged.module for averaged in transaction.averages]
            self._gates = Gates(transaction.model, rule.places, transaction.copies, averages)
            self._gates.show(rule.best())

    def update(self, runner: Runner) -> Plan:
        """Tell of the search; at its end, fix the path. See :meth:`StructureHook.update`."""
        self.rule.progress = self.schedule.progress(self._record.last)
        return super().update(runner)

    def _on_step(
        self, runner: Runner, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict
    ) -> None:
        super()._on_step(runner, optimizer, args, kwargs)
        if self._gates is not None:
            self._gates.drop_gradients()
            for group in optimizer.param_groups:
                start_momentum(optimizer, group)

    def _learn_costs(self, transaction: Transaction) -> None:
        super()._learn_costs(transaction)
        if self._gates is None or not isinstance(self.budget, KeepCost):
            return
        model, sizes = transaction.model, self._record.sizes or {}
        costs, plain = branch_costs(model, sizes), multiply_adds(model, sizes, plain=True)
        added = [costs.get(path, {}).get(name, math.inf) for path, name in self.rule.places]
        self.budget.costs = torch.tensor(added, dtype=torch.float64) / plain
        self._gates.show(self.rule.best())

    def _to_stock(self, runner: Runner, checkpoint: dict) -> None:
        for key, prefix in WEIGHTS:
            if key in checkpoint:
                close_in(checkpoint[key], self._record.units, prefix)
        super()._to_stock(runner, checkpoint)

    def _make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        config = copy.deepcopy(self.alpha_optimizer)
        try:
            return OPTIMIZERS.build({**config, 'params': parameters})
        except Exception as error:
            raise DyRepError(f'alpha_optimizer: {error}') from None


def _complete(runner: Runner, grad: Tensor) -> Tensor:
    """The gradient of the loss averaged over all processes, of one that is scaled as the loss of
    this process was."""
    grad = grad.clone()
    if isinstance(runner.optim_wrapper, AmpOptimWrapper):
        grad /= runner.optim_wrapper.loss_scaler.get_scale()
    all_reduce(grad, 'mean')
    return grad
