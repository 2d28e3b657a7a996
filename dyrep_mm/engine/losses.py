"""Losses that are not finite: noticed on every rank, without waiting for an accelerator."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import all_gather_object, get_world_size
from torch import Tensor

from dyrep_mm.errors import DyRepError


class LossWatch:
    """Watches the losses of a run.

    What was seen stays on the device of the loss until :meth:`read`.

    Args:
        stop: End the run at a loss that is not finite, instead of telling of the first one.

    Attributes:
        first: Number of the first iteration whose loss was not finite, int64; 0 if there is none.
        value: Its loss.
        latest: Whether the loss of the latest iteration was not finite.
    """

    def __init__(self, stop: bool = False):
        self.stop = stop
        self.told = False
        self.first = torch.tensor(0)
        self.value = torch.tensor(0.0)
        self.latest = torch.tensor(False)

    @torch.no_grad()
    def see(self, loss: Any, iteration: int) -> None:
        """Look at the loss of an iteration, a tensor or a number; anything else is passed over.

        Args:
            loss: Of this rank.
            iteration: Its number, from 1.
        """
        if isinstance(loss, (int, float)):
            loss = torch.tensor(float(loss))
        if not isinstance(loss, Tensor) or not loss.numel():
            return
        if self.first.device != loss.device:
            self.first, self.value = self.first.to(loss.device), self.value.to(loss.device)
        # An infinite element makes the sum infinite or NaN.
        value = loss.detach().float().sum()
        self.latest = ~loss.isfinite().all()
        new = self.latest & (self.first == 0)
        self.first = torch.where(new, iteration, self.first)
        self.value = torch.where(new, value, self.value)

    @property
    def is_free(self) -> bool:
        """Whether :meth:`read` waits for nothing: one process, on the CPU."""
        return get_world_size() == 1 and self.first.device.type == 'cpu'

    def read(self) -> tuple[int, float, bool]:
        """What all ranks saw together; every rank must call it.

        Returns:
            Number and loss of the first iteration that was not finite on a rank, 0 if there is
            none; and whether the latest loss of a rank is not finite.
        """
        own = int(self.first), self.value.item(), bool(self.latest)
        seen = all_gather_object(own)
        first, value = min(((n, v) for n, v, _ in seen if n), default=(0, 0.0), key=lambda s: s[0])
        return first, value, any(latest for *_, latest in seen)

    def tell(self, logger: Any) -> bool:
        """Tell of a loss that was not finite; every rank must call it.

        Returns:
            Whether the latest loss of a rank is not finite.

        Raises:
            DyRepError: a loss was not finite, and the run is to end.
        """
        iteration, loss, latest = self.read()
        if iteration and self.stop:
            raise DyRepError(
                f'the loss is {loss} at iteration {iteration}: '
                'training cannot go on from a loss that is not finite'
            )
        if iteration and not self.told:
            self.told = True
            logger.warning(
                f'DyRep: the loss is {loss} at iteration {iteration}; gradients that are not '
                'finite score nothing, and updates wait for a finite loss '
                '(stop_on_invalid_loss=True ends the run instead)'
            )
        return latest
