"""BN statistics of new branches, measured on training batches (section 4.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.branches import ORIGIN
from dyrep_mm.surgery.tree import get_module, outermost, state_kept
from dyrep_mm.surgery.usage import Verdict, has_few_values, in_parallel, reasons_of


class _Reached(Exception):
    """The last block has run: nothing after it matters."""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    blocks: Mapping[str, Block],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    calls: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """Measure the BN statistics of the added branches of ``blocks``, and ``origin_std``.

    All blocks are measured in one pass, in the modes that the model is in: in train mode a
    BN averages what it meets while training, and so must a new one. Each forward stops behind
    the last block. All that is not measured is left as it was, kernels too. Several processes
    average what they measured, those that met the block. :meth:`Block.settle` comes after.

    Args:
        model: Contains the blocks.
        blocks: Blocks that were inserted and are not settled, by path.
        batches: Training batches.
        forward: Runs the model on one batch.
        calls: How often one batch calls the outermost block of each path, see
            :func:`dyrep_mm.surgery.usage.watch_use`; by default the first batch runs to its end
            and shows it.

    Returns:
        Why a block could not be measured, by path, the same in all processes. It must be put back.
    """
    if not blocks:
        return {}
    norms = _norms_of(blocks)
    variances: dict[str, list[Tensor]] = {path: [] for path in blocks}
    few: set[str] = set()
    holders = dict.fromkeys(outermost(model, path) for path in blocks)
    expected = Counter({path: n for path, n in (calls or {}).items() if path in holders})
    seen: Counter[str] = Counter()
    ran = False

    def on_origin(path: str) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            wide = torch.promote_types(output.dtype, torch.float32)
            images = output.to(wide).reshape(-1, *output.shape[-3:])
            variances[path].append(images.var((0, 2, 3), unbiased=False))

        return hook

    def on_block(path: str) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            if has_few_values(output):  # nothing has run that could be measured
                few.add(path)

        return hook

    def on_holder(path: str) -> Callable:
        def hook(*_: Any) -> None:
            seen[path] += 1
            if len(expected) == len(holders) and seen >= expected:
                raise _Reached

        return hook

    handles = []
    for path, block in blocks.items():
        handles.append(block.register_forward_hook(on_block(path)))
        handles.append(block.branches[ORIGIN].register_forward_hook(on_origin(path)))
    handles += [get_module(model, p).register_forward_hook(on_holder(p)) for p in holders]
    measured = {id(b): b for ns in norms.values() for norm in ns for b in norm.buffers()}
    try:
        with state_kept(model, measured.values()):
            for norm in (norm for ns in norms.values() for norm in ns):
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.train()
            for batch in batches:
                seen.clear()
                with suppress(_Reached):
                    forward(batch)
                ran = True
                # A batch that takes another branch of the model may call more.
                expected |= seen
    finally:
        for handle in handles:
            handle.remove()
    for path, block in blocks.items():
        if variances[path]:
            block.origin_std.copy_(torch.stack(variances[path]).mean(0).sqrt())
    device = next(iter(blocks.values())).origin_std.device
    reached = torch.tensor([float(bool(variances[path])) for path in blocks], device=device)
    if in_parallel():
        mine = reached.tolist()
        dist.all_reduce(reached)
        for (path, block), own, all_of_them in zip(
            blocks.items(), mine, reached.tolist(), strict=True
        ):
            statistics = [t for norm in norms[path] for t in (norm.running_mean, norm.running_var)]
            for statistic in (*statistics, block.origin_std):
                statistic.mul_(own)
                dist.all_reduce(statistic)
                statistic.div_(max(all_of_them, 1.0))

    def verdict(path: str, is_reached: bool) -> Verdict:
        floats = [t for t in blocks[path].buffers() if t.is_floating_point()]
        if not all(t.isfinite().all() for t in floats):
            return Verdict.NOT_FINITE
        if path in few:
            return Verdict.FEW
        if not is_reached:
            return Verdict.UNUSED if ran else Verdict.NO_BATCH
        return Verdict.FIT

    verdicts = {p: verdict(p, n > 0) for p, n in zip(blocks, reached.tolist(), strict=True)}
    return reasons_of(verdicts, device)


def _norms_of(blocks: Mapping[str, Block]) -> dict[str, list[nn.Module]]:
    """The norms of the added branches, each with the innermost of its blocks."""
    norms: dict[str, list[nn.Module]] = {}
    known: set[int] = set()
    for path in reversed(list(blocks)):
        modules = [m for branch in blocks[path].added for m in branch.modules()]
        norms[path] = [m for m in modules if isinstance(m, _BatchNorm) and id(m) not in known]
        known |= {id(norm) for norm in norms[path]}
    return norms
