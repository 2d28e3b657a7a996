"""tools/study.py: a grid of tiny runs, gone on with, and its table."""

from __future__ import annotations

import json
import sys

import pytest

from support.processes import ROOT, run_tool
from support.runs import PRUNING, write_config


@pytest.fixture(scope='module')
def study():
    sys.path.insert(0, str(ROOT / 'tools'))
    try:
        import study

        yield study
    finally:
        sys.path.remove(str(ROOT / 'tools'))


@pytest.fixture
def configs(tmp_path):
    log = {'log_level': 'INFO', 'iters': 4, 'val': 2, 'default_scope': 'mmengine'}
    return [
        write_config(tmp_path / 'plain.py', None, **log),
        write_config(tmp_path / 'grown.py', [dict(PRUNING)], **log),
    ]


def rows_in(out):
    return [json.loads(line) for line in (out / 'study.jsonl').read_text().splitlines()]


def test_a_study_is_done_once_and_goes_on(tmp_path, configs):
    out = tmp_path / 'study'
    # mmengine's log smooths metrics that are named after a loss.
    options = ('--seeds', 2, '--jobs', 2, '--out', out, '--metric', 'fingerprint')
    command = ('study', *configs, *options)
    said = run_tool(*command, fresh=True)
    rows = rows_in(out)
    assert [(row['config'], row['seed']) for row in rows] == [
        (config, seed) for seed in (0, 1) for config in ('plain', 'grown')
    ]
    assert all(row['value'] == row['value'] and row['loss'] for row in rows)
    assert rows[0]['structure'] == {} != rows[1]['structure']
    assert rows[1]['final_parameters'] > rows[1]['parameters'] > rows[0]['parameters']
    assert rows[1]['final_multiply_adds'] > rows[0]['multiply_adds'] > 0
    assert rows[0]['value'] != rows[2]['value']  # another seed
    assert '| plain' in said
    assert '| grown' in (out / 'summary.md').read_text()

    logs = {path: path.stat().st_mtime_ns for path in out.rglob('output.txt')}
    assert len(logs) == 4
    cell = out / 'grown' / 'seed-1'
    (cell / 'done').unlink()  # killed behind its second iteration
    for name in ('iter_3.pth', 'iter_4.pth'):
        (cell / name).unlink()
    (cell / 'last_checkpoint').write_text(str(cell / 'iter_2.pth'))
    run_tool(*command)
    touched = [path for path, before in logs.items() if path.stat().st_mtime_ns != before]
    assert touched == [cell / 'output.txt']
    again = rows_in(out)
    for row in (*rows, *again):
        row.pop('seconds')
    for one, other in zip(rows, again, strict=True):
        assert one == other


def test_a_cell_that_fails_leaves_the_others(tmp_path, configs):
    bad = tmp_path / 'bad.py'
    bad.write_text(configs[0].read_text().replace("'SGD'", "'NoOptimizer'"))
    assert 'NoOptimizer' in bad.read_text()
    out = tmp_path / 'study'
    said = run_tool('study', configs[0], bad, '--seeds', 1, '--jobs', 1, '--out', out, code=1)
    assert 'study: bad, seed 0 failed: ' in said
    assert str(out / 'bad' / 'seed-0' / 'output.txt') in said
    assert [row['config'] for row in rows_in(out)] == ['plain']


@pytest.mark.parametrize(
    ('more', 'sentence'),
    [
        (['--seeds', 0], '--seeds and --jobs are at least 1'),
        (['--metric', 'mIoU'], 'has no metric mIoU'),
        (['{plain}'], 'two configs have the name plain'),
    ],
)
def test_bad_input(tmp_path, configs, more, sentence):
    more = [str(word).format(plain=configs[0]) for word in more]
    out = tmp_path / 'study'
    said = run_tool('study', '--seeds', 1, '--jobs', 1, '--out', out, configs[0], *more, code=1)
    assert said.splitlines()[-1].startswith('study: ')
    assert sentence in said


def test_the_interval_of_paired_differences(study):
    """Against values of Student's t from a table: 12.706 for one degree of freedom, 3.182 for
    three."""
    assert study.interval([1.0]) is None
    assert study.interval([1.0, 3.0]) == pytest.approx((2.0, 12.706), rel=1e-4)
    mean, half = study.interval([1.0, 2.0, 3.0, 6.0])
    assert (mean, half) == pytest.approx((3.0, 3.1824 * (14 / 3) ** 0.5 / 2), rel=1e-4)


def row(config, seed, value, seconds=1.0):
    names = ('loss', 'parameters', 'multiply_adds', 'final_parameters', 'final_multiply_adds')
    return {
        **{'config': config, 'seed': seed, 'metric': 'accuracy/top1', 'value': value},
        **dict.fromkeys(names, 2e9),
        'seconds': seconds,
    }


def test_the_table_compares_seed_by_seed(study):
    """Also where cells are missing."""
    rows = [row('a', 0, 50.0), row('a', 1, 60.0), row('b', 0, 51.0, 1.5), row('b', 1, 62.0, 1.5)]
    table = study.summary([*rows, row('c', 3, 55.0)], ['a', 'b', 'c', 'd'])
    a, b, c, d = table.rows
    assert a[:4] == ['a', 2, '55.00 ± 7.07', '']
    assert b[:4] == ['b', 2, '56.50 ± 7.78', '+1.50 ± 6.35']
    assert b[-1] == '1.50'
    assert c[:4] == ['c', 1, '55.00', '']
    assert d[:4] == ['d', 0, '', '']
