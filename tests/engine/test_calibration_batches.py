"""Batches and forward of calibration in real runs: any model, any loader, nothing touched."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import DATA_SAMPLERS, DATASETS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from dyrep_mm.engine.batches import calibration_loader
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Record
from dyrep_mm.surgery.structure import structure_of
from support.checks import assert_equal_data, assert_same, assert_same_run
from support.nets import output_of
from support.runs import (
    FAST,
    Images,
    TinyBackbone,
    TinyClassifier,
    call_at,
    dyrep,
    resnet_config,
    runner,
    settings,
)

ALL_AT_ONCE = {**FAST, 'interval': 1, 'metric': 'random', 'grow_per_update': 99, 'prune': False}


# Models whose training forward is not one image through the backbone.


def simsiam():
    neck = {'type': 'NonLinearNeck', 'in_channels': 64, 'hid_channels': 16, 'out_channels': 16}
    predictor = {**neck, 'in_channels': 16, 'with_avg_pool': False}
    head = {
        'type': 'LatentPredictHead',
        'loss': {'type': 'CosineSimilarityLoss'},
        'predictor': predictor,
    }
    return {'type': 'SimSiam', 'neck': neck, 'head': head}


def simclr():
    neck = {'type': 'NonLinearNeck', 'in_channels': 64, 'hid_channels': 16, 'out_channels': 16}
    loss = {'type': 'CrossEntropyLoss'}
    return {'type': 'SimCLR', 'neck': neck, 'head': {'type': 'ContrastiveHead', 'loss': loss}}


def views_runner(folder, model, hook):
    config = resnet_config(folder, hook=hook, iters=5)
    model['backbone'] = config.model.backbone
    model['data_preprocessor'] = {
        'type': 'SelfSupDataPreprocessor', 'mean': [127.0] * 3, 'std': [60.0] * 3,
    }  # fmt: skip
    config.model = model
    config.train_dataloader.dataset.type = 'mmengine.Views'
    config.train_dataloader.collate_fn.type = 'default_collate'
    return Runner.from_cfg(config)


@pytest.mark.parametrize('count', [0, 2])
@pytest.mark.parametrize('make', [simsiam, simclr])
def test_several_views(tmp_path, make, count):
    hook = {'interval': 2, 'calibration_batches': count, 'metric': 'snip'}
    run = views_runner(tmp_path, make(), hook)
    run.train()
    assert [len(entry.grown) for entry in dyrep(run).journal] == [1, 1]
    assert set(structure_of(run.model)) == {p for e in dyrep(run).journal for p in e.grown}


@MODELS.register_module(force=True)
class PairClassifier(TinyClassifier):
    """Two images lie side by side in one tensor."""

    def forward(self, inputs, labels=None, mode='tensor'):
        pairs = torch.cat([inputs, inputs.flip(-1)], 1)
        return super().forward(torch.cat(pairs.split(3, 1)), labels.repeat(2), mode)


def test_two_images_in_one_tensor(tmp_path):
    run = runner(tmp_path, [FAST], iters=5, model={'type': 'PairClassifier'})
    run.train()
    assert [len(entry.grown) for entry in dyrep(run).journal] == [1, 1]


# Convs that cannot grow: bypassed, unused, taken by some batches, not finite.


@MODELS.register_module(force=True)
class OddBackbone(TinyBackbone):
    """``use`` says how ``conv2`` is used."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        self.convs = [self.conv2]

    def second(self, x):
        weight = self.conv2.weight
        if self.use == 'list':
            return self.convs[0](x)
        if self.use == '_conv_forward':
            return self.conv2._conv_forward(x, weight, None)
        if self.use == 'functional':
            return F.conv2d(x, weight, padding=1)
        if self.use == 'both':
            return self.conv2(x) + F.conv2d(x, weight, padding=1)
        if self.use == 'empty':  # a head that is given the positives, of which there are none
            return x + self.conv2(x[:0]).sum()
        if self.use == 'not finite':
            with torch.no_grad():
                return self.conv2(x / 0).nan_to_num(0, 0, 0) + x
        return x

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.second(x)) + x)
        x = F.relu(self.bn3(self.conv3(x)))
        return F.relu(self.dw_bn(self.dw(x)))


