"""Stage C to stage D: a checkpoint starts another model, structure and all, or fused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmdet.models import ResNet as DetResNet
from mmengine.hooks import EMAHook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.models import ResNet as ClsResNet
from mmseg.models import ResNet as SegResNet
from torch import nn

import dyrep_mm
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.engine.pretrained import DyRepPretrained, handovers_in
from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.optimizer import check_optimizer
from dyrep_mm.surgery.rewire import restore
from dyrep_mm.surgery.structure import structure_of
from dyrep_mm.surgery.tree import blocks_of
from support.checks import assert_same
from support.nets import output_of, randomise
from support.runs import resnet_config, resnet_runner, with_branches

SMALL = {'depth': 18, 'stem_channels': 8, 'base_channels': 8}
STRUCTURE = {
    'layer1.0.conv1': None,
    'layer1.0.conv1.branches.1x1-kxk.conv': ['1x1', '1x1-avg', 'identity'],
    'layer3.1.conv1': None,
    'layer4.0.conv1': ['1x1', '1x1-avg'],  # of stride 2
}


def classifier(tmp_path: Path, head: int = 2) -> tuple[nn.Module, Path]:
    """A backbone with a structure and its checkpoint, that of a classifier with a head."""
    backbone = randomise(ClsResNet(**SMALL, out_indices=(0, 1, 2, 3)))
    for path, names in STRUCTURE.items():
        dyrep_mm.grow(backbone, path, names, init_scale=0.5)
    randomise(backbone).eval()
    state = {f'backbone.{k}': v for k, v in backbone.state_dict().items()}
    state['head.fc.weight'] = torch.zeros(head, 64)
    said = {'structure': {f'backbone.{k}': v for k, v in structure_of(backbone).items()}}
    path = tmp_path / 'classifier.pth'
    torch.save({'meta': {'dyrep_mm': said}, 'state_dict': state}, path)
    return backbone, path


def started(tmp_path: Path, checkpoint: Path, hook: dict | None, backbone: dict, **more) -> Runner:
    cfg = resnet_config(tmp_path / 'run', hook=hook, **more)
    cfg.model.backbone = {
        **SMALL,
        'init_cfg': {
            'type': 'dyrep_mm.DyRepPretrained',
            'checkpoint': str(checkpoint),
            'prefix': 'backbone.',
        },
        **backbone,
    }
    return Runner.from_cfg(cfg)


def start(run: Runner) -> nn.Module:
    """The model of a run as the first iteration finds it."""

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    run.model.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        run.train()
    run.model._forward_pre_hooks.clear()
    return run.model


def same_features(first: nn.Module, second: nn.Module) -> None:
    x = torch.randn(2, 3, 64, 64)
    for a, b in zip(output_of(first, x), output_of(second, x), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize('library', ['mmpretrain', 'mmdet', 'mmseg'])
def test_starts_with_structure_and_weights(tmp_path, library):
    source, checkpoint = classifier(tmp_path)
    kind = {'type': f'{library}.ResNet', 'out_indices': (0, 1, 2, 3)}
    began = started(tmp_path, checkpoint, {'interval': None}, kind, iters=2)
    model = start(began)
    assert structure_of(model.backbone) == structure_of(source)
    same_features(model.backbone, source)
    check_optimizer(began.optim_wrapper.optimizer, model)
    assert not handovers_in(model)


def test_zero_init_of_residuals_does_not_reach_what_was_loaded(tmp_path):
    source, checkpoint = classifier(tmp_path)
    kind = {'type': 'ResNet', 'zero_init_residual': True, 'out_indices': (0, 1, 2, 3)}
    model = start(started(tmp_path, checkpoint, {'interval': None}, kind, iters=2))
    same_features(model.backbone, source)


def test_evolves_downstream(tmp_path):
    source, checkpoint = classifier(tmp_path)
    hook = {'interval': 2, 'calibration_batches': 1, 'metric': 'snip', 'prune': False}
    ema = [{'type': 'dyrep_mm.DyRepHook', **hook}, {'type': 'EMAHook'}]
    backbone = {'type': 'mmdet.ResNet', 'out_indices': (3,)}
    begun = started(tmp_path, checkpoint, None, backbone, iters=5, custom_hooks=ema)
    begun.train()
    structure = structure_of(begun.model.backbone)
    assert set(structure) > set(structure_of(source))
    saved = load_checkpoint(tmp_path / 'run' / 'epoch_1.pth')
    assert saved['meta']['dyrep_mm']['structure'] == structure_of(begun.model)
    (average,) = (h.ema_model.module for h in begun.hooks if isinstance(h, EMAHook))
    assert structure_of(average) == structure_of(begun.model)
    before = source.layer3[1].conv1.origin.weight
    after = begun.model.backbone.layer3[1].conv1.origin.weight
    assert not torch.equal(before, after)


def test_frozen_stages_and_norm_eval_from_the_first_iteration(tmp_path):
    _, checkpoint = classifier(tmp_path)
    kind = {'type': 'mmdet.ResNet', 'out_indices': (3,), 'frozen_stages': 1, 'norm_eval': True}
    model = start(started(tmp_path, checkpoint, {'interval': None}, kind, iters=2))
    blocks = blocks_of(model.backbone)
    assert not any(p.requires_grad for p in blocks['layer1.0.conv1'].parameters())
    assert all(p.requires_grad for p in blocks['layer3.1.conv1'].parameters())
    assert all(block.is_linear for block in blocks.values())


def test_what_is_not_exact_on_dilated_convs_is_absorbed(tmp_path):
    source, checkpoint = classifier(tmp_path)
    geometry = {
        'out_indices': (0, 1, 2, 3),
        'dilations': (1, 1, 2, 4),
        'strides': (1, 2, 1, 1),
        'contract_dilation': True,
    }
    kind = {'type': 'mmseg.ResNet', 'norm_cfg': {'type': 'SyncBN'}, **geometry}
    model = start(started(tmp_path, checkpoint, {'interval': None}, kind, iters=2))
    structure = structure_of(model.backbone)
    assert structure['layer1.0.conv1'] == structure_of(source)['layer1.0.conv1']
    assert '1x1-avg' in structure_of(source)['layer3.1.conv1']
    assert '1x1-avg' not in structure['layer3.1.conv1']
    # It starts with the function of the fused weights.
    x = torch.randn(2, 3, 64, 64)
    fused = dyrep_mm.fuse(source, x)
    plain = SegResNet(**SMALL, **geometry)
    plain.load_state_dict(fused.state_dict())
    same_features(model.backbone, plain)


def test_fused_weights_start_a_plain_backbone(tmp_path):
    source, _ = classifier(tmp_path)
    fused = dyrep_mm.fuse(source, torch.randn(1, 3, 64, 64))
    state = {f'backbone.{k}': v for k, v in fused.state_dict().items()}
    torch.save({'meta': {}, 'state_dict': state}, tmp_path / 'fused.pth')
    init = {
        'type': 'Pretrained',
        'checkpoint': str(tmp_path / 'fused.pth'),
        'prefix': 'backbone.',
    }
    init_default_scope('mmdet')
    plain = DetResNet(**SMALL, out_indices=(0, 1, 2, 3), init_cfg=init)
    plain.init_weights()
    assert not structure_of(plain)
    same_features(plain, source)


def test_loaded_weights_win(tmp_path):
    _, checkpoint = classifier(tmp_path)
    plain = resnet_runner(tmp_path / 'plain', iters=1)
    plain.train()
    begun = started(
        tmp_path,
        checkpoint,
        {'interval': None},
        {'type': 'ResNet'},
        iters=2,
        load_from=str(tmp_path / 'plain' / 'epoch_1.pth'),
    )
    model = start(begun)
    assert not structure_of(model)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_without_the_hook_the_first_forward_says_so(tmp_path):
    _, checkpoint = classifier(tmp_path)
    with pytest.raises(DyRepError, match='DyRepHook'):
        started(tmp_path, checkpoint, None, {'type': 'ResNet'}, iters=2).train()


@pytest.mark.parametrize(
    ('damage', 'words'),
    [
        ('missing', 'no checkpoint file'),
        ('plain', "type='Pretrained'"),
        ('prefix', "'backbone.'"),
        ('deeper', 'layer1.0.conv3.weight is missing'),
        ('wider', '16 channels come in and 8 go out'),
        ('unfit', 'layer1.0.relu'),
    ],
)
def test_says_what_does_not_fit(tmp_path, damage, words):
    _, checkpoint = classifier(tmp_path)
    saved = with_branches(checkpoint)
    kind = {'type': 'ResNet'}
    if damage in ('plain', 'deeper'):
        plain = ClsResNet(**SMALL).state_dict()
        saved['state_dict'] = {f'backbone.{k}': v for k, v in plain.items()}
        saved['meta']['dyrep_mm']['structure'] = {}
    if damage == 'plain':
        del saved['meta']['dyrep_mm']
    elif damage == 'prefix':
        saved['state_dict'] = {f'x.{k}': v for k, v in saved['state_dict'].items()}
        del saved['meta']['dyrep_mm']
    elif damage == 'unfit':
        saved['meta']['dyrep_mm']['structure']['backbone.layer1.0.relu'] = ['kxk', '1x1']
    elif damage == 'deeper':
        kind['depth'] = 50
    elif damage == 'wider':
        kind.update(stem_channels=16)
    torch.save(saved, checkpoint)
    if damage == 'missing':
        checkpoint = tmp_path / 'nothing.pth'
    with pytest.raises(DyRepError, match=words):
        started(tmp_path, checkpoint, {'interval': None}, kind, iters=2).train()


def test_the_module_is_untouched_until_the_hook_comes(tmp_path):
    _, checkpoint = classifier(tmp_path)
    module = ClsResNet(**SMALL)
    before = copy.deepcopy(module.state_dict())
    DyRepPretrained(checkpoint, 'backbone')(module)
    assert module.state_dict().keys() == before.keys()
    with pytest.raises(DyRepError, match='DyRepHook'):
        module(torch.randn(1, 3, 32, 32))
    found = handovers_in(module)['']
    restore(module, found.structure)
    module.load_state_dict(found.state)
    found.finish(module)
    module(torch.randn(2, 3, 64, 64))
