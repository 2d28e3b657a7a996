"""The reasons for the speed, not the seconds: what runs, and what is kept for the backward."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from conftest import randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dyrep_mm
from dyrep_mm.block import Block
from dyrep_mm.surgery import blocks_of


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
    """Bytes of activations that the backward keeps, each storage once."""
    known = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.ndim == 4:
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


def test_branches_are_added_in_place_and_never_stacked():
    block = make_block().train()
    with Operations() as operations:
        block(torch.rand(2, 8, 9, 9, dtype=torch.float64))
    assert operations.counts['add_'] >= len(block.added)
    assert not {'stack', 'cat', 'sum', 'add'} & operations.counts.keys()


def test_what_a_block_in_training_keeps():
    """The input once, and no more than one map for each BN that is not on the input, and for
    the input of each spatial conv behind a BN."""
    block, x = make_block().train(), torch.rand(2, 8, 32, 32, dtype=torch.float64)
    size = x.untyped_storage().nbytes()
    # x; 1x1, 1xk, kx1: 1 each; 1x1-kxk: 3; 1x1-avg: 2, since its pooling keeps no input.
    padded = 34 * 34 / 32**2
    expected = size * (1 + 3 + 1 + 2 * padded + 1 + padded)
    assert saved_bytes(block, x) == pytest.approx(expected, rel=1e-6)


def test_recomputing_keeps_the_input_alone():
    block, x = make_block().train(), torch.rand(2, 8, 32, 32, dtype=torch.float64)
    block.recompute = True
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
