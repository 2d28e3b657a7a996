"""Branches and the block: one kernel equals the branches, for any geometry."""

import copy
import itertools
import pickle
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, image, norms_of, randomise
from torch import nn

from dyrep_mm.block import Block
from dyrep_mm.branches import BRANCHES, OPERATIONS, ORIGIN, check_operations, fitting
from dyrep_mm.errors import DyRepError
from dyrep_mm.geometry import ConvSpec
from dyrep_mm.transforms import add

KERNELS = [(3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (5, 3)]
# in, out, groups: dense, square, some groups, depthwise, depthwise with a multiplier
CHANNELS = [(4, 6, 1), (4, 4, 1), (4, 4, 2), (4, 6, 2), (4, 4, 4), (4, 8, 4)]
STRIDES = [(1, 1), (2, 2), (2, 1)]
DILATIONS = [(1, 1), (2, 2), (2, 1)]


def paddings(kernel, stride, dilation):
    """None, less than same, same, more than same, uneven, and the two with a name."""
    same = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    yield (0, 0)
    yield tuple(max(s - 1, 0) for s in same)
    yield same
    yield tuple(s + 2 for s in same)
    yield (same[0] + 1, max(same[1] - 1, 0))
    yield 'valid'
    if stride == (1, 1):
        yield 'same'


def norm(channels):
    return nn.BatchNorm2d(channels).double()


def make_conv(
    kernel=(3, 3), channels=(4, 4, 1), stride=(1, 1), dilation=(1, 1), padding=(1, 1), **k
):
    inner, outer, groups = channels
    k.setdefault('bias', False)
    return nn.Conv2d(inner, outer, kernel, stride, padding, dilation, groups, **k).double()


def make_block(conv=None, names=None):
    return randomise(Block(conv or make_conv(), names, norm))


def branchwise(block, x):
    return sum(branch(x) for branch in block.branches.values())


@pytest.mark.parametrize('name', BRANCHES)
@pytest.mark.parametrize('kernel', KERNELS, ids=str)
@pytest.mark.parametrize('channels', CHANNELS, ids=str)
@pytest.mark.parametrize('stride', STRIDES[:2], ids=str)
def test_branch_is_its_kernel(name, kernel, channels, stride):
    """One conv with the kernel gives what the branch gives in eval mode, border included."""
    for dilation in DILATIONS[:2]:
        for padding in paddings(kernel, stride, dilation):
            hint = (dilation, padding)
            conv = make_conv(kernel, channels, stride, dilation, padding)
            spec = ConvSpec.of(conv)
            if BRANCHES[name].misfit(spec):
                continue
            branch = randomise(BRANCHES[name](spec, norm).double()).eval()
            x = image(2, channels[0], 15, 14)
            with torch.no_grad():
                expected = branch(x)
                weight, bias = add([branch.kernel()], conv.kernel_size)
                merged = F.conv2d(x, weight, bias, stride, padding, dilation, channels[2])
            assert expected.shape == conv(x).shape, hint
            assert_same(merged, expected, hint)


@pytest.mark.parametrize('name', BRANCHES)
def test_branch_is_its_kernel_for_uneven_geometry(name):
    for kernel, stride, dilation in itertools.product(KERNELS, STRIDES, DILATIONS):
        for padding in paddings(kernel, stride, dilation):
            hint = (kernel, stride, dilation, padding)
            spec = ConvSpec.of(make_conv(kernel, (4, 4, 2), stride, dilation, padding))
            if BRANCHES[name].misfit(spec):
                continue
            branch = randomise(BRANCHES[name](spec, norm).double()).eval()
            x = image(1, 4, 15, 14)
            with torch.no_grad():
                weight, bias = add([branch.kernel()], kernel)
                merged = F.conv2d(x, weight, bias, stride, padding, dilation, 2)
                assert_same(merged, branch(x), hint)


def plain_norms(branch):
    """Make every BN of a branch an identity."""
    for bn in norms_of(branch):
        bn.running_var.fill_(1 - bn.eps)
    return branch.eval()


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(
    ('name', 'formula'),
    [
        ('1x1', lambda b, x, s: F.conv2d(x, b.conv.weight, stride=s)),
        ('1xk', lambda b, x, s: F.conv2d(x, b.conv.weight, stride=s, padding=(0, 1))),
        ('kx1', lambda b, x, s: F.conv2d(x, b.conv.weight, stride=s, padding=(2, 0))),
        (
            '1x1-kxk',
            lambda b, x, s: F.conv2d(
                F.conv2d(x, b.pre.weight), b.conv.weight, stride=s, padding=(2, 1)
            ),
        ),
        (
            '1x1-avg',
            lambda b, x, s: F.avg_pool2d(F.conv2d(x, b.pre.weight), (5, 3), s, (2, 1)),
        ),
        ('identity', lambda b, x, s: x),
    ],
)
def test_branch_is_the_operation_of_table_1(name, formula, stride):
    if name == 'identity' and stride == 2:
        pytest.skip('no identity with a stride')
    spec = ConvSpec.of(make_conv((5, 3), (4, 4, 1), (stride, stride), padding=(2, 1)))
    branch = plain_norms(BRANCHES[name](spec, norm).double())
    x = image(2, 4, 9, 8)
    assert_same(branch(x), formula(branch, x, stride))


def test_depthwise_branches():
    """There is no 1x1 ahead of the pooling: it would have nothing to mix."""
    spec = ConvSpec.of(make_conv(channels=(4, 4, 4)))
    assert spec.depthwise
    pooling = plain_norms(BRANCHES['1x1-avg'](spec, norm).double())
    x = image(2, 4, 9, 8)
    assert_same(pooling(x), F.avg_pool2d(x, 3, 1, 1))


@pytest.mark.parametrize(
    ('geometry', 'missing'),
    [
        ({}, set()),
        ({'channels': (4, 6, 1)}, {'identity'}),
        ({'stride': (2, 2)}, {'identity'}),
        ({'dilation': (2, 2), 'padding': (2, 2)}, {'1x1-avg'}),
        ({'kernel': (1, 3), 'padding': (0, 1)}, {'1xk', 'kx1'}),
        ({'kernel': (3, 1), 'padding': (1, 0)}, {'1xk', 'kx1'}),
        ({'channels': (4, 4, 4)}, set()),
        ({'padding': (0, 0)}, set()),
        ({'padding': (3, 3)}, set()),
    ],
)
def test_what_fits(geometry, missing):
    """All that can be exact is offered, what cannot is not and says why."""
    spec = ConvSpec.of(make_conv(**geometry))
    assert fitting(spec) == [name for name in BRANCHES if name not in missing]
    for name in missing:
        assert BRANCHES[name].misfit(spec)
        with pytest.raises(DyRepError, match=f'{name}.*does not fit'):
            Block(make_conv(**geometry), [name], norm)


def test_table_1_is_complete():
    assert set(OPERATIONS) == {'kxk', '1x1', '1x1-kxk', '1x1-avg', '1xk', 'kx1', 'identity'}
    assert OPERATIONS[0] == ORIGIN


@pytest.mark.parametrize(
    ('conv', 'sentence'),
    [
        (nn.Conv2d(4, 4, 2), r'\(2, 2\) is not odd'),
        (nn.Conv2d(4, 4, (3, 4)), r'\(3, 4\) is not odd'),
        (nn.Conv2d(4, 4, 1), '1x1'),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'), "padding_mode 'reflect'"),
    ],
)
def test_convs_that_no_block_replaces(conv, sentence):
    with pytest.raises(DyRepError, match=sentence):
        ConvSpec.of(conv)


@pytest.mark.parametrize('names', ['1x1', ['2x2'], [1], [['1x1']], ['1x1', None]])
def test_unknown_operations(names):
    with pytest.raises(DyRepError, match='branch'):
        check_operations(names)


@pytest.mark.parametrize('names', [[], ['kxk']])
def test_a_block_needs_a_branch(names):
    with pytest.raises(DyRepError, match='kxk'):
        Block(make_conv(), names, norm)


GEOMETRIES = [
    {},
    {'channels': (4, 6, 2), 'stride': (2, 2)},
    {'channels': (4, 4, 4), 'dilation': (2, 2), 'padding': (2, 2)},
    {'channels': (4, 8, 4), 'bias': True},
    {'kernel': (5, 3), 'padding': 'same', 'bias': True},
    {'kernel': (7, 7), 'padding': (1, 4)},
]


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


def calls_of(block):
    """List that gets a name for every branch that runs."""
    calls = []
    for name, branch in block.branches.items():
        branch.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def test_who_watches_the_branches_in_train_mode_sees_them_all():
    block, x = make_block(), image(2, 4, 8, 8)
    calls = calls_of(block)
    block.eval()(x)
    assert calls == []
    block.train()(x)
    assert calls == block.names


def test_frozen_norms_mean_one_conv():
    """``norm_eval=True``: the modules train, their norms do not."""
    block, x = make_block(), image(2, 4, 8, 8)
    calls = calls_of(block)
    block.train()
    for bn in norms_of(block):
        bn.eval()
    assert block.is_linear
    block(x).sum().backward()
    assert calls == []
    assert all(p.grad is not None for p in block.parameters())
    norms_of(block)[-1].train()
    assert not block.is_linear
    block(x)
    assert calls == block.names


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
    assert block._may_merge(x)
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
    """As near to the exact values as the branches come."""
    block, x = make_block(make_conv(channels=(32, 32, 1))).train(), torch.randn(2, 32, 20, 20)
    exact = branchwise(copy.deepcopy(block), x.double()).detach()
    single = copy.deepcopy(block).float()
    assert single._may_merge(x)
    error = (single(x) - exact).abs().max()
    reference = (branchwise(copy.deepcopy(block).float(), x) - exact).abs().max()
    assert error <= 3 * reference


def test_train_mode_on_nothing_but_zeros():
    block = make_block().train()
    x = torch.zeros(2, 4, 8, 8).double().requires_grad_()
    out = block(x)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in block.state_dict().values())


