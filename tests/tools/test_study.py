"""tools/study.py: a grid of tiny runs, gone on with, and its table."""

from __future__ import annotations

import json

import pytest

from support.processes import run_tool
from support.runs import PRUNING, write_config


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
