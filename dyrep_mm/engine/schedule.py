"""When updates happen, how far apart they should be, and the warning where they come too often."""

from __future__ import annotations

import math
import time
from typing import Any, cast

from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_world_size
from mmengine.runner import EpochBasedTrainLoop, Runner

from dyrep_mm.errors import DyRepError

#: Stands for an option that was not given, where None has a meaning of its own.
LEFT_OUT: Any = ...

#: t of the paper, in epochs (section 5.1).
INTERVAL = 5

#: Phases of a search, in epochs, as in the public code of RepNAS: of 150 in all.
PHASES = {'warmup': 15, 'fixed': 100}

#: The part of the time that updates may take.
SHARE = 0.1


def iterations_per_epoch(runner: Runner) -> int | None:
    """Iterations in which all ranks together see the dataset once; None if it has no length."""
    loader = runner.train_dataloader
    try:
        count = len(loader)
    except TypeError:
        return None
    if isinstance(loader.sampler, InfiniteSampler):  # its length is that of the dataset
        count = math.ceil(count / get_world_size())
    return count


def sensible_interval(runner: Runner, calibration_batches: int) -> int:
    """An interval in iterations to start from: 5 epochs, as in the paper, or a twelfth of a
    short training; far longer than the calibration, as long as the training has two of them."""
    epoch = iterations_per_epoch(runner)
    part = runner.max_iters // 12
    whole = part if epoch is None else min(part, INTERVAL * epoch)
    longest = max(1, runner.max_iters // 2)
    return min(max(whole, round(calibration_batches / SHARE), 1), longest)


class Schedule:
    """When updates happen.

    Args:
        interval: Epochs or iterations between two; None: never; :data:`LEFT_OUT`: the default.
        by_epoch: Whether ``interval`` and ``end`` are epochs; None: what the training loop counts.
        end: The last epoch or iteration with an update; None: no end.
    """

    def __init__(self, interval: int | None, by_epoch: bool | None, end: int | None):
        self.interval = interval
        self.by_epoch = by_epoch
        self.end = end

    def fit(self, runner: Runner, calibration_batches: int) -> None:
        """Settle what was left open, for the training loop of ``runner``.

        Raises:
            DyRepError: the loop does not count so, or does not reach an update.
        """
        limit = self._fit_unit(runner)
        if self.interval is LEFT_OUT:
            if not self.by_epoch:
                advice = sensible_interval(runner, calibration_batches)
                raise DyRepError(
                    'interval has no default where iterations are counted: write, for example, '
                    f'interval={advice} for the {limit} iterations of this training'
                )
            self.interval = INTERVAL
        if self.interval is not None and self.interval >= limit:
            raise DyRepError(
                f'interval={self.interval} is never reached: training ends after {limit} '
                f'{self.unit}s'
            )

    def _fit_unit(self, runner: Runner) -> int:
        """Settle what is counted; returns how many of these the training has."""
        epochs = isinstance(runner.train_loop, EpochBasedTrainLoop)
        if self.by_epoch is None:
            self.by_epoch = epochs
        if self.by_epoch and not epochs:
            raise DyRepError(
                'by_epoch=True needs a training loop that counts epochs, '
                f'got {type(runner.train_loop).__name__}: set by_epoch=False'
            )
        return runner.max_epochs if self.by_epoch else runner.max_iters

    @property
    def changes(self) -> bool:
        """Whether an update may ever come."""
        return self.interval is not None

    @property
    def unit(self) -> str:
        """``'epoch'`` or ``'iteration'``."""
        return 'epoch' if self.by_epoch else 'iteration'

    def now(self, runner: Runner) -> int:
        """Number of the present epoch or iteration, from 1."""
        return (runner.epoch if self.by_epoch else runner.iter) + 1

    def due(self, last: int) -> int:
        """Epoch or iteration whose end the next update waits for: the next multiple of
        ``interval``.

        Args:
            last: Epochs or iterations that were complete at the last update.
        """
        interval = cast(int, self.interval)  # asked only where there are updates
        return (last // interval + 1) * interval

    def is_over(self, runner: Runner, last: int) -> bool:
        """Whether no update comes any more."""
        if self.interval is None:
            return True
        return self.end is not None and max(self.due(last), self.now(runner)) > self.end

    def is_due(self, runner: Runner, last: int, passed: int) -> bool:
        """Whether to update now.

        Args:
            runner: At the end of an iteration or an epoch.
            last: See :meth:`due`.
            passed: Epochs or iterations that are complete.
        """
        limit = runner.max_epochs if self.by_epoch else runner.max_iters
        if self.is_over(runner, last) or not self.due(last) <= passed < limit:
            return False
        # In the middle of gradient accumulation an update waits for the optimizer step.
        return runner.optim_wrapper.should_update()


class SearchSchedule(Schedule):
    """The phases of a search: warm-up, search, and the fixed path, which lasts to the end.

    There is an update where the warm-up ends, one where the path is fixed, and between them at the
    multiples of ``interval``.

    Args:
        warmup: Epochs or iterations of random branches; :data:`LEFT_OUT`: the default.
        fixed: Epochs or iterations with the path fixed; :data:`LEFT_OUT`: the default.
        by_epoch: Whether all numbers are epochs; None: what the training loop counts.
        interval: Epochs or iterations between two updates of the search; None: none there.
    """

    def __init__(self, warmup: int, fixed: int, by_epoch: bool | None, interval: int | None):
        super().__init__(interval, by_epoch, None)
        self.warmup = warmup
        self.fixed = fixed

    def fit(self, runner: Runner, calibration_batches: int) -> None:
        """Settle what was left open, for the training loop of ``runner``.

        Raises:
            DyRepError: the loop does not count so, or is too short for the phases.
        """
        limit = self._fit_unit(runner)
        for name, part in PHASES.items():
            if getattr(self, name) is not LEFT_OUT:
                continue
            if not self.by_epoch:
                advice = ', '.join(f'{n}={max(limit * p // 150, 1)}' for n, p in PHASES.items())
                raise DyRepError(
                    f'{name} has no default where iterations are counted: write, for example, '
                    f'{advice} for the {limit} iterations of this training'
                )
            setattr(self, name, part)
        if self.warmup + self.fixed >= limit:
            raise DyRepError(
                f'warmup={self.warmup} and fixed={self.fixed} leave nothing to search: training '
                f'ends after {limit} {self.unit}s'
            )
        self.end = limit - self.fixed

    changes = True

    def progress(self, passed: int) -> float:
        """Part of the search that is over, below 0 in the warm-up.

        Args:
            passed: Epochs or iterations that are complete.
        """
        return (passed - self.warmup) / (cast(int, self.end) - self.warmup)

    def due(self, last: int) -> int:
        """Epoch or iteration whose end the next update waits for, see :meth:`Schedule.due`."""
        if last < self.warmup:
            return self.warmup
        end = cast(int, self.end)
        return end if self.interval is None else min(super().due(last), end)

    def is_over(self, runner: Runner, last: int) -> bool:
        """Whether the path is fixed."""
        return last >= cast(int, self.end)


class UpdateCost:
    """Tells, once, when updates come too often for what they cost.

    Args:
        runner: At the start of training, or where it resumes.
        schedule: Says how far apart updates are.
        calibration_batches: Of one update.

    Attributes:
        trained: Iterations since then; the hook counts them.
    """

    def __init__(self, runner: Runner, schedule: Schedule, calibration_batches: int):
        epoch = iterations_per_epoch(runner)
        self.interval, self.unit = cast(int, schedule.interval), schedule.unit
        self.size = epoch if schedule.by_epoch and epoch is not None else 1
        self.limit = runner.max_epochs if schedule.by_epoch else runner.max_iters
        self.batches = calibration_batches if epoch is None else min(calibration_batches, epoch)
        self.sensible = sensible_interval(runner, self.batches)
        self.told = False
        self.trained = 0
        self.start = time.monotonic()

    def foresee(self) -> str | None:
        """What to say before training: a calibration is as long as what lies between two."""
        if not self.batches or self.batches < self.interval * self.size:
            return None
        self.told = True
        least = math.ceil(self.batches / SHARE / self.size)
        return (
            f'{self._present()} no longer than the calibration of an update, {self.batches} '
            f'batches: {self._advice(max(least, self.sensible) if self.size == 1 else least)}'
        )

    def measure(self, update: float) -> str | None:
        """What to say after the first update that grew: it took too large a part of the time.

        Args:
            update: Seconds that it took until now.
        """
        if self.told or not self.trained:
            return None
        self.told = True
        iteration = (time.monotonic() - self.start - update) / self.trained
        between = iteration * self.interval * self.size
        if between <= 0 or update <= SHARE * (update + between):
            return None
        # Where the update takes SHARE of the time.
        least = math.ceil(update * (1 / SHARE - 1) / (iteration * self.size))
        return (
            f'an update took {update:.1f} s, and {self._present()} {between:.1f} s long, so that '
            f'updates take {update / (update + between):.0%} of the time: {self._advice(least)}'
        )

    def _present(self) -> str:
        plural = '' if self.interval == 1 else 's'
        return f'interval={self.interval}, {self.interval} {self.unit}{plural}, is'

    def _advice(self, least: int) -> str:
        fewer = 'fewer calibration_batches'
        return f'write interval={least} or {fewer}' if least < self.limit else f'write {fewer}'
