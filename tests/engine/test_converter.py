"""From a checkpoint with a structure to a plain one."""

from __future__ import annotations

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, TASK_UTILS

import dyrep_mm
from dyrep_mm.engine import converter
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.engine.converter import build_model, fuse_checkpoint, relative_difference
from dyrep_mm.engine.passes import features_of
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Record
from support.nets import randomise
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
    assert report.weights == ('averaged' if ema else 'raw')
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


def grown(tmp_path, config, structure, alter=lambda model: model):
    """Files of a config, and of a checkpoint of its model with a structure and random norms."""
    file, checkpoint = tmp_path / 'config.py', tmp_path / 'grown.pth'
    config.dump(file)
    model = alter(randomise(dyrep_mm.expand(build_model(config), structure)))
    content = {'meta': {}, 'state_dict': model.state_dict()}
    Record(dyrep_mm.structure_of(model)).to_checkpoint(content)
    torch.save(content, checkpoint)
    return file, checkpoint


SMALL = {'backbone.layer1.0.conv1': ['kxk', '1x1'], 'backbone.layer4.1.conv2': ['kxk', '1x1-kxk']}


@pytest.mark.parametrize('channels', [1, 2, 4, 7])
def test_images_have_the_channels_of_the_model(tmp_path, channels):
    config = resnet_config(tmp_path, iters=8)
    config.model.backbone.in_channels = channels
    config.model.data_preprocessor = None
    file, checkpoint = grown(tmp_path, config, SMALL)
    said = []
    report = fuse_checkpoint(file, checkpoint, tmp_path / 'out.pth', say=said.append)
    assert (report.blocks, report.biased) == (2, [])
    assert f' {channels}x128x128: ' in said[-2]


@MODELS.register_module(force=True)
class FixedSize(BaseModel):
    """A position embedding, as in a transformer, allows one size alone."""

    def __init__(self, img_size):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = torch.nn.BatchNorm2d(4)
        self.position = torch.nn.Parameter(torch.zeros(1, 4, height, width))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.bn(self.conv(inputs)) + self.position


FIXED = {'conv': ['kxk', '1x1']}


@pytest.mark.parametrize(
    ('size', 'config'),
    [
        ((24, 24), {'model': {'img_size': 24}}),
        ((24, 40), {'model': {'img_size': [24, 40]}}),
        # Width first, and not in the model.
        (
            (24, 40),
            {
                'model': {'img_size': [24, 40]},
                'test_dataloader': {'dataset': {'pipeline': [{'scale': (40, 24)}]}},
            },
        ),
    ],
)
def test_size_of_a_model_that_takes_one_size(tmp_path, size, config):
    config = Config({**config, 'model': {'type': 'FixedSize', **config['model']}})
    file, checkpoint = grown(tmp_path, config, FIXED)
    said = []
    fuse_checkpoint(file, checkpoint, tmp_path / 'out.pth', say=said.append)
    assert f' 3x{size[0]}x{size[1]}: ' in said[-2]
    fuse_checkpoint(file, checkpoint, tmp_path / 'out.pth', size=size)
    (tmp_path / 'out.pth').unlink()
    with pytest.raises(DyRepError, match='FixedSize does not run on images of 3x24x25: Runtime'):
        fuse_checkpoint(file, checkpoint, tmp_path / 'out.pth', size=(24, 25))
    assert not list(tmp_path.glob('out*'))


def test_size_that_no_config_tells(tmp_path, monkeypatch):
    config = Config({'model': {'type': 'FixedSize', 'img_size': 24}})
    file, checkpoint = grown(tmp_path, config, FIXED)
    monkeypatch.setattr(converter, 'sizes_in', lambda _: [])
    with pytest.raises(DyRepError, match=r'--size gives the height and width'):
        fuse_checkpoint(file, checkpoint, tmp_path / 'out.pth')
    fuse_checkpoint(file, checkpoint, tmp_path / 'out.pth', size=24)


