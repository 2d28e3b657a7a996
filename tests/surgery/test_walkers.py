"""Tools that make modules plain by the names of their methods leave a plain model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mmpretrain.models.backbones.levit import fuse_parameters
from timm.utils.model import reparameterize_model
from torch import nn

from dyrep_mm import fuse, grow, kernels_kept, structure_of
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.tree import blocks_of
from support.checks import assert_same
from support.nets import (
    CONVS,
    image,
    make_block,
    make_conv,
    make_net,
    nest,
    output_of,
    snapshot,
    types_of,
)


def timm_walks(model):
    return reparameterize_model(model)


def timm_walks_in_place(model):
    return reparameterize_model(model, inplace=True)


def mmpretrain_walks(model):
    fuse_parameters(model)
    return model


def in_place(name):
    """As RepVGG, MobileOne and YOLO do: the modules stay where they are."""

    def walk(model):
        for module in model.modules():
            if hasattr(module, name):
                getattr(module, name)()
        return model

    return walk


def from_a_list(model):
    """The blocks inside a block are called too, after the one that they were in."""
    for module in list(model.modules()):
        if hasattr(module, 'switch_to_deploy'):
            module.switch_to_deploy()
    return model


def from_inside(model):
    """The blocks inside a block are called first."""
    for module in reversed(list(model.modules())):
        if hasattr(module, 'reparameterize'):
            module.reparameterize()
    return model


def replacing(model):
    """As ``fuse`` of timm's RepViT: it walks on in what came out."""
    for name, child in model.named_children():
        if hasattr(child, 'fuse'):
            child = child.fuse()
            setattr(model, name, child)
        replacing(child)
    return model


WALKERS = {
    'timm': timm_walks,
    'timm in place': timm_walks_in_place,
    'mmpretrain': mmpretrain_walks,
    'switch_to_deploy': in_place('switch_to_deploy'),
    'reparameterize': in_place('reparameterize'),
    'a list': from_a_list,
    'inner blocks first': from_inside,
    'replacing': replacing,
}
walkers = pytest.mark.parametrize('walk', WALKERS.values(), ids=list(WALKERS))


@walkers
def test_the_model_is_plain_and_computes_the_same(walk):
    model, x = nest(make_net()), image(2, 3, 16, 16)
    before = output_of(model, x)
    plain = walk(model)
    assert types_of(plain) == types_of(make_net())
    assert_same(output_of(plain, x), before)


@walkers
def test_its_weights_are_those_of_a_model_whose_convs_have_biases(walk):
    x = image(2, 3, 16, 16)
    plain = walk(nest(make_net()))
    other = make_net(seed=1)
    for path in CONVS:
        conv = other.get_submodule(path)
        if plain.get_submodule(path).bias is not None:
            conv.bias = nn.Parameter(torch.zeros(conv.out_channels).to(conv.weight))
    other.load_state_dict(plain.state_dict(), strict=True)
    assert_same(output_of(other, x), output_of(plain, x))


@walkers
def test_the_biases_can_move_into_the_norms_afterwards(walk):
    model, x = nest(make_net()), image(2, 3, 16, 16)
    before = output_of(model, x)
    plain = walk(model)
    assert all(names == [] for names in structure_of(plain).values())
    fused = fuse(plain, x)
    make_net(seed=1).load_state_dict(fused.state_dict(), strict=True)
    assert structure_of(fused) == {}
    assert_same(output_of(fused, x), before)


def test_fuse_leaves_the_block_alone():
    block, x = make_block(), image(2, 4, 6, 6)
    before = snapshot(block)
    conv = block.fuse()
    assert type(conv) is nn.Conv2d
    assert_same(conv(x), output_of(block, x))
    nn.init.zeros_(conv.weight)
    after = block.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_the_conv_is_as_the_origin_was(dtype):
    conv = make_conv(channels=(4, 8, 2), stride=(2, 2), bias=True).to(dtype)
    conv.requires_grad_(False)
    block = make_block(conv).to(dtype).eval()
    made = block.fuse()
    assert (made.weight.dtype, made.bias.dtype) == (dtype, dtype)
    assert not made.weight.requires_grad
    assert not made.training
    assert (made.stride, made.groups) == ((2, 2), 2)
    exact = copy.deepcopy(block).double().kernel()
    assert torch.equal(made.weight, exact.weight.to(dtype))
    assert torch.equal(made.bias, exact.bias.to(dtype))


def test_a_block_whose_bias_is_zero_gains_none():
    model = nn.Sequential(make_conv(), nn.BatchNorm2d(4).double())
    grow(model, '0', ['1x1'])
    branch = model[0].branches['1x1']
    nn.init.zeros_(branch.bn.running_mean)
    nn.init.zeros_(branch.bn.bias)
    assert model[0].fuse().bias is None


def test_hooks_on_the_block_stay_and_it_can_be_copied():
    block, x, seen = make_block().eval(), image(2, 4, 6, 6), []
    before = output_of(block, x)
    block.register_forward_hook(lambda module, _, out: seen.append((module, out)))
    block.switch_to_deploy()
    assert type(block) is nn.Conv2d
    out = block(x)
    assert [module for module, _ in seen] == [block]
    assert_same(out, before)
    block._forward_hooks.clear()
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert_same(other(x), before)


def test_it_may_happen_where_kernels_are_kept():
    model, x = nest(make_net()).eval(), image(2, 3, 16, 16)
    before = output_of(model, x)
    with kernels_kept(model), torch.no_grad():
        model(x)
        in_place('switch_to_deploy')(model)
        assert_same(model(x), before)
    assert_same(output_of(model, x), before)


def test_convs_inside_blocks_grow_all_the_same():
    model = make_net()
    for path in CONVS:
        grow(model, path)
    inside = {f'{path}.branches.kxk' for path in CONVS}
    assert inside <= candidates(model).keys()
    grow(model, 'conv1.branches.kxk')
    assert 'conv1.branches.kxk.branches.kxk' in candidates(model)
    assert len(blocks_of(model)) == len(CONVS) + 1
