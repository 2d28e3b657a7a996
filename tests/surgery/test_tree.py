"""Finding the way in a model: scopes, and the norm beside a conv."""

import pytest
from torch import nn

from dyrep_mm import expand, grow, structure_of
from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.tree import check_scope, get_module, neighbour_norm
from support.nets import CONVS, make_net


def test_the_norm_beside_has_as_many_channels():
    model = nn.ModuleDict(
        {
            'before': nn.BatchNorm2d(8, eps=0.1),
            'conv': nn.Conv2d(4, 8, 3),
            'other': nn.BatchNorm2d(4, eps=0.2),
            'act': nn.ReLU(),
            'norm': nn.BatchNorm2d(8, eps=0.3),
        }
    )
    assert neighbour_norm(model, 'conv') is model['norm']
    del model['norm']
    assert neighbour_norm(model, 'conv') is model['before']
    del model['before']
    assert neighbour_norm(model, 'conv') is model['other']


@pytest.mark.parametrize(
    'path',
    [
        'conv1.origin',
        'conv1.branches.1x1.conv.weight',
        'again',
        'conv1.spec',
        'conv1.__class__',
        '.',
    ],
)
def test_a_path_names_modules_alone(path):
    """A property that gives a module is another name of what has a path already."""
    model = make_net()
    type(model).again = property(lambda self: self.conv1)
    grow(model, 'conv1')
    try:
        with pytest.raises(DyRepError, match='no module named'):
            get_module(model, path)
        with pytest.raises(DyRepError, match='no module named'):
            expand(model, {path: ['kxk', '1x1']})
    finally:
        del type(model).again
    assert list(structure_of(model)) == ['conv1']


@pytest.mark.parametrize('scope', ['nope', 'back', ['backbone', 'nope'], 'backbone.nope'])
def test_scope_that_names_no_module(scope):
    model = nn.ModuleDict({'backbone': make_net(), 'head': make_net()})
    for check in (check_scope, lambda m, s: expand(m, 'dbb', scope=s)):
        with pytest.raises(DyRepError, match=r'scope.*at its top it has backbone, head'):
            check(model, scope)
    assert structure_of(model) == {}


@pytest.mark.parametrize('scope', [None, '', [], 'backbone', ['backbone', 'head'], ('head.fc',)])
def test_scope_that_is_right(scope):
    check_scope(nn.ModuleDict({'backbone': make_net(), 'head': make_net()}), scope)


def test_scope_is_a_prefix_of_whole_names():
    model = nn.ModuleDict({'conv': make_net(), 'conv2': make_net()})
    assert list(candidates(model, 'conv')) == [f'conv.{path}' for path in CONVS]
    assert list(candidates(model, 'conv.stem')) == ['conv.stem']
    assert len(candidates(model, '')) == 2 * len(CONVS)
