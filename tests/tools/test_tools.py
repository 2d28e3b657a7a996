"""The main job as a user runs it: the COCO config, on a folder of COCO format."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.structures import DetDataSample
from torch import nn

from dyrep_mm import expand, structure_of
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.engine.converter import build_model, read_config
from dyrep_mm.evolution.record import Record
from support.checks import without_times
from support.nets import randomise
from support.processes import call, run_tool
from support.runs import journal

CONFIG = 'configs/fpn_r50_dyrep_coco.py'


@pytest.fixture(scope='module')
def coco(tmp_path_factory) -> Path:
    """A folder in the layout of data/coco: digits under the names of COCO's classes."""
    out = tmp_path_factory.mktemp('data') / 'coco'
    run_tool('digits', '--out', out, '--forms', 'detection', '--train', 4, '--val', 2)
    for split in ('train', 'val'):
        content = json.loads((out / f'annotations/instances_{split}.json').read_text())
        names = CocoDataset.METAINFO['classes']
        content['categories'] = [{'id': i, 'name': name} for i, name in enumerate(names, 1)]
        target = out / f'annotations/instances_{split}2017.json'
        target.write_text(json.dumps(content))
        (out / 'images' / split).rename(out / f'{split}2017')
    return out


def overrides(coco: Path, **more) -> list[str]:
    """What makes the COCO config small, on the command line."""
    settings = {
        'train_dataloader.dataset.data_root': f'{coco}/',
        'val_dataloader.dataset.data_root': f'{coco}/',
        'test_dataloader.dataset.data_root': f'{coco}/',
        'val_evaluator.ann_file': f'{coco}/annotations/instances_val2017.json',
        'test_evaluator.ann_file': f'{coco}/annotations/instances_val2017.json',
        'train_dataloader.dataset.pipeline.2.scale': '(96,96)',
        'val_dataloader.dataset.pipeline.1.scale': '(96,96)',
        'test_dataloader.dataset.pipeline.1.scale': '(96,96)',
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'val_dataloader.num_workers': 0,
        'val_dataloader.persistent_workers': False,
        'test_dataloader.num_workers': 0,
        'test_dataloader.persistent_workers': False,
        'model.backbone.init_cfg': None,
        # Boxes at all, after four iterations from nothing.
        'model.test_cfg.rcnn.score_thr': 0.0,
        'model.test_cfg.rpn.max_per_img': 50,  # each is a box of 80 classes then
        **more,
    }
    return ['--cfg-options', *(f'{key}={value}' for key, value in settings.items())]


@pytest.fixture(scope='module')
def trained(coco: Path, tmp_path_factory) -> Path:
    """A checkpoint of three short epochs, with two updates."""
    work_dir = tmp_path_factory.mktemp('run')
    options = overrides(coco, **{'train_cfg.max_epochs': 3, 'train_cfg.val_interval': 3})
    log = run_tool('train', CONFIG, '--work-dir', work_dir, *options, fresh=True)
    assert log.count('DyRep update') == 2
    return work_dir / 'epoch_3.pth'


def test_train_fuse_and_use_without_dyrep(coco, trained, tmp_path):
    assert [len(entry.grown) for entry in journal(trained)] == [1, 1]

    fused = tmp_path / 'fused.pth'
    printed = run_tool('fuse', CONFIG, trained, fused, fresh=True)
    assert 'relative difference' in printed
    content = torch.load(fused, weights_only=True)
    assert content.keys() == {'meta', 'state_dict'}
    assert content['meta']['dyrep_mm']['fused']
    assert content['meta']['dyrep_mm']['source'] == 'epoch_3.pth'

    # The stock config, built where dyrep_mm cannot be imported.
    script = f"""
import sys; sys.modules['dyrep_mm'] = None
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmdet.registry import MODELS
from mmengine.utils import get_installed_path
register_all_modules()
root = get_installed_path('mmdet')
config = root + '/.mim/configs/faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
model = MODELS.build(Config.fromfile(config).model)
state = torch.load({str(fused)!r}, weights_only=True)['state_dict']
print(model.load_state_dict(state, strict=True))
"""
    assert 'All keys matched' in call(sys.executable, '-c', script)


