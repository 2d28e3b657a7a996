"""Every config in the folder: it parses, and its first iteration trains."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS, TRANSFORMS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from mmpretrain.models import ResNet
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from torch.utils.data import Dataset

import dyrep_mm
from dyrep_mm import RepNASHook, structure_of
from dyrep_mm.engine.base import StructureHook
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.surgery.optimizer import check_optimizer
from support.processes import ROOT

FOLDER = ROOT / 'configs'
CONFIGS = sorted(
    str(path.relative_to(FOLDER))
    for path in FOLDER.rglob('*.py')
    if '_base_' not in path.relative_to(FOLDER).parts
)

#: The smallest images that each model takes.
SIZES = {'mmpretrain': (64, 64), 'mmdet': (64, 64), 'mmseg': (64, 64)}


@DATASETS.register_module(force=True)
class Synthetic(Dataset):
    """Random images with the annotations of a task, as the pipelines of its library pack them."""

    def __init__(self, library: str):
        self.library = library
        self.metainfo: dict[str, Any] = {'classes': ()}

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        height, width = size = SIZES[self.library]
        image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
        sample = {'mmpretrain': DataSample, 'mmdet': DetDataSample, 'mmseg': SegDataSample}
        sample = sample[self.library]()
        if self.library == 'mmpretrain':
            sample.set_gt_label(index % 2)
        elif self.library == 'mmdet':
            boxes = torch.tensor([[4.0, 4, width / 2, height / 2], [8, 8, width - 8, height - 8]])
            sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]))
            sample.set_metainfo({'img_shape': size, 'ori_shape': size, 'scale_factor': (1.0, 1.0)})
        else:
            label = torch.randint(2, (1, *size), generator=generator)
            sample.gt_sem_seg = PixelData(data=label)
            sample.set_metainfo({'img_shape': size})
        return {'inputs': image, 'data_samples': sample}


class Done(Exception):
    """One iteration has passed."""


class StopAfterOne(Hook):
    """Notes what the training starts with, and ends it."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.start = {k: v.clone() for k, v in runner.model.backbone.state_dict().items()}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.loss = outputs['loss'].item()
        raise Done


def load(name: str) -> Config:
    return Config.fromfile(FOLDER / name)


def hooks_in(cfg: Config) -> list[dict]:
    hooks = [*cfg.default_hooks.values(), *cfg.get('custom_hooks', [])]
    return [hook for hook in hooks if str(hook['type']).endswith(('DyRepHook', 'RepNASHook'))]


def check_pipelines(cfg: Config) -> None:
    """Build every transform that the config names."""
    init_default_scope(cfg.default_scope)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        source = loader.dataset
        while 'pipeline' not in source:  # images in memory
            source = source.dataset
        for transform in source.pipeline:
            TRANSFORMS.build(transform)


def on_synthetic_input(cfg: Config, work_dir: Path) -> None:
    """``cfg`` without the files that it reads, its schedule and model as they are."""
    library = cfg.default_scope
    sampler = cfg.train_dataloader.sampler
    cfg.train_dataloader = {
        'batch_size': 2,
        'num_workers': 0,
        'sampler': sampler,
        'collate_fn': {'type': 'pseudo_collate'},
        'dataset': {'type': 'Synthetic', 'library': library},
    }
    for key in ('val_dataloader', 'val_evaluator', 'val_cfg'):
        cfg[key] = cfg[key.replace('val', 'test', 1)] = None
    if library == 'mmseg':
        cfg.model.data_preprocessor.size = SIZES[library]
    if isinstance(cfg.model.backbone.get('arch'), str):  # PlainVGG, up to 110 million parameters
        cfg.model.backbone.base_channels = 16
        cfg.model.head.in_channels //= 4
    for hook in hooks_in(cfg):
        hook.calibration_batches = 1
    cfg.work_dir, cfg.log_level = str(work_dir), 'WARNING'
    cfg.experiment_name = work_dir.name
    cfg.visualizer = {'type': 'Visualizer'}
    kept = {'dyrep': cfg.default_hooks.dyrep} if 'dyrep' in cfg.default_hooks else {}
    cfg.default_hooks = {'checkpoint': {'type': 'CheckpointHook', 'interval': 1000}, **kept}


