"""From a checkpoint with a structure to a plain one."""

from __future__ import annotations

import json

import pytest
import torch
from mmengine.registry import TASK_UTILS

import dyrep_mm
from dyrep_mm.engine import converter
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.engine.converter import build_model, fuse_checkpoint, relative_difference
from dyrep_mm.engine.passes import features_of
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Record
from support.runs import PRUNING, resnet_config, resnet_runner

HOOK = {**PRUNING, 'interval': 3}


def trained(tmp_path, **more):
    """A config file of the plain model, and a checkpoint of it with a structure."""
    run = resnet_runner(tmp_path / 'run', iters=8, **({'hook': HOOK} | more))
    run.train()
    plain = tmp_path / 'plain.py'
    resnet_config(tmp_path / 'plain', iters=8).dump(plain)
    return plain, tmp_path / 'run/epoch_1.pth', run


@pytest.mark.parametrize('ema', [False, True])
def test_fused_file_is_the_plain_model_and_nothing_else(tmp_path, ema):
    hooks = [HOOK]
    hooks += [{'type': 'EMAHook', 'momentum': 0.5}] if ema else []
    plain, checkpoint, run = trained(tmp_path, custom_hooks=hooks)
    out, said = tmp_path / 'out.pth', []
    report = fuse_checkpoint(plain, checkpoint, out, say=said.append)
    assert report.blocks > 0
    assert report.error64 <= 1e-6
    assert report.weights == ('EMA weights' if ema else 'weights')
    assert report.weights in said[0]
    content = torch.load(out, weights_only=True)
    assert content.keys() == {'meta', 'state_dict'}
    fused = build_model(resnet_config(tmp_path / 'again', iters=8))
    fused.load_state_dict(content['state_dict'], strict=True)
    inputs = torch.randn(2, 3, 64, 64)
    (ema_hook,) = [h for h in run.hooks if hasattr(h, 'ema_model')] or [None]
    used = ema_hook.ema_model.module if ema else run.model
    with torch.no_grad():
        assert (
            relative_difference(features_of(used.eval(), inputs), features_of(fused, inputs)) < 1e-5
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out.pth', 'plain.py', 'run']


def test_fusing_twice_changes_nothing(tmp_path):
    plain, checkpoint, _ = trained(tmp_path)
    fuse_checkpoint(plain, checkpoint, tmp_path / 'one.pth')
    assert fuse_checkpoint(plain, tmp_path / 'one.pth', tmp_path / 'two.pth').blocks == 0
    one, two = (load_checkpoint(tmp_path / name)['state_dict'] for name in ('one.pth', 'two.pth'))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_model_that_differs_is_not_written(tmp_path, monkeypatch):
    plain, checkpoint, _ = trained(tmp_path)
    right = converter.fuse

    def wrong(model, inputs, **options):
        fused = right(model, inputs, **options)
        fused.backbone.conv1.weight.data.mul_(1.0001)
        return fused

    monkeypatch.setattr(converter, 'fuse', wrong)
    with pytest.raises(DyRepError, match='not written'):
        fuse_checkpoint(plain, checkpoint, tmp_path / 'out.pth')
    assert not list(tmp_path.glob('out*'))


def test_interrupted_writing_leaves_no_file(tmp_path, monkeypatch):
    plain, checkpoint, _ = trained(tmp_path)

    def fail(content, path):
        path.write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError, match='disk full'):
        fuse_checkpoint(plain, checkpoint, tmp_path / 'out.pth')
    assert not list(tmp_path.glob('out*'))


def test_checkpoint_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / 'owned'), 'w'))

    torch.save({'meta': {}, 'state_dict': Evil()}, tmp_path / 'evil.pth')
    with pytest.raises(DyRepError, match='plain data'):
        load_checkpoint(tmp_path / 'evil.pth')
    assert not (tmp_path / 'owned').exists()


@pytest.mark.parametrize('source', ['dbb', 'dbb7', 'repvgg', 'file', 'checkpoint'])
def test_converter_from_a_config(tmp_path, source):
    fixed = {'backbone.layer1.0.conv1': ['kxk', '1x1', 'identity']}
    (tmp_path / 's.json').write_text(json.dumps(fixed))
    torch.save({'meta': {'dyrep_mm': {'structure': fixed}}, 'state_dict': {}}, tmp_path / 's.pth')
    structure = {'file': str(tmp_path / 's.json'), 'checkpoint': str(tmp_path / 's.pth')}
    convert = TASK_UTILS.build(
        {'type': 'dyrep_mm.DyRepConverter', 'structure': structure.get(source, source)}
    )
    model = build_model(resnet_config(tmp_path, iters=8)).double()
    inputs = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = features_of(model, inputs)
        keys = model.state_dict().keys()
        assert convert.expand(model) is model
        assert len(dyrep_mm.structure_of(model)) == (1 if source in structure else 16)
        assert relative_difference(before, features_of(model, inputs)) < 1e-12
        fused = convert.fuse(model, inputs)
        assert fused.state_dict().keys() == keys
        assert relative_difference(before, features_of(fused, inputs)) < 1e-12


def test_converter_refuses():
    with pytest.raises(DyRepError, match='no checkpoint file'):
        TASK_UTILS.build({'type': 'dyrep_mm.DyRepConverter', 'structure': 'dbb9'})


@pytest.mark.parametrize('wrong', [False, True])
def test_blocks_of_a_head_are_verified_too(tmp_path, wrong, monkeypatch):
    """The features do not need them."""
    plain = tmp_path / 'plain.py'
    cfg = resnet_config(tmp_path / 'plain', iters=8)
    cfg.dump(plain)
    build = converter.build_model

    def with_head_conv(cfg):
        model = build(cfg)
        model.head.conv = torch.nn.Conv2d(4, 4, 3, padding=1)
        return model

    monkeypatch.setattr(converter, 'build_model', with_head_conv)
    model = with_head_conv(cfg)
    dyrep_mm.grow(model, 'head.conv')
    torch.nn.init.normal_(model.head.conv.branches['1x1'].bn.weight)
    checkpoint = {'meta': {}, 'state_dict': model.state_dict()}
    Record(dyrep_mm.structure_of(model)).to_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / 'grown.pth')
    right = converter.fuse

    def changed(model, inputs, **options):
        fused = right(model, inputs, **options)
        fused.head.conv.weight.data.mul_(1.001)
        return fused

    if wrong:
        monkeypatch.setattr(converter, 'fuse', changed)
        with pytest.raises(DyRepError, match='not written'):
            fuse_checkpoint(plain, tmp_path / 'grown.pth', tmp_path / 'out.pth')
    else:
        report = fuse_checkpoint(plain, tmp_path / 'grown.pth', tmp_path / 'out.pth')
        assert report.blocks == 1
        assert not report.biased
    assert (tmp_path / 'out.pth').exists() is not wrong
