"""The record: what a checkpoint keeps of the changes, there and back."""

from __future__ import annotations

import io
import json
from dataclasses import asdict

import pytest
import torch

from dyrep_mm import structure_of
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Entry, Record
from dyrep_mm.surgery.cost import multiply_adds
from dyrep_mm.surgery.tree import blocks_of
from support.runs import PRUNING, dyrep, runner


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run that ends in the middle of an interval."""
    run = runner(tmp_path_factory.mktemp('run'), [dict(PRUNING)], iters=5)
    run.train()
    return run


@pytest.fixture
def saved(run) -> dict:
    """Its checkpoint."""
    return load_checkpoint(f'{run.work_dir}/iter_5.pth')


def test_record_round_trip(saved):
    record = Record.from_checkpoint(saved)
    again: dict = {'meta': {}}
    record.to_checkpoint(again)
    assert again['meta']['dyrep_mm'].items() <= saved['meta']['dyrep_mm'].items()
    assert again['dyrep_mm'].keys() == saved['dyrep_mm'].keys()
    assert Record.from_checkpoint({'meta': {}}) == Record()
    assert Record.from_checkpoint({}) == Record()


def test_it_is_plain_data(saved):
    """For files that are loaded without trust, and for people with a JSON reader."""
    json.dumps(saved['meta']['dyrep_mm'])
    file = io.BytesIO()
    torch.save({'meta': saved['meta']['dyrep_mm'], 'dyrep_mm': saved['dyrep_mm']}, file)
    file.seek(0)
    torch.load(file, weights_only=True)


def test_journal_of_a_run(run, saved):
    """One entry for an update, the same in memory and in the file, with all that was known."""
    journal = dyrep(run).journal
    assert journal == Record.from_checkpoint(saved).journal
    assert [(e.update, e.unit, e.at) for e in journal] == [(1, 'iteration', 2), (2, 'iteration', 4)]
    first, last = journal
    assert set(first.scores) == {f'backbone.{name}' for name in ('conv1', 'conv2', 'conv3', 'dw')}
    assert first.importances == {}
    assert {path: set(values) for path, values in last.importances.items()} == {
        path: set(names[1:]) for path, names in first.grown.items()
    }
    blocks = blocks_of(run.model).values()
    assert last.blocks == len(blocks)
    assert last.branches == sum(len(block.added) for block in blocks)
    assert last.parameters == sum(p.numel() for p in run.model.parameters())
    assert last.multiply_adds == multiply_adds(run.model, saved['dyrep_mm']['sizes'])
    assert saved['meta']['dyrep_mm']['structure'] == structure_of(run.model)


def test_the_log_line_is_made_of_the_entry():
    entry = Entry(
        update=3,
        unit='epoch',
        at=15,
        grown={'a': ['kxk', '1x1'], 'b': ['kxk', 'kx1']},
        pruned={'c': ['1x1-avg', '1xk']},
        scores={'a': 0.01234, 'd': 1.0},
        blocks=4,
        branches=9,
        parameters=41_380_000,
        multiply_adds=5.051e9,
    )
    assert entry.summary() == (
        'update 3 at epoch 15: grew a (score 0.0123) to kxk, 1x1; grew b to kxk, kx1; '
        'pruned 1x1-avg, 1xk of c | 4 blocks, 9 branches, 41.38 M parameters, '
        '5.05 G multiply-adds'
    )
    assert 'no change |' in Entry(1, 'epoch', 5, blocks=0, branches=0).summary()
    assert Entry.from_data(asdict(entry)) == entry


def test_an_entry_of_version_0_1_0():
    data = {'update': 2, 'iteration': 4, 'grown': {}, 'pruned': {}, 'scores': {}, 'importances': {}}
    assert Entry.from_data(data) == Entry(2, 'iteration', 4)


@pytest.mark.parametrize(
    'data',
    [
        *(None, 3, [], {}, {'update': 1}, {'update': 1, 'unit': 'hour', 'at': 3}),
        *({'update': 1, 'unit': 'epoch', 'at': 3, 'scores': value} for value in ([1.0], {1: 2.0})),
        {'update': 1, 'unit': 'epoch', 'at': 3, 'parameters': 'many'},
        {'update': 'first', 'epoch': 3},
    ],
)
def test_other_data_are_no_entry(data):
    with pytest.raises(DyRepError, match='malformed: journal'):
        Entry.from_data(data)
