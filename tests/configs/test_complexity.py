"""The numbers of the paper that need no training: multiply-adds and parameters."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmpretrain.models import RepVGG
from torch import nn

import dyrep_mm
from dyrep_mm.engine.converter import build_model
from support.processes import ROOT

FOLDER = ROOT / 'configs' / 'classification'


def complexity(config: str, structure: str | None, size: int) -> tuple[float, float]:
    """Multiply-adds of convs and linears for one image, and parameters; both in millions."""
    # Shapes are all it takes: on the meta device nothing is computed.
    model = build_model(Config.fromfile(FOLDER / f'{config}.py')).to('meta')
    with torch.device('meta'):
        if structure:
            dyrep_mm.expand(model, structure, scope='backbone')
        images = torch.empty(1, 3, size, size)
    counted = []

    def count(module: nn.Conv2d | nn.Linear, _args: tuple, output: torch.Tensor) -> None:
        counted.append(output[0].numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model.train()  # branch by branch; in eval mode a block is one conv
    model.head(model.extract_feat(images))
    return sum(counted) / 1e6, sum(p.numel() for p in model.parameters()) / 1e6


def rounds_to(value: float, printed: str) -> bool:
    """Whether ``value`` is ``printed`` to the digits that are printed."""
    digits = len(printed.partition('.')[2])
    return abs(value - float(printed)) <= 0.5 * 10**-digits * 1.001


# Table 2, 3 and 8 of the paper.
@pytest.mark.parametrize(
    ('config', 'structure', 'size', 'flops', 'parameters'),
    [
        ('resnet18_8xb32-120e_in1k', None, 224, '1.81', '11.7'),
        ('resnet18_8xb32-120e_in1k', 'dbb', 224, '4.13', '26.3'),
        ('resnet34_8xb32-120e_in1k', None, 224, '3.66', '21.8'),
        ('resnet34_8xb32-120e_in1k', 'dbb', 224, '8.44', '49.9'),
        ('resnet50_8xb32-120e_in1k', None, 224, '4.09', '25.6'),
        ('resnet50_8xb32-120e_in1k', 'dbb', 224, '6.79', '40.7'),
        ('resnet50_8xb32-120e_in1k', 'dbb7', 224, '8.02', '48.3'),
        ('mobilenet-v1_8xb32-90e_in1k', None, 224, '0.57', '4.2'),
        ('mobilenet-v1_8xb32-90e_in1k', 'dbb', 224, '0.61', '4.3'),
        # In millions. With DBB the paper has 34.7 M parameters, see configs/README.md.
        ('vgg16_1xb128-600e_cifar10', None, 32, '313', '15.0'),
        ('vgg16_1xb128-600e_cifar10', 'dbb', 32, '728', '34.6'),
    ],
)
def test_is_what_the_paper_says(config, structure, size, flops, parameters):
    macs, count = complexity(config, structure, size)
    assert rounds_to(macs if size == 32 else macs / 1e3, flops), macs
    assert rounds_to(count, parameters), count


# Table 4 counts inference models; a BN beside every conv has twice as many parameters as the
# bias that it becomes.
@pytest.mark.parametrize(
    ('config', 'flops', 'parameters'),
    [
        ('plainvgg-a2_8xb32-120e_in1k', '5.1', '25.49'),
        ('plainvgg-b2g4_8xb32-200e_in1k', '11.3', '55.77'),
        ('plainvgg-b3_8xb32-200e_in1k', '26.2', '110.96'),
    ],
)
def test_plain_stack_is_the_deployed_repvgg(config, flops, parameters):
    cfg = Config.fromfile(FOLDER / f'{config}.py')
    with torch.device('meta'):
        plain = build_model(cfg).backbone
        deployed = RepVGG(cfg.model.backbone.arch, deploy=True)
    kernels = [
        [(m.weight.shape, m.stride, m.groups) for m in model.modules() if isinstance(m, nn.Conv2d)]
        for model in (plain, deployed)
    ]
    assert kernels[0] == kernels[1]
    macs, count = complexity(config, None, 224)
    assert rounds_to(macs / 1e3, flops), macs
    biases = sum(m.num_features for m in plain.modules() if isinstance(m, nn.BatchNorm2d))
    assert count - biases / 1e6 == pytest.approx(float(parameters), abs=0.011)
