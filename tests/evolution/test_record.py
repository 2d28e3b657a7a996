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
from dyrep_mm.evolution.record import Entry, Record, Timing
from dyrep_mm.surgery.cost import Cost, cost_of, multiply_adds
from dyrep_mm.surgery.tree import blocks_of
from support.runs import PRUNING, TinyClassifier, dyrep, runner


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
    sizes = saved['dyrep_mm']['sizes']
    assert Cost(last.parameters, last.multiply_adds) == cost_of(run.model, sizes)
    assert last.multiply_adds == multiply_adds(run.model, sizes)
    assert [(e.iteration, e.epoch) for e in journal] == [(2, 0.5), (4, 1.0)]  # of 4 batches
    assert last.pruned.keys() == last.reasons.keys()
    for path, names in last.pruned.items():
        values, reason = last.importances[path], last.reasons[path]
        assert reason['mean'] == pytest.approx(sum(values.values()) / len(values))
        assert reason['spread'] > reason['threshold'] == 0
        assert {name for name, value in values.items() if value < reason['mean']} == set(names)
    assert saved['meta']['dyrep_mm']['structure'] == structure_of(run.model)


def test_costs_of_a_run(run, saved):
    """The plain model is that before the first update, and averages are over iterations."""
    record = Record.from_checkpoint(saved)
    sizes = record.sizes
    assert record.plain == record.start == cost_of(TinyClassifier(), sizes)
    first, last = record.journal
    for name in ('parameters', 'multiply_adds'):
        start, middle, end = (getattr(c, name) for c in (record.start, first, last))
        assert start < middle
        assert getattr(first, f'average_{name}') == start
        assert getattr(last, f'average_{name}') == (2 * start + 2 * middle) / 4
        row = saved['meta']['dyrep_mm']['averages']
        assert row[name] == record.average(name) == (2 * start + 2 * middle + end) / 5
        assert row[f'plain_{name}'] == start
    assert record.averages() == saved['meta']['dyrep_mm']['averages']


def test_times_of_a_run(saved):
    """The iterations before the first growth are plain ones."""
    record = Record.from_checkpoint(saved)
    timing = record.timing
    assert (timing.steps, timing.plain_steps, timing.interval_steps) == (5, 2, 1)
    assert [entry.timing['steps'] for entry in record.journal] == [2, 2]
    assert all(entry.timing['step_seconds'] > 0 for entry in record.journal)
    assert timing.update_seconds == sum(e.timing['update_seconds'] for e in record.journal) > 0
    assert record.journal[0].timing['step_seconds'] == timing.plain_step


def test_times_add_up():
    """A stretch counts as its iterations times their median; a resume adds another stretch."""
    times = Timing().plus(4, 1.0, True).updated(3.0).plus(2, 2.0, False).plus(1, 5.0, False)
    assert times == Timing(7, 13.0, 4, 4.0, 3, 9.0, 3.0)
    assert (times.step, times.plain_step, times.interval_step) == (13 / 7, 1.0, 3.0)
    assert times.relative == 16 / 7
    assert Timing().plus(3, 1.0, False).relative is None
    assert Timing().step is Timing().plain_step is Timing().interval_step is None


def test_a_run_that_starts_grown_has_no_plain_iterations(tmp_path):
    hook = {'type': 'dyrep_mm.DyRepHook', 'interval': None, 'structure': 'dbb'}
    run = runner(tmp_path, [hook], iters=3)
    run.train()
    saved = load_checkpoint(tmp_path / 'iter_3.pth')
    record = Record.from_checkpoint(saved)
    sizes = record.sizes
    assert record.start == cost_of(run.model, sizes)
    assert record.plain == cost_of(TinyClassifier(), sizes)
    assert record.start.multiply_adds > record.plain.multiply_adds
    assert record.average('multiply_adds') == record.start.multiply_adds
    assert (record.timing.steps, record.timing.plain_step) == (3, None)