@MODELS.register_module(force=True)
class OddClassifier(TinyClassifier):
    def __init__(self, use):
        super().__init__()
        self.backbone = OddBackbone(use)


REASONS = {
    'list': 'outside of its own forward',
    '_conv_forward': 'outside of its own forward',
    'functional': 'outside of its own forward',
    'both': 'outside of its own forward',
    'empty': 'less than two values',
    'unused': 'not called',
    'not finite': 'not finite',
}
LEFT = 'backbone.conv2'


def odd_runner(folder, use, hook=ALL_AT_ONCE, iters=6, **more):
    return runner(folder, [hook], iters=iters, model={'type': 'OddClassifier', 'use': use}, **more)


class Lines(logging.Handler):
    """Keeps what a logger is told."""

    def __init__(self, logger):
        super().__init__(logging.WARNING)
        self.lines = []
        logger.setLevel(logging.WARNING)
        logger.addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.mark.parametrize('count', [0, 2])
@pytest.mark.parametrize('use', REASONS)
def test_a_conv_that_cannot_grow_is_named_and_never_offered_again(tmp_path, use, count):
    if use == 'not finite' and count == 0:
        pytest.skip('nothing is measured')
    run = odd_runner(tmp_path, use, {**ALL_AT_ONCE, 'calibration_batches': count})
    log, outputs = Lines(run.logger), []
    x = torch.randn(2, 3, 8, 8)

    def note(run):
        outputs.append(output_of(run.model, x))

    call_at(run, note, 'after_train_iter', 'VERY_HIGH')
    call_at(run, note)
    conv = run.model.backbone.conv2
    run.train()
    lines = [line for line in log.lines if LEFT in line]
    assert len(lines) == 1
    assert REASONS[use] in lines[0]
    for before, after in zip(outputs[::2], outputs[1::2], strict=True):
        assert_same(after, before, scale=10)
    assert run.model.backbone.conv2 is conv
    assert len(dyrep(run).journal) == 5
    grown = {path for entry in dyrep(run).journal for path in entry.grown}
    assert grown == set(structure_of(run.model)) >= {'backbone.conv1', 'backbone.conv3'}
    assert not any(path.startswith(LEFT) for path in grown)
    assert LEFT in dyrep(run).journal[0].scores
    assert all(LEFT not in entry.scores for entry in dyrep(run).journal[1:])


@pytest.mark.parametrize('use', ['list', 'unused', 'not finite'])
@pytest.mark.parametrize(
    'structure', ['dbb', {LEFT: ['kxk', '1x1'], 'backbone.dw': ['kxk', '1x1']}]
)
def test_a_start_structure(tmp_path, use, structure):
    hook = {**FAST, 'interval': None, 'structure': structure}
    run = odd_runner(tmp_path, use, hook)
    run.train()
    assert 'backbone.dw' in structure_of(run.model)
    assert LEFT not in structure_of(run.model)


@pytest.mark.parametrize('at', [1, 2, 4])
@pytest.mark.parametrize('use', ['list', 'not finite', 'unused'])
def test_a_resumed_run_knows_what_is_left_alone(tmp_path, use, at):
    """Also where an average mirrors the plan, and in the journal."""
    hooks = [{**ALL_AT_ONCE, 'interval': 2, 'grow_per_update': 3}, {'type': 'EMAHook'}]
    model = {'type': 'OddClassifier', 'use': use}
    whole = runner(tmp_path / 'whole', hooks, iters=7, model=model)
    whole.train()
    file = tmp_path / f'whole/iter_{at}.pth'
    record = Record.from_checkpoint(load_checkpoint(file))
    assert all(path == LEFT for path in record.left_alone)
    run = runner(tmp_path, hooks, iters=7, model=model, load_from=str(file), resume=True)
    run.train()
    assert_same_run(whole, run)
    files = [load_checkpoint(folder / 'iter_7.pth') for folder in (tmp_path / 'whole', tmp_path)]
    assert list(Record.from_checkpoint(files[0]).left_alone) == [LEFT]
    assert_equal_data(*(file['dyrep_mm'] for file in files))
    assert_equal_data(*(file['ema_state_dict'] for file in files))


