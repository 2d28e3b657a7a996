"""Checkpoints that several files resume from, load and damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.runs import PRUNING, runner


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> Path:
    """The checkpoints of a run of 9 iterations, at every one, and of a plain run."""
    folder = tmp_path_factory.mktemp('made')
    runner(folder, [dict(PRUNING)], iters=9).train()
    runner(folder / 'plain', iters=9).train()
    return folder
