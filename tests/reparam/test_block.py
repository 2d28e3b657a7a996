"""The block: one kernel equals the branches, for any geometry."""

import copy
import pickle
from contextlib import suppress

import pytest
import torch
from torch import nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.branches import BRANCHES, OPERATIONS, ORIGIN, fitting
from dyrep_mm.reparam.geometry import ConvSpec
from support.checks import assert_same
from support.nets import (
    GEOMETRIES,
    branchwise,
    image,
    make_block,
    make_conv,
    make_norm,
    norms_of,
    randomise,
)


@pytest.mark.parametrize('names', [[], ['kxk']])
def test_a_block_needs_a_branch(names):
    with pytest.raises(DyRepError, match='kxk'):
        Block(make_conv(), names, make_norm)


@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
@pytest.mark.parametrize('names', [*([n] for n in BRANCHES), None], ids=str)
def test_merged_equals_branches(geometry, names):
    """Output, gradient of the input and of every parameter."""
    conv = make_conv(**geometry)
    if names and names[0] not in fitting(ConvSpec.of(conv)):
        pytest.skip('does not fit')
    block = make_block(conv, names).eval()
    assert block.is_linear
    x = image(2, 4, 12, 11).requires_grad_()
    wanted = [x, *block.parameters()]
    out = block(x)
    expected = branchwise(block, x)
    assert_same(out.detach(), expected.detach())
    direction = torch.randn_like(out)
    gradients = torch.autograd.grad(out, wanted, direction)
    references = torch.autograd.grad(expected, wanted, direction)
    for gradient, reference in zip(gradients, references, strict=True):
        assert_same(gradient, reference, scale=10)


@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
def test_nested_block_is_its_kernel(geometry):
    block = make_block(make_conv(**geometry))
    inner = block.branches['1x1-kxk'].conv
    block.branches['1x1-kxk'].conv = make_block(inner)
    block.branches[ORIGIN] = make_block(block.branches[ORIGIN], ['1x1'])
    block.eval()
    x = image(2, 4, 14, 15)
    with torch.no_grad():
        assert_same(block(x), branchwise(block, x))


# Training


def train_pass(block, x, forward):
    """Output, gradients of the input and of every parameter, and buffers, of three batches."""
    results = []
    for _ in range(3):
        x = x.roll(1, -1).detach().requires_grad_()
        out = forward(block, x)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).double()
        results += [out.detach()]
        results += torch.autograd.grad(out, [x, *block.parameters()], direction)
    return results + [buffer.double() for buffer in block.buffers()]


def assert_trains_like_its_branches(block, x):
    twin = copy.deepcopy(block)
    assert block.may_merge(x)
    values = train_pass(block, x, lambda block, x: block(x))
    references = train_pass(twin, x, branchwise)
    size = max(reference.abs().max() for reference in references)
    for value, reference in zip(values, references, strict=True):
        # What is in front of a BN has gradients that cancel.
        assert torch.allclose(value, reference, rtol=1e-9, atol=1e-12 * size)


@pytest.mark.parametrize('geometry', [*GEOMETRIES, {'stride': (2, 1), 'padding': (0, 3)}], ids=str)
@pytest.mark.parametrize('names', [*([n] for n in BRANCHES), None], ids=str)
def test_train_mode_is_the_sum_of_branches(geometry, names):
    """Whatever merges: output, gradients and running statistics."""
    conv = make_conv(**geometry)
    if names and names[0] not in fitting(ConvSpec.of(conv)):
        pytest.skip('does not fit')
    assert_trains_like_its_branches(make_block(conv, names).train(), image(2, 4, 12, 11))


@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
def test_train_mode_of_nested_blocks(geometry):
    block = make_block(make_conv(**geometry))
    spatial = block.branches['1x1-kxk']
    spatial.conv = make_block(spatial.conv)
    block.branches[ORIGIN] = make_block(block.branches[ORIGIN])
    assert_trains_like_its_branches(block.train(), image(2, 4, 12, 11))


@pytest.mark.parametrize('frozen', range(9))
def test_train_mode_with_some_norms_frozen(frozen):
    """Each alone, and every second."""
    block = make_block().train()
    norms = norms_of(block)
    assert len(norms) == 8
    for bn in norms[frozen : frozen + 1] or norms[::2]:
        bn.eval()
    assert_trains_like_its_branches(block, image(2, 4, 12, 11))


