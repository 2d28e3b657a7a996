"""``DyRepHook``: Algorithm 1 of the paper inside an mmengine training run."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from dyrep_mm.engine.batches import (
    batch_sampler_before,
    can_draw,
    check_batches,
    mean_over_losses,
)
from dyrep_mm.engine.channels import tell_backends
from dyrep_mm.engine.checkpoint import (
    check_resumable,
    structure_in,
    weights_of,
)
from dyrep_mm.engine.losses import LossWatch
from dyrep_mm.engine.options import (
    check_branches,
    check_budget,
    check_count,
    check_flag,
    check_number,
    check_pick,
    check_prefixes,
    check_score,
    check_seed,
    check_start,
    with_presets,
)
from dyrep_mm.engine.pretrained import handovers_in
from dyrep_mm.engine.runner import (
    choose_resume,
    from_rank_0,
    make_generator,
    make_seed,
    optimizer_of,
    refuse_unsupported,
    unwrap,
)
from dyrep_mm.engine.schedule import LEFT_OUT, Schedule, UpdateCost, iterations_per_epoch
from dyrep_mm.engine.start import Reception, check_that_something_can_change, start_from
from dyrep_mm.engine.stock import LastHook, from_stock, norms_in, to_stock
from dyrep_mm.engine.times import StepTimes
from dyrep_mm.engine.transaction import Transaction
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Entry, Record
from dyrep_mm.evolution.rule import DyRepRule, Rule
from dyrep_mm.evolution.saliency import SCORES
from dyrep_mm.registry import HOOKS
from dyrep_mm.reparam.block import Block, kernels_kept
from dyrep_mm.reparam.norms import check_branch_norm
from dyrep_mm.surgery.candidates import (
    leave_alone,
    left_alone,
)
from dyrep_mm.surgery.charge import Costs
from dyrep_mm.surgery.copies import Copies, find_copies, own_part
from dyrep_mm.surgery.cost import SizeWatch, cost_of, plain_cost_of
from dyrep_mm.surgery.outputs import watch_training
from dyrep_mm.surgery.rewire import INIT_SCALE
from dyrep_mm.surgery.structure import (
    MAX_DEPTH,
    Plan,
    structure_of,
)
from dyrep_mm.surgery.tree import blocks_of, check_scope, get_module


@HOOKS.register_module()
class DyRepHook(Hook):
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
            it means the same however long a run is and wherever importances start.
        prune_below: Prune only branches of less importance than this, as the authors' code does
            at 0.1, whose deviation is the unbiased one; None is the rule of the paper.
        max_cost: Budget: multiply-adds of a training step, as blocks really run, over those of the
            plain model. Within it the best scores for what they add grow first, and pruning makes
            room. None sets no limit.
        max_depth: How deep blocks may nest; 1 is no nesting.
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

    # Before every EMAHook, which must find the restored structure, and before what saves.
    priority = 'HIGH'

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
        max_depth: int = 2,
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
        self.schedule = Schedule(interval, by_epoch, end)
        self.scope = check_prefixes(scope)
        self.metric = check_score(metric)
        self.grow_per_update = check_count('grow_per_update', grow_per_update, 0)
        self.branches = check_branches(branches)
        self.pick = check_pick(branches)
        self.init_scale = check_number('init_scale', init_scale)
        self.calibration_batches = check_count('calibration_batches', calibration_batches, 0)
        check_number('prune_threshold', prune_threshold)
        self.prune_threshold = prune_threshold if check_flag('prune', prune) else None
        self.prune_relative = check_flag('prune_relative', prune_relative)
        if prune_below is not None:
            check_number('prune_below', prune_below)
        self.prune_below = prune_below
        self.max_cost = check_budget(max_cost)
        self.max_depth = check_count('max_depth', max_depth, 1, MAX_DEPTH)
        self.structure = check_start(structure)
        self.compensate = check_flag('compensate', compensate)
        if structure is None and not compensate:
            raise DyRepError('compensate=False is for branches to start with: set structure')
        self.seed = check_seed(seed)
        self.recompute = check_flag('recompute', recompute)
        self.branch_norm = check_branch_norm(branch_norm)
        self.costs = Costs(self._prepare)
        self.remeasure = check_count('remeasure', remeasure, 0)
        self._losses = LossWatch(check_flag('stop_on_invalid_loss', stop_on_invalid_loss))
        self._started = False
        self._reception = Reception()
        self._record = Record()
        self._steps = StepTimes(self._record.timing)
        self._transaction: Transaction | None = None
        self._sizes: SizeWatch | None = None
        self._cost: UpdateCost | None = None
        self._handles: list[Any] = []
        self._copies: Copies | None = None
        self._inference = ExitStack()
        self._last = LastHook(self._to_stock)
        self._told: set[str] = set()  # convs with a bias that the stock model has not
        self.rule = self.make_rule()

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

    @property
    def journal(self) -> list[Entry]:
        """One entry for each update of the run so far."""
        return self._record.journal

    # The moments of a run, in order.

    def before_run(self, runner: Runner) -> None:
        refuse_unsupported(runner)
        if sum(isinstance(hook, DyRepHook) for hook in runner.hooks) > 1:
            raise DyRepError(
                'a run has one DyRepHook, and this config has several: set its options in one '
                'place (where a base has default_hooks.dyrep, override keys of that instead of '
                'adding to custom_hooks), and give all prefixes to one scope'
            )
        for hook in runner.hooks:
            if isinstance(hook, EMAHook) and runner.hooks.index(hook) < runner.hooks.index(self):
                raise DyRepError('DyRepHook must have a higher priority than EMAHook')
        choose_resume(runner)
        self._transaction = None  # averages are made anew after this
        self._find_copies(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        refuse_unsupported(runner)  # FlexibleRunner loads before before_run
        if (with_branches := from_stock(checkpoint)) is not checkpoint:
            checkpoint.clear()
            checkpoint.update(with_branches)
        structure, weights = structure_in(checkpoint), weights_of(checkpoint)
        norms = norms_in(checkpoint)
        # Once there are weights, load_checkpoint is a call of the user's own.
        resumes = runner._resume and not runner._has_loaded
        if resumes:
            check_resumable(checkpoint)
            self._record = Record.from_checkpoint(checkpoint)
            if structure and self._record.branch_norm != self.branch_norm:
                runner.logger.info(
                    f'DyRep: the norms of branches go on with branch_norm={self.branch_norm!r}, '
                    f'the checkpoint has {self._record.branch_norm!r}'
                )
        else:
            self._record.scores = None
        checkpoint.setdefault('state_dict', OrderedDict(weights))  # where EMAHook looks for it
        transaction = self._transaction_of(runner)
        model = transaction.model

        def received(changed: bool) -> None:
            # A resumed run had its start already, also if it has not grown yet.
            transaction.accept_norms(norms)
            grown = bool(structure_of(model))
            self._started = grown or (resumes and self._record.structure is not None)
            if resumes:
                for path, reason in self._record.left_alone.items():
                    leave_alone(get_module(model, path), reason)
            elif changed and self.rule.state_dict() is not None:  # in the middle of a training
                self.rule.watch(model)

        self._reception.receive(transaction, structure or {}, weights, resumes, received)

    def before_train(self, runner: Runner) -> None:
        model = unwrap(runner.model)
        self._reception.close()
        self._stop_watching()  # of a training that did not end
        check_scope(model, self.scope)
        self._transaction_of(runner).set_modes()
        runner.model.train()  # the library's own train() says what is frozen
        # With diff_rank_seed every rank has another; branches must be the same.
        self.seed = from_rank_0(runner.seed if self.seed is None else self.seed)
        self._fit_schedule(runner)
        transaction = self._transaction_of(runner)
        transaction.batch_sampler = batch_sampler_before(runner.train_dataloader)
        for path, handover in handovers_in(model).items():
            runner.logger.info(f'DyRep: {handover.carry_out(transaction, path)}')
        to_start = self.structure is not None and not self._started
        if self.calibration_batches and (to_start or self.schedule.interval is not None):
            check_batches(runner)
        if getattr(SCORES[self.metric], 'needs_batches', False) and not can_draw(runner):
            raise DyRepError(
                f'metric={self.metric} needs batches of its own, which an IterableDataset does not '
                'give: choose another metric'
            )
        if to_start:
            start_from(
                transaction, self.structure, self.scope, self.seed, 0, compensate=self.compensate
            )
            runner.logger.info(f'DyRep: starts with {len(blocks_of(model))} blocks')
        self._started = True
        self._handles = [model.register_forward_pre_hook(lambda *_: transaction.freezes.follow())]
        self._steps = StepTimes(self._record.timing)
        # Where weights with branches came without the norms that follow them.
        self._handles += watch_training(
            model, lambda: transaction.unwatched, transaction.learn_norms
        )
        if self.schedule.interval is None:
            self._watch_costs(model)
            return
        trouble = check_that_something_can_change(model, self.scope, self.max_depth, self.branches)
        self._warn(runner, trouble)
        self.rule.watch(model)
        scores = self._record.scores
        if scores is not None and not self.rule.load_state_dict(scores):
            runner.logger.warning(
                'DyRep: the checkpoint scored other operations or by another metric; the '
                'interval starts without its scores'
            )
        if self._record.sizes is None or self._record.images is None:
            self._sizes = SizeWatch(model)
        else:
            self._learn_costs(transaction)
        self._know_costs(model)
        self._cost = UpdateCost(runner, self.schedule, self.calibration_batches)
        self._warn(runner, self._cost.foresee())
        on_step = partial(self._on_step, runner)
        optimizer = cast(torch.optim.Optimizer, optimizer_of(runner))
        self._handles.append(optimizer.register_step_pre_hook(on_step))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._steps.begin()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        self._steps.end()
        self._record.iteration = runner.iter + 1
        self._look_at_loss(runner, outputs)
        if self._cost is not None:
            self._cost.trained += 1
        if self._sizes is not None:
            watch, record = self._sizes, self._record
            seen = watch.finish(), watch.images, watch.autocast
            record.sizes, record.images, record.autocast = from_rank_0(seen)
            self._sizes = None
            self._know_costs(unwrap(runner.model))
            self._learn_costs(self._transaction_of(runner))
        if not can_draw(runner):
            self._transaction_of(runner).last_batch = data_batch
        if not self.schedule.by_epoch:
            self._update_if_due(runner, runner.iter + 1)
        elif not self.end_of_epoch(runner.train_dataloader, batch_idx):
            # One that an epoch's end in the middle of gradient accumulation has left.
            self._update_if_due(runner, runner.epoch)

    def after_train_epoch(self, runner: Runner) -> None:
        if self._looks_at_loss(runner):
            self._losses.tell(runner.logger)  # before a checkpoint is saved
        if self.schedule.by_epoch:
            self._update_if_due(runner, runner.epoch + 1)

    def before_val_epoch(self, runner: Runner) -> None:
        # Before an EMAHook swaps weights in; kernels merge after it, at the first batch.
        self._inference.close()
        self._inference.enter_context(kernels_kept(unwrap(runner.model)))

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self._inference.close()

    def before_test_epoch(self, runner: Runner) -> None:
        self.before_val_epoch(runner)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self._inference.close()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._record.structure = structure_of(unwrap(runner.model))
        self._record.left_alone = left_alone(unwrap(runner.model))
        self._record.scores = self.rule.state_dict()
        self._record.timing = self._steps.timing(self._record.is_plain)
        self._record.branch_norm = self.branch_norm
        self._record.to_checkpoint(checkpoint)
        if runner.hooks[-1] is not self._last:
            # The walk over the hooks that has come here goes on to it.
            if self._last in runner.hooks:
                runner.hooks.remove(self._last)
            runner.register_hook(self._last)

    def _to_stock(self, runner: Runner, checkpoint: dict) -> None:
        transaction = self._transaction_of(runner)
        biased = to_stock(checkpoint, transaction.model, transaction.norms)
        if new := [path for path in biased if path not in self._told]:
            self._told.update(new)
            self._warn(
                runner,
                f'checkpoints have a bias for {", ".join(new)} that the plain model has not: no BN '
                'is known that takes all of the output, so the plain config must give one (bias)',
            )

    def after_train(self, runner: Runner) -> None:
        self._record.scores = self.rule.state_dict()  # where another train() goes on
        self._record.timing = self._steps.timing(self._record.is_plain)
        runner.logger.info(f'DyRep: {self._record.summary()}')
        self._stop_watching()
        if self._looks_at_loss(runner):
            self._losses.tell(runner.logger)

    def _stop_watching(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # What happens at them.

    def _transaction_of(self, runner: Runner) -> Transaction:
        if self._transaction is None:
            self._transaction = Transaction(
                runner,
                init_scale=self.init_scale,
                calibration_batches=self.calibration_batches,
                recompute=self.recompute,
                branch_norm=self.branch_norm,
                copies=self._find_copies(runner),
            )
        return self._transaction

    def _prepare(self, block: Block) -> None:
        block.set_branch_norm(self.branch_norm, block.training)

    def _learn_costs(self, transaction: Transaction) -> None:
        record = self._record
        if record.images is not None and record.sizes is not None:  # else no layer was called
            self.costs.learn(record.sizes, record.images, record.autocast, transaction.copies)

    def _find_copies(self, runner: Runner) -> Copies:
        if self._copies is None:  # later the values of copies differ
            self._copies = find_copies(unwrap(runner.model), self.scope)
        return self._copies

    def _fit_schedule(self, runner: Runner) -> None:
        self.schedule.fit(runner, self.calibration_batches)
        if self._record.by_epoch != self.schedule.by_epoch:
            # A new run, or one resumed from a plain checkpoint or with another unit.
            self._record.by_epoch = self.schedule.by_epoch
            self._record.last = self.schedule.now(runner) - 1

    def _on_step(
        self, runner: Runner, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict
    ) -> None:
        # Here gradients are complete: accumulated, averaged over ranks, and unscaled.
        if not self.schedule.is_over(runner, self._record.last):
            self.rule.observe(optimizer)

    def _update_if_due(self, runner: Runner, passed: int) -> None:
        """Update, if there is reason to, with ``passed`` epochs or iterations complete."""
        if not self.schedule.is_due(runner, self._record.last, passed):
            return
        if self._losses.tell(runner.logger):
            return  # the weights may be lost; if the step was skipped, another comes
        start = time.monotonic()
        self.update(runner)
        self._record.last = passed
        if self._cost is not None and self.journal[-1].grown:
            self._warn(runner, self._cost.measure(time.monotonic() - start))

    def _warn(self, runner: Runner, message: str | None) -> None:
        if message is not None:
            runner.logger.warning(f'DyRep: {message}')

    def _over_losses(self, measure: Callable[[Tensor], Tensor]) -> Tensor | None:
        """See :data:`dyrep_mm.evolution.saliency.OverLosses`."""
        transaction = cast(Transaction, self._transaction)
        runner, before = transaction.runner, transaction.batch_sampler
        seed = make_seed(self.seed, self._record.updates, 'losses')
        return mean_over_losses(runner, measure, seed, before)

    def _looks_at_loss(self, runner: Runner) -> bool:
        return self._losses.stop or not self.schedule.is_over(runner, self._record.last)

    def _look_at_loss(self, runner: Runner, outputs: dict | None) -> None:
        if not self._looks_at_loss(runner):
            return
        self._losses.see((outputs or {}).get('loss'), runner.iter + 1)
        # On an accelerator reading waits, and several ranks must agree: once in a while is enough.
        if self._losses.is_free or self.every_n_train_iters(runner, 50):
            self._losses.tell(runner.logger)

    def update(self, runner: Runner) -> Plan:
        """One update of Algorithm 1 (lines 6 to 11), behind an optimizer step, the same on every
        rank."""
        record, transaction = self._record, self._transaction_of(runner)
        begin = time.perf_counter()
        before = self._steps.close(record.is_plain)
        record.updates += 1
        if self.remeasure and record.updates % self.remeasure == 0:
            transaction.remeasure(self.seed, record.updates)
        generator = make_generator(self.seed, record.updates, 'scores')
        plan = from_rank_0(self.rule.decide(transaction.model, generator))
        plan = own_part(plan, transaction.copies)
        if plan.remark is not None and not record.warned:
            record.warned = True
            runner.logger.warning(f'DyRep: {plan.remark}')
        plan = transaction.change(plan, self.seed, record.updates)
        entry = self._entry(plan, transaction.model, self.schedule.now(runner))
        seen = record.iteration / per_epoch if (per_epoch := iterations_per_epoch(runner)) else None
        entry = replace(entry, epoch=seen, timing=self._steps.updated(time.perf_counter() - begin))
        record.journal.append(entry)
        runner.logger.info(f'DyRep {entry.summary(record.plain, before.plain_step)}')
        tell_backends(runner, entry, blocks_of(transaction.model))
        self.rule.watch(transaction.model)
        return plan

    def _entry(self, plan: Plan, model: nn.Module, now: int) -> Entry:
        blocks, cost = blocks_of(model).values(), cost_of(model, self._record.sizes)
        return Entry(
            update=self._record.updates,
            unit=self.schedule.unit,
            at=now,
            grown=plan.grow,
            pruned=plan.prune,
            scores=plan.scores,
            importances=plan.importances,
            blocks=len(blocks),
            branches=sum(len(block.added) for block in blocks),
            parameters=cost.parameters,
            multiply_adds=cost.multiply_adds,
            cost_ratio=self.costs.of(model)() if self.costs.known else None,
            reasons=plan.reasons,
            iteration=self._record.iteration,
            average_parameters=self._record.average('parameters'),
            average_multiply_adds=self._record.average('multiply_adds'),
        )

    def _watch_costs(self, model: nn.Module) -> None:
        if self._record.sizes is None:
            self._sizes = SizeWatch(model)
        self._know_costs(model)

    def _know_costs(self, model: nn.Module) -> None:
        sizes = self._record.sizes
        self._record.know_costs(cost_of(model, sizes), plain_cost_of(model, sizes))
