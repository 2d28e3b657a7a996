"""One block over a run: which stages are told, and with which branches."""

from __future__ import annotations

from dyrep_mm.evolution.record import Entry, Record
from dyrep_mm.report.data import make_run
from dyrep_mm.report.logs import Log
from dyrep_mm.report.story import story

INNER = 'a.branches.1x1-kxk.conv'
ALL = ['kxk', '1x1', '1x1-kxk', 'kx1']
JOURNAL = [
    Entry(1, 'iteration', 10, {'a': ALL}),
    Entry(2, 'iteration', 20, {INNER: ['kxk', '1xk']}, {'a': ['kx1']}),
    Entry(3, 'iteration', 30, {'b': ['kxk', '1x1']}),
    Entry(4, 'iteration', 40, {}, {INNER: ['1xk']}),
]


def told(journal: list[Entry], structure: dict) -> list[tuple[str, str, str]]:
    """The rows of the picture, which is drawn too."""
    checkpoint: dict = {'meta': {'iter': 50}}
    Record(structure, journal, iteration=50).to_checkpoint(checkpoint)
    picture = story(make_run('run', 'run', checkpoint, Log()))
    assert picture.png().startswith(b'\x89PNG')
    assert '<title' in picture.svg_file()
    return [tuple(row) for row in picture.rows]


def test_the_block_that_changed_most_from_conv_to_conv():
    """What goes is drawn once more; changes of other blocks are no stage."""
    rows = told(JOURNAL[:3], {'a': ALL[:3], INNER: ['kxk', '1xk'], 'b': ['kxk', '1x1']})
    assert rows == [
        ('plain', 'one conv', 'kxk'),
        ('iteration 10', '3 branches grow', 'kxk, 1x1, 1x1-kxk, kx1'),
        (
            *('iteration 20', '1 branch grows, 1 branch goes'),
            'kxk, 1x1, 1x1-kxk (kxk, 1xk), kx1 pruned',
        ),
        ('fused', 'one conv again', 'kxk'),
    ]


def test_a_long_story_is_cut_short():
    longer = [*JOURNAL, Entry(5, 'iteration', 45, {}, {'a': ['1x1']})]
    rows = told(longer, {'a': ['kxk', '1x1-kxk'], 'b': ['kxk', '1x1']})
    assert [title for title, *_ in rows] == [
        *('plain', 'iteration 10', '2 stages between', 'iteration 45', 'fused')
    ]
    assert rows[3][2] == 'kxk, 1x1 pruned, 1x1-kxk'


def test_a_block_from_the_start():
    rows = told([], {'a': ['kxk', '1x1']})
    assert rows == [('start', '1 branch', 'kxk, 1x1'), ('fused', 'one conv again', 'kxk')]


def test_a_run_without_blocks_has_no_story():
    checkpoint: dict = {'meta': {'iter': 50}}
    Record({}, [Entry(1, 'iteration', 10)], iteration=50).to_checkpoint(checkpoint)
    assert story(make_run('run', 'run', checkpoint, Log())) is None
