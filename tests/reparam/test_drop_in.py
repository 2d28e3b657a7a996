"""What it means to stand in the place of a conv: called as one, differentiated as one."""

from __future__ import annotations

import copy
import io
from operator import getitem

import pytest
import torch
from mmcv.cnn import ConvModule, fuse_conv_bn
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jvp,
    replace_all_batch_norm_modules_,
    vmap,
)
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import dyrep_mm
from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.branches import BRANCHES, ORIGIN
from support.checks import assert_same
from support.nets import (
    GEOMETRIES,
    branchwise,
    image,
    make_block,
    make_conv,
    norms_of,
    randomise,
    snapshot,
)

# Calls


@pytest.mark.parametrize('train', [False, True])
def test_the_input_has_the_name_that_a_conv_has_for_it(train):
    block, x = make_block().train(train), image(2, 4, 8, 8)
    assert_same(block(input=x), branchwise(block, x))


@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
@pytest.mark.parametrize('train', [False, True])
def test_an_image_without_a_batch(geometry, train):
    block, x = make_block(make_conv(**geometry)).train(train), image(4, 9, 10)
    twin = copy.deepcopy(block)
    assert_same(block(x), branchwise(twin, x[None])[0])
    for (name, one), other in zip(block.named_buffers(), twin.buffers(), strict=True):
        assert_same(one.double(), other.double(), name)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('shape', [(8, 8), (1, 2, 4, 8, 8), (2, 3, 8, 8), (2, 4, 1, 8, 8)])