def test_geometry_of_the_conv_can_be_read():
    conv = make_conv((5, 3), (4, 8, 2), (2, 1), (2, 1), (1, 1), bias=True)
    block = make_block(conv)
    sizes = ['in_channels', 'out_channels', 'kernel_size', 'groups']
    steps = ['stride', 'padding', 'dilation', 'transposed', 'output_padding', 'padding_mode']
    for name in sizes + steps:
        assert getattr(block, name) == getattr(conv, name), name
    assert block.weight.shape == conv.weight.shape
    assert block.bias.shape == conv.bias.shape
    assert block.origin is conv


def test_the_conv_stays_the_same_objects():
    conv = make_conv(bias=True)
    weight, bias, before = conv.weight, conv.bias, conv.weight.detach().clone()
    block = Block(conv, None, norm)
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
            assert_same(branch.bn.weight, block.origin_std * 0.01)
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
    block = Block(make_conv(), ['1x1'], norm)
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


# The kept kernel


@pytest.fixture
def watched(monkeypatch):
    """A block in eval mode, and the list that grows with every merge."""
    block, merges = make_block().eval(), []
    kernel = Block.kernel
    monkeypatch.setattr(Block, 'kernel', lambda self: merges.append(1) or kernel(self))
    return block, merges


def test_merged_kernel_is_kept_without_gradients(watched):
    block, merges = watched
    x = image(2, 4, 8, 8)
    with torch.no_grad():
        first = block(x)
        assert torch.equal(block(x), first)
        assert len(merges) == 1
    for _ in range(2):
        block(x).sum().backward()  # a graph of its own each time
    assert len(merges) == 3


