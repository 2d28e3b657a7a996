"""Real runs on made-up images: a tiny classifier, and mmpretrain's ResNet.

The tiny classifier is made of mmengine's parts alone; a run of it takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

from dyrep_mm import DyRepHook
from dyrep_mm.engine.base import StructureHook
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.engine.stock import from_stock
from dyrep_mm.evolution.record import Entry, Record
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.structure import Plan

_NUMBERS = count()  # mmengine keeps one logger for each name


@DATASETS.register_module(force=True)
class Images(Dataset):
    """Random images of two classes that differ in brightness; the same at every call.

    Args:
        length: How many there are.
        size: Height and width.
        poison: Index of an image that is NaN.
        packed: Give what mmpretrain's pipelines give: bytes of brightness and a ``DataSample``.
    """

    metainfo = {'classes': ('dark', 'bright')}

    def __init__(
        self, length: int = 16, size: int = 8, poison: int | None = None, packed: bool = False
    ):
        self.length, self.size, self.poison, self.packed = length, size, poison, packed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator, label = torch.Generator().manual_seed(index), index % 2
        shape = (3, self.size, self.size)
        if self.packed:
            image = torch.rand(shape, generator=generator) * 128 + 100 * label
        else:
            image = torch.randn(shape, generator=generator) + label
        if index == self.poison:
            image[:] = float('nan')
        if not self.packed:
            return {'inputs': image, 'labels': torch.tensor(label)}
        from mmpretrain.structures import DataSample  # here: the tiny runs start without it

        return {'inputs': image, 'data_samples': DataSample().set_gt_label(label)}


@DATASETS.register_module(force=True)
class Views(Images):
    """Two views of each image, as mmpretrain's ``MultiView`` gives them."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, 'inputs': [item['inputs'], item['inputs'].flip(-1)]}


@MODELS.register_module(force=True)
class TinyBackbone(BaseModule):
    """Four convs of different geometry, each with its norm."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)  # has a bias
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.dw = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.dw_bn = nn.BatchNorm2d(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        x = F.relu(self.bn3(self.conv3(x)))
        return F.relu(self.dw_bn(self.dw(x)))

    def get_layer_depth(self, name: str, prefix: str = '') -> tuple[int, int]:
        """As mmpretrain's layer decay asks: number of the layer, and how many there are."""
        depths = {'conv1': 1, 'bn1': 1, 'conv2': 2, 'bn2': 2, 'conv3': 3, 'bn3': 3}
        inner = name.removeprefix('backbone.')
        return (depths.get(inner.split('.')[0], 4) if inner != name else 5), 6


