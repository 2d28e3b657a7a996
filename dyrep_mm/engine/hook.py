"""``DyRepHook``: Algorithm 1 of the paper inside an mmengine training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn

from dyrep_mm.engine.checkpoint import check_keys, load_structure
from dyrep_mm.engine.pretrained import Handover, handovers_in
from dyrep_mm.engine.runner import (
    choose_resume,
    from_rank_0,
    make_generator,
    optimizer_of,
    refuse_unsupported,
    unwrap,
)
from dyrep_mm.engine.transaction import Transaction
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Entry, Record
from dyrep_mm.evolution.rule import DyRepRule, Rule
from dyrep_mm.evolution.saliency import check_metric
from dyrep_mm.registry import HOOKS
from dyrep_mm.reparam.block import kernels_kept
from dyrep_mm.reparam.branches import check_operations
from dyrep_mm.surgery.candidates import candidates, preset, survey
from dyrep_mm.surgery.cost import SizeWatch, multiply_adds
from dyrep_mm.surgery.rewire import INIT_SCALE, absent, structure_errors
from dyrep_mm.surgery.structure import MAX_DEPTH, PRESETS, Plan, structure_of
from dyrep_mm.surgery.tree import Scope, blocks_of, check_scope, get_module


@HOOKS.register_module()
class DyRepHook(Hook):
    """Grows the convs that matter into multi-branch blocks and prunes branches that do not.

    Every training iteration is scored between backward and optimizer step. Every ``interval``
    the best operation grows and weak branches go; optimizer, EMA copies, DDP and checkpoints
    follow. The paper's numbers are the defaults.

    Args:
        interval: t of Algorithm 1, epochs or iterations between two updates; None never
            changes the structure.
        by_epoch: Unit of ``interval`` and ``end``; by default that of the training loop.
        end: No change of structure after this epoch or iteration, and no scoring (A.4).
        scope: Dotted prefix, or several, inside which convs may grow.
        metric: Saliency score: ``synflow`` (Eq. 4), ``snip``, ``grad_norm``, ``random``,
            ``vote`` (A.3).
        grow_per_update: How many of the best operations grow at an update (Algorithm 1: 1).
        branches: What a grown operation gets, as far as it fits (Table 1: all seven).
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

    Raises:
        DyRepError: an option has no meaning; at the start of training, the runner, the scope
            or the loop does not allow what the options ask for.
    """

    # Before every EMAHook, which must find the restored structure, and before what saves.
    priority = 'HIGH'

    def __init__(
        self,
        interval: int | None = 5,
        by_epoch: bool | None = None,
        end: int | None = None,
        scope: str | Sequence[str] = 'backbone',
        metric: str = 'synflow',
        grow_per_update: int = 1,
        branches: Sequence[str] | None = None,
        init_scale: float = INIT_SCALE,
        calibration_batches: int = 20,
        prune: bool = True,
        prune_threshold: float = 0.02,
        max_depth: int = 2,
        structure: str | Mapping[str, Sequence[str]] | None = None,
        seed: int | None = None,
        recompute: bool = False,
    ):
        check_metric(metric)
        if branches is not None:
            check_operations(branches)
        for name, value, least in (
            ('interval', interval, 1),
            ('end', end, 0),
            ('grow_per_update', grow_per_update, 0),
            ('calibration_batches', calibration_batches, 0),
            ('max_depth', max_depth, 1),
        ):
            optional = name in ('interval', 'end')
            if not (optional and value is None) and (type(value) is not int or value < least):
                raise DyRepError(f'{name} must be an integer of at least {least}, got {value!r}')
        if max_depth > MAX_DEPTH:
            raise DyRepError(f'max_depth must be at most {MAX_DEPTH}, got {max_depth}')
        for name, value in (('init_scale', init_scale), ('prune_threshold', prune_threshold)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise DyRepError(f'{name} must be a number of at least 0, got {value!r}')
        self.interval = interval
        self.by_epoch = by_epoch
        self.end = end
        self.scope: Scope = scope if isinstance(scope, str) else list(scope)
        self.metric = metric
        self.grow_per_update = grow_per_update
        self.branches = None if branches is None else list(branches)
        self.init_scale = init_scale
        self.calibration_batches = calibration_batches
        self.prune_threshold = prune_threshold if prune else None
        self.max_depth = max_depth
        self.structure = structure
        self.seed = seed
        self.recompute = bool(recompute)
        self._restored = False
        self._record = Record()
        self._transaction: Transaction | None = None
        self._sizes: SizeWatch | None = None
        self._handle: Any = None
        self._inference = ExitStack()
        self.rule = self.make_rule()

    def make_rule(self) -> Rule:
        """The rule that decides; a subclass may return another one."""
        return DyRepRule(
            self.metric,
            scope=self.scope,
            branches=self.branches,
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
        for hook in runner.hooks:
            if isinstance(hook, EMAHook) and runner.hooks.index(hook) < runner.hooks.index(self):
                raise DyRepError('DyRepHook must have a higher priority than EMAHook')
        choose_resume(runner)
        self._transaction = None  # averages are made anew after this

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        refuse_unsupported(runner)  # FlexibleRunner loads before before_run
        record, model = Record.from_checkpoint(checkpoint), unwrap(runner.model)
        if record.structure:
            self._transaction_of(runner).restore(record.structure)
        # A resumed run had its start already, also if it has not grown yet.
        self._restored = bool(record.structure) or (runner._resume and record.structure is not None)
        for path, handover in handovers_in(model).items():
            handover.finish(get_module(model, path))  # the weights that are loaded last win
        check_keys(model, checkpoint, runner._resume)
        if runner._resume:
            self._record = record

    def before_train(self, runner: Runner) -> None:
        model = unwrap(runner.model)
        check_scope(model, self.scope)
        runner.model.train()  # the library's own train() says what is frozen
        # With diff_rank_seed every rank has another; branches must be the same.
        self.seed = from_rank_0(runner.seed if self.seed is None else self.seed)
        self._choose_unit(runner)
        for path, handover in handovers_in(model).items():
            self._take_over(runner, path, handover)
        if self.structure is not None and not self._restored:
            self._start(runner)
        if self.interval is None:
            return
        self._check_that_something_can_change(model)
        self.rule.watch(model)
        scores = self._record.scores
        if scores is not None and not self.rule.load_state_dict(scores):
            runner.logger.warning(
                'DyRep: the checkpoint scored other operations or by another metric; the '
                'interval starts without its scores'
            )
        if self._record.sizes is None:
            self._sizes = SizeWatch(model)
        self._handle = optimizer_of(runner).register_step_pre_hook(self._on_step)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        self._check_loss(runner, outputs)
        if self._sizes is not None:
            self._record.sizes = from_rank_0(self._sizes.finish())
            self._sizes = None
        if not self.by_epoch:
            self._update_if_due(runner, runner.iter + 1, runner.max_iters)

    def after_train_epoch(self, runner: Runner) -> None:
        if self.by_epoch:
            self._update_if_due(runner, runner.epoch + 1, runner.max_epochs)

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
        self._record.scores = self.rule.state_dict()
        self._record.to_checkpoint(checkpoint)

    def after_train(self, runner: Runner) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    # What happens at them.

    def _transaction_of(self, runner: Runner) -> Transaction:
        if self._transaction is None:
            self._transaction = Transaction(
                runner,
                init_scale=self.init_scale,
                calibration_batches=self.calibration_batches,
                recompute=self.recompute,
            )
        return self._transaction

    def _choose_unit(self, runner: Runner) -> None:
        epochs = isinstance(runner.train_loop, EpochBasedTrainLoop)
        if self.by_epoch is None:
            self.by_epoch = epochs
        if self.by_epoch and not epochs:
            raise DyRepError(
                'by_epoch=True needs a training loop that counts epochs, '
                f'got {type(runner.train_loop).__name__}: set by_epoch=False'
            )
        limit = runner.max_epochs if self.by_epoch else runner.max_iters
        if self.interval is not None and self.interval >= limit:
            raise DyRepError(
                f'interval={self.interval} is never reached: training ends after {limit} '
                f'{self._unit}s'
            )
        if self._record.by_epoch != self.by_epoch:
            # A new run, or one resumed from a plain checkpoint or with another unit.
            self._record.by_epoch = self.by_epoch
            self._record.last = runner.epoch if self.by_epoch else runner.iter

    @property
    def _unit(self) -> str:
        return 'epoch' if self.by_epoch else 'iteration'

    def _check_that_something_can_change(self, model: nn.Module) -> None:
        if blocks_of(model) or candidates(model, self.scope, self.max_depth, self.branches):
            return
        reasons = [f'{p}: {why}' for p, why in survey(model, self.scope, self.branches).items()]
        raise DyRepError(
            f'no conv in scope {self.scope!r} can grow'
            + (f' ({"; ".join(reasons[:3])})' if reasons else ': it has no conv above 1x1')
        )

    def _on_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # Here gradients are complete: accumulated, averaged over ranks, and unscaled.
        if not self._ended:
            self.rule.observe(optimizer)

    @property
    def _ended(self) -> bool:
        return self.end is not None and self._due > self.end

    @property
    def _due(self) -> int:
        """Epoch or iteration of the next update: the next multiple of ``interval``."""
        return (self._record.last // self.interval + 1) * self.interval

    def _update_if_due(self, runner: Runner, now: int, limit: int) -> None:
        if self.interval is None or self._ended or (self.end is not None and now > self.end):
            return
        # In the middle of gradient accumulation an update waits for the optimizer step.
        if self._due <= now < limit and runner.optim_wrapper.should_update():
            self.update(runner, now)

    def _check_loss(self, runner: Runner, outputs: dict | None) -> None:
        loss = (outputs or {}).get('loss')
        if not isinstance(loss, Tensor):
            return
        # Reading a loss on an accelerator waits for it: there it is read once in a while.
        if loss.device.type != 'cpu' and not self.every_n_train_iters(runner, 50):
            return
        if not math.isfinite(value := loss.item()):
            raise DyRepError(
                f'the loss is {value} at iteration {runner.iter + 1}: '
                'training cannot go on from a loss that is not finite'
            )

    def update(self, runner: Runner, now: int) -> Plan:
        """One update of Algorithm 1 (lines 6 to 11), the same on every rank."""
        record, transaction = self._record, self._transaction_of(runner)
        record.updates += 1
        generator = make_generator(self.seed, record.updates, 'scores')
        plan = from_rank_0(self.rule.decide(transaction.model, generator))
        if plan.remark is not None and not record.warned:
            record.warned = True
            runner.logger.warning(f'DyRep: {plan.remark}')
        transaction.change(plan, self.seed, record.updates)
        record.last = now
        record.journal.append(self._entry(plan, transaction.model))
        runner.logger.info(f'DyRep {record.journal[-1].summary()}')
        self.rule.watch(transaction.model)
        return plan

    def _entry(self, plan: Plan, model: nn.Module) -> Entry:
        blocks, sizes = blocks_of(model).values(), self._record.sizes
        return Entry(
            update=self._record.updates,
            unit=self._unit,
            at=self._record.last,
            grown=plan.grow,
            pruned=plan.prune,
            scores=plan.scores,
            importances=plan.importances,
            blocks=len(blocks),
            branches=sum(len(block.added) for block in blocks),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            multiply_adds=None if sizes is None else multiply_adds(model, sizes),
        )

    def _start(self, runner: Runner) -> None:
        transaction = self._transaction_of(runner)
        model = transaction.model
        if isinstance(self.structure, str) and self.structure in PRESETS:
            structure = preset(model, self.structure, scope=self.scope)
        else:
            structure = load_structure(self.structure)
        with structure_errors():
            transaction.change(Plan(grow=absent(model, structure)), self.seed, 0)
        runner.logger.info(f'DyRep: starts with {len(blocks_of(model))} blocks')

    def _take_over(self, runner: Runner, path: str, handover: Handover) -> None:
        """Do what :class:`DyRepPretrained` has left to do for the module at ``path``."""
        transaction = self._transaction_of(runner)
        module = get_module(transaction.model, path)
        below = f'{path}.' if path else ''
        transaction.restore({below + p: names for p, names in handover.structure.items()})
        module.load_state_dict(handover.state)
        handover.finish(module)
        runner.logger.info(
            f'DyRep: {path or "the model"} starts from {handover.checkpoint} with '
            f'{len(blocks_of(module))} blocks'
            + ''.join(
                f'; {below}{p}: {", ".join(names)} not exact here, absorbed by the conv'
                for p, names in handover.absorbed.items()
            )
        )
