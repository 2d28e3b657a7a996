"""Models of the three libraries, each in a run that grows all that can grow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.compatibility import row
from support.processes import ROOT
from support.sweep import result_of
from support.zoo import BACKBONES, CASES, LIBRARIES, Case, registered

#: Where `make zoo` keeps results; without it they are held against the page.
STORE = os.environ.get('DYREP_ZOO')
PAGE = (ROOT / 'docs' / 'compatibility.md').read_text() if not STORE else ''

#: Small ones of many kinds.
FAST = (
    'mmpretrain-MobileNetV3',
    'mmpretrain-RepVGG',
    'mmpretrain-ConvNeXt',
    'mmdet-CSPNeXt',
    'mmseg-fast_scnn_8xb4-160k_cityscapes-512x1024',
)
NAMES = {str(case): case for case in CASES}


def check(case: Case) -> None:
    result = result_of(case, Path(STORE) if STORE else None)
    assert STORE or row(case, result) in PAGE


@pytest.mark.parametrize('name', FAST)
def test_a_model(name):
    check(NAMES[name])


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in NAMES if name not in FAST])
def test_any_model(name):
    check(NAMES[name])


@pytest.mark.parametrize('library', LIBRARIES)
def test_every_backbone_is_in_it(library):
    assert registered(library) == BACKBONES[library].keys()


def test_names_are_unique():
    assert len(NAMES) == len(CASES)