@MODELS.register_module(force=True)
class TinyClassifier(BaseModel):
    """Backbone and linear head, with the three modes of mmengine's models."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.backbone = TinyBackbone(width)
        self.head = nn.Linear(2 * width, 2)

    def get_layer_depth(self, name: str) -> tuple[int, int]:
        return self.backbone.get_layer_depth(name)

    def forward(self, inputs: Tensor, labels: Tensor | None = None, mode: str = 'tensor') -> Any:
        logits = self.head(self.backbone(inputs).mean((2, 3)))
        if mode == 'loss':
            return {'loss': F.cross_entropy(logits, labels)}
        if mode == 'predict':
            return [{'logits': row, 'label': label} for row, label in zip(logits, labels)]  # noqa: B905
        return logits


@METRICS.register_module(force=True)
class TinyLoss(BaseMetric):
    """Cross entropy of the predictions, and their sum as a fingerprint of the weights."""

    def process(self, data_batch: Any, data_samples: list[dict]) -> None:
        self.results += [
            (F.cross_entropy(s['logits'], s['label']).item(), s['logits'][0].item())
            for s in data_samples
        ]

    def compute_metrics(self, results: list) -> dict[str, float]:
        losses, logits = zip(*results, strict=True)
        return {'loss': sum(losses) / len(losses), 'fingerprint': sum(logits)}


#: A hook that updates often; every branch that is below the mean is pruned.
#: Blocks in blocks are the harder case.
FAST = {
    'type': 'dyrep_mm.DyRepHook',
    'interval': 2,
    'calibration_batches': 2,
    'max_depth': 2,
}
PRUNING = {**FAST, 'prune_threshold': 0.0}

#: A search of a few iterations.
SEARCH = {
    'type': 'dyrep_mm.RepNASHook',
    'warmup': 2,
    'fixed': 3,
    'calibration_batches': 2,
}


def settings(
    work_dir: str | Path,
    hooks: list[dict] | None = None,
    *,
    iters: int | None = None,
    epochs: int = 4,
    every: int = 1,
    val: int | None = None,
    size: int = 8,
    **more: Any,
) -> dict[str, Any]:
    """Arguments of a ``Runner``.

    Args:
        work_dir: For logs and checkpoints.
        hooks: Custom hooks.
        iters: Iterations to train; epochs of 4 iterations by default.
        epochs: Epochs to train.
        every: Epochs or iterations between checkpoints.
        val: Epochs or iterations between validations.
        size: Of the images.
        more: Overrides of whole arguments.
    """
    by_epoch = iters is None
    loader = {
        'batch_size': 4,
        'num_workers': 0,
        'collate_fn': {'type': 'default_collate'},
        'dataset': {'type': 'Images', 'size': size},
    }
    sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    schedule = {'max_epochs': epochs} if by_epoch else {'max_iters': iters}
    result = {
        'model': {'type': 'TinyClassifier'},
        'work_dir': str(work_dir),
        'train_dataloader': {**loader, 'sampler': {'type': sampler, 'shuffle': True}},
        'train_cfg': {'by_epoch': by_epoch, **schedule, 'val_interval': val or 10**6},
        'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9}},
        'default_hooks': {
            'logger': {'type': 'LoggerHook', 'interval': 1},
            'checkpoint': {'type': 'CheckpointHook', 'interval': every, 'by_epoch': by_epoch},
        },
        'custom_hooks': hooks,
        'randomness': {'seed': 0},
        'experiment_name': f'tiny_{next(_NUMBERS)}',
        'log_level': 'ERROR',
    }
    if val is not None:
        sampler = {'type': 'DefaultSampler', 'shuffle': False}
        for phase in ('val', 'test'):
            result[f'{phase}_dataloader'] = {**loader, 'sampler': sampler}
            result[f'{phase}_evaluator'] = {'type': 'TinyLoss'}
        result |= {'val_cfg': {}, 'test_cfg': {}}
    return {**result, **more}


def runner(work_dir: str | Path, hooks: list[dict] | None = None, **more: Any) -> Runner:
    """A runner of :func:`settings`; its ``cfg`` holds them, as with ``Runner.from_cfg``."""
    arguments = settings(work_dir, hooks, **more)
    if isinstance(arguments['model'], nn.Module):
        return Runner(**arguments)
    return Runner.from_cfg(Config(arguments))


def resnet_config(
    work_dir: Path, *, hook: dict | None = None, iters: int | None = None, epochs: int = 4, **more
) -> Config:
    """ResNet-18 with an eighth of the channels; ``more`` overrides top-level settings."""
    loader = {
        'batch_size': 4,
        'num_workers': 0,
        'collate_fn': {'type': 'pseudo_collate'},
        'dataset': {'type': 'Images', 'size': 32, 'packed': True},
    }
    train_cfg = (
        {'by_epoch': True, 'max_epochs': epochs, 'val_interval': 100}
        if iters is None
        else {'by_epoch': False, 'max_iters': iters, 'val_interval': 10**6}
    )
    sampler = 'DefaultSampler' if iters is None else 'InfiniteSampler'
    arguments = {
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
        'experiment_name': f'resnet_{next(_NUMBERS)}',
        'log_level': 'WARNING',
    }
    return Config({**arguments, **more})


def resnet_runner(work_dir: Path, **settings) -> Runner:
    """A runner of :func:`resnet_config`."""
    return Runner.from_cfg(resnet_config(work_dir, **settings))


class Script:
    """A rule that does what it is told.

    Args:
        steps: For each update ``grow``, paths of convs that get every operation, and ``prune``,
            branches by path of their block.
    """

    def __init__(self, steps: list[dict]):
        self.steps = list(steps)

    def watch(self, model: nn.Module) -> None:
        pass

    def observe(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def decide(self, model: nn.Module, generator: torch.Generator) -> Plan:
        step, able = self.steps.pop(0), candidates(model)
        grow = {path: list(able[path]) for path in step.get('grow', ())}
        return Plan(grow, {path: list(names) for path, names in step.get('prune', {}).items()})

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state: dict) -> bool:
        return True


@HOOKS.register_module(force=True)
class ScriptedDyRepHook(DyRepHook):
    """The hook with a :class:`Script` for a rule."""

    def __init__(self, script: list[dict], **options: Any):
        self.script = script
        super().__init__(**options)

    def make_rule(self) -> Script:
        return Script(self.script)


def dyrep(run: Runner) -> StructureHook:
    """The hook of a runner."""
    (hook,) = (h for h in run.hooks if isinstance(h, StructureHook))
    return hook


class At(Hook):
    """Calls a function at a moment of a run.

    Args:
        call: Takes the runner.
        moment: Name of the hook method.
        priority: When among the hooks; last by default.
    """

    def __init__(
        self,
        call: Callable[[Runner], Any],
        moment: str = 'after_train_iter',
        priority: str = 'LOWEST',
    ):
        self.priority = priority
        setattr(self, moment, lambda runner, *_args, **_kwargs: call(runner))


def call_at(run: Runner, call: Callable[[Runner], Any], *moment: str) -> None:
    """Call a function at a moment of the run."""
    hook = At(call, *moment)
    run.register_hook(hook, hook.priority)


def with_branches(file: Path) -> dict[str, Any]:
    """A checkpoint, with the weights of the model that trained in ``state_dict``."""
    return from_stock(load_checkpoint(file))


def journal(file: Path) -> list[Entry]:
    """The updates that a checkpoint tells of."""
    return Record.from_checkpoint(load_checkpoint(file)).journal


def updates(file: Path, unit: str = 'iteration') -> list[int]:
    """When they were, all in one unit."""
    entries = journal(file)
    assert {entry.unit for entry in entries} <= {unit}
    return [entry.at for entry in entries]


def write_config(path: Path, hooks: list[dict] | None, **more) -> Path:
    """A config file of a run with ``hooks`` and changed ``settings``."""
    arguments = settings(path.parent / path.stem, hooks, **{'iters': 9, **more})
    arguments = {k: v for k, v in arguments.items() if v is not None}
    Config({**arguments, 'custom_imports': {'imports': ['support.runs']}}).dump(path)
    return path
