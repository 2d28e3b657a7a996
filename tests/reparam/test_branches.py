"""Branches: each equals one kernel, for any geometry."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.branches import BRANCHES, OPERATIONS, ORIGIN, check_operations, fitting
from dyrep_mm.reparam.geometry import ConvSpec
from dyrep_mm.reparam.kernels import add
from support.checks import assert_same
from support.nets import image, make_conv, make_norm, norms_of, randomise

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
            branch = randomise(BRANCHES[name](spec, make_norm).double()).eval()
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
            branch = randomise(BRANCHES[name](spec, make_norm).double()).eval()
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
    branch = plain_norms(BRANCHES[name](spec, make_norm).double())
    x = image(2, 4, 9, 8)
    assert_same(branch(x), formula(branch, x, stride))


def test_depthwise_branches():
    """There is no 1x1 ahead of the pooling: it would have nothing to mix."""
    spec = ConvSpec.of(make_conv(channels=(4, 4, 4)))
    assert spec.depthwise
    pooling = plain_norms(BRANCHES['1x1-avg'](spec, make_norm).double())
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
            Block(make_conv(**geometry), [name], make_norm)


def test_table_1_is_complete():
    assert set(OPERATIONS) == {'kxk', '1x1', '1x1-kxk', '1x1-avg', '1xk', 'kx1', 'identity'}
    assert OPERATIONS[0] == ORIGIN


@pytest.mark.parametrize('names', ['1x1', ['2x2'], [1], [['1x1']], ['1x1', None]])
def test_unknown_operations(names):
    with pytest.raises(DyRepError, match='branch'):
        check_operations(names)
