"""Structures: what a model says of itself, and models that are built from it."""

import copy
import io
import json
import pickle

import pytest
import torch

from dyrep_mm import expand, grow, prune, structure_of
from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.tree import get_module
from support.checks import assert_same, assert_untouched
from support.nets import image, make_net, nest, output_of, snapshot, types_of


@pytest.mark.parametrize('build', [lambda m: m, lambda m: expand(m, 'dbb7'), nest])
def test_structure_round_trip(build):
    """Structure through JSON and state through a file give the model back."""
    model, x = build(make_net()), image()
    structure = json.loads(json.dumps(structure_of(model)))
    assert structure == structure_of(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)

    twin = expand(make_net(seed=7), structure)
    assert structure_of(twin) == structure
    assert list(twin.state_dict()) == list(model.state_dict())
    assert not torch.equal(output_of(twin, x), output_of(model, x))
    twin.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(output_of(twin, x), output_of(model, x))
    assert torch.equal(twin.train()(x), model.train()(x))


def test_expand_keeps_the_function():
    model, x = make_net(), image()
    structure = structure_of(nest(make_net()))
    weight, before = model.conv1.weight, output_of(model, x)
    assert expand(model, structure) is model
    assert_same(output_of(model, x), before)
    assert model.conv1.origin.weight is weight
    deepest = get_module(model, 'conv1.branches.1x1-kxk.conv.branches.kx1.conv')
    assert deepest.importances() == pytest.approx({'1x1': 0.01, 'identity': 0.01})


@pytest.mark.parametrize('scale', [0.01, 0.1])
def test_expand_and_grow_take_the_scale_and_the_generator(scale):
    def seeded():
        return torch.Generator().manual_seed(3)

    grown, expanded = make_net(), make_net()
    state = torch.random.get_rng_state()
    grow(grown, 'conv1', ['1x1', '1xk'], init_scale=scale, generator=seeded())
    expand(expanded, {'conv1': ['kxk', '1x1', '1xk']}, init_scale=scale, generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert grown.conv1.importances() == pytest.approx({'1x1': scale, '1xk': scale})
    for name, tensor in grown.state_dict().items():
        assert torch.equal(tensor, expanded.state_dict()[name]), name


def test_expanding_twice_changes_nothing():
    model = expand(make_net(), {'conv1': ['kxk', '1x1', 'kx1']})
    state, types = snapshot(model), types_of(model)
    expand(model, structure_of(model))
    assert_untouched(model, state, types)
    expand(model, {**structure_of(model), 'dw': ['kxk', '1x1']})
    assert list(structure_of(model)) == ['conv1', 'dw']


def test_the_order_of_operations_does_not_matter():
    structure = {'conv1': ['kxk', 'kx1', '1x1']}
    model = expand(make_net(), structure)
    state, types = snapshot(model), types_of(model)
    expand(model, structure)
    assert_untouched(model, state, types)


INNER = 'conv1.branches.1x1-kxk.conv'


UNFIT = {
    'no such module': ({'nope': ['kxk', '1x1']}, 'nope'),
    'no conv': ({'bn1': ['kxk', '1x1']}, 'bn1'),
    'a branch that does not fit': ({'conv2': ['kxk', 'identity']}, 'conv2'),
    'unknown branch': ({'conv2': ['kxk', '2x2']}, '2x2'),
    'no origin': ({'conv2': ['1x1', '1xk']}, 'conv2'),
    'origin not first': ({'conv2': ['1x1', 'kxk']}, 'conv2'),
    'a branch twice': ({'conv2': ['kxk', '1x1', '1x1']}, 'conv2'),
    'only the origin': ({'conv2': ['kxk']}, 'conv2'),
    'a bias that is there': ({'conv2': []}, 'conv2'),
    'a bias for a norm': ({'bn2': []}, 'bn2'),
    'inside a branch that is not there': ({'conv1': ['kxk', '1x1'], INNER: ['kxk', '1x1']}, INNER),
    'inside a 1x1': (
        {'conv1': ['kxk', '1x1-kxk'], 'conv1.branches.1x1-kxk.pre': ['kxk', 'identity']},
        'pre',
    ),
    'names in a string': ({'conv2': 'kxk'}, 'conv2'),
    'no list': ({'conv2': None}, 'conv2'),
    'no path': ({3: ['kxk', '1x1']}, 'a int: a list'),
    'no strings': ({'conv2': ['kxk', 3]}, 'conv2'),
    'no mapping': (['conv2'], 'list'),
    'none': (None, 'NoneType'),
    'too many': ({f'c{i}': ['kxk', '1x1'] for i in range(20_000)}, '20000'),
    'unknown preset': ('dbb8', 'dbb8'),
}


@pytest.mark.parametrize('case', UNFIT)
def test_a_structure_that_does_not_fit_changes_nothing(case):
    structure, culprit = UNFIT[case]
    if isinstance(structure, dict) and len(structure) < 10:
        # What fits comes first, so that there is something to take back.
        good = {'stem': ['kxk', '1x1'], 'stem.branches.kxk': ['kxk', '1xk'], 'dw': []}
        structure = {**good, **structure}
    model, x = make_net(), image()
    state, types, before = snapshot(model), types_of(model), output_of(model, x)
    parameters = dict(model.named_parameters())
    with pytest.raises(DyRepError, match=culprit) as error:
        expand(model, structure)
    assert '\n' not in str(error.value)
    assert_untouched(model, state, types)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert structure_of(model) == {}
    assert torch.equal(output_of(model, x), before)


def test_a_structure_that_contradicts_the_model():
    model = expand(make_net(), {'conv1': ['kxk', '1x1']})
    state, types = snapshot(model), types_of(model)
    with pytest.raises(DyRepError, match=r"conv1.*\['kxk', '1x1'\].*\['kxk', '1xk'\]"):
        expand(model, {'dw': ['kxk', '1x1'], 'conv1': ['kxk', '1xk']})
    assert_untouched(model, state, types)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_apart(duplicate):
    model, x = nest(make_net()), image()
    before = output_of(model, x)
    twin = duplicate(model)
    assert structure_of(twin) == structure_of(model)
    assert torch.equal(output_of(twin, x), before)
    prune(twin, 'conv1', ['1x1'])
    assert structure_of(twin) != structure_of(model)
    assert torch.equal(output_of(model, x), before)
