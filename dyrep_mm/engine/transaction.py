"""The edit transaction: one change of structure and all that follows it, the same on every rank."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import replace as with_fields
from functools import partial
from typing import Any

from mmengine.runner import Runner
from torch import Generator, Tensor

from dyrep_mm.engine.batches import calibration_batches, calibration_forward, random_state_kept
from dyrep_mm.engine.runner import (
    averaged_models,
    broadcast_parameters,
    make_generator,
    make_seed,
    optimizer_of,
    param_settings,
    refresh_averages,
    rewrap,
    unwrap,
)
from dyrep_mm.surgery.calibration import calibrate
from dyrep_mm.surgery.copies import (
    Copies,
    copies_kept,
    following,
    own_part,
    places_in,
    with_copies,
)
from dyrep_mm.surgery.optimizer import FreezeWatch, check_optimizer, sync_optimizer
from dyrep_mm.surgery.rewire import (
    INIT_SCALE,
    Blocks,
    adopt,
    insert,
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
        copies: Momentum copies inside the model, as it was constructed.

    Attributes:
        model: The model inside its wrappers.
        averages: The averaged models of EMA hooks.
        optimizer: None in a test.
        freezes: Of the present structure.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        init_scale: float = INIT_SCALE,
        calibration_batches: int = 20,
        recompute: bool = False,
        copies: Mapping[str, str] | None = None,
    ):
        self.runner = runner
        self.init_scale = init_scale
        self.calibration_batches = calibration_batches
        self.recompute = recompute
        self.model = unwrap(runner.model)
        self.averages = averaged_models(runner)
        self.optimizer = optimizer_of(runner)
        self.freezes = FreezeWatch(self.model)
        self._copies: Copies = dict(copies or {})

    @property
    def copies(self) -> Copies:
        """Momentum copies inside the model that follow a part of it now."""
        return following(self.model, self._copies)

    def change(self, plan: Plan, *key: Any) -> Blocks:
        """Carry out a plan.

        Args:
            plan: The same on every rank. Copies inside the model do what the plan does in what
                they copy, and nothing else.
            key: Seeds new branches and calibration, together with the path of a branch: the same
                on every rank and after a resume.

        Returns:
            The blocks that were made, by path.

        Raises:
            DyRepError: the plan does not fit the model.
        """
        self.freezes.follow()
        copies = self.copies
        plan = own_part(plan, copies)
        source_of = {at: path for path in plan.grow for at in places_in(copies, path)}
        copied: Blocks = {}

        def measure(blocks: Blocks) -> None:
            # The forward may update the copies, which must have the shape of their sources then.
            grown = {at: plan.grow[path] for at, path in source_of.items()}
            copied.update(insert(self.model, grown, lambda _: Generator()))
            refresh_averages(self.model)
            with copies_kept(self.model, copies):
                self._measure(blocks, key)

        try:
            blocks = rewire(
                self.model,
                plan.grow,
                init_scale=self.init_scale,
                generator=partial(make_generator, *key),
                measure=measure,
            )
            for at in reversed(copied):
                adopt(copied[at], blocks[source_of[at]])
            plan = with_fields(
                plan, grow=with_copies(plan.grow, copies), prune=with_copies(plan.prune, copies)
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
        self.freezes.follow()
        if not restore(self.model, structure, state):
            return False
        for averaged in self.averages:
            restore(averaged.module, structure, state)
        self.follow()
        return True

    def follow(self) -> None:
        """Update everything that refers to the model's parameters: averages, optimizer, DDP."""
        set_recompute(self.model, self.recompute)
        refresh_averages(self.model)
        for averaged in self.averages:
            broadcast_parameters(averaged.module)
            refresh_averages(averaged)
        if self.optimizer is not None:
            before = [p for group in self.optimizer.param_groups for p in group['params']]
            sync_optimizer(self.optimizer, self.model, param_settings(self.runner))
        rewrap(self.runner)
        if self.optimizer is not None:
            self.runner.model.train()  # frozen stages and norm_eval, as the library wants them
            check_optimizer(self.optimizer, self.model, before)
        self.freezes = FreezeWatch(self.model)

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
