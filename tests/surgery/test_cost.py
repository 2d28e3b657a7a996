"""Multiply-adds of every structure, counted from the sizes of one iteration."""

import pytest
import torch
from torch import nn

from dyrep_mm import expand, grow
from dyrep_mm.surgery.cost import SizeWatch, are_sizes, cost_of, multiply_adds, plain_cost_of
from support.nets import image, make_net

INNER = 'conv1.branches.1x1-kxk.conv'


def counted(model, x):
    """By hooks on every conv and linear layer in a forward that runs every branch by itself."""
    total, handles = [], []

    def count(module, _args, output):
        total.append(output.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(count))
    model.train()(x)
    for handle in handles:
        handle.remove()
    return sum(total) / len(x)


def sizes_of(model, *batches):
    watch = SizeWatch(model)
    for x in batches:
        model(x)
    return watch.finish()


@pytest.mark.parametrize('shape', [(2, 3, 13, 14), (5, 3, 16, 9)])
@pytest.mark.parametrize('names', ['dbb', 'dbb7', 'repvgg', 'nested', None])
def test_is_what_runs(names, shape):
    """Counted from a plain forward, for a structure that grows later."""
    model, x = make_net(), image(*shape)
    sizes = sizes_of(model, x)
    assert multiply_adds(model, sizes) == counted(model, x)
    if names == 'nested':
        for path in ('conv1', INNER, f'{INNER}.branches.kx1.conv', 'conv1.branches.kxk', 'dw'):
            grow(model, path)
    elif names:
        expand(model, names, kernel_sizes=(3, 5))
    assert multiply_adds(model, sizes) == counted(model, x)
    assert sizes_of(model, x) == sizes


@pytest.mark.parametrize('options', [{'padding': 'same'}, {'padding': 'valid'}, {'stride': (2, 1)}])
def test_geometries(options):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, **options), nn.BatchNorm2d(6)).double()
    x = image()
    sizes = sizes_of(model, x)
    grow(model, '0')
    assert multiply_adds(model, sizes) == counted(model, x)


def test_calls_add_up():
    """A layer that is called several times counts each, for one image of the first call."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    sizes = sizes_of(model, torch.zeros(2, 3, 5, 5), torch.zeros(6, 3, 5, 5))
    assert sizes == {'0': [[4.0, 5, 5]]}
    sizes = sizes_of(model, torch.zeros(2, 3, 5, 5), torch.zeros(2, 3, 8, 5))
    assert sizes == {'0': [[1.0, 5, 5], [1.0, 8, 5]]}
    assert multiply_adds(model, sizes) == 4 * 27 * (9 + 18)


def test_checkpointed_layers_count_once():
    """Activation checkpointing runs them again in the backward."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    watch = SizeWatch(model)
    x = torch.zeros(2, 3, 5, 5, requires_grad=True)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert watch.finish() == {'0': [[1.0, 5, 5]]}


def test_nothing_is_left_on_the_model():
    model = make_net()
    sizes_of(model, image())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    'value', [[], {1: []}, {'a': 1}, {'a': [[1, 2]]}, {'a': [[1, 2, -3]]}, {'a': [['1', 2, 3]]}]
)
def test_other_data_are_no_sizes(value):
    assert are_sizes(sizes_of(make_net(), image()))
    assert not are_sizes(value)


@pytest.mark.parametrize('names', ['dbb', 'nested', 'biased'])
def test_plain_cost(names):
    """That of the model before it grew, from the grown one: branches, blocks in them and gained
    biases are left out."""
    model, x = make_net(), image(2, 3, 13, 14)
    sizes = sizes_of(model, x)
    before = cost_of(model, sizes)
    assert before == plain_cost_of(model, sizes)
    assert before.multiply_adds == counted(model, x)
    if names == 'nested':
        for path in ('conv1', INNER, f'{INNER}.branches.kx1.conv', 'conv1.branches.kxk', 'dw'):
            grow(model, path)
    else:
        expand(model, {'conv1': []} if names == 'biased' else names)
    if names != 'biased':
        assert cost_of(model, sizes).multiply_adds > before.multiply_adds
    assert cost_of(model, sizes).parameters > before.parameters
    assert plain_cost_of(model, sizes) == before
    assert plain_cost_of(model, None).multiply_adds is None
