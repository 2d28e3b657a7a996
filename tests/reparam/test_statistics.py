"""What the norms of branches normalise with, and the unit of a branch."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.branches import BRANCHES, ORIGIN, fitting
from dyrep_mm.reparam.geometry import ConvSpec
from dyrep_mm.reparam.moments import SAMPLE
from support.checks import assert_same
from support.nets import GEOMETRIES, branchwise, image, make_block, make_conv, norms_of

NAMES = [*([name] for name in BRANCHES), None]


def blocks_in(block: Block) -> list[Block]:
    return [module for module in block.modules() if isinstance(module, Block)]


@torch.no_grad()
def in_mode(branch_norm: str, geometry: dict | None = None, names=None, nested=False) -> Block:
    """A block in train mode with random norms and units; nested, with blocks in two places."""
    conv = make_conv(**(geometry or {}))
    if names and names[0] not in fitting(ConvSpec.of(conv)):
        pytest.skip('does not fit')
    block = make_block(conv, names)
    if nested:
        block.branches['1x1-kxk'].conv = make_block(block.branches['1x1-kxk'].conv)
        block.branches[ORIGIN] = make_block(block.branches[ORIGIN])
    block.train()
    for one in blocks_in(block):
        one.set_branch_norm(branch_norm, True)
        for branch in one.added:
            branch.unit.uniform_(0.5, 2)
    return block


def train_pass(block: Block, x: torch.Tensor, forward=lambda block, x: block(x)) -> list:
    """Output, gradients of input and parameters, and buffers, of two batches."""
    results = []
    for _ in range(2):
        x = x.roll(1, -1).detach().requires_grad_()
        out = forward(block, x)
        results += [out.detach(), *torch.autograd.grad(out.sin().sum(), [x, *block.parameters()])]
    return results + [buffer.double() for buffer in block.buffers()]


def assert_same_pass(values: list, references: list) -> None:
    size = max(reference.abs().max() for reference in references)
    for value, reference in zip(values, references, strict=True):
        # What is in front of a BN has gradients that cancel.
        assert torch.allclose(value, reference, rtol=1e-8, atol=1e-11 * size)


# The unit


@pytest.mark.parametrize('names', NAMES, ids=str)
def test_a_branch_counts_in_its_unit(names):
    block = in_mode('batch', names=names)
    x = image(2, 4, 8, 8)
    assert_same_pass(train_pass(copy.deepcopy(block), x), train_pass(block, x, branchwise))
    assert_same(block.eval()(x), branchwise(block, x))
    before = block(x)
    block.absorb(block.names[1:2])
    assert_same(block(x), before)


def test_weights_of_a_version_without_units():
    """Then all are 1; weights of another part of a model leave them alone."""
    block = in_mode('batch')
    state = {n: t for n, t in block.state_dict().items() if not n.endswith('.unit')}
    assert len(block.state_dict()) == len(state) + len(block.added)
    units = [branch.unit.clone() for branch in block.added]
    block.load_state_dict({'branches.kxk.weight': block.origin.weight}, strict=False)
    assert all(torch.equal(branch.unit, u) for branch, u in zip(block.added, units, strict=True))
    block.load_state_dict(state, strict=True)
    assert all((branch.unit == 1).all() for branch in block.added)


@pytest.mark.parametrize('dead', [slice(1, 3), slice(None)], ids=['two', 'all'])
def test_branches_of_a_dead_channel_can_wake_it(dead):
    conv, x = make_conv(), image(2, 4, 8, 8)
    with torch.no_grad():
        conv.weight[dead] = 0
        before = conv(x)
        block = make_block(conv)
        block.origin_std.copy_(before.std((0, 2, 3)))
        block.settle(0.01)
        block.eval()
        assert_same(block(x) + 1, before + 1)
    block(x).square().sum().backward()
    for branch in block.added:
        assert (branch.unit > 0).all()
    assert all(value < float('inf') for value in block.importances().values())


# Fixed


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def plainly(block, x):
    return block(x)


def autocast(block, x):
    with torch.autocast('cpu', torch.bfloat16):
        return block(x)


def in_half(block, x):
    return block.bfloat16()(x.bfloat16())


def channels_last(block, x):
    return block(x.to(memory_format=torch.channels_last))


def on_a_tiny_map(block, x):
    return block(x[..., :1, :2])


def on_one_image(block, x):
    return block(x[0])


def watched(block, x):
    for module in block.modules():
        if module is not block:
            module.register_forward_hook(lambda *_: None)
    return block(x)


def with_synchronised_norms(block, x):
    return nn.SyncBatchNorm.convert_sync_batchnorm(block)(x)


def recomputing(block, x):
    block.recompute = True
    return block(x)


WAYS = [plainly, autocast, in_half, channels_last, on_a_tiny_map, on_one_image, watched]
WAYS += [with_synchronised_norms, recomputing]


@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('branch_norm', ['fixed', 'sampled'])
def test_one_conv_in_train_mode(branch_norm, way, nested):
    block = in_mode(branch_norm, nested=nested).float()
    assert block.training
    with Operations() as operations:
        out = way(block, image(2, 4, 9, 9, dtype=torch.float32))
    assert operations.counts['convolution'] == 1
    assert not operations.counts['native_batch_norm']
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('branch_norm', ['fixed', 'sampled'])
def test_one_conv_in_a_trace(branch_norm):
    block, x = in_mode(branch_norm), image(2, 4, 9, 9)
    trace = torch.jit.trace(block, x, check_trace=False)
    assert str(trace.inlined_graph).count('aten::_convolution') == 1
    assert_same(trace(x), block(x))


@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
@pytest.mark.parametrize('names', NAMES, ids=str)
def test_a_fixed_block_computes_in_train_mode_what_it_does_in_eval_mode(geometry, names):
    block, x = in_mode('fixed', geometry, names), image(2, 4, 12, 11)
    state = {name: buffer.clone() for name, buffer in block.named_buffers()}
    out = block(x)
    assert_same(block.eval()(x), out)
    assert_same(branchwise(block, x), out)
    assert all(torch.equal(buffer, state[name]) for name, buffer in block.named_buffers())


def test_fixed_norms_stay_in_eval_mode():
    block = in_mode('fixed', nested=True)
    for one in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        one.eval()
        nn.Sequential(one).train()
        assert one.training
        assert one.is_linear
        assert not any(norm.training for norm in norms_of(one))
    for one in blocks_in(block):
        one.set_branch_norm('batch', True)
    assert all(norm.training for norm in norms_of(block))
    with pytest.raises(DyRepError, match='branch_norm must be one of batch, fixed, sampled, got'):
        block.set_branch_norm('scale', True)


# Sampled


@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('geometry', [*GEOMETRIES, {'stride': (2, 1), 'padding': (0, 3)}], ids=str)
def test_a_sample_of_all_places_is_the_batch(geometry, nested):
    """Output, gradients and running statistics are those of the branches."""
    block, x = in_mode('sampled', geometry, nested=nested), image(2, 4, 12, 11)
    twin = copy.deepcopy(block)
    for one in blocks_in(twin):
        one.set_branch_norm('batch', True)
    assert_same_pass(train_pass(block, x), train_pass(twin, x))
    last = image(2, 4, 12, 11).to(memory_format=torch.channels_last)
    assert_same(block(last), block(last.contiguous()))


def sampled_places(shape: torch.Size) -> torch.Tensor:
    """Which places of maps of this shape (batch, h, w) are in the sample: by the rule in words."""
    batch, *sides = shape
    chosen = None
    for step in range(1, max(sides) + 1):
        mask = torch.zeros(shape, dtype=torch.bool)
        for n in range(batch):
            starts = (n, n // step)
            rows, cols = (
                [(start + i) % side for i in range(0, side, step)]
                for start, side in zip(starts, sides, strict=True)
            )
            for row in rows:
                mask[n, row, cols] = True
        if chosen is None or mask.sum() >= SAMPLE:
            chosen = mask
    return chosen


def by_hand(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Every branch of Table 1 by itself, normalised with the statistics of the sampled places."""
    spec = block.spec

    def norm(bn, y):
        values = y.movedim(1, -1)[sampled_places(y[:, 0].shape)]
        mean, var = values.mean(0), values.var(0, correction=0)
        with torch.no_grad():
            unbiased = values.var(0)
            bn.running_mean.lerp_(mean, bn.momentum)
            bn.running_var.lerp_(unbiased, bn.momentum)
            bn.num_batches_tracked.add_(1)
        y = (y - mean.view(-1, 1, 1)) / (var + bn.eps).sqrt().view(-1, 1, 1)
        return y * bn.weight.view(-1, 1, 1) + bn.bias.view(-1, 1, 1)

    def conv(x, weight, padding=(0, 0), stride=spec.stride):
        return F.conv2d(x, weight, None, stride, padding, spec.dilation, spec.groups)

    rows, cols = spec.padding
    total = block.origin(x)
    for name, branch in block.branches.items():
        if name in ('1x1', '1xk', 'kx1', 'identity'):
            size = {'1x1': (1, 1), '1xk': (1, 3), 'kx1': (3, 1), 'identity': (1, 1)}[name]
            y = x if name == 'identity' else conv(x, branch.conv.weight, [k // 2 for k in size])
        elif name in ('1x1-kxk', '1x1-avg'):
            y = F.pad(conv(x, branch.pre.weight, stride=1), (cols, cols, rows, rows))
            y = norm(branch.pre_bn, y)
            if name == '1x1-avg':
                y = F.avg_pool2d(y, spec.kernel_size, spec.stride)
            else:
                y = conv(y, branch.conv.weight)
        else:
            continue
        total = total + norm(branch.bn, y) * branch.unit.view(-1, 1, 1)
    return total


@pytest.mark.parametrize('batch', [7, 8])
@pytest.mark.parametrize('geometry', [{}, {'channels': (4, 6, 2), 'stride': (2, 2)}], ids=str)
def test_a_sample_against_plain_torch(geometry, batch):
    """Output, gradients and running statistics."""
    block, x = in_mode('sampled', geometry), image(batch, 4, 48, 50)
    places = sampled_places(block.origin(x)[:, 0].shape)
    assert SAMPLE <= places.sum() < places.numel() / 3
    twin = copy.deepcopy(block)
    assert_same_pass(train_pass(block, x), train_pass(twin, x, by_hand))


def test_every_place_has_its_turn():
    """Over the images of a large batch, so that the border counts as it does in the map."""
    places = sampled_places(torch.Size((256, 7, 7))).double()
    assert places.mean() < 0.1
    for axis in (1, 2):
        share = places.mean((0, axis))
        assert (share / share.mean() - 1).abs().max() < 0.05


def test_an_operation_from_outside_runs_where_nothing_tells_its_statistics():
    """Two stages, of which nobody said what the first norm sees."""
    block = in_mode('sampled', names=['1x1-kxk'])
    branch = block.branches['1x1-kxk']
    branch.pads_first = False
    twin, x = copy.deepcopy(block), image(2, 4, 8, 8)
    assert_same_pass(train_pass(block, x), train_pass(twin, x, branchwise))


def test_derivatives_of_a_sampled_block():
    block, x = in_mode('sampled', names=['1x1-kxk', 'kx1']), image(1, 4, 4, 3).requires_grad_()
    torch.autograd.gradcheck(block, x, check_forward_ad=True, atol=1e-4)