def test_test_and_compare(coco, trained, tmp_path):
    fused = tmp_path / 'fused.pth'
    run_tool('fuse', CONFIG, trained, fused)
    out = tmp_path / 'predictions.pkl'
    options = overrides(coco)
    arguments = [CONFIG, trained, '--work-dir', tmp_path, '--out', out, *options]
    printed = run_tool('test', *arguments, fresh=True)
    assert 'bbox_mAP' in printed
    assert out.exists()
    plain = tmp_path / 'plain.py'
    plain.write_text("_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'\n")
    options = ['--work-dir', tmp_path, *options]
    printed = run_tool('compare', CONFIG, trained, plain, fused, *options, fresh=True)
    assert 'coco/bbox_mAP' in printed
    largest = dict(re.findall(r'  (pred_instances\.\w+): (\S+)', printed))
    assert largest.keys() == {'pred_instances.' + name for name in ('bboxes', 'labels', 'scores')}
    # Scores are in order, so rounding moves them little; it may swap boxes whose scores are equal
    # but for rounding. That all predictions agree is certain where the weights are the same.
    assert float(largest['pred_instances.scores']) <= 1e-3
    same = shutil.copy(trained, tmp_path / 'same.pth')
    run_tool('compare', CONFIG, trained, CONFIG, same, '--tolerance', 0, *options)
    # A plain config takes the checkpoint of the run as well.
    printed = run_tool('test', plain, trained, *options)
    assert 'bbox_mAP' in printed
    assert 'unexpected key' not in printed


def test_resume_auto(coco, trained, tmp_path):
    """Weights cannot be compared here: mmdet's samplers draw from a random stream that a
    resumed run starts anew. test_hook.py compares them where the pipeline is deterministic."""
    work_dir = tmp_path / 'run'
    work_dir.mkdir()
    (work_dir / 'epoch_2.pth').symlink_to(trained.with_name('epoch_2.pth'))
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_2.pth'))
    options = overrides(coco, **{'train_cfg.max_epochs': 3, 'train_cfg.val_interval': 3})
    log = run_tool('train', CONFIG, '--work-dir', work_dir, '--resume', 'auto', *options)
    assert 'resumed epoch: 2' in log
    whole, resumed = (load_checkpoint(p) for p in (trained, work_dir / 'epoch_3.pth'))
    assert without_times(whole['meta']['dyrep_mm']) == without_times(resumed['meta']['dyrep_mm'])
    assert whole['state_dict'].keys() == resumed['state_dict'].keys()
    groups = [c['optimizer']['param_groups'] for c in (whole, resumed)]
    assert groups[0] == groups[1]


def grown_elsewhere(path: str) -> dict:
    """A checkpoint of a model whose one conv, at ``path``, has grown."""
    model = module = nn.Module()
    *parents, name = path.split('.')
    for parent in parents:
        module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    module.add_module(name, nn.Conv2d(4, 4, 3, bias=False))
    expand(model, {path: ['kxk', '1x1']})
    checkpoint = {'meta': {}, 'state_dict': model.state_dict()}
    Record(structure_of(model)).to_checkpoint(checkpoint)
    return checkpoint


@pytest.mark.parametrize('case', ['missing', 'truncated', 'text', 'plain', 'other', 'misfit'])
def test_fuse_refuses(case, trained, tmp_path):
    source, out = tmp_path / f'{case}.pth', tmp_path / 'out.pth'
    word = {
        'missing': 'there is no checkpoint file',
        'truncated': 'truncated or no checkpoint',
        'text': 'no checkpoint',
        'plain': 'holds no structure',
        'other': 'has shape',
        'misfit': 'layer9',
    }[case]
    if case == 'truncated':
        source.write_bytes(trained.read_bytes()[:100_000])
    elif case == 'text':
        source.write_text('hello\n')
    elif case == 'plain':
        torch.save({'meta': {}, 'state_dict': {'weight': torch.ones(1)}}, source)
    elif case == 'other':
        torch.save(grown_elsewhere('backbone.layer2.0.conv2'), source)
    elif case == 'misfit':
        torch.save(grown_elsewhere('backbone.layer9.conv'), source)
    before = sorted(tmp_path.iterdir())
    printed = run_tool('fuse', CONFIG, source, out, code=1).strip()
    assert word in printed.splitlines()[-1]
    assert 'Traceback' not in printed
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ('options', 'word'),
    [
        ({'default_hooks.dyrep.interval': 0}, 'interval'),
        ({'default_hooks.dyrep.metric': 'magic'}, 'magic'),
        ({'default_hooks.dyrep.branches': '[3x3]'}, '3x3'),
        ({'default_hooks.dyrep.scope': 'spine'}, 'spine'),
        ({'load_from': 'nowhere.pth'}, 'nowhere.pth'),
    ],
)
def test_train_refuses(coco, tmp_path, options, word):
    printed = run_tool('train', CONFIG, '--work-dir', tmp_path, *overrides(coco, **options), code=1)
    assert word in printed.strip().splitlines()[-1]
    assert 'Traceback' not in printed
    assert not list(tmp_path.glob('*.pth'))


