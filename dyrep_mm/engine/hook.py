"""``DyRepHook``: Algorithm 1 of the paper inside an mmengine training run."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

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
from dyrep_mm.engine.checkpoint import (
    check_resumable,
    structure_in,
    weights_of,
)
from dyrep_mm.engine.losses import LossWatch
from dyrep_mm.engine.options import (
    check_branches,
    check_count,
    check_flag,
    check_number,
    check_pick,
    check_prefixes,
    check_score,
    check_seed,
    check_start,
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
from dyrep_mm.engine.schedule import LEFT_OUT, Schedule, UpdateCost
from dyrep_mm.engine.start import Reception, check_that_something_can_change, start_from
from dyrep_mm.engine.transaction import Transaction
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Entry, Record
from dyrep_mm.evolution.rule import DyRepRule, Rule
from dyrep_mm.evolution.saliency import SCORES
from dyrep_mm.registry import HOOKS
from dyrep_mm.reparam.block import kernels_kept
from dyrep_mm.surgery.candidates import (
    leave_alone,
    left_alone,
)
from dyrep_mm.surgery.copies import Copies, find_copies, own_part
from dyrep_mm.surgery.cost import SizeWatch, multiply_adds
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
    follow. The paper's numbers are the defaults.

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
        max_depth: How deep blocks may nest; 1 is no nesting.
        structure: What to start from: ``'dbb'``, ``'dbb7'``, ``'repvgg'``, a Structure file
            or a checkpoint.
        seed: Of new branches and calibration; by default the runner's.
        recompute: Compute the outputs of branches again in the backward instead of keeping
            them: training takes less memory and more time.
        stop_on_invalid_loss: End the run at a loss that is NaN or infinite. By default the log
            tells of the first one, and updates wait for a loss that is finite.

    Raises:
        DyRepError: an option has no meaning; at the start of training, the runner, the scope
            or the loop does not allow what the options ask for.
    """

    # Before every EMAHook, which must find the restored structure, and before what saves.
    priority = 'HIGH'

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
        max_depth: int = 2,
        structure: str | os.PathLike | Mapping[str, Sequence[str]] | None = None,
        seed: int | None = None,
        recompute: bool = False,
        stop_on_invalid_loss: bool = False,
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
        self.max_depth = check_count('max_depth', max_depth, 1, MAX_DEPTH)
        self.structure = check_start(structure)
        self.seed = check_seed(seed)
        self.recompute = check_flag('recompute', recompute)
        self._losses = LossWatch(check_flag('stop_on_invalid_loss', stop_on_invalid_loss))
        self._started = False
        self._reception = Reception()
        self._record = Record()
        self._transaction: Transaction | None = None
        self._sizes: SizeWatch | None = None
        self._cost: UpdateCost | None = None
        self._handles: list[Any] = []
        self._copies: Copies | None = None
        self._inference = ExitStack()
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
        structure, weights = structure_in(checkpoint), weights_of(checkpoint)
        # Once there are weights, load_checkpoint is a call of the user's own.
        resumes = runner._resume and not runner._has_loaded
        if resumes:
            check_resumable(checkpoint)
            self._record = Record.from_checkpoint(checkpoint)
        else:
            self._record.scores = None
        checkpoint.setdefault('state_dict', OrderedDict(weights))  # where EMAHook looks for it
        transaction = self._transaction_of(runner)
        model = transaction.model

        def received(changed: bool) -> None:
            # A resumed run had its start already, also if it has not grown yet.
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
            start_from(transaction, self.structure, self.scope, self.seed, 0)
            runner.logger.info(f'DyRep: starts with {len(blocks_of(model))} blocks')
        self._started = True
        self._handles = [model.register_forward_pre_hook(lambda *_: transaction.freezes.follow())]
        if self.schedule.interval is None:
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
        if self._record.sizes is None:
            self._sizes = SizeWatch(model)
        self._cost = UpdateCost(runner, self.schedule, self.calibration_batches)
        self._warn(runner, self._cost.foresee())
        on_step = partial(self._on_step, runner)
        self._handles.append(optimizer_of(runner).register_step_pre_hook(on_step))

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        self._look_at_loss(runner, outputs)
        if self._cost is not None:
            self._cost.trained += 1
        if self._sizes is not None:
            self._record.sizes = from_rank_0(self._sizes.finish())
            self._sizes = None
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
        self._record.to_checkpoint(checkpoint)

    def after_train(self, runner: Runner) -> None:
        self._record.scores = self.rule.state_dict()  # where another train() goes on
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
                copies=self._find_copies(runner),
            )
        return self._transaction

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
        if self.journal[-1].grown:
            self._warn(runner, self._cost.measure(time.monotonic() - start))

    def _warn(self, runner: Runner, message: str | None) -> None:
        if message is not None:
            runner.logger.warning(f'DyRep: {message}')

    def _over_losses(self, measure: Callable[[Tensor], Tensor]) -> Tensor | None:
        """See :data:`dyrep_mm.evolution.saliency.OverLosses`."""
        runner, before = self._transaction.runner, self._transaction.batch_sampler
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
        record.updates += 1
        generator = make_generator(self.seed, record.updates, 'scores')
        plan = from_rank_0(self.rule.decide(transaction.model, generator))
        plan = own_part(plan, transaction.copies)
        if plan.remark is not None and not record.warned:
            record.warned = True
            runner.logger.warning(f'DyRep: {plan.remark}')
        plan = transaction.change(plan, self.seed, record.updates)
        record.journal.append(self._entry(plan, transaction.model, self.schedule.now(runner)))
        runner.logger.info(f'DyRep {record.journal[-1].summary()}')
        self.rule.watch(transaction.model)
        return plan

    def _entry(self, plan: Plan, model: nn.Module, now: int) -> Entry:
        blocks, sizes = blocks_of(model).values(), self._record.sizes
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
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            multiply_adds=None if sizes is None else multiply_adds(model, sizes),
        )
