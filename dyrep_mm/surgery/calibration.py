"""BN statistics of new branches, measured on training batches (section 4.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.branches import ORIGIN
from dyrep_mm.reparam.norms import change_statistics, tracked
from dyrep_mm.surgery.tree import ancestors, get_module, outermost, state_kept
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

    def on_origin(path: str) -> Callable:
        return lambda _module, _args, output: variances[path].append(_moments(output, 0)[1])

    def on_block(path: str) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            if has_few_values(output):  # nothing has run that could be measured
                few.add(path)

        return hook

    measured = [b for ns in norms.values() for norm in ns for b in norm.buffers()]
    with ExitStack() as stack:
        for path, block in blocks.items():
            stack.callback(block.register_forward_hook(on_block(path)).remove)
            origin = block.branches[ORIGIN]
            stack.callback(origin.register_forward_hook(on_origin(path)).remove)
        stack.enter_context(state_kept(model, measured))
        for norm in (norm for ns in norms.values() for norm in ns):
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.train()
        for path in blocks:  # what it lies in must run branch by branch
            for module in (*ancestors(model, path), blocks[path]):
                if isinstance(module, Block):
                    module.branch_norm = 'batch'
        ran = _run(model, blocks, batches, forward, calls)
    for path, block in blocks.items():
        if variances[path]:
            block.origin_std.copy_(torch.stack(variances[path]).mean(0).sqrt())
    statistics = {
        path: [block.origin_std, *(t for norm in norms[path] for t in tracked(norm)[:2])]
        for path, block in blocks.items()
    }
    reached = _average(statistics, {path: bool(variances[path]) for path in blocks})

    def verdict(path: str, is_reached: bool) -> Verdict:
        floats = [t for t in blocks[path].buffers() if t.is_floating_point()]
        if not all(t.isfinite().all() for t in floats):
            return Verdict.NOT_FINITE
        if path in few:
            return Verdict.FEW
        if not is_reached:
            return Verdict.UNUSED if ran else Verdict.NO_BATCH
        return Verdict.FIT

    device = next(iter(blocks.values())).origin_std.device
    return reasons_of({path: verdict(path, path in reached) for path in blocks}, device)


@torch.no_grad()
def remeasure(
    model: nn.Module,
    blocks: Mapping[str, Block],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
) -> None:
    """Measure ``origin_std`` of blocks that train, and what their norms see where these are fixed.

    The scale and the shift of a fixed norm follow its statistics, so that the function stays what
    it was. A block that no batch reached, or that met what is not finite, is left alone.

    Args:
        model: Contains the blocks.
        blocks: By path.
        batches: Training batches.
        forward: Runs the model on one batch.
    """
    if not blocks:
        return
    fixed = {path: b for path, b in blocks.items() if b.branch_norm == 'fixed'}
    norms = _norms_of(fixed)
    seen: dict[str, list[list[Tensor]]] = {path: [] for path in blocks}
    inputs: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def before_norm(norm: nn.Module, args: tuple) -> None:
        inputs[norm] = _moments(args[0], 1)  # as a BN keeps it

    def before_block(path: str) -> Callable:
        def hook(block: Block, args: tuple, kwargs: dict) -> None:
            x = (*args, *kwargs.values())[0]
            x = x[None] if x.ndim == 3 else x
            output = block.branches[ORIGIN](x)
            if has_few_values(output):
                return
            for branch in block.added if path in fixed else ():
                branch(x)  # beside the block, which is one conv
            own = [inputs[norm] for norm in norms.get(path, ())]
            seen[path].append([_moments(output, 0)[1], *(t for pair in own for t in pair)])

        return hook

    with ExitStack() as stack:
        for path, block in blocks.items():
            handle = block.register_forward_pre_hook(before_block(path), with_kwargs=True)
            stack.callback(handle.remove)
        for norm in (norm for ns in norms.values() for norm in ns):
            stack.callback(norm.register_forward_pre_hook(before_norm).remove)
        stack.enter_context(state_kept(model))
        _run(model, blocks, batches, forward)
    statistics: dict[str, list[Tensor]] = {}
    for path, block in blocks.items():
        if seen[path]:
            statistics[path] = [torch.stack(t).mean(0) for t in zip(*seen[path], strict=True)]
        else:
            own = [t for norm in norms.get(path, ()) for t in tracked(norm)[:2]]
            wide = torch.promote_types(block.origin_std.dtype, torch.float32)
            statistics[path] = [t.to(wide, copy=True) for t in (block.origin_std, *own)]
    for path in _average(statistics, {path: bool(seen[path]) for path in blocks}):
        variance, *own = statistics[path]
        if not all(t.isfinite().all() for t in statistics[path]):
            continue
        blocks[path].origin_std.copy_(variance.sqrt())
        for norm, mean, var in zip(norms.get(path, ()), own[::2], own[1::2], strict=True):
            change_statistics(norm, mean, var)


def _moments(x: Tensor, correction: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (channels,) of maps (..., channels, h, w)."""
    images = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, *x.shape[-3:])
    var, mean = torch.var_mean(images, (0, 2, 3), correction=correction)
    return mean, var


def _run(
    model: nn.Module,
    paths: Iterable[str],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    calls: Mapping[str, int] | None = None,
) -> bool:
    """Run batches, each until it is behind the last of the blocks at ``paths``; whether there was
    one. For ``calls`` see :func:`calibrate`."""
    holders = dict.fromkeys(outermost(model, path) for path in paths)
    expected = Counter({path: n for path, n in (calls or {}).items() if path in holders})
    seen: Counter[str] = Counter()
    ran = False

    def on_holder(path: str) -> Callable:
        def hook(*_: Any) -> None:
            seen[path] += 1
            if len(expected) == len(holders) and seen >= expected:
                raise _Reached

        return hook

    handles = [get_module(model, p).register_forward_hook(on_holder(p)) for p in holders]
    try:
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
    return ran


def _average(statistics: dict[str, list[Tensor]], is_reached: dict[str, bool]) -> set[str]:
    """Average tensors in place over the processes that reached their block; the paths of the
    blocks that any has reached."""
    if not in_parallel():
        return {path for path, reached in is_reached.items() if reached}
    device = next(iter(statistics.values()))[0].device
    counts = torch.tensor([float(reached) for reached in is_reached.values()], device=device)
    dist.all_reduce(counts)
    for (path, reached), count in zip(is_reached.items(), counts.tolist(), strict=True):
        for statistic in statistics[path]:
            statistic.mul_(float(reached))
            dist.all_reduce(statistic)
            statistic.div_(max(count, 1.0))
    return {path for path, count in zip(is_reached, counts.tolist(), strict=True) if count}


def _norms_of(blocks: Mapping[str, Block]) -> dict[str, list[_BatchNorm]]:
    """The norms of the added branches, each with the innermost of its blocks."""
    norms: dict[str, list[_BatchNorm]] = {}
    known: set[int] = set()
    for path in reversed(list(blocks)):
        modules = [m for branch in blocks[path].added for m in branch.modules()]
        norms[path] = [m for m in modules if isinstance(m, _BatchNorm) and id(m) not in known]
        known |= {id(norm) for norm in norms[path]}
    return norms
