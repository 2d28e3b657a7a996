"""Which norms new branches get (docs/norms.md)."""

from __future__ import annotations

import pytest
from mmengine.model import revert_sync_batchnorm
from timm.layers import BatchNormAct2d
from torch import nn

import dyrep_mm
from dyrep_mm.surgery.candidates import survey
from dyrep_mm.surgery.tree import blocks_of
from support.checks import assert_same
from support.nets import image, output_of, randomise
from support.runs import resnet_config


def pair(norm: nn.Module) -> nn.Sequential:
    conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    return randomise(nn.Sequential(conv, norm).double())


def inner_norms(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for block in blocks_of(model).values()
        for branch in block.added
        for module in branch.modules()
        if 'Norm' in type(module).__name__
    ]


def test_a_norm_that_activates_gives_a_plain_one():
    model = pair(BatchNormAct2d(8, eps=1e-3)).eval()
    x = image(2, 4, 9, 9)
    before = output_of(model, x)
    dyrep_mm.grow(model, '0')
    norms = inner_norms(model)
    assert {type(norm) for norm in norms} == {nn.BatchNorm2d}
    assert {norm.eps for norm in norms} == {1e-3}
    assert_same(output_of(model, x), before)
    # Fused, the bias is in the norm, ahead of its activation.
    randomise(model)
    fused = dyrep_mm.fuse(model, x)
    assert fused[0].bias is None
    assert_same(output_of(fused, x), output_of(model, x))


def test_sync_bn_and_its_reversion():
    plain = pair(nn.SyncBatchNorm(8))
    dyrep_mm.grow(plain, '0')
    assert {type(norm) for norm in inner_norms(plain)} == {nn.SyncBatchNorm}
    reverted = revert_sync_batchnorm(plain)
    assert not [m for m in reverted.modules() if isinstance(m, nn.SyncBatchNorm)]
    again = revert_sync_batchnorm(pair(nn.SyncBatchNorm(8)))
    dyrep_mm.grow(again, '0')
    assert {type(norm) for norm in inner_norms(again)} == {type(again[1])}
    again.load_state_dict(reverted.state_dict())
    x = image(2, 4, 9, 9)
    assert_same(output_of(again, x), output_of(reverted, x))


def test_sync_bn_in_a_config_grows_on_cpu(tmp_path):
    from mmengine.runner import Runner

    cfg = resnet_config(tmp_path, hook={'interval': 2, 'calibration_batches': 1}, iters=5)
    cfg.model.backbone.norm_cfg = {'type': 'SyncBN', 'requires_grad': True}
    runner = Runner.from_cfg(cfg)
    runner.train()
    norms = inner_norms(runner.model)
    assert norms
    assert {type(norm) for norm in norms} == {type(runner.model.backbone.bn1)}
    assert not any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)


@pytest.mark.parametrize('norm', [nn.GroupNorm(2, 8), nn.Identity()], ids=['GroupNorm', 'none'])
def test_what_is_no_bn_leaves_the_bias_on_the_conv(norm):
    model = pair(norm).eval()
    x = image(2, 4, 9, 9)
    before = output_of(model, x)
    dyrep_mm.grow(model, '0')
    assert_same(output_of(model, x), before)
    assert {type(norm) for norm in inner_norms(model)} == {nn.BatchNorm2d}
    randomise(model)
    fused = dyrep_mm.fuse(model, x)
    assert type(fused[0]) is nn.Conv2d
    assert fused[0].bias is not None
    assert_same(output_of(fused, x), output_of(model, x))


def test_norm_eval_is_kept_after_every_train_call(tmp_path):
    from mmdet.models import ResNet

    backbone = ResNet(18, base_channels=8, stem_channels=8, frozen_stages=1, norm_eval=True)
    backbone.train()
    for path in ('layer2.0.conv1', 'layer3.1.conv1'):
        dyrep_mm.grow(backbone, path)
    for _ in range(2):
        backbone.eval()
        backbone.train()
        assert all(block.is_linear for block in blocks_of(backbone).values())
    frozen = [p for p in survey(backbone) if p.startswith(('conv1', 'layer1'))]
    assert frozen
    for path in frozen:
        assert survey(backbone)[path] == 'it is frozen'
    assert backbone.layer2[0].conv1.origin.weight.requires_grad