def test_a_run_in_which_nothing_may_grow_goes_on(tmp_path):
    hook = {**ALL_AT_ONCE, 'scope': LEFT}
    odd_runner(tmp_path / 'first', 'list', hook, iters=4).train()
    file = str(tmp_path / 'first/iter_3.pth')
    run = odd_runner(tmp_path, 'list', hook, iters=4, load_from=file, resume=True)
    run.train()
    assert structure_of(run.model) == {}


# Loaders.


@DATA_SAMPLERS.register_module(force=True)
class Buckets(BatchSampler):
    """Bright and dark images apart, each in batches of their own size."""

    def __init__(self, sampler, batch_size, sizes=(2, 3)):
        self.sampler, self.batch_size, self.sizes = sampler, list(sizes), sizes
        self.waiting = [[], []]

    def __len__(self):
        return len(self.sampler) // 3

    def __iter__(self):
        for index in self.sampler:
            bucket = self.waiting[index % 2]
            bucket.append(index)
            if len(bucket) == self.sizes[index % 2]:
                yield bucket[:]
                bucket.clear()


@DATA_SAMPLERS.register_module(force=True)
class InHand(Buckets):
    """All images alike, as mmdet's batches of one aspect ratio: in the middle of an epoch the one
    bucket is full, and gives nothing to who goes on from there."""

    def __iter__(self):
        for index in self.sampler:
            self.waiting[0].append(index)
            if len(self.waiting[0]) == 3:
                yield self.waiting[0][:]
                self.waiting[0].clear()


@DATA_SAMPLERS.register_module(force=True)
class FixedLists:
    """Batches that were made before, in an order of its own; mmengine asks for a sampler."""

    def __init__(self, sampler, batch_size):
        self.sampler = sampler
        self.batches = [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self):
        return 3

    def __iter__(self):
        while True:
            for i in torch.randperm(3, generator=self.generator).tolist():
                yield self.batches[i]


@DATA_SAMPLERS.register_module(force=True)
class Running(FixedLists):
    """An iterator that runs cannot be copied."""

    def __init__(self, sampler, batch_size):
        super().__init__(sampler, batch_size)
        self.running = super().__iter__()

    def __iter__(self):
        return self.running


@pytest.mark.parametrize('batches', ['Buckets', 'InHand', 'FixedLists', 'Running'])
@pytest.mark.parametrize('sampler', ['DefaultSampler', 'InfiniteSampler'])
def test_any_batch_sampler(tmp_path, batches, sampler):
    """The run grows, and trains on what a plain run trains on."""
    seen = {}
    for name, hooks in {'plain': None, 'grown': [{**FAST, 'metric': 'random'}]}.items():
        loader = settings(tmp_path, iters=7)['train_dataloader'] | {
            'batch_sampler': {'type': batches}, 'sampler': {'type': sampler, 'shuffle': True},
        }  # fmt: skip
        run = runner(tmp_path / name, hooks, iters=7, train_dataloader=loader)
        seen[name] = []
        forward = run.model.forward

        def note(inputs, *args, run=run, sums=seen[name], forward=forward, **kwargs):
            if torch.is_grad_enabled() and run.model.iteration != run.iter:
                run.model.iteration = run.iter
                sums.append((run.iter, inputs.sum().item()))
            return forward(inputs, *args, **kwargs)

        run.model.iteration = -1
        run.model.forward = note
        run.train()
    assert len(seen['plain']) == 7
    assert seen['plain'] == seen['grown']
    assert len(dyrep(run).journal) == 3


