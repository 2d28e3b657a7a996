"""The record: what a checkpoint keeps of the changes, there and back."""

from __future__ import annotations

import pytest

from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.evolution.record import Record
from support.runs import PRUNING, runner


@pytest.fixture
def saved(tmp_path) -> dict:
    """A checkpoint from the middle of an interval."""
    runner(tmp_path, [dict(PRUNING)], iters=5).train()
    return load_checkpoint(tmp_path / 'iter_5.pth')


def test_record_round_trip(saved):
    record = Record.from_checkpoint(saved)
    again: dict = {'meta': {}}
    record.to_checkpoint(again)
    assert again['meta']['dyrep_mm'] == saved['meta']['dyrep_mm']
    assert again['dyrep_mm'].keys() == saved['dyrep_mm'].keys()
    assert Record.from_checkpoint({'meta': {}}) == Record()
    assert Record.from_checkpoint({}) == Record()
