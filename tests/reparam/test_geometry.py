"""The geometry of a conv: what is refused, and what a block shows of it."""

import pytest
from torch import nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.geometry import ConvSpec
from support.nets import make_block, make_conv


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
