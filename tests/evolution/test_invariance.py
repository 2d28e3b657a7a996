"""A score is one of the function: the scale of a kernel, the form of its conv, and how often maps
repeat each other change nothing."""

import copy

import pytest
import torch
from torch import nn

from dyrep_mm import grow
from dyrep_mm.evolution.operations import operations_of
from dyrep_mm.evolution.saliency import SCORES, make_score
from dyrep_mm.reparam.branches import OPERATIONS, fitting
from dyrep_mm.reparam.geometry import ConvSpec
from dyrep_mm.surgery.candidates import candidates
from support.nets import image, randomise

#: `random` looks at nothing.
METRICS = [name for name in SCORES if name != 'random']


class Chain(nn.Module):
    """Three convs, each with its BN; without padding a repeated map gives a repeated map."""

    def __init__(self):
        super().__init__()
        kinds = ((3, 4, {}), (4, 4, {'groups': 2}), (4, 6, {'bias': True}))
        for i, (inner, outer, more) in enumerate(kinds):
            more = {'bias': False, 'stride': 3} | more
            setattr(self, f'conv{i}', nn.Conv2d(inner, outer, 3, **more))
            setattr(self, f'bn{i}', nn.BatchNorm2d(outer, eps=1e-14))

    def forward(self, x):
        for i in range(3):
            x = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(x))
            x = x * torch.sigmoid(x)  # with second derivatives
        return x.mean((2, 3))


def make_chain():
    torch.manual_seed(0)
    return randomise(Chain().double())


def scores_of(metric, model, x, paths=None):
    """After one iteration, for targets that the images of ``x`` share out."""
    target = torch.linspace(-1, 1, 6, dtype=torch.float64)

    def loss():
        return (model(x) - target).square().mean()

    found = candidates(model)
    operations = operations_of(model, {path: found[path] for path in paths or found})
    score = make_score(metric, operations)
    model.zero_grad()
    loss().backward()
    score.gather()
    if hasattr(score, 'look'):
        score.look(lambda measure: measure(loss()))
    return score.means()


def assert_alike(metric, first, second, rel=1e-7):
    """The signed sum is rounding on both sides: it is to be small beside what does not cancel."""
    if metric == 'vote':  # one of its ranks is by rounding
        return
    if metric == 'synflow':
        first, second = ({p: abs(v) < 1e-10 for p, v in s.items()} for s in (first, second))
        assert all(first.values()), first
    assert first == pytest.approx(second, rel=rel, abs=0)


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('factor', [0.1, 3.0])
def test_the_scale_of_a_kernel_in_front_of_a_norm(metric, factor):
    model, x = make_chain(), image(4, 3, 27, 27)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for conv, scale in ((twin.conv0, factor), (twin.conv1, 1 / factor), (twin.conv2, factor)):
            for parameter in conv.parameters():
                parameter.mul_(scale)
    assert_alike(metric, scores_of(metric, twin, x), scores_of(metric, model, x))


@pytest.mark.parametrize('metric', METRICS)
def test_how_often_maps_repeat_each_other(metric):
    model, x = make_chain(), image(4, 3, 27, 27)
    plain = scores_of(metric, model, x)
    assert len({round(value, 12) for value in plain.values()}) == (1 if metric == 'synflow' else 3)
    for more in (torch.cat([x, x]), x.repeat(1, 1, 1, 2), x.repeat(1, 1, 3, 2)):
        assert_alike(metric, scores_of(metric, model, more), plain)


def with_a_block(nested=False, without=()):
    """A net with a block that has learned, and its twin in which that block is one conv."""
    model = make_chain().eval()
    names = [n for n in fitting(ConvSpec.of(model.conv1), OPERATIONS) if n not in without]
    grow(model, 'conv1', names)
    if nested:
        grow(model, 'conv1.branches.kxk', names[:3])
    randomise(model)
    twin = make_chain()
    twin.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in twin.state_dict()}, False
    )
    kernel = model.conv1.kernel()
    twin.conv1 = nn.Conv2d(4, 4, 3, stride=3, groups=2).double()
    with torch.no_grad():
        twin.conv1.weight.copy_(kernel.weight)
        twin.conv1.bias.copy_(kernel.bias)
    # The norms of the branches keep their statistics: the function is the same, not only in eval
    # mode. Those behind use the batch's.
    for net in (model, twin):
        for i in range(3):
            getattr(net, f'bn{i}').train()
    return model, twin


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('nested', [False, True])
def test_a_conv_and_the_kxk_of_a_block_with_the_same_function(metric, nested):
    # A conv inside of a branch is an operation of its own, which the twin does not have.
    model, twin = with_a_block(nested)
    x, kxk = image(4, 3, 27, 27), 'conv1.branches.kxk' + '.branches.kxk' * nested
    assert torch.allclose(model(x), twin(x), rtol=1e-12)
    places = {'conv0': 'conv0', kxk: 'conv1', 'conv2': 'conv2'}
    assert places.keys() <= candidates(model).keys()
    got = scores_of(metric, model, x, places)
    assert_alike(
        metric, {places[path]: value for path, value in got.items()}, scores_of(metric, twin, x)
    )


def test_the_signed_sum_of_a_kxk_alone_does_not_cancel():
    """What the scales and shifts of the branches are counted for."""
    model, _ = with_a_block()
    model(image(4, 3, 27, 27)).square().mean().backward()
    weight = model.conv1.origin.weight
    assert (weight * weight.grad).sum().abs() > 1e-6


@pytest.mark.parametrize('metric', METRICS)
def test_without_a_norm_the_scores_of_both_forms_agree_too(metric):
    """There the signed sum does not cancel."""
    model, twin = (net.eval() for net in with_a_block())
    x = image(4, 3, 27, 27)
    places = {'conv0': 'conv0', 'conv1.branches.kxk': 'conv1', 'conv2': 'conv2'}
    got, expected = scores_of(metric, model, x, places), scores_of(metric, twin, x)
    assert {places[p]: v for p, v in got.items()} == pytest.approx(expected, rel=1e-9)
    assert all(value != 0 for value in expected.values()) or metric == 'vote'
