"""A long run of a ResNet-50 for reports: a real model grows and is pruned, and nothing trains."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from torch import nn

from dyrep_mm import grow, prune, structure_of
from dyrep_mm.evolution.record import Entry, Record
from dyrep_mm.evolution.rule import make_plan
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.cost import Cost, SizeWatch, cost_of
from dyrep_mm.surgery.tree import blocks_of

CONFIG = """
model = dict(type='ImageClassifier', backbone=dict(type='ResNet', depth=50))
train_cfg = dict(by_epoch=True, max_epochs={epochs}, val_interval=1)
"""


def small_resnet50() -> nn.Module:
    """A ResNet-50 with a sixteenth of the channels."""
    init_default_scope('mmpretrain')
    backbone = {'type': 'ResNet', 'depth': 50, 'stem_channels': 4, 'base_channels': 4}
    return MODELS.build(
        {
            'type': 'ImageClassifier',
            'backbone': backbone,
            'neck': {'type': 'GlobalAveragePooling'},
            'head': {'type': 'LinearClsHead', 'num_classes': 2, 'in_channels': 128},
        }
    )


def write_run(work_dir: Path, updates: int = 40, interval: int = 3) -> Record:
    """A work directory as a run leaves it: a checkpoint, scalars and a config.

    Args:
        work_dir: For the files.
        updates: How many the run had, each after ``interval`` epochs of 10 iterations.
        interval: Epochs between two updates.

    Returns:
        What the checkpoint records.
    """
    model, chance, epochs = small_resnet50(), random.Random(0), updates * interval
    watch = SizeWatch(model)
    model(torch.randn(2, 3, 32, 32))
    record = Record(by_epoch=True, sizes=watch.finish())
    record.plain = record.start = cost_of(model, record.sizes)
    liked: dict[str, float] = {}
    for update in range(1, updates + 1):
        record.journal.append(_update(model, update, interval, chance, liked, record.sizes))
    record.structure = structure_of(model)
    record.updates, record.last, record.iteration = updates, epochs, epochs * 10
    config = CONFIG.format(epochs=epochs)
    checkpoint = {
        'meta': {'epoch': epochs, 'iter': epochs * 10, 'seed': 3, 'cfg': config},
        'state_dict': model.state_dict(),
    }
    record.to_checkpoint(checkpoint)
    folder = work_dir / '20260101_120000' / 'vis_data'
    folder.mkdir(parents=True)
    torch.save(checkpoint, work_dir / f'epoch_{epochs}.pth')
    (folder / 'config.py').write_text(config)
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, _scalars(epochs, chance))))
    return record


def _update(
    model: nn.Module,
    update: int,
    interval: int,
    chance: random.Random,
    liked: dict[str, float],
    sizes: dict,
) -> Entry:
    operations = candidates(model, 'backbone', 2)
    for path in operations:
        liked.setdefault(path, chance.lognormvariate(0, 1))
    scores = {path: liked[path] * chance.lognormvariate(0, 0.3) for path in operations}
    for block in blocks_of(model).values():
        for branch in block.added:
            branch.bn.weight.data.fill_(block.origin_std.mean() * chance.lognormvariate(-2, 0.7))
    plan = make_plan(
        scores,
        {path: block.importances() for path, block in blocks_of(model).items()},
        operations,
        count=1,
        threshold=0.1,
    )
    for path, names in plan.grow.items():
        grow(model, path, names)
    for path, names in plan.prune.items():
        prune(model, path, names)
    blocks = blocks_of(model).values()
    cost: Cost = cost_of(model, sizes)
    return Entry(
        update,
        'epoch',
        update * interval,
        plan.grow,
        plan.prune,
        plan.scores,
        plan.importances,
        len(blocks),
        sum(len(block.added) for block in blocks),
        cost.parameters,
        cost.multiply_adds,
        iteration=update * interval * 10,
    )


def _scalars(epochs: int, chance: random.Random) -> list[dict]:
    lines = []
    for epoch in range(1, epochs + 1):
        loss = 2 / epoch**0.4 + chance.uniform(0, 0.1)
        train = {'lr': 0.1, 'loss': loss, 'time': 0.2 + epoch / 1000, 'data_time': 0.01}
        lines.append({**train, 'epoch': epoch, 'iter': epoch * 10, 'step': epoch * 10})
        top1 = 76 - 50 / epoch**0.7 + chance.uniform(-1, 1)
        lines.append({'accuracy/top1': top1, 'accuracy/top5': top1 + 15, 'step': epoch})
    return lines
