"""tools/analysis_tools/get_flops.py: a config of each library, counted in its three forms."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config

import dyrep_mm
from dyrep_mm.cli.flops import costs_of, shape_in
from dyrep_mm.engine.converter import build_model
from dyrep_mm.errors import DyRepError
from support.nets import randomise
from support.processes import ROOT, run_tool

#: By library, a config, a conv of it (64 to 64, 3x3), and the stride of its map.
CONFIGS = {
    'mmpretrain': ('classification/resnet18_8xb32-120e_in1k.py', 'backbone.layer1.0.conv1', 4),
    'mmdet': ('detection/faster-rcnn_r50_fpn_dyrep_1x_coco.py', 'backbone.layer1.0.conv2', 4),
    'mmseg': (
        'segmentation/pspnet_r50-d8_dyrep_4xb2-40k_cityscapes-512x1024.py',
        'backbone.layer1.0.conv2',
        4,
    ),
}
SIDE = 64


def load(name: str) -> Config:
    return Config.fromfile(ROOT / 'configs' / name)


@pytest.mark.parametrize('library', CONFIGS)
def test_three_forms_differ_in_the_block_alone(library):
    name, path, part = CONFIGS[library]
    costs = costs_of(load(name), structure={path: ['kxk', '1x1', '1xk']}, shape=(SIDE, SIDE))
    places = (SIDE // part) ** 2
    kernels = 64 * 64 * (1 + 3)
    assert costs.trained.multiply_adds - costs.plain.multiply_adds == kernels * places
    norms = 2 * 2 * 64
    assert costs.trained.parameters - costs.plain.parameters == kernels + norms
    assert costs.fused == costs.plain
    assert costs.plain.multiply_adds > 1e8  # heads and all


def test_the_plain_model_is_what_mmengine_counts():
    config = load(CONFIGS['mmpretrain'][0])
    model = build_model(config)
    model.forward = lambda x: model.head(model.extract_feat(x))
    counted = FlopAnalyzer(model, torch.zeros(1, 3, SIDE, SIDE)).by_operator()
    costs = costs_of(config, shape=(SIDE, SIDE))
    assert costs.trained is costs.fused is None
    # mmengine counts norms and pooling besides.
    assert costs.plain.multiply_adds == counted['conv'] + counted['linear']


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        ('classification/resnet18_8xb32-120e_in1k.py', (224, 224)),
        ('classification/vgg16_1xb128-600e_cifar10.py', (32, 32)),
        ('fpn_r50_dyrep_coco.py', (800, 1333)),
        ('pspnet_r50_dyrep_cityscapes.py', (512, 1024)),
    ],
)
def test_the_config_says_the_size(name, shape):
    assert shape_in(load(name)) == shape


def test_a_config_without_a_size_is_told_so():
    with pytest.raises(DyRepError, match='--shape gives the height and width'):
        shape_in(load('demo/resnet50_digits.py'))


def test_the_structure_of_the_hook_is_the_default():
    costs = costs_of(load('classification/resnet18_dbb_8xb32-120e_in1k.py'), shape=(224, 224))
    # Table 3 of the paper: 4.13 G, 26.3 M.
    assert round(costs.trained.multiply_adds / 1e9, 2) == 4.13
    assert round(costs.trained.parameters / 1e6, 1) == 26.3


def test_a_checkpoint_has_its_structure(tmp_path):
    name, path, _ = CONFIGS['mmpretrain']
    model = build_model(load(name))
    dyrep_mm.grow(model, path)
    randomise(model)
    meta = {'dyrep_mm': {'structure': dyrep_mm.structure_of(model)}}
    file = tmp_path / 'epoch_1.pth'
    torch.save({'meta': meta, 'state_dict': copy.deepcopy(model.state_dict())}, file)
    printed = run_tool('analysis_tools/get_flops', f'configs/{name}', file, '--shape', SIDE)
    assert f'one image of {SIDE}x{SIDE}' in printed
    rows = [line for line in printed.splitlines() if line.startswith('|')]
    assert [row.split('|')[1].strip() for row in rows] == ['model', 'plain', 'as trained', 'fused']
    plain, trained, fused = (row.split('|')[2:5] for row in rows[1:])
    assert plain == fused
    assert float(trained[2]) > 1
    counted = sum(p.numel() for p in model.parameters())
    assert trained[0].strip() == f'{counted / 1e6:.3f}'


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['--shape', '0'], 'at least 1 pixel'),
        (['--structure', 'nope'], 'no structure of that name'),
        (['nope.pth', '--structure', 'dbb'], '--structure is for a config alone'),
    ],
)
def test_wrong_arguments_get_a_sentence(options, words, monkeypatch):
    from dyrep_mm.cli import flops

    config = str(ROOT / 'configs' / CONFIGS['mmpretrain'][0])
    monkeypatch.setattr('sys.argv', ['dyrep-flops', config, *options])
    with pytest.raises(SystemExit, match=words):
        flops.main()
