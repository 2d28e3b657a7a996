"""Branches that are switched off: in the model, in what follows it, and in files."""

from __future__ import annotations

import copy

import pytest
import torch

import dyrep_mm
from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.cost import SizeWatch, branch_costs, multiply_adds
from dyrep_mm.surgery.gates import Gates, close_in, closed_in, open_in
from dyrep_mm.surgery.rewire import set_branch_norm
from dyrep_mm.surgery.tree import blocks_of
from support.checks import assert_equal_states, assert_same
from support.nets import Net, image, output_of, randomise, snapshot


@pytest.fixture
def model():
    return randomise(dyrep_mm.expand(Net().double(), 'dbb7', kernel_sizes=(3, 5)))


def places_of(model):
    return [(p, name) for p, block in blocks_of(model).items() for name in block.names[1:]]


def mask_of(places):
    return [i % 3 == 0 for i in range(len(places))]


@pytest.mark.parametrize('branch_norm', ['batch', 'fixed', 'sampled'])
@pytest.mark.parametrize('training', [True, False])
def test_a_branch_that_is_off_is_not_there(model, branch_norm, training):
    """The model computes what it would without the branches, in all modes of its norms."""
    set_branch_norm(model, branch_norm)
    places = places_of(model)
    mask = mask_of(places)
    without = copy.deepcopy(model)
    for (path, name), on in zip(places, mask, strict=True):
        if not on:
            del blocks_of(without)[path].branches[name]
    Gates(model, places).show(mask)
    for net in (model, without):
        net.train(training)
    x = image(4, 3, 20, 20)
    assert_same(model(x), without(x))


def test_pruning_what_is_off_absorbs_nothing(model):
    places = places_of(model)
    Gates(model, places).show([False] * len(places))
    x, state = image(2, 3, 20, 20), snapshot(model)
    before = output_of(model, x)
    for path, block in blocks_of(model).items():
        dyrep_mm.prune(model, path, block.names[1:])
    assert not dyrep_mm.structure_of(model)  # no conv gained a bias
    assert torch.equal(output_of(model, x), before)
    for name, tensor in model.state_dict().items():
        path, _, last = name.rpartition('.')
        assert torch.equal(tensor, state.get(name, state.get(f'{path}.branches.kxk.{last}')))


def test_fused_is_what_is_on(model):
    places = places_of(model)
    Gates(model, places).show(mask_of(places))
    x = image(2, 3, 20, 20)
    fused = dyrep_mm.fuse(model.eval(), x)
    assert not blocks_of(fused)
    assert_same(output_of(fused, x), output_of(model, x))


def test_a_file_has_them_off(model):
    """Whoever loads the file computes the same; the units bring them back, bit for bit."""
    places = places_of(model)
    for block in blocks_of(model).values():
        for branch in block.added:
            branch.unit.uniform_(0.5, 2)
    gates = Gates(model, places)
    gates.show(mask_of(places))
    x, state = image(2, 3, 20, 20), snapshot(model)
    units = gates.units_off()
    assert len(units) == len(places) - sum(mask_of(places))
    for prefix in ('', 'module.'):
        file = {prefix + name: tensor.clone() for name, tensor in state.items()}
        close_in(file, units, prefix)
        reader = randomise(dyrep_mm.expand(Net().double(), 'dbb7', kernel_sizes=(3, 5)))
        reader.load_state_dict({name.removeprefix(prefix): t for name, t in file.items()})
        assert_same(output_of(reader, x), output_of(model, x))
        off = {place for place, on in zip(places, mask_of(places), strict=True) if not on}
        closed = closed_in(reader)
        assert {(path, name) for path, names in closed.items() for name in names} == off
        open_in(file, units, prefix)
        assert_equal_states({n.removeprefix(prefix): t for n, t in file.items()}, state)
    assert not closed_in(model)
    assert_equal_states(model.state_dict(), state)
    name = next(iter(units))
    with pytest.raises(DyRepError, match='malformed: units'):
        open_in(file, {'module.' + name: torch.zeros(99)})


def test_a_shift_passes_over_what_is_closed(model):
    """A bias that a pruned branch leaves goes to a branch with a unit."""
    x = image(2, 3, 20, 20)
    first, *_ = blocks_of(model)['conv1'].added
    first.unit.zero_()
    before = output_of(model, x)
    dyrep_mm.prune(model, 'conv1', ['kx1'])
    assert_same(output_of(model, x), before)
    assert first.unit.count_nonzero() == 0


def test_averages_and_copies_follow(model):
    pair = torch.nn.ModuleDict({'online': model, 'target': copy.deepcopy(model)})
    average = copy.deepcopy(pair)
    places = [(f'online.{path}', name) for path, name in places_of(model)]
    gates = Gates(pair, places, {'target': 'online'}, [average])
    gates.show(mask_of(places))
    for net in (pair, average):
        for part in ('online', 'target'):
            found = [b.is_on for block in blocks_of(net[part]).values() for b in block.added]
            assert found == mask_of(places)
    off = len(places) - sum(mask_of(places))
    assert len(gates.units_off()) == 2 * off


def test_gradients_of_what_was_off(model):
    """Between two steps a branch may be on in one iteration and off in another."""
    places = places_of(model)
    gates = Gates(model, places)
    branches = [blocks_of(model)[path].branches[name] for path, name in places]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gates.open([i == 0 for i in range(len(places))])
    gates.open([i == 1 for i in range(len(places))])
    gates.show([True] * len(places))
    gates.drop_gradients()
    has = [all(p.grad is not None for p in branch.parameters()) for branch in branches]
    assert has == [i < 2 for i in range(len(places))]
    gates.stepped()
    gates.drop_gradients()
    assert not any(p.grad is not None for branch in branches for p in branch.parameters())
    assert model.fc.weight.grad is not None


def test_what_branches_cost(model):
    """Together the branches that are on are what the model has more than the plain one."""
    watch = SizeWatch(model)
    model(image(2, 3, 20, 20))
    sizes = watch.finish()
    costs, places = branch_costs(model, sizes), places_of(model)
    mask = mask_of(places)
    Gates(model, places).show(mask)
    added = sum(costs[p][n] for (p, n), on in zip(places, mask, strict=True) if on)
    assert multiply_adds(model, sizes) == multiply_adds(model, sizes, plain=True) + added
    assert added > 0
