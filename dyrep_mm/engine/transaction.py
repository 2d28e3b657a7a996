"""The edit transaction: one change of structure and all that follows it, the same on every rank."""

from __future__ import annotations

import copy
import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import tee
from typing import Any

from mmengine.runner import Runner
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyrep_mm.engine.batches import (
    calibration_batches,
    calibration_forward,
    can_draw,
    random_state_kept,
)
from dyrep_mm.engine.progress import track
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
from dyrep_mm.reparam.block import origin_of
from dyrep_mm.surgery.calibration import calibrate, remeasure
from dyrep_mm.surgery.candidates import leave_alone
from dyrep_mm.surgery.copies import Copies, following, own_part, places_in, with_copies
from dyrep_mm.surgery.optimizer import FreezeWatch, check_optimizer, sync_optimizer
from dyrep_mm.surgery.outputs import Norms, OutputWatch
from dyrep_mm.surgery.rewire import (
    INIT_SCALE,
    Blocks,
    adopt,
    adopt_statistics,
    insert,
    mirror,
    prune,
    restore,
    rewire,
    set_branch_norm,
    set_recompute,
)
from dyrep_mm.surgery.structure import Plan, Structure, altered
from dyrep_mm.surgery.tree import blocks_of, get_module, in_scope, outermost, replace
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
        branch_norm: What the norms of branches normalise with, see docs/norms.md.
        copies: Momentum copies inside the model, as it was constructed.

    Attributes:
        model: The model inside its wrappers.
        averages: The averaged models of EMA hooks.
        optimizer: None in a test.
        freezes: Of the present structure.
        batch_sampler: Of the training, as it was before its first batch.
        last_batch: The batch that was trained on last, where no other can be drawn.
        unwatched: Blocks and convs of which no forward has shown yet which norms follow.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        init_scale: float = INIT_SCALE,
        calibration_batches: int = 20,
        recompute: bool = False,
        branch_norm: str = 'batch',
        copies: Mapping[str, str] | None = None,
    ):
        self.runner = runner
        self.init_scale = init_scale
        self.calibration_batches = calibration_batches
        self.recompute = recompute
        self.branch_norm = branch_norm
        self.model = unwrap(runner.model)
        self.averages = averaged_models(runner)
        self.optimizer = optimizer_of(runner)
        self.freezes = FreezeWatch(self.model)
        self.batch_sampler: Any = None
        self.last_batch: Any = None
        self._copies: Copies = dict(copies or {})
        self._norms: Norms = {}
        self.unwatched = list(altered(self.model))

    @property
    def copies(self) -> Copies:
        """Momentum copies inside the model that follow a part of it now."""
        return following(self.model, self._copies)

    @property
    def norms(self) -> Norms:
        """The norms that follow convs and blocks, as far as they are known; those of copies are at
        the places of those of their sources."""
        norms = dict(self._norms)
        for copied, source in self.copies.items():
            for path, names in self._norms.items():
                if in_scope(path, source) and all(in_scope(name, source) for name in names):
                    at = copied + path[len(source) :]
                    norms.setdefault(at, [copied + name[len(source) :] for name in names])
        return norms

    def learn_norms(self, norms: Norms) -> None:
        """Remember which norms a forward, or another run, has seen behind convs and blocks."""
        for path, names in norms.items():
            known = self._norms.get(path, names)
            # Calls that differ, as with and without a norm: none takes all.
            self._norms[path] = names if set(known) == set(names) else []
        self._note_unwatched()

    def accept_norms(self, norms: Norms) -> None:
        """Believe another run, as its checkpoint tells, of what is not known yet and can be."""

        def fits(path: str, module: nn.Module) -> bool:
            found = [modules.get(name) for name in norms[path]]
            width = origin_of(module).out_channels
            return all(
                isinstance(norm, _BatchNorm)
                and norm.running_mean is not None
                and norm.num_features == width
                for norm in found
            )

        modules = dict(self.model.named_modules(remove_duplicate=False))
        wanted = {path: m for path, m in altered(self.model).items() if path not in self._norms}
        self.learn_norms({p: norms[p] for p, m in wanted.items() if p in norms and fits(p, m)})

    def _note_unwatched(self) -> None:
        norms = self.norms
        self.unwatched = [path for path in altered(self.model) if path not in norms]

    def change(self, plan: Plan, *key: Any) -> Plan:
        """Carry out a plan, except for convs in whose place no block can stand.

        Those stay plain for good, and the log says why.

        Args:
            plan: The same on every rank. Copies inside the model do what the plan does in what
                they copy, and nothing else.
            key: Seeds new branches and calibration, together with the path of a branch: the same
                on every rank and after a resume.

        Returns:
            What was carried out.

        Raises:
            DyRepError: the plan does not fit the model.
        """
        self.freezes.follow()
        try:
            plan = self._grow(own_part(plan, self.copies), key)
            everywhere = dataclasses.replace(
                plan,
                grow=with_copies(plan.grow, self.copies),
                prune=with_copies(plan.prune, self.copies),
            )
            for averaged in self.averages:
                mirror(averaged.module, self.model, everywhere)
            for path, names in everywhere.prune.items():
                prune(self.model, path, names)
            self.follow()
        except TypeError:
            # mmengine re-raises a TypeError of a hook without its traceback.
            raise RuntimeError(traceback.format_exc()) from None
        return plan

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
        self.set_modes()
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
        self._note_unwatched()

    def set_modes(self) -> None:
        """Let all blocks run as the options say; modes of norms are the library's afterwards."""
        set_recompute(self.model, self.recompute)
        for model in (self.model, *(averaged.module for averaged in self.averages)):
            set_branch_norm(model, self.branch_norm)

    def remeasure(self, *key: Any) -> None:
        """Measure the blocks that are there on training batches, of which training notices
        nothing; no function changes, nor that of a copy or an average.

        Args:
            key: Seeds the choice of batches, see :meth:`change`.
        """
        copies, present = self.copies, blocks_of(self.model)
        blocks = {path: b for path, b in present.items() if not in_scope(path, list(copies))}
        if not (blocks and self.calibration_batches):
            return
        seed = make_seed(*key, 'measuring')
        with random_state_kept(seed):
            forward = calibration_forward(self.runner)
            remeasure(self.model, blocks, self._batches(seed) or (), forward)
        if self.branch_norm != 'fixed':
            return
        for path, block in blocks.items():
            for at in places_in(copies, path):
                adopt_statistics(present[at], block)
        for averaged in self.averages:
            for path, block in blocks_of(averaged.module).items():
                adopt_statistics(block, present[path])

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
            reasons: dict[str, str] = {}
            calls: Mapping[str, int] = {}
            if (batches := self._batches(seed)) is not None:
                first, batches = tee(batches)
                # A preprocessor may write into a batch.
                watched = self._watching_norms(convs, forward)
                reasons, calls = watch_use(self.model, convs, map(copy.deepcopy, first), watched)
                del first  # it would keep what `batches` has passed

            wanted = {p: names for p, names in plan.grow.items() if not in_scope(p, list(reasons))}
            source_of = {at: path for path in wanted for at in places_in(self.copies, path)}
            copied: Blocks = {}

            def measure(blocks: Blocks) -> dict[str, str]:
                # A forward may update copies, which have the shape of their sources then.
                shapes = {at: wanted[path] for at, path in source_of.items()}
                copied.update(insert(self.model, shapes, lambda _: Generator()))
                refresh_averages(self.model)
                if not self.calibration_batches:
                    return {}
                refused = calibrate(self.model, blocks, batches or (), forward, calls)
                reasons.update(refused)
                return refused

            standing = rewire(
                self.model,
                wanted,
                init_scale=self.init_scale,
                generator=partial(make_generator, *key),
                measure=measure,
            )
            for at in reversed(copied):  # inner ones first
                if (source := source_of[at]) in standing:
                    adopt(copied[at], standing[source])
                else:
                    replace(self.model, at, origin_of(copied[at]))
        outer = [p for p in reasons if not in_scope(p, [other for other in reasons if other != p])]
        for path in outer:
            leave_alone(get_module(self.model, path), reasons[path])
            self.runner.logger.warning(f'DyRep: {path} stays a plain conv: {reasons[path]}')
        grow = {p: names for p, names in plan.grow.items() if not in_scope(p, outer)}
        return dataclasses.replace(plan, grow=grow)

    def _watching_norms(
        self, convs: Sequence[str], forward: Callable[[Any], None]
    ) -> Callable[[Any], None]:
        """``forward``, which also shows which norms follow the convs: a checkpoint that is saved
        next holds them fused."""
        paths = list(dict.fromkeys(outermost(self.model, path) for path in convs))
        if not (paths := [path for path in paths if path not in self._norms]):
            return forward

        def watched(batch: Any) -> None:
            with OutputWatch(self.model, paths) as watch:
                forward(batch)
            self.learn_norms(watch.norms())

        return watched

    def _batches(self, seed: int) -> Iterator[Any] | None:
        """Training batches to look at and to measure on; None if there is none."""
        if can_draw(self.runner) or self.calibration_batches:
            count = max(self.calibration_batches, 1)
            batches = calibration_batches(self.runner, count, seed, self.batch_sampler)
            return track(batches, 'calibrating new branches', count)
        return None if self.last_batch is None else iter([self.last_batch])
