"""The maths on kernels, against torch's own layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dyrep_mm.reparam.kernels import (
    Kernel,
    Norm,
    Stage,
    add,
    average_weight,
    chain,
    fold_bn,
    identity_weight,
    make_kernel,
    merge,
)
from support.checks import assert_same
from support.nets import image, randomise


def random_kernel(out=6, narrow=4, kh=3, kw=3):
    return Kernel(torch.randn(out, narrow, kh, kw).double(), torch.randn(out).double())


def apply(kernel, x, **geometry):
    return F.conv2d(x, kernel.weight, kernel.bias, **geometry)


def test_make_kernel_has_a_bias():
    weight = torch.randn(6, 4, 3, 3).double()
    bias = torch.randn(6).double()
    assert make_kernel(weight, bias) == (weight, bias)
    zero = make_kernel(weight)
    assert zero.weight is weight
    assert zero.bias.shape == (6,)
    assert zero.bias.dtype == torch.float64
    assert not zero.bias.any()


@pytest.mark.parametrize('affine', [True, False])
def test_fold_bn(affine):
    bn = randomise(nn.BatchNorm2d(6, eps=0.1, affine=affine).double()).eval()
    kernel, x = random_kernel(), image(2, 4, 9, 8)
    folded = fold_bn(kernel, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    assert_same(apply(folded, x), bn(apply(kernel, x)).detach())


def test_add_is_the_sum_of_outputs():
    kernels, x = [random_kernel() for _ in range(3)], image(2, 4, 9, 8)
    size = kernels[0].weight.shape[-2:]
    assert_same(apply(add(kernels, size), x), sum(apply(k, x) for k in kernels))
    assert_same(apply(add(kernels[:1], size), x), apply(kernels[0], x))
    assert_same(add(iter(kernels), size).bias, add(kernels, size).bias)


@pytest.mark.parametrize('size', [(3, 3), (5, 5)])
def test_add_leaves_its_arguments_alone(size):
    kernels = [random_kernel(6, 4, 3, 3) for _ in range(2)]
    copies = [Kernel(*(t.clone() for t in k)) for k in kernels]
    add(kernels, size)
    for kernel, copy in zip(kernels, copies, strict=True):
        assert torch.equal(kernel.weight, copy.weight)
        assert torch.equal(kernel.bias, copy.bias)


@pytest.mark.parametrize('size', [(3, 3), (5, 3), (1, 7)])
@pytest.mark.parametrize(
    ('groups', 'inner', 'middle', 'outer'),
    [(1, 4, 5, 6), (2, 4, 6, 8), (4, 4, 4, 4), (4, 4, 8, 4), (4, 4, 4, 12)],
)
def test_chain(size, groups, inner, middle, outer):
    first = random_kernel(middle, inner // groups, 1, 1)
    second = random_kernel(outer, middle // groups, *size)
    x = image(2, inner, 11, 12)
    expected = apply(second, apply(first, x, groups=groups), groups=groups, stride=2)
    chained = chain(first, second, groups)
    assert chained.weight.shape == (outer, inner // groups, *size)
    assert_same(apply(chained, x, groups=groups, stride=2), expected)


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_identity_weight_copies(groups):
    x = image(2, 4, 5, 6)
    weight = identity_weight(4, groups, x)
    assert weight.dtype == x.dtype
    assert torch.equal(F.conv2d(x, weight, groups=groups), x)


@pytest.mark.parametrize('size', [(3, 3), (5, 3), (1, 7)])
def test_average_weight_is_the_pooling(size):
    x, margin = image(2, 4, 9, 8), tuple(k // 2 for k in size)
    weight = average_weight(4, size, x)
    assert weight.dtype == x.dtype
    expected = F.avg_pool2d(x, size, 2, margin, count_include_pad=True)
    assert_same(F.conv2d(x, weight, stride=2, padding=margin, groups=4), expected)


@pytest.mark.parametrize(('groups', 'inner'), [(1, 4), (1, 5), (2, 4), (4, 4), (1, 1)])
def test_chain_with_one_filter_per_channel(groups, inner):
    """The second may be depthwise, whatever the groups of the first: an average is."""
    first, second = random_kernel(4, inner // groups, 1, 1), random_kernel(4, 1, 3, 5)
    x = image(2, inner, 9, 8)
    expected = apply(second, apply(first, x, groups=groups), groups=4)
    chained = chain(first, second, groups)
    assert chained.weight.shape == (4, inner // groups, 3, 5)
    assert_same(apply(chained, x, groups=groups), expected)


@pytest.mark.parametrize('size', [(1, 1), (3, 3), (1, 5), (5, 1), (5, 5)])
@pytest.mark.parametrize('grad', [True, False])
def test_add_puts_a_small_kernel_in_the_middle(size, grad):
    kernels, x = [random_kernel(6, 4, *s) for s in (size, (3, 1))], image(2, 4, 9, 8)
    with torch.set_grad_enabled(grad):
        total = add(kernels, (5, 5))
        assert total.weight.shape == (6, 4, 5, 5)
        expected = sum(
            apply(k, x, padding=tuple(n // 2 for n in k.weight.shape[-2:])) for k in kernels
        )
        assert_same(apply(total, x, padding=2), expected)


def test_everything_is_differentiable():
    mean, var = torch.randn(4).double(), torch.rand(4).double()

    def merged(w1, b1, w2, b2, gamma, beta):
        first = fold_bn(Kernel(w1, b1), mean, var, gamma, beta, 0.1)
        return tuple(add([first, chain(first, Kernel(w2, b2), 2)] * 2, (5, 3)))

    shapes = [(4, 1, 1, 1), (4,), (4, 2, 3, 3), (4,), (4,), (4,)]
    inputs = [torch.randn(shape).double().requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(merged, inputs)


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('eps', [(0.1, 0.1), (0.1, 0.2)])
def test_merge_is_the_sum_of_its_paths(groups, eps):
    """And of one, two and three stages, with norms, biases and units or without."""

    def norm(channels, eps, affine=True, unit=True):
        mean, var, gamma, beta, factor = torch.rand(5, channels, dtype=torch.float64) + 0.5
        gamma, beta = (gamma, beta) if affine else (None, None)
        return Norm(mean, var, gamma, beta, eps, factor if unit else None)

    def fold(kernel, norm):
        return fold_bn(kernel, *norm)

    narrow = 4 // groups
    point, middle, strip, full = (
        random_kernel(out, narrow, *size)
        for out, size in ((4, (1, 1)), (4, (1, 1)), (6, (1, 3)), (6, (3, 3)))
    )
    norms = [norm(4, eps[0], unit=False), norm(4, eps[1], affine=False), norm(6, eps[0])]
    merged = merge(
        [
            [Stage(*full)],
            [Stage(strip.weight, None, norms[2])],
            [Stage(*point, norms[0]), Stage(*full, norms[2])],
            [Stage(*point, norms[0]), Stage(*middle, norms[1]), Stage(*strip)],
        ],
        (3, 3),
        groups,
    )
    expected = add(
        [
            full,
            fold(make_kernel(strip.weight), norms[2]),
            fold(chain(fold(point, norms[0]), full, groups), norms[2]),
            chain(fold(chain(fold(point, norms[0]), middle, groups), norms[1]), strip, groups),
        ],
        (3, 3),
    )
    for one, other in zip(merged, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize('second', [(4, 2, 3, 3), (4, 1, 3, 3), (4, 2, 1, 1)])
def test_the_gradients_of_a_merge_leave_its_tensors_alone(second):
    """They are computed in place, also where a kernel is its own matrix."""
    groups = 4 // second[1] if second[1] > 1 else 4
    first = torch.randn(4, 4 // groups, 1, 1).double()
    tensors = [first, torch.rand(4).double(), torch.randn(second).double()]
    tensors += torch.rand(5, 4).double().unbind()
    before = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.requires_grad_()
    point, shift, weight, *norm, unit = tensors
    path = [Stage(point, shift), Stage(weight, None, Norm(*norm, 0.1, unit))]
    for out in merge([path], (3, 3), groups):
        out.sum().backward(retain_graph=True)
    for one, other in zip(tensors, before, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype):
    kernel = Kernel(torch.randn(4, 4, 3, 3, dtype=dtype), torch.randn(4, dtype=dtype))
    one = kernel.bias.abs() + 1
    point = make_kernel(identity_weight(4, 1, one))
    for result in (
        add([kernel, kernel], (3, 3)),
        add([kernel, point], (5, 5)),
        chain(point, kernel),
        fold_bn(kernel, one, one, one, one, 1e-5),
        make_kernel(average_weight(4, (3, 3), one)),
    ):
        assert result.weight.dtype == result.bias.dtype == dtype