@pytest.mark.parametrize('change', [{'momentum': None}, {'eps': 0.5, 'momentum': 0.5}], ids=str)
def test_train_mode_with_other_norms(change):
    block = Block(make_conv(), None, lambda channels: nn.BatchNorm2d(channels, **change).double())
    assert_trains_like_its_branches(randomise(block).train(), image(2, 4, 12, 11))


def test_train_mode_without_running_statistics():
    block = make_block().train()
    for bn in norms_of(block):
        bn.track_running_stats, bn.running_mean, bn.running_var = False, None, None
    assert_trains_like_its_branches(block, image(2, 4, 12, 11))


def test_train_mode_in_single_precision():
    """As near to the exact values as rounding allows, like the branches themselves."""
    block, x = make_block(make_conv(channels=(32, 32, 1))).train(), torch.randn(2, 32, 20, 20)
    exact = branchwise(copy.deepcopy(block), x.double()).detach().float()
    single = copy.deepcopy(block).float()
    assert single.may_merge(x)
    for output in (single(x), branchwise(copy.deepcopy(block).float(), x)):
        assert_same(output.detach(), exact)


def test_train_mode_on_nothing_but_zeros():
    block = make_block().train()
    x = torch.zeros(2, 4, 8, 8).double().requires_grad_()
    out = block(x)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in block.state_dict().values())


# Settling and absorbing


def test_the_conv_stays_the_same_objects():
    conv = make_conv(bias=True)
    weight, bias, before = conv.weight, conv.bias, conv.weight.detach().clone()
    block = Block(conv, None, make_norm)
    assert block.branches[ORIGIN] is conv
    assert torch.equal(weight, before)
    block.settle(0.01)
    assert conv.weight is weight
    assert conv.bias is bias
    assert not torch.equal(weight, before)


@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
@pytest.mark.parametrize('names', [*([n] for n in BRANCHES), None], ids=str)
def test_settle_keeps_the_function(geometry, names):
    conv = make_conv(**geometry)
    if names and names[0] not in fitting(ConvSpec.of(conv)):
        pytest.skip('does not fit')
    x = image(2, 4, 12, 11)
    with torch.no_grad():
        before = conv(x)
        block = make_block(conv, names)
        block.origin_std.uniform_(0.5, 2)
        block.settle(0.01)
        assert_same(block.eval()(x), before)
        for branch in block.added:
            assert torch.equal(branch.unit, block.origin_std)
            assert (branch.bn.weight == 0.01).all()
            assert not branch.kernel().bias.any()
            assert branch.kernel().weight.any()
    for value in block.importances().values():
        assert value == pytest.approx(0.01)


def test_importances_are_equation_9_relative_to_the_output():
    block = make_block()
    block.origin_std.fill_(4.0)
    assert list(block.importances()) == block.names[1:]
    for name, value in block.importances().items():
        gamma = block.branches[name].bn.weight
        assert value == pytest.approx(gamma.abs().mean().item() / 4)
    with torch.no_grad():
        block.branches['1x1'].bn.weight.neg_()
    assert block.importances()['1x1'] > 0


@pytest.mark.parametrize('names', [['1x1'], ['1x1-kxk', 'identity'], list(BRANCHES)], ids=str)
@pytest.mark.parametrize('bias', [True, False])
def test_absorb_keeps_the_function(names, bias):
    block = make_block(make_conv(bias=bias)).eval()
    weight, x = block.origin.weight, image(2, 4, 8, 8)
    with torch.no_grad():
        before = block(x)
        block.absorb(names)
        assert block.names == [n for n in OPERATIONS if n not in names]
        assert block.origin.weight is weight
        assert_same(block(x), before)
        assert_same(branchwise(block, x), before)
    # A conv without bias gains one only when no branch is left to take it.
    gained = not bias and len(names) == len(BRANCHES)
    assert (block.origin.bias is not None) == (bias or gained)
    assert getattr(block.origin, 'gained_bias', False) == gained


def test_absorbing_nothing_worth_a_bias_adds_none():
    block = Block(make_conv(), ['1x1'], make_norm)
    block.settle(0.01)
    block.absorb(['1x1'])
    assert block.origin.bias is None


def test_absorb_into_a_nested_origin():
    block = make_block(make_conv(), ['1x1', 'identity'])
    inner = make_block(block.branches[ORIGIN], ['kx1'])
    block.branches[ORIGIN] = inner
    block.eval()
    x = image(2, 4, 8, 8)
    with torch.no_grad():
        before = block(x)
        block.absorb(['1x1', 'identity'])
        assert_same(branchwise(block, x), before)
    assert inner.origin.bias is None  # the shift of the inner branch took it
    with torch.no_grad():
        inner.absorb(['kx1'])
        assert_same(branchwise(block, x), before)
    assert inner.origin.gained_bias