def test_the_journal_tells_who_was_close():
    scores = {'a': 3.0, 'b': 2.0, 'c.branches.kx1.conv': 2.5, 'd': float('nan'), 'e': 1.0}
    entry = Entry(1, 'epoch', 5, {'a': ['kxk', '1x1']}, {'c': ['kx1']}, scores)
    assert entry.runner_up == ('b', 2.0)
    assert Entry(1, 'epoch', 5).runner_up is None


def test_what_is_not_known_is_none():
    """In a run that an older version began."""
    record = Record(journal=[Entry(1, 'epoch', 5)], iteration=10)
    record.know_costs(Cost(30), Cost(20))
    assert record.start is None
    assert not record.is_plain
    row = record.averages()
    assert row.pop('plain_parameters') == 20
    assert row.pop('iterations') == 10
    assert row.pop('timing')['relative'] is None
    assert set(row.values()) == {None}
    assert 'not known' in Record().summary()


def test_the_log_line_is_made_of_the_entry():
    entry = Entry(
        update=3,
        unit='epoch',
        at=15,
        grown={'a': ['kxk', '1x1'], 'b': ['kxk', 'kx1']},
        pruned={'c': ['1x1-avg', '1xk']},
        scores={'a': 0.01234, 'd': 0.005},
        importances={'c': {'1x1-avg': 0.011, '1xk': 0.0021, '1x1': 0.09}},
        reasons={'c': {'mean': 0.034, 'spread': 0.0393, 'threshold': 0.02}},
        blocks=4,
        branches=9,
        parameters=41_380_000,
        multiply_adds=5.051e9,
        average_parameters=40.5e6,
        timing={'step_seconds': 0.3},
        cost_ratio=1.23456,
    )
    changes = (
        'update 3 at epoch 15: grew a (score 0.0123, runner-up d 0.005) to kxk, 1x1; '
        'grew b to kxk, kx1; pruned 1x1-avg (0.011), 1xk (0.0021) of c '
        '(mean 0.034, spread 0.0393, threshold 0.02)\n'
    )
    assert entry.summary() == changes + (
        '    4 blocks, 9 branches, 41.38 M parameters (average 40.5), 5.051 G multiply-adds, '
        '1.235 times the cost of plain, until now 0.3 s a step'
    )
    assert entry.summary(Cost(40_000_000, 4e9), 0.25) == changes + (
        '    4 blocks, 9 branches, 41.38 M parameters (average 40.5, plain 40), '
        '5.051 G multiply-adds (plain 4), 1.235 times the cost of plain, '
        'until now 0.3 s a step (plain 0.25)'
    )
    assert 'no change\n' in Entry(1, 'epoch', 5, blocks=0, branches=0).summary()
    assert Entry.from_data(asdict(entry)) == entry


def test_an_entry_of_version_0_1_0():
    data = {'update': 2, 'iteration': 4, 'grown': {}, 'pruned': {}, 'scores': {}, 'importances': {}}
    assert Entry.from_data(data) == Entry(2, 'iteration', 4, iteration=4)


@pytest.mark.parametrize(
    'data',
    [
        *(None, 3, [], {}, {'update': 1}, {'update': 1, 'unit': 'hour', 'at': 3}),
        *({'update': 1, 'unit': 'epoch', 'at': 3, 'scores': value} for value in ([1.0], {1: 2.0})),
        {'update': 1, 'unit': 'epoch', 'at': 3, 'parameters': 'many'},
        {'update': 1, 'unit': 'epoch', 'at': 3, 'iteration': 'late'},
        {'update': 1, 'unit': 'epoch', 'at': 3, 'timing': {'steps': 'few'}},
        {'update': 1, 'unit': 'epoch', 'at': 3, 'cost_ratio': 'much'},
        {'update': 'first', 'epoch': 3},
    ],
)
def test_other_data_are_no_entry(data):
    with pytest.raises(DyRepError, match='malformed: journal'):
        Entry.from_data(data)
