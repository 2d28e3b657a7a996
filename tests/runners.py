"""Real runners on small inputs: mmpretrain's ResNet on images that are made up."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from torch.utils.data import Dataset

_NUMBERS = count()  # mmengine keeps one logger for each name


@DATASETS.register_module(force=True)
class Images(Dataset):
    """Random images of two classes that differ in brightness; the same at every call."""

    metainfo = {'classes': ('dark', 'bright')}

    def __init__(self, length: int = 16, size: int = 32, poison: int | None = None):
        self.length, self.size, self.poison = length, size, poison

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        label = index % 2
        image = torch.rand(3, self.size, self.size, generator=generator) * 128 + 100 * label
        if index == self.poison:
            image[:] = float('nan')
        return {'inputs': image, 'data_samples': DataSample().set_gt_label(label)}


def config(
    work_dir: Path, *, hook: dict | None = None, iters: int | None = None, epochs: int = 4, **more
) -> Config:
    """ResNet-18 with an eighth of the channels; ``more`` overrides top-level settings."""
    loader = {
        'batch_size': 4,
        'num_workers': 0,
        'collate_fn': {'type': 'pseudo_collate'},
        'dataset': {'type': 'Images'},
    }
    train_cfg = (
        {'by_epoch': True, 'max_epochs': epochs, 'val_interval': 100}
        if iters is None
        else {'by_epoch': False, 'max_iters': iters, 'val_interval': 10**6}
    )
    sampler = 'DefaultSampler' if iters is None else 'InfiniteSampler'
    settings = {
        'default_scope': 'mmpretrain',
        'work_dir': str(work_dir),
        'model': {
            'type': 'ImageClassifier',
            'data_preprocessor': {'mean': [127.0] * 3, 'std': [60.0] * 3},
            'backbone': {
                'type': 'ResNet',
                'depth': 18,
                'stem_channels': 8,
                'base_channels': 8,
                'norm_cfg': {'type': 'BN', 'requires_grad': True},
            },
            'neck': {'type': 'GlobalAveragePooling'},
            'head': {'type': 'LinearClsHead', 'num_classes': 2, 'in_channels': 64},
        },
        'train_dataloader': {**loader, 'sampler': {'type': sampler, 'shuffle': True}},
        'train_cfg': train_cfg,
        'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9}},
        'default_hooks': {
            'logger': {'type': 'LoggerHook', 'interval': 1},
            'checkpoint': {'type': 'CheckpointHook', 'interval': 1},
        },
        'custom_hooks': [] if hook is None else [{'type': 'dyrep_mm.DyRepHook', **hook}],
        'randomness': {'seed': 0},
        'experiment_name': f'test_{next(_NUMBERS)}',
        'log_level': 'WARNING',
    }
    return Config({**settings, **more})


def runner(work_dir: Path, **settings) -> Runner:
    """A runner of :func:`config`."""
    return Runner.from_cfg(config(work_dir, **settings))
