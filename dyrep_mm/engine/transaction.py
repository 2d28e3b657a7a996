"""The edit transaction: one change of structure and all that follows it, the same on every rank."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from functools import partial
from typing import Any

from mmengine.runner import Runner
from torch import Tensor

from dyrep_mm.engine.batches import calibration_batches, calibration_forward, random_state_kept
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

    def change(self, plan: Plan, *key: Any) -> Blocks:
        """Carry out a plan.

        Args:
            plan: The same on every rank.
            key: Seeds new branches and calibration, together with the path of a branch: the same
                on every rank and after a resume.

        Returns:
            The blocks that were made, by path.

        Raises:
            DyRepError: the plan does not fit the model.
        """
        try:
            blocks = rewire(
                self.model,
                plan.grow,
                init_scale=self.init_scale,
                generator=partial(make_generator, *key),
                measure=partial(self._measure, key=key),
            )
            for averaged in self.averages:
                mirror(averaged.module, self.model, plan)
            for path, names in plan.prune.items():
                prune(self.model, path, names)
            self.follow()
        except TypeError:
            # mmengine re-raises a TypeError of a hook without its traceback.
            raise RuntimeError(traceback.format_exc()) from None
        return blocks

    def restore(self, structure: Structure, state: Mapping[str, Tensor] | None = None) -> bool:
        """Give the model and its averages exactly a structure whose weights are loaded afterwards.

        Args:
            structure: See :func:`dyrep_mm.surgery.rewire.restore`.
            state: See there.

        Returns:
            Whether anything changed.

        Raises:
            DyRepError: the structure or the state does not fit the model.
        """
        if not restore(self.model, structure, state):
            return False
        for averaged in self.averages:
            restore(averaged.module, structure, state)
        self.follow()
        return True

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

    def _measure(self, blocks: Blocks, key: tuple) -> None:
        """BN statistics of new branches from training batches; training notices nothing."""
        if not self.calibration_batches or not blocks:
            return
        seed = make_seed(*key, 'calibration')
        with random_state_kept():
            calibrate(
                self.model,
                blocks,
                calibration_batches(self.runner, self.calibration_batches, seed),
                calibration_forward(self.runner, list(blocks)),
            )