def change_parameter(block):
    with torch.no_grad():
        block.branches['1x1'].conv.weight.mul_(2)


def change_buffer(block):
    block.branches['1x1'].bn.running_mean.add_(1)


def load(block):
    block.load_state_dict({k: v + v for k, v in block.state_dict().items()})


def load_assigned(block):
    block.load_state_dict({k: v + v for k, v in block.state_dict().items()}, assign=True)


def step(block):
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    with torch.enable_grad():
        block(image(2, 4, 8, 8)).square().mean().backward()
    optimizer.step()


def fused_step(block):
    optimizer = torch.optim.AdamW(block.parameters(), 0.1, foreach=True)
    with torch.enable_grad():
        block(image(2, 4, 8, 8)).square().mean().backward()
    optimizer.step()


def train_a_little(block):
    block.train()(image(2, 4, 8, 8))
    block.eval()


def frozen_statistics(block):
    for bn in norms_of(block):
        bn.train()
    block(image(2, 4, 8, 8))
    for bn in norms_of(block):
        bn.eval()


def absorb(block):
    block.branches['1x1'].bn.bias.data += 1
    block.absorb(['1x1'])


def average(block):
    """A swap through ``data`` that is followed by ``eval()``, as mmengine's EMA hook does."""
    for parameter in block.parameters():
        parameter.data.mul_(2)
    block.eval()