def test_sizes_in_a_config():
    pipeline = [{'type': 'Resize', 'scale': (40, 24)}, {'type': 'Pad', 'size': None}]
    config = Config(
        {
            'model': {
                'backbone': {'img_size': 32, 'patch_size': [0, 4]},
                'data_preprocessor': {'size': (8, 16)},
                'test_cfg': {'crop_size': [6, 6], 'score_scale': 1.5, 'size': '7'},
            },
            'train_dataloader': {'dataset': {'dataset': {'pipeline': pipeline}}},
        }
    )
    sizes = [(32, 32), (8, 16), (16, 8), (6, 6), (40, 24), (24, 40)]
    assert list(dict.fromkeys(converter.sizes_in(config))) == sizes


def test_numbers_that_are_not_finite_are_named(tmp_path):
    def spoil(model):
        model.backbone.layer1[0].conv1.branches['1x1'].bn.running_var[0] = float('nan')
        model.head.fc.weight.data[0, 0] = float('inf')
        return model

    file, checkpoint = grown(tmp_path, resnet_config(tmp_path, iters=8), SMALL, spoil)
    with pytest.raises(DyRepError, match=r'not finite, in 2 tensors, backbone\.layer1\.0\.conv1'):
        fuse_checkpoint(file, checkpoint, tmp_path / 'out.pth')
    assert not list(tmp_path.glob('out*'))


@pytest.mark.parametrize(
    ('options', 'word'),
    [
        ({'size': 0}, 'size is a height and a width of at least 1 pixel, got 0x0'),
        ({'size': -32}, 'got -32x-32'),
        ({'size': (64, 0)}, 'got 64x0'),
        ({'size': (64, 64, 64)}, 'got 64x64x64'),
        ({'size': 10**7}, 'no images of 10000000x10000000'),
        ({'tolerance': -1e-6}, 'tolerance is a finite number of at least 0, got -1e-06'),
        ({'tolerance': float('nan')}, 'got nan'),
        ({'tolerance': float('inf')}, 'got inf'),
        ({'out': ''}, 'is a folder: name the file to write'),
        ({'out': 'nowhere/out.pth'}, 'is no folder to write out.pth into'),
        ({'out': 'grown.pth'}, 'is the checkpoint itself'),
    ],
)
def test_arguments_of_every_wrong_form_get_a_sentence(tmp_path, options, word):
    file, checkpoint = grown(tmp_path, resnet_config(tmp_path, iters=8), SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    options = {'out': 'out.pth', **options}
    out, heard = tmp_path / options.pop('out'), []
    with pytest.raises(DyRepError) as caught:
        fuse_checkpoint(file, checkpoint, out, say=heard.append, **options)
    assert word in str(caught.value)
    assert '\n' not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    if 'no images' not in word:
        assert not heard


@pytest.mark.parametrize(
    ('text', 'word'),
    [
        ('model = dict(', 'cannot be read: '),
        ('import nowhere\nmodel = dict(type=nowhere.Net)', 'cannot be built: '),
        ("_base_ = './nowhere.py'", 'cannot be read: '),
        ('', 'has no model'),
        ('model = None', 'has no model'),
        ('model = 5', 'has no model'),
        ("model = dict(type='NoSuchThing')", 'cannot be built: KeyError'),
        ('model = dict(depth=18)', 'cannot be built: '),
        ("model = dict(type='TinyClassifier', depth=18)", 'cannot be built: TypeError'),
    ],
)
def test_configs_of_every_wrong_form_get_a_sentence(tmp_path, text, word):
    _, checkpoint = grown(tmp_path, resnet_config(tmp_path, iters=8), SMALL)
    (tmp_path / 'wrong.py').write_text(text)
    with pytest.raises(DyRepError) as caught:
        fuse_checkpoint(tmp_path / 'wrong.py', checkpoint, tmp_path / 'out.pth')
    assert word in str(caught.value)
    assert 'wrong.py' in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.glob('out*'))


