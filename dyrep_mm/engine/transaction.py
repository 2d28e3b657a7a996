"""The edit transaction: one change of structure and all that follows it, the same on every rank."""

from __future__ import annotations

import copy
import dataclasses
import traceback
from collections.abc import Iterator
from functools import partial
from itertools import tee
from typing import Any

from mmengine.runner import Runner
from torch import nn

from dyrep_mm.engine.batches import (
    calibration_batches,
    calibration_forward,
    can_draw,
    random_state_kept,
)
from dyrep_mm.engine.runner import (
    averaged_models,
    broadcast_parameters,
    make_generator,
    make_seed,
    optimizer_of,
    param_settings,
    refresh_average,
    rewrap,
    unwrap,
)
from dyrep_mm.surgery.calibration import calibrate
from dyrep_mm.surgery.candidates import leave_alone
from dyrep_mm.surgery.optimizer import check_optimizer, sync_optimizer
from dyrep_mm.surgery.rewire import (
    INIT_SCALE,
    Blocks,
    mirror,
    prune,
    restore,
    rewire,
    set_recompute,
)
from dyrep_mm.surgery.structure import Plan, Structure
from dyrep_mm.surgery.tree import get_module, in_scope
from dyrep_mm.surgery.usage import watch_use


class Transaction:
    """Changes the structure of the model that a Runner trains, and everything that refers to its
    parameters: averaged copies, optimizer, DDP, train and eval modes.

    It is built once per run, when the averaged copies exist, and every trigger uses it: an
    update, a structure to start from, a resume. All ranks make the same calls in the same order.

    Args:
        runner: Holds the model.
        init_scale: Importance of a new branch relative to its conv.
        calibration_batches: Training batches for the BN statistics of new branches.
        recompute: Compute branch outputs again in the backward instead of keeping them.

    Attributes:
        model: The model inside its wrappers.
        averages: mmengine's averaged models.
        optimizer: None in a test.
        last_batch: The batch that was trained on last, where no other can be drawn.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        init_scale: float = INIT_SCALE,
        calibration_batches: int = 20,
        recompute: bool = False,
    ):
        self.runner = runner
        self.init_scale = init_scale
        self.calibration_batches = calibration_batches
        self.recompute = recompute
        self.model = unwrap(runner.model)
        self.averages = averaged_models(runner)
        self.optimizer = optimizer_of(runner)
        self.last_batch: Any = None

    def change(self, plan: Plan, *key: Any) -> Plan:
        """Carry out a plan, except for convs in whose place no block can stand.

        Those stay plain for good, and the log says why.

        Args:
            plan: The same on every rank.
            key: Seeds new branches and calibration, together with the path of a branch: the same
                on every rank and after a resume.

        Returns:
            What was carried out.

        Raises:
            DyRepError: the plan does not fit the model.
        """
        try:
            plan = self._grow(plan, key)
            for averaged in self.averages:
                mirror(averaged.module, self.model, plan)
            for path, names in plan.prune.items():
                prune(self.model, path, names)
            self.follow()
        except TypeError:
            # mmengine re-raises a TypeError of a hook without its traceback.
            raise RuntimeError(traceback.format_exc()) from None
        return plan

    def restore(self, structure: Structure) -> None:
        """Give the model and its averages a structure whose weights are loaded afterwards.

        Raises:
            DyRepError: the structure does not fit the model.
        """
        for module in (self.model, *(averaged.module for averaged in self.averages)):
            restore(module, structure)
        self.follow()

    def follow(self) -> None:
        """Update everything that refers to the model's parameters: averages, optimizer, DDP."""
        set_recompute(self.model, self.recompute)
        for averaged in self.averages:
            broadcast_parameters(averaged.module)
            refresh_average(averaged)
        if self.optimizer is not None:
            sync_optimizer(self.optimizer, self.model, param_settings(self.runner))
        rewrap(self.runner)
        if self.optimizer is not None:
            self.runner.model.train()  # frozen stages and norm_eval, as the library wants them
            check_optimizer(self.optimizer, self.model)

    def _grow(self, plan: Plan, key: tuple) -> Plan:
        """Look how training uses the convs, put blocks around them and measure those on training
        batches, of which training notices nothing; the plan without what stays plain."""
        if not plan.grow:
            return plan
        # Convs in blocks of this plan are not there yet.
        there = {path for path, m in self.model.named_modules() if isinstance(m, nn.Conv2d)}
        convs = [path for path, names in plan.grow.items() if path in there and names]
        seed = make_seed(*key, 'calibration')
        with random_state_kept(seed):
            forward = calibration_forward(self.runner)
            reasons, calls = {}, {}
            if (batches := self._batches(seed)) is not None:
                first, batches = tee(batches)
                # A preprocessor may write into a batch.
                reasons, calls = watch_use(self.model, convs, map(copy.deepcopy, first), forward)
                del first  # it would keep what `batches` has passed

            def measure(blocks: Blocks) -> dict[str, str]:
                if not self.calibration_batches:
                    return {}
                refused = calibrate(self.model, blocks, batches, forward, calls)
                reasons.update(refused)
                return refused

            rewire(
                self.model,
                {p: names for p, names in plan.grow.items() if not in_scope(p, list(reasons))},
                init_scale=self.init_scale,
                generator=partial(make_generator, *key),
                measure=measure,
            )
        outer = [p for p in reasons if not in_scope(p, [other for other in reasons if other != p])]
        for path in outer:
            leave_alone(get_module(self.model, path), reasons[path])
            self.runner.logger.warning(f'DyRep: {path} stays a plain conv: {reasons[path]}')
        grow = {p: names for p, names in plan.grow.items() if not in_scope(p, outer)}
        return dataclasses.replace(plan, grow=grow)

    def _batches(self, seed: int) -> Iterator[Any] | None:
        """Training batches to look at and to measure on; None if there is none."""
        if can_draw(self.runner) or self.calibration_batches:
            return calibration_batches(self.runner, max(self.calibration_batches, 1), seed)
        return None if self.last_batch is None else iter([self.last_batch])
