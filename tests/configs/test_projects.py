"""Projects of users, each with bases of its own, on the installed wheel and the library's tools."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from dyrep_mm.engine.checkpoint import load_checkpoint
from support.processes import call, environment, run_script, run_tool
from support.wheels import copy_sources

#: What all three projects train with; text style.
SCHEDULE = """
train_cfg = dict(_delete_=True, by_epoch=False, max_iters=5, val_interval=5)
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=False, T_max=5)]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=5))
loader = dict(batch_size=2, num_workers=0, persistent_workers=False)
"""

BASES = {
    'mmpretrain': """
_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
model = dict(head=dict(num_classes=10))
dataset = dict(
    data_root=data_root + 'crops', metainfo=dict(classes=tuple('0123456789')),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')])
train_dataloader = dict(**loader, dataset=dataset)
val_dataloader = dict(**loader, dataset=dataset)
test_dataloader = val_dataloader
""",
    'mmdet': """
_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
model = dict(
    backbone=dict(init_cfg=None), bbox_head=dict(num_classes=10), test_cfg=dict(score_thr=0.001))
metainfo = dict(classes=tuple('0123456789'))
train_dataloader = dict(**loader, dataset=dict(
    data_root=data_root, metainfo=metainfo, ann_file='annotations/instances_train.json',
    data_prefix=dict(img='images/train/'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
              dict(type='Resize', scale=(64, 64)), dict(type='PackDetInputs')]))
val_dataloader = dict(**loader, dataset=dict(
    data_root=data_root, metainfo=metainfo, ann_file='annotations/instances_val.json',
    data_prefix=dict(img='images/val/'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)),
              dict(type='LoadAnnotations', with_bbox=True),
              dict(type='PackDetInputs', meta_keys=(
                  'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
""",
    'mmseg': """
_base_ = (
    __import__('mmseg').__path__[0]
    + '/.mim/configs/pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py')
size = (64, 64)
model = dict(pretrained=None, data_preprocessor=dict(size=size),
             decode_head=dict(num_classes=11), auxiliary_head=dict(num_classes=11))
metainfo = dict(classes=('background', *'0123456789'), palette=[[20 * i] * 3 for i in range(11)])
train_dataloader = dict(**loader, dataset=dict(
    _delete_=True, type='BaseSegDataset', data_root=data_root, metainfo=metainfo,
    data_prefix=dict(img_path='images/train', seg_map_path='labels/train'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
              dict(type='Resize', scale=size), dict(type='PackSegInputs')]))
val_dataloader = dict(**loader, dataset=dict(
    _delete_=True, type='BaseSegDataset', data_root=data_root, metainfo=metainfo,
    data_prefix=dict(img_path='images/val', seg_map_path='labels/val'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=size),
              dict(type='LoadAnnotations'), dict(type='PackSegInputs')]))
test_dataloader = val_dataloader
""",
}

# The whole integration, in both styles (docs/projects.md).
TEXT = """
_base_ = './base.py'
custom_hooks = [dict(type='dyrep_mm.DyRepHook', interval=2, calibration_batches=1)]
"""
PYTHON = """
from mmengine.config import read_base

from dyrep_mm import DyRepHook

with read_base():
    from .base import *

custom_hooks = [dict(type=DyRepHook, interval=2, calibration_batches=1)]
"""

METRIC = {'mmpretrain': 'accuracy/top1', 'mmdet': 'coco/bbox_mAP', 'mmseg': 'mIoU'}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    """A folder with what the wheel installs, and nothing else."""
    source = copy_sources(tmp_path_factory.mktemp('source') / 'checkout')
    site = tmp_path_factory.mktemp('site')
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
    build = ['wheel', '--no-deps', '--no-build-isolation', '--no-index', '-w', source / 'dist']
    call(*pip, *build, source)
    (built,) = (source / 'dist').glob('*.whl')
    call(*pip, 'install', '--no-deps', '--no-index', '--target', site, built)
    return site


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('digits') / 'data'
    options = '--forms detection segmentation classification --size 64 --train 4 --val 2'
    run_tool('digits', '--out', folder, *options.split())
    return folder


def write_project(folder: Path, library: str, style: str, digits: Path) -> Path:
    """A project of its own in ``folder``; returns its config with DyRep."""
    # Not the name of a package that is installed: a project may be called anything.
    configs = folder / 'project'
    configs.mkdir()
    base = f"data_root = '{digits}/'\n{SCHEDULE}{BASES[library]}"
    (configs / 'base.py').write_text(base)
    if style == 'python':
        # The installed packages ship text configs only: a Python project owns its whole base.
        flat = Config.fromfile(configs / 'base.py')
        flat.pop('loader')
        flat.dump(configs / 'base.py')
    (configs / 'dyrep.py').write_text(TEXT if style == 'text' else PYTHON)
    return configs / 'dyrep.py'


@pytest.mark.parametrize(
    ('library', 'style'),
    [
        ('mmdet', 'text'),
        ('mmseg', 'text'),
        ('mmpretrain', 'python'),
        ('mmpretrain', 'text'),
        ('mmdet', 'python'),
        ('mmseg', 'python'),
    ],
)
def test_trains_and_tests_with_its_own_tools(tmp_path, wheel, digits, library, style):
    config = write_project(tmp_path, library, style, digits)
    variables = environment(PYTHONPATH=str(wheel))
    where = call(
        *(sys.executable, '-c', 'import dyrep_mm; print(dyrep_mm.__file__)'),
        env=variables,
        cwd=tmp_path,
    )
    assert where.startswith(str(wheel))
    tools = Path(importlib.util.find_spec(library).origin).parent / '.mim' / 'tools'
    options = ['--work-dir', tmp_path / 'run']
    place = {'env': variables, 'cwd': tmp_path}
    said = run_script(tools / 'train.py', config, *options, **place)
    assert 'DyRep update 2 at iteration 4' in said
    checkpoint = tmp_path / 'run' / 'iter_5.pth'
    record = load_checkpoint(checkpoint)['meta']['dyrep_mm']
    assert record['structure']
    said = run_script(tools / 'test.py', config, checkpoint, *options, **place)
    assert METRIC[library] in said
    assert 'unexpected key' not in said