def test_what_a_conv_refuses(shape, train):
    block, x = make_block().train(train), image(*shape)
    before = snapshot(block)
    with pytest.raises(RuntimeError) as plain:
        block.origin(x)
    with pytest.raises(RuntimeError) as own:
        block(x)
    assert str(own.value) == str(plain.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_a_map_that_is_too_small():
    block, x = make_block(make_conv(padding=(0, 0))).train(), image(2, 4, 2, 2)
    with pytest.raises(RuntimeError, match='Kernel size'):
        block(x)


@pytest.mark.parametrize('names', [*([name] for name in BRANCHES), None], ids=str)
@pytest.mark.parametrize(
    ('shape', 'geometry'),
    [
        ((1, 4, 1, 1), {}),
        ((4, 1, 1), {}),
        ((0, 4, 8, 8), {}),
        ((1, 4, 3, 3), {'padding': (0, 0)}),
        ((1, 4, 2, 2), {'stride': (2, 2)}),
    ],
    ids=str,
)
def test_a_batch_without_statistics(names, shape, geometry):
    """In train mode a block is then what it is in eval mode, trains, and records nothing."""
    conv = make_conv(**geometry)
    if names == ['identity'] and 'stride' in geometry:
        pytest.skip('does not fit')
    block, x = make_block(conv, names).train(), image(*shape)
    before = snapshot(block)
    out = block(x)
    assert_same(out, copy.deepcopy(block).eval()(x)) if x.numel() else None
    assert out.shape == block.origin(x).shape
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_two_values_are_statistics():
    block, x = make_block().train(), image(2, 4, 1, 1)
    twin = copy.deepcopy(block)
    assert_same(block(x), branchwise(twin, x))
    assert all(norm.num_batches_tracked == 1 for norm in norms_of(block))


# Libraries


@pytest.mark.parametrize('mode', ['eval', 'norms in eval mode'])
def test_conv_modules_that_fold_their_norm(mode):
    """``efficient_conv_bn_eval`` of mmcv computes weights from those of the conv."""
    config = {'padding': 1, 'norm_cfg': {'type': 'BN'}, 'efficient_conv_bn_eval': True}
    module = randomise(ConvModule(4, 4, 3, **config).double())
    grown = copy.deepcopy(module)
    dyrep_mm.grow(grown, 'conv')
    x = image(2, 4, 8, 8)
    for one in (module, grown):
        one.train(mode != 'eval')
        for norm in norms_of(one):
            norm.eval()
    assert_same(grown(x), module(x))
    randomise(grown)
    plain = grown.bn(branchwise(grown.conv, x)).relu()
    assert_same(grown(x), plain)
    grown(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in grown.parameters())


def make_model(names=None) -> nn.Sequential:
    """A conv, then a block and its BN."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    dyrep_mm.grow(model.double().eval(), '1', names)
    return randomise(model)


@pytest.mark.parametrize('names', [['1x1'], ['1x1-kxk'], ['1x1-avg'], ['kx1'], None], ids=str)
@pytest.mark.parametrize('train', [False, True])
def test_tools_that_fold_norms_are_refused(names, train):
    """They look into a block; its next forward says so."""
    model = make_model(names)
    fuse_conv_bn(model)
    with pytest.raises(DyRepError, match=r'folds norms into convs.*dyrep_mm\.fuse first'):
        model.train(train)[1](image(2, 4, 8, 8))
    with pytest.raises(DyRepError, match='folds norms'):
        dyrep_mm.fuse(model)


def test_tools_that_fold_norms_take_a_fused_model():
    model, x = nn.Sequential(make_model()[1:]), image(2, 4, 8, 8)
    before = model(x)
    assert_same(fuse_conv_bn(dyrep_mm.fuse(model, x))(x), before)


@pytest.mark.parametrize(
    'change',
    [
        lambda block: setattr(block, 'weight', nn.Parameter(torch.zeros(4, 4, 3, 3))),
        lambda block: setattr(block, 'bias', nn.Parameter(torch.zeros(4))),
        lambda block: fuse_conv_bn_eval(block, nn.BatchNorm2d(4).eval()),
        lambda block: prune.l1_unstructured(block, 'weight', 0.5),
    ],
)
def test_the_weight_of_a_block_cannot_be_set(change):
    block = make_block().eval()
    before = snapshot(block)
    with pytest.raises((DyRepError, TypeError), match=r'cannot be set|cannot assign'):
        change(block)
    assert list(block.state_dict()) == list(before)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('grads', [False, True])
@pytest.mark.parametrize('depth', [1, 2])
def test_a_trace_that_checks_itself(train, grads, depth):
    block, x = make_block(), image(3, 4, 8, 8)
    if depth == 2:
        block.branches[ORIGIN] = make_block(block.origin)
        block.branches['1x1-kxk'].conv = make_block(block.branches['1x1-kxk'].conv)
    block.train(train)
    with torch.set_grad_enabled(grads):
        traced = torch.jit.trace(block, x)
        assert_same(traced(x), block(x))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    other = image(2, 4, 9, 7)
    assert_same(torch.jit.load(file).train(train)(other).detach(), block(other).detach())


@pytest.mark.parametrize('strict', [False, True])
def test_an_export_holds_operations_of_torch_alone(strict):
    block, x = make_block().eval(), image(3, 4, 8, 8)
    sizes = ({0: torch.export.Dim('batch')},)
    program = torch.export.export(block, (x,), dynamic_shapes=sizes, strict=strict)
    calls = [node.target for node in program.graph.nodes if node.op == 'call_function']
    assert all(target is getitem or str(target).startswith('aten.') for target in calls)
    assert_same(program.module()(image(2, 4, 8, 8) * 0 + 1), block(torch.ones_like(x))[:2])


# Derivatives


def make_net(names=None, nested=False) -> nn.Sequential:
    """A block and the BN behind it."""
    model = nn.Sequential(make_conv(), nn.BatchNorm2d(4)).double()
    dyrep_mm.grow(model, '0', names)
    if nested:
        dyrep_mm.grow(model, '0.branches.kxk', names)
    return randomise(model)


MODES = ['eval', 'train', 'train, merged']
EACH = [*([name] for name in BRANCHES), None]


@pytest.fixture(params=MODES)
def net(request):
    """Makes a network in a mode and an input with which it merges, or does not."""
    merged = 'merged' in request.param

    def make(names=None, nested=False):
        model = make_net(names, nested).train(request.param != 'eval')
        x = image(2, 4, 8, 8) if merged else image(2, 4, 3, 2)
        assert model[0].may_merge(x) == merged
        return model, x

    return make


def scalar(model):
    """A function of parameters and input that leaves the model as it is."""

    def function(parameters, x):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return functional_call(model, (parameters, buffers), (x,)).pow(3).sum()

    return function


def detached(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize('names', EACH, ids=str)
def test_first_and_second_derivatives(names, net):
    """Against differences: backward, forward and batched ones, and those of the backward."""
    model, x = net(names)
    x = x[:, :, :3, :3].clone() if not model.training else x
    # Along directions: a whole Jacobian of the larger maps takes long.
    along = torch.randn(3, *x.shape, dtype=x.dtype) / 10

    def function(weights):
        y = model(x + torch.einsum('k,k...->...', weights, along))
        return (y * torch.arange(y.numel()).view(y.shape)).sin().sum((2, 3))

    weights = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        function,
        weights,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        atol=1e-4,
    )
    torch.autograd.gradgradcheck(function, weights, check_fwd_over_rev=True, atol=1e-3)


@pytest.mark.parametrize('nested', [False, True])
def test_functional_gradients(net, nested):
    """Of parameters, through ``torch.func``, forward and backward."""
    model, x = net(nested=nested)
    function, parameters = scalar(model), detached(model)
    loss = copy.deepcopy(model)(x).pow(3).sum()
    twin = copy.deepcopy(model)
    twin(x).pow(3).sum().backward()
    found = grad(function)(parameters, x)
    size = max(gradient.abs().max() for gradient in found.values())
    for name, parameter in twin.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-9, atol=1e-12 * size), name
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    value, change = jvp(lambda p: function(p, x), (parameters,), (tangents,))
    assert_same(value, loss.detach())
    expected = sum((found[name] * tangents[name]).sum() for name in found)
    assert abs(change - expected) <= 1e-9 * sum((found[n] * tangents[n]).abs().sum() for n in found)


def test_gradient_penalty(net):
    """The square of an input gradient as a loss, against differences of it."""
    model, x = net()

    def penalty(x):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
        return gradient.square().sum(), x

    value, x = penalty(x)
    value.backward()
    direction = torch.randn_like(x)
    step = 1e-6
    ends = [penalty(x + sign * step * direction)[0].item() for sign in (1, -1)]
    along = (x.grad * direction).sum().item()
    # Differences have half of the digits.
    assert along == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


def test_an_ensemble(net):
    """Networks of one structure, parameters and statistics stacked."""
    model, x = net()
    twins = [randomise(copy.deepcopy(model)) for _ in range(3)]
    expected = torch.stack([copy.deepcopy(twin)(x) for twin in twins])
    parameters, buffers = torch.func.stack_module_state(twins)
    call = vmap(lambda p, b: functional_call(model, (p, b), (x,)))
    assert_same(call(parameters, buffers).detach(), expected.detach())
    with torch.no_grad():
        assert_same(call(parameters, buffers), expected.detach())


@pytest.mark.parametrize('name', ['branches.kxk.weight', 'branches.1x1.conv.weight'])
@pytest.mark.parametrize('grads', [False, True])
def test_an_ensemble_in_one_parameter(name, grads):
    block, x = make_block().eval(), image(2, 4, 8, 8)
    stacked = torch.randn(3, *block.get_parameter(name).shape, dtype=torch.float64)
    with torch.set_grad_enabled(grads), dyrep_mm.kernels_kept(block):
        block(x)
        found = vmap(lambda weight: functional_call(block, {name: weight}, (x,)))(stacked)
        after = block(x)
    for weight, out in zip(stacked, found, strict=True):
        assert_same(out.detach(), functional_call(block, {name: weight}, (x,)).detach())
    assert_same(after.detach(), branchwise(block, x).detach())


@pytest.mark.parametrize('train', [False, True])
def test_gradients_of_each_image(train):
    """In train mode with norms that keep no statistics, as torch asks for."""
    model, x = make_net().train(train), image(3, 4, 8, 8)
    if train:
        replace_all_batch_norm_modules_(model)
    function, parameters = scalar(model), detached(model)
    found = vmap(grad(lambda p, x: function(p, x[None])), (None, 0))(parameters, x)
    for i in range(3):
        expected = grad(function)(parameters, x[i : i + 1])
        size = max(gradient.abs().max() for gradient in expected.values())
        for name, gradient in expected.items():
            assert torch.allclose(found[name][i], gradient, rtol=1e-9, atol=1e-11 * size), name


def test_jacobians(net):
    model, x = net()
    x = x[:, :, :3, :2].clone()
    twin = copy.deepcopy(model)
    expected = jacobian(twin, x)
    for how in ({'vectorize': True}, {'vectorize': True, 'strategy': 'forward-mode'}):
        assert_same(jacobian(copy.deepcopy(model), x, **how), expected, scale=10)
    function = scalar(model)
    first = jacfwd(lambda x: function(detached(model), x))(x)
    assert_same(first, grad(function, argnums=1)(detached(model), x), scale=10)
    second = hessian(lambda x: function(detached(model), x))(x).reshape(x.numel(), -1)
    assert_same(second, second.T, scale=100)


def test_forward_mode_leaves_no_trace(net):
    model, x = net()
    with forward_ad.dual_level():
        out = model(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(out).tangent.isfinite().all()
    assert not any(buffer.requires_grad for buffer in model.buffers())
    model(x).sum().backward()


def test_what_plain_torch_refuses():
    """Running statistics that are changed inside a transform."""
    for model in (nn.Sequential(make_conv(), nn.BatchNorm2d(4).double()), make_net()):
        with pytest.raises(RuntimeError):
            grad(lambda p, m=model: functional_call(m, p, (image(2, 4, 8, 8),)).sum())(
                detached(model)
            )
