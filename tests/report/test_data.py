"""Runs as plain data: from work directories and checkpoints of real runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from dyrep_mm import structure_of
from dyrep_mm.errors import DyRepError
from dyrep_mm.report.data import (
    best_of,
    lower_is_better,
    make_run,
    newest_checkpoint,
    read_run,
    read_runs,
)
from dyrep_mm.report.logs import Log
from dyrep_mm.surgery.tree import blocks_of
from support.runs import FAST, dyrep, runner


def test_a_work_directory_tells_all(trained):
    run = read_run(trained.work_dir)
    assert (run.label, run.group, run.unit, run.seed) == ('dyrep', 'DyRep', 'epoch', 0)
    assert (run.reached, run.recorded, run.planned, run.is_over) == (5, 5, 5, True)
    assert run.journal == dyrep(trained).journal
    assert run.structure == structure_of(trained.model)
    assert run.layers == [f'backbone.{name}' for name in ('conv1', 'conv2', 'conv3', 'dw')]
    assert run.facts['model'] == 'TinyClassifier'
    assert run.steps == 20
    for path, block in blocks_of(trained.model).items():
        assert run.importances[path] == pytest.approx(block.importances())
        assert run.measured[path] == 5
        assert run.kernels[path] == (3, 3)


def test_metrics_are_those_of_the_log(trained):
    run = read_run(trained.work_dir)
    (file,) = Path(trained.work_dir).glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    expected = [(line['step'], line['fingerprint']) for line in lines if 'fingerprint' in line]
    assert run.metrics['fingerprint'] == expected
    assert [at for at, _ in expected] == [1, 2, 3, 4, 5]
    assert len(run.loss) == 20
    assert run.loss[3][0] == 1  # an epoch has 4 iterations


def test_one_checkpoint_has_the_journal(trained):
    whole = read_run(trained.work_dir)
    run = read_run(f'alone={trained.work_dir}/epoch_5.pth')
    assert run.label == 'alone'
    assert (run.journal, run.lives, run.layers) == (whole.journal, whole.lives, whole.layers)
    assert run.importances == whole.importances
    assert run.averages['parameters'] == whole.averages['parameters']
    assert run.metrics == {}
    assert run.planned == 5  # of the config in it


def test_a_run_that_is_going_on(trained, tmp_path):
    """The log is ahead of the newest whole checkpoint, and another one is being written."""
    folder = tmp_path / 'run'
    shutil.copytree(trained.work_dir, folder)
    for epoch in (4, 5):
        file = folder / f'epoch_{epoch}.pth'
        os.truncate(file, file.stat().st_size // 2)
    assert newest_checkpoint(folder).name == 'epoch_3.pth'
    (config,) = folder.glob('*/vis_data/config.py')
    config.write_text(config.read_text().replace('max_epochs=5', 'max_epochs=9'))
    run = read_run(str(folder))
    assert (run.recorded, run.reached, run.planned, run.is_over) == (3, 5, 9, False)
    assert run.journal == dyrep(trained).journal[:3]


def test_the_best_checkpoint_is_not_the_newest_one(tmp_path):
    for name in ('epoch_1.pth', 'best_acc_epoch_1.pth'):
        torch.save({'meta': {}}, tmp_path / name)
    assert newest_checkpoint(tmp_path).name == 'epoch_1.pth'


def test_iterations(tmp_path):
    run = runner(tmp_path, [{**FAST, 'metric': 'snip'}], iters=6, val=3)
    run.train()
    read = read_run(str(tmp_path))
    assert (read.unit, read.reached, read.planned) == ('iteration', 6, 6)
    assert [entry.at for entry in read.journal] == [2, 4]
    assert [at for at, _ in read.metrics['loss']] == [3, 6]


def test_averages_and_plain_costs_come_from_the_record(r50):
    folder, record = r50
    run = read_run(str(folder))
    assert run.averages['parameters'] == record.average('parameters')
    assert run.averages['multiply_adds'] == record.average('multiply_adds')
    assert run.plain == {
        'parameters': record.plain.parameters,
        'multiply_adds': record.plain.multiply_adds,
    }
    # By the log: steps become slower, and the first three epochs were plain ones.
    assert run.averages['time'] > 1


def test_seconds_have_all_steps_and_all_updates(trained):
    """Lines of the log have neither: they are means of the last iterations before them, and a
    change of structure between two epochs is in none."""
    run = read_run(trained.work_dir)
    assert run.steps == trained.iter
    plain = run.journal[0].timing['step_seconds']
    updates = sum(entry.timing['update_seconds'] for entry in run.journal)
    assert run.seconds == pytest.approx(run.averages['time'] * run.steps * plain)
    assert run.seconds > updates > 0


def test_seconds_of_a_plain_run_have_no_waiting_for_data():
    """Those of a record have none, and the two are compared."""
    lines = [(10, None, {'time': 0.5, 'data_time': 0.1}), (30, None, {'time': 0.3})]
    run = make_run('plain', '', {}, Log(lines))
    assert run.steps == 30
    assert run.seconds == pytest.approx(10 * 0.4 + 20 * 0.3)


def test_methods_side_by_side(plain, static, trained):
    runs = read_runs([str(plain), str(static), trained.work_dir, f'again={trained.work_dir}'])
    assert [run.group for run in runs] == ['plain', 'DBB', 'DyRep', 'DyRep']
    assert [run.label for run in runs] == ['plain', 'dbb', 'dyrep', 'again']
    first, second, third, _ = runs
    count = third.plain['parameters']
    assert first.averages['parameters'] == count
    assert second.averages['parameters'] > count
    # A plain run knows of no multiply-adds, and the others know them of its model.
    assert first.averages['multiply_adds'] == third.plain['multiply_adds']
    assert second.start == second.structure
    assert {life.born for life in second.lives} == {0}


def test_labels_differ(trained):
    runs = read_runs([trained.work_dir, trained.work_dir])
    assert [run.label for run in runs] == ['dyrep', 'dyrep (2)']


def test_old_checkpoints_are_read():
    """Of a version whose journal has no costs."""
    run = read_run('tests/data/0.1.0/nested.pth')
    assert run.journal
    assert run.lives
    assert run.plain == {}


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('nowhere', 'there is no folder and no checkpoint nowhere'),
        ('a=nowhere', 'there is no folder and no checkpoint nowhere'),
        ('', 'there is no journal in .*: it holds no whole checkpoint'),
    ],
)
def test_what_is_no_run(tmp_path, source, message):
    with pytest.raises(DyRepError, match=message):
        read_runs([source or str(tmp_path)])


def test_a_plain_run_alone_has_no_journal(plain):
    with pytest.raises(DyRepError, match=r'there is no journal in .*no DyRep run'):
        read_runs([str(plain)])


def test_a_malformed_record_is_named(tmp_path):
    torch.save({'meta': {'dyrep_mm': {'structure': 3}}}, tmp_path / 'bad.pth')
    with pytest.raises(DyRepError, match=r'bad\.pth'):
        read_run(str(tmp_path / 'bad.pth'))


def test_the_best_of_a_metric():
    points = [(1, 3.0), (2, 1.0), (3, 2.0)]
    assert best_of(points, 'accuracy/top1') == (1, 3.0)
    assert best_of(points, 'val/loss') == (2, 1.0)
    assert lower_is_better('mae')
    assert not lower_is_better('coco/bbox_mAP')
