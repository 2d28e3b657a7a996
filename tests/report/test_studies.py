"""A study: every config against the first one, seed by seed."""

from __future__ import annotations

import json

import pytest

from dyrep_mm.report.page import make_report
from dyrep_mm.report.study import ROWS, interval, is_study, methods_of, table
from support.pages import Html
from support.processes import run_tool


def row(config, seed, value, seconds=1.0):
    names = ('loss', 'parameters', 'multiply_adds', 'final_parameters', 'final_multiply_adds')
    return {
        **{'config': config, 'seed': seed, 'metric': 'accuracy/top1', 'value': value},
        **dict.fromkeys(names, 2e9),
        'seconds': seconds,
    }


ROWS_OF_TWO = [
    *(row('a', 0, 50.0), row('a', 1, 60.0)),
    *(row('b', 0, 51.0, 1.5), row('b', 1, 62.0, 1.5)),
]


def test_the_interval_of_paired_differences():
    """Against values of Student's t from a table: 12.706 for one degree of freedom, 3.182 for
    three."""
    assert interval([1.0]) is None
    assert interval([1.0, 3.0]) == pytest.approx((2.0, 12.706), rel=1e-4)
    mean, half = interval([1.0, 2.0, 3.0, 6.0])
    assert (mean, half) == pytest.approx((3.0, 3.1824 * (14 / 3) ** 0.5 / 2), rel=1e-4)


def test_parts_of_one_have_more_decimals():
    """As the box mAP of COCO: its seeds differ behind the second one."""
    cells = [('a', 0, 0.534), ('a', 1, 0.526), ('b', 0, 0.541), ('b', 1, 0.523)]
    _, (_, b) = table(methods_of([row(*cell) for cell in cells], ['a', 'b']), 'coco/bbox_mAP')
    assert b[2:4] == ['0.5320 ± 0.0127', '+0.0020 ± 0.0635']


def test_the_table_compares_seed_by_seed():
    """Also where cells are missing."""
    methods = methods_of([*ROWS_OF_TWO, row('c', 3, 55.0)], ['a', 'b', 'c', 'd'])
    columns, (a, b, c, d) = table(methods, 'accuracy/top1')
    assert columns[:4] == ['config', 'seeds', 'accuracy/top1', 'difference']
    titles = [column.partition(',')[0] for column in columns[5:-1]]
    assert titles == ['multiply-adds', 'final multiply-adds', 'parameters', 'final parameters']
    assert a[:4] == ['a', '2', '55.00 ± 7.07', '']
    assert b[:4] == ['b', '2', '56.50 ± 7.78', '+1.50 ± 6.35']
    assert b[-1] == '1.50'
    assert c[:4] == ['c', '1', '55.00', '']
    assert d[:4] == ['d', '0', '', '']


def test_the_page_shows_a_study():
    report = make_report([], studies={'small': ROWS_OF_TWO})
    html = Html(report.html())
    assert '+1.50 ± 6.35' in html.text
    (picture,) = html.pictures
    assert '+1.50 ± 6.35 against a' in html.texts[picture['aria-labelledby'].split()[1]]


@pytest.mark.parametrize('as_file', [False, True], ids=['folder', 'file'])
def test_the_tool_reads_a_study(tmp_path, as_file):
    (tmp_path / ROWS).write_text(''.join(json.dumps(row) + '\n' for row in ROWS_OF_TWO))
    source = tmp_path / ROWS if as_file else tmp_path
    assert is_study(str(source))
    out = tmp_path / 'report.html'
    assert '1 figure of 1 study' in run_tool('report', source, '--out', out)
    assert 'accuracy/top1' in out.read_text()


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [('', 'holds no row'), ('{}', "KeyError 'config'"), ('nonsense', 'JSONDecodeError')],
)
def test_what_is_no_study(tmp_path, text, sentence):
    file = tmp_path / 'rows.jsonl'
    file.write_text(text)
    said = run_tool('report', file, '--out', tmp_path / 'report.html', code=1)
    assert sentence in said.splitlines()[-1]
    assert not (tmp_path / 'report.html').exists()
