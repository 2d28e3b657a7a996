"""Runs that reports are made of, once for all tests of reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.journals import write_run
from support.runs import PRUNING, runner


@pytest.fixture(scope='session')
def r50(tmp_path_factory):
    """Work directory of a ResNet-50 with 40 updates, and its record."""
    folder = tmp_path_factory.mktemp('r50')
    return folder, write_run(folder)


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A real run by epoch, with validation."""
    hook = {**PRUNING, 'interval': 1, 'metric': 'snip'}
    run = runner(tmp_path_factory.mktemp('run') / 'dyrep', [hook], epochs=5, val=1)
    run.train()
    return run


@pytest.fixture(scope='session')
def static(tmp_path_factory) -> Path:
    """Work directory of a real run of DBB."""
    hook = {'type': 'dyrep_mm.DyRepHook', 'interval': None, 'structure': 'dbb'}
    folder = tmp_path_factory.mktemp('run') / 'dbb'
    runner(folder, [{**hook, 'calibration_batches': 1}], epochs=3, val=1).train()
    return folder


@pytest.fixture(scope='session')
def plain(tmp_path_factory) -> Path:
    """Work directory of a real run without DyRep."""
    folder = tmp_path_factory.mktemp('run') / 'plain'
    runner(folder, epochs=3, val=1).train()
    return folder