@pytest.mark.parametrize('names', [['kxk'], ['1xk'], ['1x1', '1xk']])
def test_absorb_refuses_what_is_not_there(names):
    block = make_block(names=['1x1', 'identity'])
    state = {k: v.clone() for k, v in block.state_dict().items()}
    with pytest.raises(DyRepError, match='no branch'):
        block.absorb(names)
    assert block.names == ['kxk', '1x1', 'identity']
    assert all(torch.equal(v, state[k]) for k, v in block.state_dict().items())


def test_absorb_a_name_twice():
    """Once is enough, or an error that changes nothing; not half of it."""
    block = make_block(names=['1x1', 'identity']).eval()
    x = image(2, 4, 8, 8)
    with torch.no_grad():
        before = block(x)
        with suppress(DyRepError):
            block.absorb(['1x1', '1x1'])
        assert_same(block(x), before)


def test_absorbing_into_a_frozen_conv_trains_nothing():
    block = make_block(names=['1x1']).requires_grad_(False)
    block.absorb(['1x1'])
    assert not any(p.requires_grad for p in block.parameters())


@pytest.mark.parametrize(
    'duplicate', [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))]
)
def test_copies(duplicate):
    block, x = make_block().eval(), image(2, 4, 8, 8)
    with torch.no_grad():
        before = block(x)
    twin = duplicate(block)
    assert list(twin.state_dict()) == list(block.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(x), before)
        twin.origin.weight.zero_()
        assert torch.equal(block(x), before)
        assert_same(twin(x), branchwise(twin, x))


# What a new branch is like


def test_frozen_conv_has_frozen_branches():
    conv = make_conv().requires_grad_(False)
    assert not any(p.requires_grad for p in Block(conv, None, make_norm).parameters())
    assert all(p.requires_grad for p in Block(make_conv(), None, make_norm).parameters())


def test_modes_follow():
    block = Block(make_conv().eval(), None, make_norm)
    assert not any(module.training for module in block.modules())
    block = Block(make_conv(), None, lambda channels: make_norm(channels).eval())
    assert block.is_linear
    assert block.training


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dtype_follows(dtype):
    block = Block(make_conv().to(dtype), None, nn.BatchNorm2d)
    floats = [t for t in block.state_dict().values() if t.is_floating_point()]
    assert all(t.dtype == dtype for t in floats)
    x = image(2, 4, 8, 8, dtype=dtype)
    assert block(x).dtype == block.eval()(x).dtype == dtype


def test_autocast_merges_in_full_precision():
    block, x = make_block(make_conv()).float().eval(), image(2, 4, 8, 8, dtype=torch.float32)
    expected = block.kernel()
    with torch.autocast('cpu', torch.bfloat16):
        merged = block.kernel()
        assert block(x).dtype == torch.bfloat16
        assert block.train()(x).dtype == torch.bfloat16
    assert torch.equal(merged.weight, expected.weight)
    assert merged.bias.dtype == torch.float32


def test_random_weights_come_from_the_generator():
    def weights(seed):
        block = Block(make_conv(), None, make_norm, torch.Generator().manual_seed(seed))
        names = [n for n, p in block.named_parameters() if p.ndim > 1 and ORIGIN + '.w' not in n]
        return [block.get_parameter(name).detach() for name in names]

    conv = make_conv()
    state = torch.random.get_rng_state()
    Block(conv, None, make_norm, torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    first, again, other = weights(1), weights(1), weights(2)
    assert len(first) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_new_block_computes_what_its_conv_does():
    """Before it is settled, so that calibration sees the activations of the plain model."""
    conv, x = make_conv(bias=True), image(2, 4, 8, 8)
    block = Block(conv, None, make_norm)
    for training in (True, False):
        assert_same(block.train(training)(x).detach(), conv(x).detach())


def test_white_input_statistics():
    """Until calibrated, a new branch has the statistics that white noise would give it."""
    conv = make_conv(channels=(32, 32, 1), bias=False)
    block = Block(conv, None, make_norm).eval()
    x = torch.randn(8, 32, 24, 24).double()
    with torch.no_grad():
        for branch in block.added:
            branch.bn.weight.fill_(1)
            out = branch(x)[..., 3:-3, 3:-3]
            assert out.mean().abs() < 0.1
            assert 0.7 < out.std() < 1.4, type(branch)
        measured = conv(x)[..., 2:-2, 2:-2].std((0, 2, 3))
    assert torch.allclose(block.origin_std, measured, rtol=0.1)
