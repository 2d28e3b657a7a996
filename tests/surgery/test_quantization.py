"""The spread of the channels of a kernel, on kernels whose figures are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dyrep_mm import fuse
from dyrep_mm.surgery.quantization import (
    Spread,
    at_risk,
    channel_ranges,
    channel_spread,
    channel_spreads,
    named_as,
    norms_behind,
)
from support.nets import CONVS, image, make_net, nest


def kernel(*ranges: float) -> torch.Tensor:
    """A weight whose channels have these ranges; the extreme is positive and negative in turn."""
    weight = torch.zeros(len(ranges), 2, 3, 3)
    for i, value in enumerate(ranges):
        weight[i, 1, i % 3, 2] = value * (-1) ** i
        weight[i, 0, 0, 0] = value / 2
    return weight


@pytest.mark.parametrize(
    ('ranges', 'spread'),
    [
        ((1, 1, 1), 1),
        ((1, 2, 8), 4),
        ((8, 1, 2), 4),
        ((1, 1, 3, 9), 4.5),  # the median of an even number is between the two in the middle
        ((0, 0, 0), 1),
        ((0, 0, 5), math.inf),
        ((0, 5, 5), 1),
        ((3,), 1),
    ],
)
def test_spread_of_known_kernels(ranges, spread):
    weight = kernel(*ranges)
    assert channel_ranges(weight).tolist() == list(ranges)
    assert channel_spread(weight) == spread
    assert channel_spread(-3 * weight) == pytest.approx(spread)  # a scale of all changes nothing


def state_of(weight, gamma, variance):
    return {
        'conv.weight': weight,
        'bn.weight': torch.tensor(gamma),
        'bn.running_var': torch.tensor(variance),
        'bn.running_mean': torch.ones(len(gamma)),
    }


def test_the_norm_that_follows_is_folded_in():
    eps = 0.25
    state = state_of(kernel(1, 2, 8), [1.0, -3.0, 0.5], [0.75, 2.0, 3.75])
    # Scales 1, 2 and 1/4: ranges 1, 4 and 2.
    found = channel_spreads(state, {'conv': [('bn', eps)]})
    assert found == {'conv': Spread(4.0, pytest.approx(2.0))}
    # Several norms: the worst. One that is not in the state does not count.
    state |= {'other.running_var': torch.full((3,), 0.75)}
    found = channel_spreads(state, {'conv': [('bn', eps), ('other', eps), ('none', eps)]})
    assert found == {'conv': Spread(4.0, pytest.approx(4.0))}
    assert channel_spreads(state, {'conv': []}) == {'conv': Spread(4.0, 4.0)}
    assert channel_spreads(state, {'nowhere': []}) == {}


def test_those_most_at_risk_come_first():
    spreads = {
        'a': Spread(1.0, 2.0),
        'b': Spread(3.0, 2.0),
        'c': Spread(1.0, math.inf),
        'd': Spread(9.0, 1.0),
    }
    assert at_risk(spreads) == ['c', 'b', 'a', 'd']


def test_norms_of_a_fused_model_are_found_by_name():
    x = image(2, 3, 16, 16)
    plain = fuse(nest(make_net()), x)
    norms = norms_behind(plain, CONVS, x, lambda model, x: model(x))
    names = {'stem': 'stem_bn', 'conv1': 'bn1', 'dw': 'dw_bn', 'conv2': 'bn2'}
    assert {path: [name for name, _ in found] for path, found in norms.items()} == {
        path: [name] for path, name in names.items()
    }
    assert norms['conv1'][0][1] == 1e-3
    found = channel_spreads(plain.state_dict(), norms)
    # What a runtime quantizes is the kernel of conv and norm in one.
    for path, name in names.items():
        conv, norm = plain.get_submodule(path), plain.get_submodule(name)
        whole = nn.utils.fuse_conv_bn_eval(conv.eval(), norm.eval())
        assert found[path].folded == pytest.approx(channel_spread(whole.weight))
        assert found[path].kernel == channel_spread(conv.weight)


def test_names_of_a_backbone_alone():
    weight = torch.ones(1)
    whole = {'backbone.layer.conv.weight': weight, 'head.weight': weight}
    paths = ['backbone.layer.conv', 'backbone.layer.other']
    assert named_as(whole, paths) == whole
    assert named_as({'layer.conv.weight': weight, 'fc.weight': weight}, paths) == {
        'backbone.layer.conv.weight': weight,
        'backbone.fc.weight': weight,
    }
    assert named_as({}, []) == {}
