"""The reasons for the speed, not the seconds: what runs, and what is kept for the backward."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from conftest import randomise
from mmengine.model.utils import _BatchNormXd
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dyrep_mm
from dyrep_mm.reparam.block import Block
from dyrep_mm.surgery.tree import blocks_of


class Operations(TorchDispatchMode):
    """Counts what runs, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def make_block() -> Block:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)).double()
    dyrep_mm.grow(model, '0')
    randomise(model)
    return model[0]


def saved_bytes(block: Block, x: torch.Tensor) -> int:
    """Bytes of maps that the backward keeps, each storage once."""
    known = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        is_map = tensor.ndim == 4 and len(tensor) == len(x)  # and not a merged kernel
        if storage.data_ptr() not in known and is_map:
            storages[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    assert out.requires_grad
    return sum(size for size, _ in storages.values())


def test_a_frozen_block_is_one_conv():
    block = make_block().train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with Operations() as operations:
        block(torch.rand(2, 8, 9, 9, dtype=torch.float64))
    assert operations.counts['convolution'] == 1
    assert operations.counts['native_batch_norm'] == 0


def test_inference_merges_once():
    block = make_block().eval()
    x = torch.rand(2, 8, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        block(x)
        with Operations() as operations:
            block(x)
    assert operations.counts == {'convolution': 1}


@pytest.mark.parametrize('kind', [nn.BatchNorm2d, _BatchNormXd], ids=['BN', 'reverted SyncBN'])
def test_in_training_a_1x1_merges_too(kind):
    """Four convs run, for `kxk` with all that merges, `1x1-kxk`, `1xk` and `kx1`, and one that is
    the pooling; three norms; and three sums, in place."""
    block = make_block().train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = kind
    with Operations() as operations:
        block(torch.rand(2, 8, 9, 9, dtype=torch.float64))
    assert operations.counts['convolution'] == 5
    assert operations.counts['native_batch_norm'] == 3
    assert not {'stack', 'cat'} & operations.counts.keys()


@pytest.mark.parametrize('side', [7, 8])
def test_merging_costs_no_more_than_it_saves(side):
    """It happens only on maps with at least eight times as many places as channels."""
    block = make_block().train()
    with Operations() as operations:
        block(torch.rand(1, 8, side, side, dtype=torch.float64))
    assert operations.counts['native_batch_norm'] == (3 if side == 8 else 8)


def autocast(block, x):
    with torch.autocast('cpu', torch.bfloat16):
        block(x)


def half(block, x):
    block.bfloat16()(x.bfloat16())


class OtherNorm(nn.BatchNorm2d):
    """Computes in its own way, as SyncBN does."""

    def forward(self, x):
        return super().forward(x)


def other_norms(block, x):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = OtherNorm
    block(x)


def watched(block, x):
    handle = block.branches['1x1'].bn.register_forward_hook(lambda *_: None)
    block(x)
    handle.remove()


@pytest.mark.parametrize('run', [autocast, half, other_norms, watched])
def test_all_branches_run_where_merging_is_not_sure(run):
    block = make_block().float().train()
    with Operations() as operations:
        run(block, torch.rand(2, 8, 9, 9))
    assert operations.counts['native_batch_norm'] == 8
    assert operations.counts['add_'] >= len(block.added)
    assert not {'stack', 'cat', 'sum', 'add'} & operations.counts.keys()


def test_a_trace_shows_all_branches():
    """Who counts multiply-adds from a trace counts those of the structure."""
    block = make_block().float().train()
    trace = torch.jit.trace(block, torch.rand(2, 8, 9, 9), check_trace=False)
    assert str(trace.inlined_graph).count('aten::batch_norm') == 8


def test_what_a_block_in_training_keeps():
    """The input, its averages over windows for `1x1-avg`, and one map for each branch that runs."""
    block = make_block().train()
    x = torch.rand(2, 8, 32, 32, dtype=torch.float64, requires_grad=True)
    assert saved_bytes(block, x) == x.untyped_storage().nbytes() * (1 + 1 + 3)


@pytest.mark.parametrize('watch', [False, True])
def test_recomputing_keeps_the_input_alone(watch):
    block = make_block().train()
    x = torch.rand(2, 8, 32, 32, dtype=torch.float64, requires_grad=True)
    block.recompute = True
    if watch:  # all branches run
        block.branches['1x1'].register_forward_hook(lambda *_: None)
    assert saved_bytes(block, x) == x.untyped_storage().nbytes()


def test_recomputing_computes_the_same():
    kept = make_block().train()
    again = copy.deepcopy(kept)
    again.recompute = True
    inputs = [torch.rand(2, 8, 9, 9, dtype=torch.float64) for _ in range(2)]
    for x in inputs:  # twice: statistics are recorded once in each step
        results = []
        for block in (kept, again):
            leaf = x.clone().requires_grad_()
            out = block(leaf)
            out.square().sum().backward()
            results.append((out, leaf.grad, *(p.grad for p in block.parameters())))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    for (name, one), other in zip(kept.named_buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert [m.momentum for m in kept.modules() if isinstance(m, nn.BatchNorm2d)] == [
        m.momentum for m in again.modules() if isinstance(m, nn.BatchNorm2d)
    ]


@pytest.mark.parametrize('recompute', [False, True])
def test_the_hook_says_whether_to_recompute(tmp_path, recompute):
    from runners import runner

    hook = {'interval': 2, 'calibration_batches': 1, 'recompute': recompute}
    run = runner(tmp_path, hook=hook, iters=5)
    run.train()
    blocks = blocks_of(run.model).values()
    assert blocks
    assert all(block.recompute is recompute for block in blocks)


def test_activation_checkpointing_of_mmengine_goes_on_working(tmp_path):
    """It wraps the forward of modules above the blocks, also of those that grow later."""
    from mmengine.runner import Runner
    from runners import config

    hook = {'interval': 2, 'calibration_batches': 1, 'metric': 'snip'}
    cfg = config(tmp_path, hook=hook, iters=6)
    cfg.activation_checkpointing = ['backbone.layer1', 'backbone.layer4']
    run = Runner.from_cfg(cfg)
    run.train()
    assert len(blocks_of(run.model)) == 2
    for parameter in run.model.parameters():
        assert parameter.isfinite().all()
