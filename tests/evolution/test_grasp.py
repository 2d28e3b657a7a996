"""Eq. 14 against the whole Hessian."""

import pytest
import torch
from torch import nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.metrics import grasp
from dyrep_mm.evolution.operations import operations_of
from dyrep_mm.evolution.saliency import make_score
from dyrep_mm.surgery.candidates import candidates
from support.nets import image


def make_small(norm=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3), nn.Tanh()]
    if norm:
        layers.insert(1, nn.BatchNorm2d(3, eps=1e-14))
        layers.insert(4, nn.BatchNorm2d(2, eps=1e-14))
    return nn.Sequential(*layers).double()


def loss_of(model, x):
    return ((model(x) - 0.3) ** 2).mean()


@pytest.mark.parametrize('norm', [True, False])
def test_it_is_the_formula(norm):
    model, x = make_small(norm), image(3, 2, 7, 7)
    operations = operations_of(model, candidates(model))
    weights = [operation.weight for operation in operations.values()]
    paths = list(operations)

    def loss(*values):
        named = {f'{path}.weight': value for path, value in zip(paths, values, strict=True)}
        return ((torch.func.functional_call(model, named, x) - 0.3) ** 2).mean()

    values = tuple(weight.detach() for weight in weights)
    hessian = torch.autograd.functional.hessian(loss, values)
    grads = torch.autograd.functional.jacobian(loss, values)
    vector = [g * w.square().sum() for g, w in zip(grads, values, strict=True)]
    expected = []
    for i, weight in enumerate(values):
        rows = [torch.tensordot(hessian[i][j], vector[j], dims=4) for j in range(len(values))]
        expected.append(-(weight * sum(rows)).sum().item())
    got = grasp(loss_of(model, x), list(operations.values()))
    assert got.tolist() == pytest.approx(expected, rel=1e-9)
    assert got.dtype == torch.float64


def test_in_front_of_a_norm_it_is_the_square_of_the_norm_of_the_gradient():
    """What scales a kernel there changes nothing but the size of its own gradient."""
    model, x = make_small(), image(3, 2, 7, 7)
    operations = operations_of(model, candidates(model))
    score = make_score('grad_norm', operations)
    got = dict(
        zip(operations, grasp(loss_of(model, x), [*operations.values()]).tolist(), strict=True)
    )
    loss_of(model, x).backward()
    score.gather()
    assert got == pytest.approx({path: norm**2 for path, norm in score.means().items()}, rel=1e-7)


def test_what_has_no_part_in_the_loss_has_none_in_the_score():
    model, x = make_small(), image(3, 2, 7, 7)
    operations = list(operations_of(model, candidates(model)).values())
    assert grasp(loss_of(model[:3], x).sum(), operations)[1] == 0
    linear = list(operations_of(model, {'0': ['kxk', '1x1']}).values())
    assert grasp(model[0](x).sum(), linear).tolist() == [0.0]


def test_gradients_are_left_alone():
    model, x = make_small(), image(3, 2, 7, 7)
    grasp(loss_of(model, x), list(operations_of(model, candidates(model)).values()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_conv_has_no_score():
    model, x = make_small(), image(3, 2, 7, 7)
    operations = operations_of(model, candidates(model))
    model[0].weight.requires_grad_(False)
    score = make_score('grasp', operations)
    assert score.means() == {}
    score.look(lambda measure: measure(loss_of(model, x)))
    assert list(score.means()) == ['3']


def test_no_second_derivative():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * 2

    model, x = make_small(), image(3, 2, 7, 7)
    operations = list(operations_of(model, candidates(model)).values())
    with pytest.raises(DyRepError, match='metric=grasp needs second derivatives'):
        grasp(Once.apply(model(x)).square().mean(), operations)
