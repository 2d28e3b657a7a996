"""What tools/compare.py makes of predictions, in the process of the test."""

from __future__ import annotations

import sys
from argparse import Namespace

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from support.processes import ROOT


@pytest.fixture(scope='module')
def compare():
    sys.path.insert(0, str(ROOT / 'tools'))
    try:
        import compare

        yield compare
    finally:
        sys.path.remove(str(ROOT / 'tools'))


def sample(order=(0, 1, 2, 3), shift=0.0):
    """Four boxes, two of which have the same score."""
    boxes = torch.tensor([[0.0, 0, 9, 9], [5, 5, 20, 20], [30, 0, 40, 9], [1, 50, 9, 60]])
    scores, labels = torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([3, 1, 2, 1])
    index = torch.tensor(order)
    instances = InstanceData(
        bboxes=boxes[index] + shift, scores=scores[index], labels=labels[index]
    )
    return DetDataSample(pred_instances=instances)


def test_equal_scores_in_another_order_are_no_difference(compare):
    largest, unlike = compare.differences([sample()], [sample((0, 2, 1, 3))])
    assert unlike == 0
    assert largest.keys() == {f'pred_instances.{n}' for n in ('bboxes', 'scores', 'labels')}
    assert set(largest.values()) == {0.0}


def test_boxes_elsewhere_are_a_difference(compare):
    largest, _ = compare.differences([sample()], [sample((0, 2, 1, 3), shift=0.25)])
    assert largest['pred_instances.bboxes'] == 0.25
    assert largest['pred_instances.scores'] == 0.0


def test_other_counts_and_numbers_that_are_none(compare):
    assert compare.differences([sample()], [sample((0, 1))]) == ({}, 1)
    bad = sample()
    bad.pred_instances.scores[1] = float('nan')
    largest, _ = compare.differences([sample()], [bad])
    assert largest['pred_instances.scores'] != largest['pred_instances.scores']


@pytest.mark.parametrize(
    ('first', 'second', 'expected'),
    [
        (('a.py', 'w/1.pth'), ('b.py', 'w/2.pth'), ['1.pth', '2.pth']),
        (('a.py', 'v/1.pth'), ('a.py', 'w/1.pth'), ['v/1.pth', 'w/1.pth']),
        (('a.py', 'w/1.pth'), ('b.py', 'w/1.pth'), ['a: w/1.pth', 'b: w/1.pth']),
        (('x/a.py', '1.pth'), ('y/a.py', '1.pth'), ['x/a.py: 1.pth', 'y/a.py: 1.pth']),
        (('a.py', '1.pth'), ('a.py', '1.pth'), ['a.py: 1.pth (1)', 'a.py: 1.pth (2)']),
    ],
)
def test_columns_have_names_of_their_own(compare, first, second, expected):
    names = ('config', 'checkpoint', 'other_config', 'other_checkpoint')
    assert compare.labels(Namespace(**dict(zip(names, (*first, *second), strict=True)))) == expected