def test_a_loader_without_batches_of_its_own(tmp_path):
    """``batch_size=None``: each index gives a whole batch."""

    class Whole(Images):
        def __getitem__(self, index):
            items = [super(Whole, self).__getitem__(i) for i in (index, index + 1)]
            return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    loader = DataLoader(Whole(), batch_size=None, shuffle=True)
    batches = list(calibration_loader(loader, 1))
    assert [batch['inputs'].shape for batch in batches] == [(2, 3, 8, 8)] * 16


@pytest.mark.parametrize('world', [1, 2, 3, 5])
def test_a_share_of_less_than_a_batch(monkeypatch, world):
    """Each of several processes has a batch, a whole one where its share allows."""
    monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda: (0, world))
    data = Images(20)
    loader = DataLoader(data, 8, sampler=DefaultSampler(data, seed=0))
    sizes = [len(batch['inputs']) for batch in calibration_loader(loader, 1)]
    assert sizes == {1: [8, 8], 2: [8], 3: [7], 5: [4]}[world]


# What training must not notice, and what is said at the start.


@MODELS.register_module(force=True)
class Remembers(BaseDataPreprocessor):
    """Keeps a size and a plain list, as those do that change the size of images in training."""

    def __init__(self):
        super().__init__()
        self.size, self.log = 8, [0]

    def forward(self, data, training=False):
        self.size = 8 + (self.size - 5) % 6
        self.log.append(self.size)
        data = super().forward(data, training)
        return {**data, 'inputs': F.interpolate(data['inputs'], size=self.size)}


@MODELS.register_module(force=True)
class RemembersClassifier(TinyClassifier):
    """Counts forwards, and keeps a queue in a buffer."""

    def __init__(self):
        super().__init__()
        self.data_preprocessor = Remembers()
        self.forwards = 0
        self.register_buffer('queue', torch.zeros(3))

    def forward(self, *args, **kwargs):
        self.forwards += 1
        self.queue = torch.cat([self.queue[1:], self.queue[-1:] + 1])
        return super().forward(*args, **kwargs)


def test_the_state_of_preprocessor_and_model_is_left_alone(tmp_path):
    run = runner(tmp_path, [FAST], iters=7, model={'type': 'RemembersClassifier'})
    run.train()
    model, expected = run.model, [0]
    size = 8
    for _ in range(7):
        expected.append(size := 8 + (size - 5) % 6)
    assert len(dyrep(run).journal) == 3
    assert model.data_preprocessor.log == expected
    assert model.forwards == 7
    assert model.queue.tolist() == [5, 6, 7]


@DATASETS.register_module(force=True)
class Stream(IterableDataset):
    def __len__(self):  # for the log
        return 1000

    def __iter__(self):
        return (Images()[i % 16] for i in range(1000))


def stream_runner(folder, hook, model='TinyClassifier', **more):
    loader = settings(folder)['train_dataloader'] | {'dataset': {'type': 'Stream'}, 'sampler': None}
    model = {'type': model, **more}
    return runner(folder, [hook], iters=5, train_dataloader=loader, model=model)


@pytest.mark.parametrize('more', [{'interval': 2}, {'interval': None, 'structure': 'dbb'}])
def test_a_stream_is_refused_at_the_start(tmp_path, more):
    run = stream_runner(tmp_path, {**FAST, **more})
    with pytest.raises(DyRepError, match='calibration_batches=0'):
        run.train()
    assert run.iter == 0


def test_a_stream_without_calibration(tmp_path):
    """The batch that was trained on tells of a conv that is bypassed."""
    hook = {**ALL_AT_ONCE, 'calibration_batches': 0}
    run = stream_runner(tmp_path, hook, 'OddClassifier', use='list')
    run.train()
    assert 'backbone.dw' in structure_of(run.model)
    assert LEFT not in structure_of(run.model)
    assert nn.Conv2d is type(run.model.backbone.conv2)


def test_a_stream_goes_on_without_changes(tmp_path):
    stream_runner(tmp_path, {**FAST, 'interval': None}).train()