@pytest.fixture(scope='module')
def stage_c(tmp_path_factory) -> Callable[[int], tuple[Path, Path]]:
    """What stage C leaves of a ResNet of a depth: its last checkpoint, and the fused one."""

    @cache
    def leave(depth: int) -> tuple[Path, Path]:
        return train_stage_c(depth, tmp_path_factory.mktemp('stage_c'))

    return leave


def train_stage_c(depth: int, folder: Path) -> tuple[Path, Path]:
    backbone = ResNet(depth)
    backbone.eval()
    for path in ('layer1.0.conv2', 'layer3.1.conv2'):
        dyrep_mm.grow(backbone, path)
    said = {'structure': {f'backbone.{k}': v for k, v in structure_of(backbone).items()}}
    fused = dyrep_mm.fuse(backbone, torch.randn(1, 3, 64, 64))
    for name, model, meta in (('last', backbone, {'dyrep_mm': said}), ('fused', fused, {})):
        state = {f'backbone.{k}': v for k, v in model.state_dict().items()}
        torch.save({'meta': meta, 'state_dict': state}, folder / f'{name}.pth')
    return folder / 'last.pth', folder / 'fused.pth'


def from_stage_c(
    cfg: Config, stage_c: Callable[[int], tuple[Path, Path]], folder: Path
) -> dict[str, Any] | None:
    """Put what earlier stages leave where the config looks for it; returns what is to start it."""
    for hook in hooks_in(cfg):
        if str(hook.get('structure')).endswith('.pth'):
            hook.structure = str(folder / 'structure.json')
            structure = {'backbone.features.1.conv': ['kxk', '1x1', '1x1-avg']}
            Path(hook.structure).write_text(json.dumps(structure))
    cfg.model.pop('pretrained', None)  # what a URL gives is not under test
    init = cfg.model.backbone.get('init_cfg')
    if init is None:
        return None
    if '://' in init.checkpoint:
        cfg.model.backbone.init_cfg = None
        return None
    last, fused = stage_c(cfg.model.backbone.depth)
    init.checkpoint = str(fused if init.type == 'Pretrained' else last)
    assert init.prefix == 'backbone.'
    return load_checkpoint(init.checkpoint)


@pytest.mark.parametrize('name', CONFIGS)
def test_first_iteration_trains(name, tmp_path, stage_c):
    cfg = load(name)
    check_pipelines(cfg)
    on_synthetic_input(cfg, tmp_path)
    source = from_stage_c(cfg, stage_c, tmp_path)
    runner = Runner.from_cfg(cfg)
    stop = StopAfterOne()
    runner.register_hook(stop, stop.priority)
    with pytest.raises(Done):
        runner.train()
    assert np.isfinite(stop.loss)
    check_optimizer(runner.optim_wrapper.optimizer, runner.model)
    hooks = [hook for hook in runner.hooks if isinstance(hook, StructureHook)]
    assert len(hooks) == len(hooks_in(cfg)) <= 1
    expected = set()
    if source is not None:
        state = {k.removeprefix('backbone.'): v for k, v in source['state_dict'].items()}
        for key in ('conv1.weight', 'layer1.0.bn2.running_var', 'layer4.1.bn2.weight'):
            torch.testing.assert_close(stop.start[key], state[key], rtol=0, atol=0)
        expected = set(source['meta'].get('dyrep_mm', {}).get('structure', ()))
    if hooks and (isinstance(hooks[0], RepNASHook) or hooks[0].structure is not None):
        assert set(structure_of(runner.model))
    else:
        assert set(structure_of(runner.model)) == expected


def test_the_table_has_every_config():
    table = (FOLDER / 'README.md').read_text()
    rows = [name for name in CONFIGS if not name.startswith('demo')]
    names = [name.removeprefix('classification/') for name in rows]
    assert not [name for name in names if f'| `{name}` |' not in table]


#: Epochs of a training, and the last that may grow by the authors' files.
ENDS = {90: 70, 120: 100, 200: 100, 600: 500}


