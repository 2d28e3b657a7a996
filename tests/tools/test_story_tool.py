"""``tools/report.py --story``: the command beside the picture of the README."""

from __future__ import annotations

import torch

from dyrep_mm.evolution.record import Entry, Record
from support.processes import run_tool


def checkpoint(file, structure):
    """A checkpoint whose journal tells of one update that grew this."""
    content = {'meta': {'iter': 20, 'epoch': 0}, 'state_dict': {}}
    Record(structure, [Entry(1, 'iteration', 10, structure)], iteration=20).to_checkpoint(content)
    torch.save(content, file)
    return file


def test_it_is_written(tmp_path):
    file = checkpoint(tmp_path / 'iter_20.pth', {'conv': ['kxk', '1x1', 'kx1']})
    out = tmp_path / 'report.html'
    said = run_tool('report', file, '--out', out, '--story', tmp_path / 'story.svg')
    assert str(tmp_path / 'story.svg') in said
    drawn = (tmp_path / 'story.svg').read_text()
    assert drawn.startswith('<svg')
    assert all(f'>{word}<' in drawn for word in ('plain', 'iteration 10', 'fused', '1x1', 'kx1'))


def test_without_a_block_there_is_none(tmp_path):
    file = checkpoint(tmp_path / 'iter_20.pth', {})
    out = tmp_path / 'report.html'
    said = run_tool('report', file, '--out', out, '--story', tmp_path / 'story.svg', code=1)
    assert 'none has grown' in said.splitlines()[-1]
    assert not (tmp_path / 'story.svg').exists()