SMALL = """
default_scope = 'mmdet'
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
    backbone=dict(type='ResNet', depth=18, stem_channels=8, base_channels=8,
                  init_cfg=dict(type='dyrep_mm.DyRepPretrained', checkpoint='nowhere.pth')),
    neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
    bbox_head=dict(
        type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1,
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.0],
                              strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder')),
    test_cfg=dict(nms_pre=100, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5),
                  max_per_img=10))
test_dataloader = dict(dataset=dict(
    type='CocoDataset', ann_file='nowhere.json', metainfo=dict(classes=('dark', 'bright')),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)),
              dict(type='PackDetInputs', meta_keys=('ori_shape', 'img_shape', 'scale_factor'))]))
test_cfg = dict(type='TestLoop')
test_evaluator = dict(type='CocoMetric')
visualizer = dict(type='DetLocalVisualizer', vis_backends=[])
custom_imports = dict(imports=['dyrep_mm'])
custom_hooks = [dict(type='dyrep_mm.DyRepHook', interval=1)]
"""


def test_inferencer_needs_the_fused_file_alone(tmp_path):
    config, checkpoint, fused = (tmp_path / n for n in ('c.py', 'grown.pth', 'fused.pth'))
    config.write_text(SMALL)
    model = build_model(read_config(config))
    expand(model, 'dbb', scope='backbone')
    # Far from the same for all images.
    torch.nn.init.normal_(model.bbox_head.retina_cls.weight)
    meta = {'epoch': 3, 'dataset_meta': {'classes': ('dark', 'bright')}}
    content = {'meta': meta, 'state_dict': randomise(model).state_dict()}
    Record(structure_of(model)).to_checkpoint(content)
    torch.save(content, checkpoint)
    printed = run_tool('fuse', config, checkpoint, fused)
    assert 'gains a bias' not in printed

    script = f"""
import sys; sys.modules['dyrep_mm'] = None
import json
import numpy as np
import torch
from mmdet.apis import DetInferencer
inferencer = DetInferencer(weights={str(fused)!r}, device='cpu', palette='random')
image = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
found = inferencer(image, show=False)['predictions'][0]
print(json.dumps([list(inferencer.model.dataset_meta['classes']), found]))
"""
    said = call(sys.executable, '-c', script, cwd=tmp_path).splitlines()
    classes, found = next(json.loads(line) for line in said if line.startswith('[["dark"'))
    assert classes == ['dark', 'bright']
    assert len(found['bboxes']) == 10

    # The same boxes as of the model that grew.
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    data = {
        'inputs': [torch.from_numpy(image).permute(2, 0, 1)],
        'data_samples': [DetDataSample(metainfo={
            'img_shape': (64, 64), 'ori_shape': (64, 64), 'scale_factor': (1.0, 1.0)})],
    }  # fmt: skip
    expected = model.eval().test_step(data)[0].pred_instances
    torch.testing.assert_close(torch.tensor(found['scores']), expected.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found['bboxes']), expected.bboxes, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ('tool', 'options', 'word'),
    [
        ('fuse', ['{config}', '{file}', '{out}', '--size', '0'], 'at least 1 pixel, got 0x0'),
        ('fuse', ['{broken}', '{file}', '{out}'], 'cannot be read: SyntaxError'),
        ('test', ['{empty}', '{file}'], 'has no model'),
        ('test', ['{config}', '{file}', '--out', '{folder}.pkl'], 'is a folder'),
        ('compare', ['{config}', '{file}'] * 2 + ['--tolerance', 'nan'], '--tolerance'),
    ],
)
def test_wrong_arguments_get_a_sentence(tool, options, word, tmp_path):
    names = {n: tmp_path / n for n in ('config', 'file', 'out', 'folder', 'broken', 'empty')}
    names |= {n: names[n].with_suffix('.py') for n in ('config', 'broken', 'empty')}
    names['config'].write_text(SMALL)
    names['broken'].write_text('model = dict(')
    names['empty'].write_text('')
    for folder in ('folder', 'folder.pkl'):
        (tmp_path / folder).mkdir()
    torch.save(
        {'meta': {'dyrep_mm': {'structure': {}}}, 'state_dict': {'a': torch.ones(1)}},
        names['file'],
    )
    before = sorted(tmp_path.rglob('*'))
    options = [option.format(**names) for option in options]
    printed = run_tool(tool, *options, code=1)
    assert word in printed.splitlines()[-1]
    assert 'Traceback' not in printed
    assert sorted(tmp_path.rglob('*')) == before
