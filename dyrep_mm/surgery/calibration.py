"""BN statistics of new branches, measured on training batches (section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.branches import ORIGIN
from dyrep_mm.surgery.tree import modes_kept


class _Reached(Exception):
    """The last block has run: nothing after it matters."""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
) -> None:
    """Measure the BN statistics of the added branches of ``blocks``, and ``origin_std``.

    All blocks are measured in one pass, in the modes that the model is in: in train mode a
    BN averages what it meets while training, and so must a new one. Each forward stops behind
    the last block. Modes, and all buffers that are not measured, are restored; kernels are
    left alone. Several processes average what they measured. :meth:`Block.settle` comes after.

    Args:
        model: Contains the blocks.
        blocks: Blocks that were inserted and are not settled.
        batches: At least one batch.
        forward: Runs the model, or what of it reaches the blocks, on one batch.

    Raises:
        DyRepError: there was no batch, a block was never reached, or a statistic is not
            finite.
    """
    if not blocks:
        return
    norms = [n for b in blocks for branch in b.added for n in branch.modules()]
    norms = [n for n in norms if isinstance(n, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    variances: dict[Block, list[Tensor]] = {block: [] for block in blocks}
    calls_per_batch = None
    calls = 0

    def on_origin(block: Block) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            wide = torch.promote_types(output.dtype, torch.float32)
            variances[block].append(output.to(wide).var((0, 2, 3), unbiased=False))

        return hook

    def on_block(*_: Any) -> None:
        nonlocal calls
        calls += 1
        # The first batch runs to its end and shows how often the blocks are called.
        if calls == calls_per_batch:
            raise _Reached

    own = {id(buffer) for norm in norms for buffer in norm.buffers()}
    others = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in own]
    handles = [b.branches[ORIGIN].register_forward_hook(on_origin(b)) for b in blocks]
    handles += [b.register_forward_hook(on_block) for b in blocks]
    try:
        with modes_kept(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.train()
            for batch in batches:
                calls = 0
                with suppress(_Reached):
                    forward(batch)
                calls_per_batch = calls
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for buffer, kept in others:
            buffer.copy_(kept)
    for block, measured in variances.items():
        if not measured:
            raise DyRepError('calibration never reached a block: no batch, or it is not in use')
        block.origin_std.copy_(torch.stack(measured).mean(0).sqrt())
    statistics = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
    statistics += [block.origin_std for block in blocks]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for statistic in statistics:
            dist.all_reduce(statistic)
            statistic.div_(dist.get_world_size())
    if not all(statistic.isfinite().all() for statistic in statistics):
        raise DyRepError('calibration met activations that are not finite')
