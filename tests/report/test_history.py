"""The structure over time, replayed from journals."""

from __future__ import annotations

import pytest
import torch

from dyrep_mm import grow, prune, structure_of
from dyrep_mm.evolution.record import Entry
from dyrep_mm.report.history import (
    Life,
    first_structure,
    in_order,
    last_importances,
    lives,
    operations_in,
    short_names,
)
from dyrep_mm.surgery.tree import blocks_of
from support.nets import Net


def entry(update: int, grown: dict | None = None, pruned: dict | None = None, **more) -> Entry:
    return Entry(update, 'epoch', 5 * update, grown or {}, pruned or {}, **more)


def test_a_branch_lives_from_its_growth_to_its_pruning():
    journal = [
        entry(1, {'a': ['kxk', '1x1', 'kx1']}),
        entry(2, {'b': ['kxk', '1x1']}, {'a': ['1x1']}),
    ]
    assert lives({}, journal) == [
        Life('a', '1x1', 5, 10, True),
        Life('a', 'kx1', 5),
        Life('b', '1x1', 10),
    ]


def test_what_a_run_started_with_is_what_no_update_made():
    journal = [entry(1, {'b': ['kxk', '1x1']}, {'a': ['1xk'], 'c': ['kx1']})]
    structure = {'a': ['kxk', '1x1'], 'b': ['kxk', '1x1'], 'd': []}
    start = first_structure(structure, journal)
    assert {path: {*names} for path, names in start.items()} == {
        'a': {'kxk', '1x1', '1xk'},
        'c': {'kxk', 'kx1'},
    }
    born = {(life.path, life.operation): (life.born, life.gone) for life in lives(start, journal)}
    assert born == {
        ('a', '1x1'): (0, None),
        ('a', '1xk'): (0, 5),
        ('c', 'kx1'): (0, 5),
        ('b', '1x1'): (5, None),
    }


def test_what_lies_in_a_branch_ends_with_it():
    inner = 'a.branches.1x1-kxk.conv'
    journal = [
        entry(1, {'a': ['kxk', '1x1', '1x1-kxk']}),
        entry(2, {inner: ['kxk', 'kx1']}),
        entry(3, {}, {'a': ['1x1-kxk']}),
    ]
    assert Life(inner, 'kx1', 10, 15, False) in lives({}, journal)


def test_a_path_may_become_a_block_twice():
    journal = [
        entry(1, {'a': ['kxk', '1x1']}),
        entry(2, {}, {'a': ['1x1']}),
        entry(3, {'a': ['kxk', '1x1']}),
    ]
    assert lives({}, journal) == [Life('a', '1x1', 5, 10, True), Life('a', '1x1', 15)]


@pytest.mark.parametrize('seed', range(20))
def test_the_end_is_the_structure_of_the_model(seed):
    """Random growth and pruning of a real model, with blocks that give their place to others."""
    generator = torch.Generator().manual_seed(seed)
    model, journal = Net(), []

    def choose(options: list):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    for update in range(1, 16):
        convs = [
            path
            for path, module in model.named_modules()
            if path.startswith('stem') and isinstance(module, torch.nn.Conv2d)
            if module.kernel_size != (1, 1) and module.kernel_size[0] == module.kernel_size[1]
        ]
        path = choose(convs)
        grow(model, path)
        grown = {path: structure_of(model)[path]}
        blocks = {path: block.names[1:] for path, block in blocks_of(model).items()}
        path = choose(list(blocks))
        names = blocks[path][: choose(range(1, len(blocks[path]) + 1))]
        prune(model, path, names)
        journal.append(entry(update, grown, {path: names}))
    alive = [life for life in lives({}, journal) if life.gone is None]
    expected = {(path, name) for path, names in structure_of(model).items() for name in names[1:]}
    assert {(life.path, life.operation) for life in alive} == expected
    assert first_structure(structure_of(model), journal) == {}


def test_paths_stand_from_input_to_output_with_what_is_inside_behind():
    layers = ['stem', 'b', 'a']
    paths = ['a', 'x', 'b.branches.1x1-kxk.conv', 'b', 'b.branches.kxk', 'stem']
    assert in_order(paths, layers) == [
        *('stem', 'b', 'b.branches.kxk', 'b.branches.1x1-kxk.conv', 'a', 'x'),
    ]


def test_operations_stand_as_in_the_paper():
    assert operations_in(['own', 'kx1', 'kxk', '1x1']) == ['1x1', 'kx1', 'own']


def test_short_names_lose_what_all_have():
    assert short_names(['backbone.a', 'backbone.b.c']) == {
        'backbone.a': 'a',
        'backbone.b.c': 'b.c',
    }
    assert short_names(['backbone.a', 'neck.b']) == {'backbone.a': 'backbone.a', 'neck.b': 'neck.b'}
    assert short_names(['conv1']) == {'conv1': 'conv1'}


def test_importances_are_those_of_the_last_update_that_knew_the_block():
    journal = [
        entry(1, {'a': ['kxk', '1x1']}),
        entry(2, {}, {}, importances={'a': {'1x1': 0.1}}),
        entry(3, {'b': ['kxk', '1x1']}, {}, importances={'a': {'1x1': 0.2}, 'b': {'1x1': 9.0}}),
    ]
    assert last_importances(journal) == {'a': (15, {'1x1': 0.2})}
