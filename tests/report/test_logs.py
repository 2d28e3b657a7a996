"""Scalars and configs that runs leave beside their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dyrep_mm.report.logs import counts_epochs, read_log, settings_in

EPOCHS = 'train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=4)'
ITERATIONS = 'train_cfg = dict(type="IterBasedTrainLoop", max_iters=40)'


def write(work_dir: Path, lines: list[dict], config: str = EPOCHS, name: str = '20260101_120000'):
    folder = work_dir / name / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'config.py').write_text(config)
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))
    return folder


def train(step: int, epoch: int | None = None, **more) -> dict:
    about = {} if epoch is None else {'epoch': epoch}
    return {'lr': 0.1, 'loss': 1.0, 'time': 0.5, **about, 'iter': step, 'step': step, **more}


def test_lines_of_training_and_of_validation(tmp_path):
    own = {'dyrep/parameters': 3, 'step': 20}
    metric = {'acc': 0.5, 'time': 0.1, 'data_time': 0.1, 'step': 2}
    write(tmp_path, [train(10, 1), train(20, 2), own, metric])
    log = read_log(tmp_path)
    assert [(step, epoch) for step, epoch, _ in log.steps] == [(10, 1), (20, 2)]
    assert log.validations == [(20, 2, {'acc': 0.5})]
    assert f'{log.started:%Y-%m-%d %H:%M}' == '2026-01-01 12:00'


def test_iterations_are_counted_where_mmengine_writes_epochs_of_an_iteration_loop(tmp_path):
    """``log_metric_by_epoch`` is True by default, and an ``InfiniteSampler`` ends no epoch."""
    lines = [train(10), {'acc': 0.1, 'step': 0}, train(20), {'acc': 0.2, 'step': 0}]
    write(tmp_path, lines, ITERATIONS)
    assert read_log(tmp_path).validations == [(10, None, {'acc': 0.1}), (20, None, {'acc': 0.2})]


def test_a_resume_replaces_what_it_does_again(tmp_path):
    first = [train(10, 1), {'acc': 0.1, 'step': 1}, train(20, 2), {'acc': 0.2, 'step': 2}]
    again = [train(20, 2, loss=9.0), {'acc': 0.3, 'step': 2}, train(30, 3), {'acc': 0.4, 'step': 3}]
    write(tmp_path, first)
    write(tmp_path, again, name='20260101_130000')
    write(tmp_path, [{'acc': 0.9, 'step': 0}], name='20260101_140000')  # a test alone
    log = read_log(tmp_path)
    assert [(step, values['loss']) for step, _, values in log.steps] == [
        *((10, 1.0), (20, 9.0), (30, 1.0)),
    ]
    assert [(epoch, metrics['acc']) for _, epoch, metrics in log.validations] == [
        *((1, 0.1), (2, 0.3), (3, 0.4)),
    ]


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = write(tmp_path, [train(10, 1)])
    with (folder / 'scalars.json').open('a') as file:
        file.write('\n{"lr": 0.1, "it')
    assert len(read_log(tmp_path).steps) == 1
    assert read_log(tmp_path / 'nothing').steps == []


def test_configs_are_read_and_not_run(tmp_path):
    file = tmp_path / 'made'
    text = f"""
model = dict(type='R', sizes=[1, -2], more={{'a': (None, True)}})
bad = open({str(file)!r}, 'w')
other = __import__('os').getcwd()
x = y = 3
"""
    settings = settings_in(text)
    assert settings['model'] == {'type': 'R', 'sizes': [1, -2], 'more': {'a': [None, True]}}
    assert settings['bad'] is None
    assert settings['other'] is None
    assert not file.exists()
    assert settings_in('model = dict(') == {}


@pytest.mark.parametrize(
    ('loop', 'expected'),
    [
        ({'by_epoch': False, 'max_iters': 3}, False),
        ({'type': 'EpochBasedTrainLoop', 'max_epochs': 3}, True),
        ({'type': 'IterBasedTrainLoop', 'max_iters': 3}, False),
        ({'type': 'Own', 'max_epochs': 3}, True),
        ({'type': 'Own'}, None),
        (None, None),
    ],
)
def test_what_a_loop_counts(loop, expected):
    assert counts_epochs({'train_cfg': loop}) is expected
