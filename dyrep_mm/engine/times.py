"""How long training iterations take, for the journal: the clock beside a training."""

from __future__ import annotations

import statistics
import time

from dyrep_mm.evolution.record import Timing


class StepTimes:
    """Measures training iterations by the wall clock of this process.

    No device is waited for. Where mmengine logs the loss, it reads it in every iteration before
    :meth:`end` is called, so that an iteration on an accelerator is measured whole.

    Args:
        before: What was measured before a resume.
    """

    def __init__(self, before: Timing):
        self._before = before
        self._seconds: list[float] = []  # of the iterations since the last change
        self._start: float | None = None

    def begin(self) -> None:
        """A training iteration begins: its data are there."""
        self._start = time.perf_counter()

    def end(self) -> None:
        """It ended."""
        if self._start is not None:
            self._seconds.append(time.perf_counter() - self._start)
            self._start = None

    def timing(self, plain: bool) -> Timing:
        """All that was measured until now.

        Args:
            plain: The iterations since the last update were of the plain model.
        """
        if not self._seconds:
            return self._before
        return self._before.plus(len(self._seconds), statistics.median(self._seconds), plain)

    def close(self, plain: bool) -> Timing:
        """:meth:`timing`, at the end of a stretch of iterations: an update follows."""
        self._before, self._seconds = self.timing(plain), []
        return self._before

    def updated(self, seconds: float) -> dict[str, float]:
        """The update took ``seconds``; returns the ``timing`` of its journal entry."""
        before, self._before = self._before, self._before.updated(seconds)
        entry = {'steps': before.interval_steps, 'update_seconds': seconds}
        if before.interval_step is not None:
            entry['step_seconds'] = before.interval_step
        return entry
