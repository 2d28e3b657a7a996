"""The hook of a run whose model changes its structure: what must follow, whatever the rule."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import nn

from dyrep_mm.engine.batches import batch_sampler_before, can_draw, check_batches
from dyrep_mm.engine.channels import tell_backends
from dyrep_mm.engine.checkpoint import check_resumable, structure_in, weights_of
from dyrep_mm.engine.losses import LossWatch
from dyrep_mm.engine.options import (
    check_count,
    check_flag,
    check_number,
    check_prefixes,
    check_seed,
)
from dyrep_mm.engine.pretrained import handovers_in
from dyrep_mm.engine.runner import (
    choose_resume,
    from_rank_0,
    make_generator,
    optimizer_of,
    refuse_unsupported,
    unwrap,
)
from dyrep_mm.engine.schedule import Schedule, iterations_per_epoch
from dyrep_mm.engine.start import Reception, start_from
from dyrep_mm.engine.stock import LastHook, from_stock, norms_in, to_stock
from dyrep_mm.engine.times import StepTimes
from dyrep_mm.engine.transaction import Transaction
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Entry, Record
from dyrep_mm.evolution.rule import Rule
from dyrep_mm.reparam.block import Block, kernels_kept
from dyrep_mm.reparam.norms import check_branch_norm
from dyrep_mm.surgery.candidates import leave_alone, left_alone
from dyrep_mm.surgery.charge import Costs
from dyrep_mm.surgery.copies import Copies, find_copies, own_part
from dyrep_mm.surgery.cost import SizeWatch, cost_of, plain_cost_of
from dyrep_mm.surgery.gates import closed_in
from dyrep_mm.surgery.outputs import watch_training
from dyrep_mm.surgery.structure import Plan, structure_of
from dyrep_mm.surgery.tree import blocks_of, check_scope, get_module


class StructureHook(Hook):
    """Carries out what a rule decides, and keeps the rest of a run in step.

    A subclass gives the rule (:meth:`make_rule`), a schedule, and what a run starts with
    (:meth:`start_structure`). Optimizer, EMA copies, DDP, checkpoints, resumes, the journal and its
    costs are here.

    Args:
        schedule: When updates happen.
        scope: Dotted prefix, or several, inside which the structure may change.
        init_scale: Starting importance of a new branch relative to its conv.
        compensate: Whether the convs take the kernels of the branches that a run starts with out of
            their own.
        calibration_batches: Training batches for the BN statistics of new branches.
        seed: Of new branches and calibration; by default the runner's.
        recompute: Compute branch outputs again in the backward instead of keeping them.
        branch_norm: What the norms of branches normalise with, see docs/norms.md.
        remeasure: Before every so many-th update all blocks are measured again; 0 never does it.
        stop_on_invalid_loss: End the run at a loss that is NaN or infinite.

    Attributes:
        rule: Decides.
        costs: What structures cost in this training.

    Raises:
        DyRepError: an option has no meaning.
    """

    # Before every EMAHook, which must find the restored structure, and before what saves.
    priority = 'HIGH'

    #: What a person calls what the rule does.
    method = 'DyRep'

    #: What to warn of where a resumed run cannot go on with the state of its rule.
    other_scores = (
        'the checkpoint scored other operations or by another metric; the interval starts without '
        'its scores'
    )

    def __init__(
        self,
        schedule: Schedule,
        *,
        scope: str | Sequence[str] | None,
        init_scale: float,
        compensate: bool,
        calibration_batches: int,
        seed: int | None,
        recompute: bool,
        branch_norm: str,
        remeasure: int,
        stop_on_invalid_loss: bool,
    ):
        self.schedule = schedule
        self.scope = check_prefixes(scope)
        self.init_scale = check_number('init_scale', init_scale)
        self.compensate = check_flag('compensate', compensate)
        self.calibration_batches = check_count('calibration_batches', calibration_batches, 0)
        self.seed = check_seed(seed)
        self.recompute = check_flag('recompute', recompute)
        self.branch_norm = check_branch_norm(branch_norm)
        self.remeasure = check_count('remeasure', remeasure, 0)
        self.costs = Costs(self._prepare)
        self._losses = LossWatch(check_flag('stop_on_invalid_loss', stop_on_invalid_loss))
        self._started = False
        self._reception = Reception()
        self._record = Record()
        self._steps = StepTimes(self._record.timing)
        self._transaction: Transaction | None = None
        self._sizes: SizeWatch | None = None
        self._handles: list[Any] = []
        self._copies: Copies | None = None
        self._inference = ExitStack()
        self._last = LastHook(self._to_stock)
        self._told: set[str] = set()  # convs with a bias that the stock model has not
        self.rule = self.make_rule()

    def make_rule(self) -> Rule:
        """The rule that decides; a subclass may return another one."""
        raise NotImplementedError

    def start_structure(self, runner: Runner) -> Any:
        """What the model is given before the first iteration, see
        :func:`dyrep_mm.engine.start.start_from`; None if it has what it shall have."""
        raise NotImplementedError

    @property
    def journal(self) -> list[Entry]:
        """One entry for each update of the run so far."""
        return self._record.journal

    def check_changes(self, runner: Runner) -> None:
        """Raise ``DyRepError`` if no update could ever change the model."""

    def watch(self, runner: Runner, scores: Mapping[str, Any] | None = None) -> None:
        """Let the rule observe the model in its present structure.

        Args:
            runner: Holds the model.
            scores: Of a checkpoint, to continue with.
        """
        self.rule.watch(unwrap(runner.model))
        if scores is not None and not self.rule.load_state_dict(scores):
            self._warn(runner, self.other_scores)

    # The moments of a run, in order.

    def before_run(self, runner: Runner) -> None:
        refuse_unsupported(runner, type(self).__name__)
        self._refuse_others(runner)
        choose_resume(runner)
        self._transaction = None  # averages are made anew after this
        self._find_copies(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        refuse_unsupported(runner, type(self).__name__)  # FlexibleRunner loads before before_run
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
                self.watch(runner)

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
        if closed := closed_in(model):  # the file is of a search that goes on no more
            transaction.change(own_part(Plan(prune=closed), transaction.copies))
        start = self.start_structure(runner)
        if self.calibration_batches and (start is not None or self.schedule.changes):
            check_batches(runner)
        if start is not None:
            start_from(transaction, start, self.scope, self.seed, 0, compensate=self.compensate)
            runner.logger.info(f'DyRep: starts with {len(blocks_of(model))} blocks')
        self._started = True
        self._handles = [model.register_forward_pre_hook(lambda *_: transaction.freezes.follow())]
        self._steps = StepTimes(self._record.timing)
        # Where weights with branches came without the norms that follow them.
        self._handles += watch_training(
            model, lambda: transaction.unwatched, transaction.learn_norms
        )
        if not self.schedule.changes:
            self._watch_costs(model)
            return
        self.check_changes(runner)
        self.watch(runner, self._record.scores)
        if self._record.sizes is None or self._record.images is None:
            self._sizes = SizeWatch(model)
        else:
            self._learn_costs(transaction)
        self._know_costs(model)
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
        self._record.method = self.method
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

    def _refuse_others(self, runner: Runner) -> None:
        """Raise ``DyRepError`` for hooks of this config that would get in the way."""
        names = [type(hook).__name__ for hook in runner.hooks if isinstance(hook, StructureHook)]
        if len(set(names)) > 1:
            raise DyRepError(
                f'a run has one hook that changes the structure, and this config has '
                f'{" and ".join(dict.fromkeys(names))}: take out all but one'
            )
        if len(names) > 1:
            raise DyRepError(
                f'a run has one {names[0]}, and this config has several: set its options in one '
                'place (where a base has default_hooks.dyrep, override keys of that instead of '
                'adding to custom_hooks), and give all prefixes to one scope'
            )
        for hook in runner.hooks:
            if isinstance(hook, EMAHook) and runner.hooks.index(hook) < runner.hooks.index(self):
                raise DyRepError(f'{names[0]} must have a higher priority than EMAHook')

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
        self._record.last = passed
        self.update(runner)

    def _warn(self, runner: Runner, message: str | None) -> None:
        if message is not None:
            runner.logger.warning(f'DyRep: {message}')

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
        """Carry out what the rule decides, behind an optimizer step, the same on every rank."""
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
        self.watch(runner)
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