def test_config_of_an_unknown_kind_of_file_gets_a_sentence(tmp_path):
    _, checkpoint = grown(tmp_path, resnet_config(tmp_path, iters=8), SMALL)
    (tmp_path / 'config.txt').write_text('model')
    with pytest.raises(DyRepError, match=r'config\.txt cannot be read'):
        fuse_checkpoint(tmp_path / 'config.txt', checkpoint, tmp_path / 'out.pth')


@pytest.mark.parametrize('state', [None, [], 5, 'weights', {}])
def test_state_dicts_of_every_wrong_form_get_a_sentence(tmp_path, state):
    file, checkpoint = grown(tmp_path, resnet_config(tmp_path, iters=8), SMALL)
    content = torch.load(checkpoint)
    content |= {'state_dict': state}
    if state is None:
        content.pop('state_dict')
    torch.save(content, checkpoint)
    with pytest.raises(DyRepError) as caught:
        fuse_checkpoint(file, checkpoint, tmp_path / 'out.pth')
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.glob('out*'))


TEXT = """
custom_imports = dict(imports=['dyrep_mm', 'json'], allow_failed_imports=False)
default_hooks = dict(timer=dict(type='IterTimerHook'), dyrep=dict(type='dyrep_mm.DyRepHook'),
                     off=None)
custom_hooks = [dict(type='DyRepHook', scope='head'), dict(type='EMAHook'),
                dict(type='ScriptedDyRepHook', script=[])]
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet', init_cfg=dict(type='dyrep_mm.DyRepPretrained', checkpoint='c')),
    head=[dict(init_cfg=[dict(type='Normal', layer='Linear'),
                         dict(type='DyRepPretrained', checkpoint='c')])])
"""
PYTHON = """
from mmengine.config import read_base
from mmengine.hooks import EMAHook, IterTimerHook
from mmengine.model import BaseModel

from dyrep_mm import DyRepHook, DyRepPretrained

default_hooks = dict(timer=dict(type=IterTimerHook), dyrep=dict(type=DyRepHook))
custom_hooks = [dict(type=EMAHook), dict(type=DyRepHook, interval=None)]
model = dict(type=BaseModel, neck=dict(init_cfg=dict(type=DyRepPretrained, checkpoint='c')))
"""


@pytest.mark.parametrize('text', [TEXT, PYTHON])
def test_plain_config_has_no_dyrep(tmp_path, text):
    (tmp_path / 'config.py').write_text(text)
    config = converter.read_config(tmp_path / 'config.py')
    before = config.pretty_text
    plain = Config.fromstring(converter.plain_config(config).pretty_text, file_format='.py')
    assert 'dyrep' not in plain.pretty_text.lower()
    assert config.pretty_text == before
    assert set(plain.default_hooks) == ({'timer', 'off'} if text is TEXT else {'timer'})
    assert len(plain.custom_hooks) == 1
    if text is TEXT:
        assert plain.custom_imports.imports == ['json']
        assert plain.model.head[0].init_cfg == [{'type': 'Normal', 'layer': 'Linear'}]


def test_meta_is_that_of_the_libraries_as_plain_data(tmp_path):
    _, checkpoint, _ = trained(tmp_path)
    run = tmp_path / 'run_config.py'
    config = resnet_config(tmp_path / 'other', iters=8, hook=HOOK)
    config.dump(run)
    fuse_checkpoint(run, checkpoint, tmp_path / 'out.pth')
    before = load_checkpoint(checkpoint)['meta']
    meta = torch.load(tmp_path / 'out.pth', weights_only=True)['meta']
    assert meta.keys() == before.keys() - {'dyrep_mm_branches'}
    assert {'cfg', 'dataset_meta', 'epoch', 'iter', 'seed', 'experiment_name', 'time'} < set(meta)
    same = meta.keys() - {'cfg', 'dyrep_mm'}
    assert {name: meta[name] for name in same} == {name: before[name] for name in same}
    assert 'dyrep_mm' not in meta['cfg']
    assert Config.fromstring(meta['cfg'], file_format='.py').model == config.model
