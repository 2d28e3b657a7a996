"""Batch statistics that follow from those of the input, against torch's own BN."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyrep_mm
from dyrep_mm.reparam.geometry import ConvSpec
from dyrep_mm.reparam.kernels import Kernel
from dyrep_mm.reparam.moments import BlockInput, Moments, Source, Statistics, fold
from support.checks import assert_same
from support.nets import image, randomise, snapshot


def pointwise(groups=1, out=6):
    return Kernel(torch.randn(out, 4 // groups, 1, 1).double(), torch.randn(out).double())


def statistics(x):
    return x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)


@pytest.mark.parametrize(('groups', 'out'), [(1, 6), (2, 6), (4, 4), (4, 8)])
def test_a_1x1_gets_its_statistics_from_its_input(groups, out):
    kernel, x = pointwise(groups, out), image(2, 4, 7, 6)
    expected = statistics(F.conv2d(x, *kernel, groups=groups))
    for value, reference in zip(Moments.of(x, groups).through(kernel), expected, strict=True):
        assert_same(value, reference)


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_zeros_around_the_map(groups):
    kernel, x = pointwise(groups, 8), image(2, 4, 7, 6)
    padded = F.pad(x, (1, 1, 2, 2))
    moments = Moments.of(x, groups).with_zeros(padded.numel() // 4)
    expected = statistics(F.conv2d(padded, *kernel, groups=groups))
    for value, reference in zip(moments.through(kernel), expected, strict=True):
        assert_same(value, reference)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_gradients(groups, layout):
    x = image(2, 4, 3, 2).to(memory_format=layout).requires_grad_()
    kernel = pointwise(groups, 8)

    def function(x):
        return Moments.of(x, groups).with_zeros(40).through(kernel)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize('mean', [0.0, 10.0, 1000.0])
def test_a_large_mean_does_not_drown_the_variance(mean):
    """In single precision as exact as the two passes of a BN."""
    kernel = Kernel(torch.randn(6, 4, 1, 1), torch.zeros(6))
    x = torch.randn(2, 4, 40, 50) + mean
    expected = statistics(F.conv2d(x.double(), kernel.weight.double()))[1]
    torch.testing.assert_close(
        Moments.of(x, 1).through(kernel)[1], expected.float(), rtol=1e-5, atol=0
    )


def test_a_variance_is_never_negative():
    """Channels that cancel in the kernel leave nothing but rounding."""
    x = torch.randn(2, 1, 20, 20).repeat(1, 4, 1, 1) * 1e3
    weight = torch.tensor([[1.0, -1, 1, -1], [0.3, 0.3, -0.3, -0.3]]).view(2, 4, 1, 1)
    assert (Moments.of(x, 1).through(Kernel(weight, torch.zeros(2)))[1] >= 0).all()


def found(kernel, x):
    moments = Moments.of(x, 1)
    return Statistics(*moments.through(kernel), moments.count)


def with_gradient(values, x):
    total = sum(value.sin().sum() for value in values)
    return *values, *torch.autograd.grad(total, x, retain_graph=True)


@pytest.mark.parametrize('stride', [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize(('kernel', 'padding'), [((3, 3), (1, 1)), ((5, 3), (0, 2)), ((3, 3), 3)])
@pytest.mark.parametrize('recompute', [False, True])
def test_what_the_branches_see(stride, kernel, padding, recompute):
    spec = ConvSpec.of(nn.Conv2d(4, 4, kernel, stride, padding))
    x = image(2, 4, 9, 8).requires_grad_()
    seen, point = BlockInput(x, spec, recompute), pointwise()
    rows, cols = spec.padding
    padded = F.pad(x, (cols, cols, rows, rows))
    middle = padded[..., kernel[0] // 2 :, kernel[1] // 2 :]
    height, width = padded.shape[-2] - kernel[0] + 1, padded.shape[-1] - kernel[1] + 1
    views = {
        'whole': x,
        'padded': padded,
        'centre': middle[..., :height, :width][..., :: stride[0], :: stride[1]],
        'pooled': F.avg_pool2d(padded, kernel, stride),
    }
    for name, view in views.items():
        values = with_gradient(getattr(seen, name).through(point), x)
        references = with_gradient(statistics(F.conv2d(view, *point)), x)
        for value, reference in zip(values, references, strict=True):
            assert_same(value, reference, name)


NORMS = {
    'train': lambda: nn.BatchNorm2d(6),
    'eval': lambda: nn.BatchNorm2d(6).eval(),
    'momentum': lambda: nn.BatchNorm2d(6, eps=0.1, momentum=0.3),
    'cumulative': lambda: nn.BatchNorm2d(6, momentum=None),
    'no scale': lambda: nn.BatchNorm2d(6, affine=False),
    'no statistics': lambda: nn.BatchNorm2d(6, track_running_stats=False),
    'no statistics, eval': lambda: nn.BatchNorm2d(6, track_running_stats=False).eval(),
}


@pytest.mark.parametrize('kind', NORMS)
def test_a_norm_folds_and_records_as_it_runs(kind):
    bn = randomise(NORMS[kind]().double())
    twin = copy.deepcopy(bn)
    kernel = pointwise()
    for _ in range(3):
        x = image(2, 4, 7, 6)
        source = Source()
        if bn.training or bn.running_mean is None:
            source.found.append((bn, found(kernel, x)))
        folded = fold(kernel, bn, *(found for _, found in source.found))
        source.record()
        assert_same(F.conv2d(x, *folded).detach(), twin(F.conv2d(x, *kernel)).detach())
        for (name, buffer), other in zip(bn.named_buffers(), twin.buffers(), strict=True):
            assert_same(buffer.double(), other.double(), name)


def test_one_value_has_no_variance():
    x, bn = image(1, 4, 1, 1), nn.BatchNorm2d(6).double()
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        bn(F.conv2d(x, *pointwise()))
    bn.reset_running_stats()
    state = snapshot(bn)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        fold(pointwise(), bn, found(pointwise(), x))
    assert all(torch.equal(state[name], tensor) for name, tensor in bn.state_dict().items())


# Digits


def rank_one(x):
    return x[:, :1] * x[:1, :, :1, :1]


def nearly_equal(x):
    return x[:, :1] + 1e-3 * x


def loud_common_part(x):
    return 100 * x[:, :1] + x


def large_means(x):
    return 100 + x


@pytest.mark.parametrize('name', ['1x1', '1x1-kxk', '1x1-avg', 'identity'])
@pytest.mark.parametrize('make', [rank_one, nearly_equal, loud_common_part, large_means])
def test_merging_in_training_keeps_its_digits(make, name):
    """Of single precision, where channels depend on one another; docs/norms.md has the bound. With
    a scatter in single precision half of these lose one to two digits more."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False)).train()
    block = dyrep_mm.grow(net, '0', [name], init_scale=1.0)
    x = make(torch.randn(4, 16, 24, 24)).contiguous()
    weights = torch.randn(4, 16, 24, 24)

    def run(dtype):
        twin = copy.deepcopy(block).to(dtype)
        if dtype == torch.float64:  # every branch runs by itself
            twin.branches[name].register_forward_hook(lambda *_: None)
        leaf = x.to(dtype, copy=True).requires_grad_()
        assert twin.may_merge(leaf) == (dtype == torch.float32)
        out = twin(leaf)
        (out * weights.to(dtype)).sum().backward()
        return out.detach(), leaf.grad

    single, exact = run(torch.float32), run(torch.float64)
    for found, right, bound in zip(single, exact, (1e-5, 2e-5), strict=True):
        assert (found - right).norm() <= bound * right.norm()