@pytest.mark.parametrize(
    'name', [n for n in CONFIGS if '_dyrep' in n and not n.startswith(('demo', 'study'))]
)
def test_the_tables_have_the_numbers_of_the_paper(name):
    cfg = load(name)
    if name.endswith(('-c_1x_coco.py', '-c_4xb2-40k_cityscapes-512x1024.py')):
        assert not hooks_in(cfg)  # the plain model, started by a classifier
        return
    (hook,) = hooks_in(cfg)
    assert hook.preset == 'paper'
    if cfg.train_cfg.get('max_epochs') in ENDS:
        assert hook.end == ENDS[cfg.train_cfg.max_epochs]


ABLATIONS = [name for name in CONFIGS if name.startswith('ablations')]


@pytest.mark.parametrize('name', ABLATIONS)
def test_an_ablation_varies_one_thing(name):
    """All else is a config of Table 2; Figure 7 trains for 100 epochs."""
    data = name.rpartition('_')[2]
    method = 'dbb' if '_dbb' in name else 'dyrep'
    cfg, base = load(name), load(f'classification/vgg16_{method}_1xb128-600e_{data}')
    varied = {
        key
        for key in cfg.default_hooks.dyrep.keys() | base.default_hooks.dyrep.keys()
        if cfg.default_hooks.dyrep.get(key) != base.default_hooks.dyrep.get(key)
    }
    allowed = {'structure', 'interval', 'init_scale'} if '-fixed' in name else None
    assert varied == allowed or len(varied) == 1 or ('-first' in name and 'end' in varied)
    for key in ('model', 'train_dataloader', 'optim_wrapper'):
        assert cfg[key] == base[key]
    assert cfg.train_cfg.max_epochs == (100 if '-first' in name else 600)


#: Devices x batch and schedule, as OpenMMLab writes them: 8xb32-120e, 4xb2-40k.
SCHEDULE = re.compile(r'_(\d+)xb(\d+)-(\d+)([ek])_')


@pytest.mark.parametrize('name', [name for name in CONFIGS if SCHEDULE.search(name)])
def test_the_name_says_batch_and_schedule(name):
    devices, batch, length, unit = SCHEDULE.search(name).groups()
    cfg = load(name)
    assert cfg.train_dataloader.batch_size == int(batch)
    if 'auto_scale_lr' in cfg:
        assert cfg.auto_scale_lr.base_batch_size == int(devices) * int(batch)
    if unit == 'e':
        assert cfg.train_cfg.max_epochs == int(length)
    else:
        assert cfg.train_cfg.max_iters == int(length) * 1000


@pytest.mark.parametrize('name', CONFIGS)
def test_the_hook_merges_by_key(name, tmp_path):
    """A config that inherits can change one option and bring hooks of its own."""
    cfg = load(name)
    assert 'custom_hooks' not in cfg
    assert 'dyrep' not in cfg, 'the variable of _base_/methods is left over'
    if not hooks_in(cfg):
        return
    child = tmp_path / 'child.py'
    child.write_text(
        f'_base_ = {str(FOLDER / name)!r}\n'
        "default_hooks = dict(dyrep=dict(metric='vote'))\n"
        "custom_hooks = [dict(type='EMAHook')]\n"
    )
    child = Config.fromfile(child)
    assert child.default_hooks == {
        **cfg.default_hooks,
        'dyrep': {**cfg.default_hooks.dyrep, 'metric': 'vote'},
    }
    assert child.custom_hooks == [{'type': 'EMAHook'}]


@pytest.mark.parametrize(
    ('name', 'options', 'expected'),
    [
        (
            'classification/vgg16_dyrep_1xb128-600e_cifar10.py',
            {'default_hooks.dyrep.metric': 'snip'},
            'snip',
        ),
        (
            'detection/faster-rcnn_r50_fpn_1x_coco.py',
            {
                'default_hooks.dyrep.type': 'dyrep_mm.DyRepHook',
                'default_hooks.dyrep.metric': 'snip',
            },
            'snip',
        ),
    ],
)
def test_options_of_the_command_line(name, options, expected):
    """What configs/README.md and docs/projects.md say works with --cfg-options."""
    cfg = load(name)
    cfg.merge_from_dict(options)
    (hook,) = hooks_in(cfg)
    init_default_scope(cfg.default_scope)
    assert HOOKS.build(hook).metric == expected
