"""``DyRepHook``: Algorithm 1 of the paper inside an mmengine training run."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn

from dyrep_mm.engine.batches import calibration_batches, calibration_forward, random_state_kept
from dyrep_mm.engine.checkpoint import check_keys, load_structure
from dyrep_mm.engine.pretrained import Start, starts_in
from dyrep_mm.engine.runner import (
    averaged_models,
    broadcast_parameters,
    choose_resume,
    from_rank_0,
    make_generator,
    make_seed,
    optimizer_of,
    param_settings,
    refresh_average,
    refuse_unsupported,
    rewrap,
    unwrap,
)
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Record
from dyrep_mm.evolution.rule import make_plan
from dyrep_mm.evolution.saliency import Saliency, check_metric
from dyrep_mm.registry import HOOKS
from dyrep_mm.reparam.branches import check_operations, fitting
from dyrep_mm.reparam.geometry import ConvSpec
from dyrep_mm.surgery.calibration import calibrate
from dyrep_mm.surgery.candidates import candidates, preset, survey
from dyrep_mm.surgery.optimizer import check_optimizer, sync_optimizer
from dyrep_mm.surgery.rewire import apply_structure, insert, mirror, prune
from dyrep_mm.surgery.structure import MAX_DEPTH, PRESETS, Plan, Structure, structure_of
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
        init_scale: float = 0.01,
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
        self._saliency: Saliency | None = None
        self._scored: dict[str, Tensor] = {}
        self._handle: Any = None

    # The moments of a run, in order.

    def before_run(self, runner: Runner) -> None:
        refuse_unsupported(runner)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook) and runner.hooks.index(hook) < runner.hooks.index(self):
                raise DyRepError('DyRepHook must have a higher priority than EMAHook')
        choose_resume(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        refuse_unsupported(runner)  # FlexibleRunner loads before before_run
        model = unwrap(runner.model)
        record = Record.from_checkpoint(checkpoint)
        if record.structure:
            self._apply(runner, record.structure)
        # A resumed run had its start already, also if it has not grown yet.
        self._restored = bool(record.structure) or (runner._resume and record.structure is not None)
        for path, start in starts_in(model).items():
            start.done(get_module(model, path))  # what is loaded last wins
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
        for path, start in starts_in(model).items():
            self._take_over(runner, path, start)
        if self.structure is not None and not self._restored:
            self._start(runner, model)
        if self.interval is None:
            return
        if not candidates(model, self.scope, self.max_depth) and not blocks_of(model):
            reasons = [f'{path}: {why}' for path, why in survey(model, self.scope).items()]
            raise DyRepError(
                f'no conv in scope {self.scope!r} can grow'
                + (f' ({"; ".join(reasons[:3])})' if reasons else ': it has no conv above 1x1')
            )
        self._watch(runner)
        if (scores := self._record.scores) and self._saliency is not None:
            if not self._saliency.load_state_dict(scores):
                runner.logger.warning(
                    'DyRep: the checkpoint scored other operations or by another metric; the '
                    'interval starts without its scores'
                )
        self._handle = optimizer_of(runner).register_step_pre_hook(self._on_step)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        self._check_loss(runner, outputs)
        if not self.by_epoch:
            self._update_if_due(runner, runner.iter + 1, runner.max_iters)

    def after_train_epoch(self, runner: Runner) -> None:
        if self.by_epoch:
            self._update_if_due(runner, runner.epoch + 1, runner.max_epochs)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._record.structure = structure_of(unwrap(runner.model))
        self._record.scores = self._saliency.state_dict() if self._saliency else None
        self._record.to_checkpoint(checkpoint)

    def after_train(self, runner: Runner) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    # What happens at them.

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
        unit = 'epochs' if self.by_epoch else 'iterations'
        if self.interval is not None and self.interval >= limit:
            raise DyRepError(
                f'interval={self.interval} is never reached: training ends after {limit} {unit}'
            )
        if self._record.by_epoch != self.by_epoch:
            # A new run, or one resumed from a plain checkpoint or with another unit.
            self._record.by_epoch = self.by_epoch
            self._record.last = runner.epoch if self.by_epoch else runner.iter

    def _watch(self, runner: Runner) -> None:
        """Score the present candidates from now on."""
        model = unwrap(runner.model)
        paths = candidates(model, self.scope, self.max_depth)
        self._scored = {path: get_module(model, path).weight for path in paths}
        device = next(model.parameters()).device
        self._saliency = Saliency(self.metric, paths, device) if paths else None

    def _on_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # Here gradients are complete: accumulated, averaged over ranks, and unscaled, but for
        # a fused optimizer, which unscales by itself and leaves these two attributes.
        if self._saliency is not None and not self._ended:
            self._saliency.gather(
                self._scored,
                getattr(optimizer, 'grad_scale', None),
                getattr(optimizer, 'found_inf', None),
            )

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
        record, model = self._record, unwrap(runner.model)
        record.updates += 1
        scores: dict[str, float] = {}
        if self._saliency is not None:
            generator = make_generator(self.seed, record.updates, 'scores')
            scores = self._saliency.means(generator)
            if self._saliency.cancelled() and not record.warned:
                record.warned = True
                runner.logger.warning(
                    'DyRep: the signed sums of metric=synflow (Eq. 4) cancel to rounding in front '
                    'of BN in train mode; the choice is close to random, metric=snip is not'
                )
        importances = {path: b.importances() for path, b in blocks_of(model).items()}
        plan = make_plan(
            {path: score for path, score in scores.items() if self._fits(model, path)},
            importances,
            grow=self.grow_per_update,
            threshold=self.prune_threshold,
        )
        plan, scores, importances = from_rank_0((plan, scores, importances))
        self._edit(runner, plan)
        record.last = now
        unit = 'epoch' if self.by_epoch else 'iteration'
        entry = {
            'update': record.updates,
            unit: now,
            'grown': {path: get_module(model, path).names for path in plan.grow},
            'pruned': plan.prune,
            'scores': {path: scores[path] for path in plan.grow},
            'importances': {path: importances[path] for path in plan.prune},
        }
        record.journal.append(entry)
        self._log(runner, entry, f'{unit} {now}')
        self._watch(runner)
        return plan

    def _fits(self, model: nn.Module, path: str) -> bool:
        return bool(fitting(ConvSpec.of(get_module(model, path)), self.branches))

    def _start(self, runner: Runner, model: nn.Module) -> None:
        if isinstance(self.structure, str) and self.structure in PRESETS:
            structure = preset(model, self.structure, scope=self.scope)
        else:
            structure = load_structure(self.structure)
        self._edit(runner, Plan(), structure)
        runner.logger.info(f'DyRep: starts with {len(blocks_of(model))} blocks')

    def _take_over(self, runner: Runner, path: str, start: Start) -> None:
        """What :class:`DyRepPretrained` has left to do for the module at ``path``."""
        model = unwrap(runner.model)
        module = get_module(model, path)
        below = f'{path}.' if path else ''
        self._apply(runner, {below + p: names for p, names in start.structure.items()})
        module.load_state_dict(start.state)
        start.done(module)
        runner.logger.info(
            f'DyRep: {path or "the model"} starts from {start.checkpoint} with '
            f'{len(blocks_of(module))} blocks'
            + ''.join(
                f'; {below}{p}: {", ".join(names)} not exact here, absorbed by the conv'
                for p, names in start.absorbed.items()
            )
        )

    # The edit transaction.

    def _edit(self, runner: Runner, plan: Plan, structure: Structure | None = None) -> None:
        """Change the structure and all that depends on it; every rank runs the same."""
        model = unwrap(runner.model)
        number, seed = self._record.updates, self.seed
        try:
            if structure:
                blocks = apply_structure(
                    model, structure, make_generator(seed, number, 'structure')
                )
                plan = Plan([path for path, b in blocks_of(model).items() if b in blocks])
            else:
                blocks = []
                for path in plan.grow:
                    names = fitting(ConvSpec.of(get_module(model, path)), self.branches)
                    generator = make_generator(seed, number, path)
                    blocks.append(insert(model, path, names, generator))
            if self.calibration_batches and blocks:
                with random_state_kept():
                    calibrate(
                        model,
                        blocks,
                        calibration_batches(
                            runner,
                            self.calibration_batches,
                            make_seed(seed, number, 'calibration'),
                        ),
                        calibration_forward(runner, plan.grow),
                    )
            for block in reversed(blocks):  # inner ones first
                block.settle(self.init_scale)
            averages = averaged_models(runner)
            for averaged in averages:
                mirror(averaged.module, model, Plan(plan.grow))
            for module in (model, *(averaged.module for averaged in averages)):
                for path, names in plan.prune.items():
                    prune(module, path, names)
            self._follow(runner)
        except TypeError:
            # mmengine re-raises a TypeError of a hook without its traceback.
            raise RuntimeError(traceback.format_exc()) from None

    def _apply(self, runner: Runner, structure: Structure) -> None:
        """Give the model and its averages a structure whose weights are loaded afterwards."""
        for module in (
            unwrap(runner.model),
            *(averaged.module for averaged in averaged_models(runner)),
        ):
            apply_structure(module, structure, torch.Generator())
        self._follow(runner)

    def _follow(self, runner: Runner) -> None:
        """Bring in step with the model what refers to its parameters."""
        model = unwrap(runner.model)
        for block in blocks_of(model).values():
            block.recompute = self.recompute
        for averaged in averaged_models(runner):
            broadcast_parameters(averaged.module)
            refresh_average(averaged)
        optimizer = optimizer_of(runner)
        if optimizer is not None:
            sync_optimizer(optimizer, model, param_settings(runner))
        rewrap(runner)
        if optimizer is not None:
            runner.model.train()  # frozen stages and norm_eval, as the library wants them
            check_optimizer(optimizer, unwrap(runner.model))

    def _log(self, runner: Runner, entry: dict, when: str) -> None:
        model = unwrap(runner.model)
        blocks = blocks_of(model)
        parts = [
            f'grew {path} (score {entry["scores"][path]:.3g}) to {", ".join(names)}'
            for path, names in entry['grown'].items()
        ]
        parts += [f'pruned {", ".join(names)} of {path}' for path, names in entry['pruned'].items()]
        size = sum(p.numel() for p in model.parameters())
        runner.logger.info(
            f'DyRep update {entry["update"]} at {when}: {"; ".join(parts) or "no change"} | '
            f'{len(blocks)} blocks, {sum(len(b.added) for b in blocks.values())} branches, '
            f'{size / 1e6:.2f} M parameters'
        )
