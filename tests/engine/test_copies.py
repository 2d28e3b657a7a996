"""Momentum copies inside a model, which its own code updates."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dyrep_mm import structure_of
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block
from dyrep_mm.surgery.optimizer import check_optimizer
from dyrep_mm.surgery.tree import get_module
from support.checks import assert_equal_data, assert_same, assert_same_run
from support.runs import (
    PRUNING,
    TinyBackbone,
    TinyClassifier,
    call_at,
    dyrep,
    resnet_config,
    runner,
    with_branches,
)

# mmpretrain's


NECK = {
    'type': 'NonLinearNeck', 'in_channels': 64, 'hid_channels': 16, 'out_channels': 8,
    'norm_cfg': {'type': 'BN1d'},
}  # fmt: skip
KINDS = {
    'BYOL': {
        'neck': NECK,
        'base_momentum': 0.1,
        'head': {
            'type': 'LatentPredictHead',
            'loss': {'type': 'CosineSimilarityLoss'},
            'predictor': {**NECK, 'in_channels': 8, 'with_avg_pool': False},
        },
    },
    'MoCo': {
        'neck': {
            'type': 'MoCoV2Neck', 'in_channels': 64, 'hid_channels': 16, 'out_channels': 8,
        },
        'queue_len': 16,
        'feat_dim': 8,
        'momentum': 0.1,
        'head': {
            'type': 'ContrastiveHead', 'temperature': 0.2, 'loss': {'type': 'CrossEntropyLoss'},
        },
    },
}  # fmt: skip
NAMES = {'BYOL': 'target_net', 'MoCo': 'encoder_k'}


def self_supervised(work_dir, kind, hooks, **more) -> Runner:
    """A runner of BYOL or MoCo on a ResNet-18 with an eighth of the channels."""
    config = resnet_config(work_dir, iters=7, **more)
    model = config['model'].to_dict()
    processor = {'type': 'SelfSupDataPreprocessor', 'mean': [127.0] * 3, 'std': [60.0] * 3}
    config['model'] = {
        'type': kind,
        'backbone': {**model['backbone'], 'out_indices': (3,)},
        'data_preprocessor': processor,
        **KINDS[kind],
    }
    config['train_dataloader']['dataset'] = {'type': 'Views', 'packed': True, 'size': 32}
    config['train_dataloader']['collate_fn'] = {'type': 'default_collate'}
    config['custom_hooks'] = hooks
    config['default_hooks']['checkpoint'] = {
        'type': 'CheckpointHook', 'interval': 1, 'by_epoch': False,
    }  # fmt: skip
    run = Runner.from_cfg(config)
    # MoCo shuffles batches; mmengine does not save the random streams.
    call_at(run, lambda run: torch.manual_seed(run.iter), 'before_train_iter')
    return run


HOOK = {**PRUNING, 'metric': 'snip', 'calibration_batches': 2}


@torch.no_grad()
def features(module, size=32):
    """What a module computes in eval mode."""
    modes = [m.training for m in module.modules()]
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    module.eval()  # which returns nothing in some libraries
    result = module(x)
    for m, training in zip(module.modules(), modes, strict=True):
        m.training = training
    return result[0] if isinstance(result, tuple) else result


def assert_follows(run, copied, source):
    """The copy has the shape of its source, is frozen, and what it gained is in no group."""
    model = run.model
    copied, source = get_module(model, copied), get_module(model, source)
    assert structure_of(copied) == structure_of(source)
    assert list(copied.state_dict()) == list(source.state_dict())
    assert not any(p.requires_grad for p in copied.parameters())
    optimizer = run.optim_wrapper.optimizer
    check_optimizer(optimizer, model)


def branch_parameters(module):
    blocks = [m for m in module.modules() if isinstance(m, Block)]
    return {p for block in blocks for branch in block.added for p in branch.parameters()}


@pytest.mark.parametrize('average', [False, True], ids=['alone', 'in-an-average'])
@pytest.mark.parametrize('kind', KINDS)
def test_copies_of_mmpretrain_follow(tmp_path, monkeypatch, kind, average):
    """At an update the copy computes what it did; then it is the average of its definition."""
    hooks = [HOOK, {'type': 'EMAHook', 'momentum': 0.1}] if average else [HOOK]
    run = self_supervised(tmp_path / 'a', kind, hooks)
    name = NAMES[kind]
    jumps, last = [], {}
    before = []

    def note(run):
        target = getattr(run.model, name)
        before[:] = [features(target.module[0])]

    def check(run):
        target = getattr(run.model, name)
        after = features(target.module[0])
        jumps.append(((after - before[0]).abs().max() / before[0].abs().max()).item())
        assert_follows(run, f'{name}.module.0', 'backbone')
        held = {p for g in run.optim_wrapper.optimizer.param_groups for p in g['params']}
        assert not branch_parameters(target) & held
        last.clear()
        last.update({n: p.clone() for n, p in target.module.named_parameters()})
        # The copy of an iteration is taken before the optimizer steps.
        last['source'] = {
            n: p.detach().clone()
            for n, p in nn.Sequential(run.model.backbone, run.model.neck).named_parameters()
        }

    def expect(run):
        if not last:
            return
        source = last.pop('source')
        target = getattr(run.model, name)
        for n, p in target.module.named_parameters():
            expected = last[n].clone()
            momentum = torch.tensor(target.steps.item() - 1)
            target.avg_func(expected, source[n], momentum)
            torch.testing.assert_close(p, expected, rtol=0, atol=0, msg=n)

    call_at(run, expect, 'after_train_iter', 'VERY_HIGH')
    call_at(run, note, 'after_train_iter', 'VERY_HIGH')
    call_at(run, check)
    run.train()
    assert len(jumps) == 7
    assert max(jumps) < 1e-4
    journal = dyrep(run).journal
    assert len(journal) == 3
    assert all(path.startswith('backbone.') for entry in journal for path in entry.grown)
    assert any(entry.pruned for entry in journal)
    if average:
        (hook,) = (h for h in run.hooks if type(h).__name__ == 'EMAHook')
        assert structure_of(hook.ema_model.module) == structure_of(run.model)
    again = self_supervised(
        tmp_path / 'b', kind, hooks, load_from=str(tmp_path / 'a' / 'iter_4.pth'), resume=True
    )
    again.train()
    assert_same_run(run, again)
    target, other = (getattr(r.model, name) for r in (run, again))
    assert_equal_data(dict(target.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize('kind', KINDS)
def test_convs_of_copies_are_no_candidates(tmp_path, kind):
    run = self_supervised(tmp_path, kind, [{**HOOK, 'scope': '', 'metric': 'random'}])
    run.train()
    grown = [path for entry in dyrep(run).journal for path in entry.grown]
    assert len(grown) == 3
    assert not any(path.startswith(NAMES[kind]) for path in grown)
    run = self_supervised(tmp_path / 'b', kind, [{**HOOK, 'scope': NAMES[kind]}])
    with pytest.raises(DyRepError, match=r'no conv in scope .* it is in an averaged model'):
        run.train()


def test_a_structure_and_a_pretrained_backbone_reach_the_copy(tmp_path):
    """Stage C has no copy: what its checkpoint gives the backbone, the copy gets too."""
    run = self_supervised(tmp_path / 'a', 'BYOL', [{**HOOK, 'interval': None, 'structure': 'dbb'}])
    run.train()
    assert_follows(run, 'target_net.module.0', 'backbone')
    assert len(structure_of(run.model.target_net)) > 10
    file = tmp_path / 'a' / 'iter_3.pth'
    saved = with_branches(file)
    for part in (saved['state_dict'], saved['meta']['dyrep_mm']['structure']):
        for name in [n for n in part if not n.startswith('backbone.')]:
            del part[name]
    torch.save(saved, tmp_path / 'backbone.pth')
    again = self_supervised(
        tmp_path / 'b',
        'BYOL',
        [{**HOOK, 'interval': None}],
        load_from=str(tmp_path / 'backbone.pth'),
    )
    again.train()
    assert structure_of(again.model) == structure_of(run.model)
    assert_follows(again, 'target_net.module.0', 'backbone')


# Made by hand


@MODELS.register_module(force=True)
class MomentumClassifier(TinyClassifier):
    """Its encoder is compared to a momentum copy of itself, updated in the forward.

    Args:
        how: What the copy is.
        frozen: Whether the encoder is frozen by the constructor.
    """

    def __init__(self, how: str = 'module', frozen: bool = False):
        super().__init__()
        self.encoder, self.backbone = self.backbone, nn.Identity()
        self.how = how
        if how == 'module':
            self.key = copy.deepcopy(self.encoder).requires_grad_(False)
        elif how == 'parts':
            self.key = nn.Sequential(copy.deepcopy(self.encoder)).requires_grad_(False)
        elif how == 'torch':
            self.key = AveragedModel(self.encoder, avg_fn=lambda old, new, _: old.lerp(new, 0.2))
            self.key.requires_grad_(False)
        elif how == 'buffers':
            self.key = ExponentialMovingAverage(self.encoder, 0.2, update_buffers=True)
        else:
            self.key = ExponentialMovingAverage(nn.Sequential(self.encoder), 0.2)
        self.encoder.requires_grad_(not frozen)

    @torch.no_grad()
    def update(self):
        if self.how in ('torch', 'buffers'):
            self.key.update_parameters(self.encoder)
        elif self.how == 'average':
            self.key.update_parameters(nn.Sequential(self.encoder))
        else:
            pairs = zip(self.key.parameters(), self.encoder.parameters(), strict=True)
            for mine, theirs in pairs:
                mine.data = mine.data * 0.8 + theirs.data * 0.2

    def forward(self, inputs, labels=None, mode='tensor'):
        logits = self.head(self.encoder(inputs).mean((2, 3)))
        if mode != 'loss':
            return logits
        self.update()
        with torch.no_grad():
            keys = self.head(self.key(inputs).mean((2, 3)))
        return {'loss': F.cross_entropy(logits, labels), 'pull': F.mse_loss(logits, keys)}


PLACES = {
    'module': 'key', 'parts': 'key.0', 'torch': 'key.module', 'buffers': 'key.module',
    'average': 'key.module.0',
}  # fmt: skip
HAND_HOOK = {**PRUNING, 'scope': 'encoder', 'metric': 'snip'}


@pytest.mark.parametrize('batches', [0, 2])
@pytest.mark.parametrize('how', PLACES)
def test_copies_made_by_hand_follow(tmp_path, how, batches):
    """Calibration runs a forward that updates them, which leaves no trace."""
    hook = {**HAND_HOOK, 'calibration_batches': batches}
    model = {'type': 'MomentumClassifier', 'how': how}
    run = runner(tmp_path / 'a', [hook], iters=9, model=model)
    before, jumps = [], []

    def note(run):
        before[:] = [features(get_module(run.model, PLACES[how]), 8)]

    def check(run):
        after = features(get_module(run.model, PLACES[how]), 8)
        jumps.append(((after - before[0]).abs().max() / before[0].abs().max()).item())
        assert_follows(run, PLACES[how], 'encoder')

    call_at(run, note, 'after_train_iter', 'VERY_HIGH')
    call_at(run, check)
    run.train()
    assert max(jumps) < 1e-4
    assert len(jumps) == 9
    journal = dyrep(run).journal
    assert len(journal) == 4
    assert all(path.startswith('encoder.') for entry in journal for path in entry.grown)
    assert any(entry.pruned for entry in journal)
    # The copy is another one than its source.
    pairs = zip(
        get_module(run.model, PLACES[how]).parameters(), run.model.encoder.parameters(), strict=True
    )
    assert not all(torch.equal(p, q) for p, q in pairs)
    # A checkpoint has both fused.
    plain, state = MomentumClassifier(how), load_checkpoint(tmp_path / 'a/iter_9.pth')['state_dict']
    plain.load_state_dict(state, strict=True)
    for path in (PLACES[how], 'encoder'):
        parts = [get_module(model, path) for model in (plain, run.model)]
        assert_same(*(features(part, 8) for part in parts), path, scale=10)
    again = runner(
        tmp_path / 'b', [hook], iters=9, model=model,
        load_from=str(tmp_path / 'a' / 'iter_5.pth'), resume=True,
    )  # fmt: skip
    again.train()
    assert_same_run(run, again)


@MODELS.register_module(force=True)
class Twins(TinyClassifier):
    """Two backbones of one kind, the second one frozen; no copy of each other."""

    def __init__(self, average: bool = False):
        super().__init__()
        self.second = TinyBackbone()
        if average:
            self.key = ExponentialMovingAverage(TinyBackbone(), 0.2)
        else:
            self.second.requires_grad_(False)

    def forward(self, inputs, labels=None, mode='tensor'):
        features = self.backbone(inputs) + self.second(inputs)
        logits = self.head(features.mean((2, 3)))
        return {'loss': F.cross_entropy(logits, labels)} if mode == 'loss' else logits


def test_a_frozen_twin_is_no_copy(tmp_path):
    run = runner(tmp_path, [PRUNING], iters=5, model={'type': 'Twins'})
    run.train()
    assert structure_of(run.model.backbone)
    assert not structure_of(run.model.second)


def test_an_average_of_one_of_two_is_refused(tmp_path):
    model = {'type': 'Twins', 'average': True}
    run = runner(tmp_path, [PRUNING], iters=5, model=model)
    with pytest.raises(DyRepError, match=r'key\.module averages one of backbone, second'):
        run.train()
    # Where none of the two may grow, it does not matter which it is.
    hook = {**PRUNING, 'interval': None, 'scope': 'head'}
    runner(tmp_path / 'b', [hook], iters=5, model=model).train()