@pytest.mark.parametrize(
    'change',
    [
        change_parameter,
        change_buffer,
        load,
        load_assigned,
        step,
        fused_step,
        train_a_little,
        frozen_statistics,
        absorb,
        average,
    ],
)
def test_kept_kernel_is_dropped(change):
    block, x = make_block().eval(), image(2, 4, 8, 8)
    with torch.no_grad():
        before = block(x)
        change(block)
        after = block(x)
        assert_same(after, branchwise(block, x))
        assert not torch.allclose(after, before)


def test_kept_kernel_follows_the_dtype():
    block, x = make_block().eval(), image(2, 4, 8, 8)
    with torch.no_grad():
        before = block(x)
        assert_same(block.float()(x.float()), before.float())


def test_inference_mode():
    block, x = make_block().eval(), image(2, 4, 8, 8)
    expected = block(x).detach()
    with torch.inference_mode():
        assert_same(block(x), expected)
    with torch.no_grad():
        assert_same(block(x), expected)
    block(x).sum().backward()


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
    assert not any(p.requires_grad for p in Block(conv, None, norm).parameters())
    assert all(p.requires_grad for p in Block(make_conv(), None, norm).parameters())


def test_modes_follow():
    block = Block(make_conv().eval(), None, norm)
    assert not any(module.training for module in block.modules())
    block = Block(make_conv(), None, lambda channels: norm(channels).eval())
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
        block = Block(make_conv(), None, norm, torch.Generator().manual_seed(seed))
        names = [n for n, p in block.named_parameters() if p.ndim > 1 and ORIGIN + '.w' not in n]
        return [block.get_parameter(name).detach() for name in names]

    conv = make_conv()
    state = torch.random.get_rng_state()
    Block(conv, None, norm, torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    first, again, other = weights(1), weights(1), weights(2)
    assert len(first) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_new_block_computes_what_its_conv_does():
    """Before it is settled, so that calibration sees the activations of the plain model."""
    conv, x = make_conv(bias=True), image(2, 4, 8, 8)
    block = Block(conv, None, norm)
    for training in (True, False):
        assert_same(block.train(training)(x).detach(), conv(x).detach())


def test_white_input_statistics():
    """Until calibrated, a new branch has the statistics that white noise would give it."""
    conv = make_conv(channels=(32, 32, 1), bias=False)
    block = Block(conv, None, norm).eval()
    x = torch.randn(8, 32, 24, 24).double()
    with torch.no_grad():
        for branch in block.added:
            branch.bn.weight.fill_(1)
            out = branch(x)[..., 3:-3, 3:-3]
            assert out.mean().abs() < 0.1
            assert 0.7 < out.std() < 1.4, type(branch)
        measured = conv(x)[..., 2:-2, 2:-2].std((0, 2, 3))
    assert torch.allclose(block.origin_std, measured, rtol=0.1)
