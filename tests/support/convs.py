"""Convs in whose place no block can stand, as the libraries and torch make them, each with the
sentence that says why."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import nn as quantization
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrizations


class LoraConv(nn.Module):
    """A conv and a low-rank update of its weight, with the names of PEFT."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Conv2d(4, 4, 3, padding=1)
        self.lora_A = nn.Conv2d(4, 2, 3, padding=1, bias=False)
        self.lora_B = nn.Conv2d(2, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
        """Add the update to the weight of the conv."""
        update = torch.einsum('ormn,rikl->oikl', self.lora_B.weight, self.lora_A.weight)
        self.base_layer.weight.data += update


class AdaptedWeight(nn.Module):
    """A conv whose weight a low-rank update is added to in each forward, as loralib's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.lora_A = nn.Parameter(torch.randn(6, 12))
        self.lora_B = nn.Parameter(torch.randn(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        update = (self.lora_B @ self.lora_A).view(self.conv.weight.shape)
        return self.conv._conv_forward(x, self.conv.weight + update, self.conv.bias)


class Borrowing(nn.Module):
    """A conv that is called, and whose weight something else multiplies too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.conv2d(x, self.conv.weight, padding=2, dilation=2)


def shared() -> nn.Module:
    """Two convs with one weight."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[0].weight = model[1].weight
    return model


def quietly(make: Callable, *arguments: Any) -> nn.Module:
    """What ``make`` gives, without its warning that it is old."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return make(*arguments)


def mmcv(path: str, *arguments: Any, **more: Any) -> nn.Module:
    """A class of mmcv, which is imported here alone."""
    from importlib import import_module

    module, _, name = path.rpartition('.')
    return getattr(import_module(f'mmcv.{module}'), name)(*arguments, **more)


def timm(name: str) -> nn.Module:
    """A conv of timm."""
    from timm import layers

    return getattr(layers, name)(4, 4, 3)


def repvgg_block() -> nn.Module:
    """A block of mmpretrain's RepVGG."""
    from mmpretrain.models.backbones.repvgg import RepVGGBlock

    return RepVGGBlock(4, 4)


def prepared() -> nn.Module:
    """A conv that is observed for quantization."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    model.qconfig = get_default_qat_qconfig('x86')
    return torch.ao.quantization.prepare(copy.deepcopy(model).eval())


def conv() -> nn.Conv2d:
    """A plain conv."""
    return nn.Conv2d(4, 4, 3)


MORE = 'which computes more than a conv'
OTHER = 'and only a Conv2d can grow'
QAT = get_default_qat_qconfig('x86')

#: What it is: how to make a model of it, the path of the conv, and the reason that is given.
LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    'deformable': (
        lambda: nn.Sequential(mmcv('ops.DeformConv2d', 4, 4, 3)),
        '0',
        f'it is a DeformConv2d, {OTHER}',
    ),
    'the offsets of a deformable one': (
        lambda: nn.Sequential(mmcv('ops.DeformConv2dPack', 4, 4, 3)),
        '0.conv_offset',
        'it makes the offsets of a deformable conv',
    ),
    'deformable with a mask': (
        lambda: nn.Sequential(mmcv('ops.ModulatedDeformConv2dPack', 4, 4, 3)),
        '0',
        f'it is a ModulatedDeformConv2dPack, {OTHER}',
    ),
    'weight-standardised': (
        lambda: nn.Sequential(mmcv('cnn.bricks.conv_ws.ConvWS2d', 4, 4, 3)),
        '0',
        f'it is a ConvWS2d, {MORE}',
    ),
    'weight-standardised with an affine map': (
        lambda: nn.Sequential(mmcv('cnn.bricks.conv_ws.ConvAWS2d', 4, 4, 3)),
        '0',
        f'it is a ConvAWS2d, {MORE}',
    ),
    'weight-standardised, of timm': (
        lambda: nn.Sequential(timm('StdConv2d')),
        '0',
        f'it is a StdConv2d, {MORE}',
    ),
    'switchable atrous': (
        lambda: nn.Sequential(mmcv('ops.SAConv2d', 4, 4, 3, padding=1)),
        '0',
        f'it is a SAConv2d, {MORE}',
    ),
    'padded as TensorFlow does': (
        lambda: nn.Sequential(
            mmcv('cnn.bricks.conv2d_adaptive_padding.Conv2dAdaptivePadding', 4, 4, 3)
        ),
        '0',
        f'it is a Conv2dAdaptivePadding, {MORE}',
    ),
    'of masked positions': (
        lambda: nn.Sequential(mmcv('ops.MaskedConv2d', 4, 4, 3)),
        '0',
        f'it is a MaskedConv2d, {MORE}',
    ),
    'spectral norm, old': (
        lambda: nn.Sequential(quietly(nn.utils.spectral_norm, conv())),
        '0',
        'its weight is computed from other parameters',
    ),
    'spectral norm': (
        lambda: nn.Sequential(parametrizations.spectral_norm(conv())),
        '0',
        f'it is a ParametrizedConv2d, {MORE}',
    ),
    'weight norm, old': (
        lambda: nn.Sequential(quietly(nn.utils.weight_norm, conv())),
        '0',
        'its weight is computed from other parameters',
    ),
    'weight norm': (
        lambda: nn.Sequential(parametrizations.weight_norm(conv())),
        '0',
        f'it is a ParametrizedConv2d, {MORE}',
    ),
    'parametrised': (
        lambda: nn.Sequential(
            nn.utils.parametrize.register_parametrization(conv(), 'weight', nn.Tanh())
        ),
        '0',
        f'it is a ParametrizedConv2d, {MORE}',
    ),
    'shared weight': (shared, '0', 'its weight is shared with another module'),
    'padded by reflection': (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect')),
        '0',
        'padding_mode \'reflect\' is not "zeros"',
    ),
    'transposed': (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3)),
        '0',
        f'it is a ConvTranspose2d, {OTHER}',
    ),
    'in three dimensions': (
        lambda: nn.Sequential(nn.Conv3d(4, 4, 3)),
        '0',
        f'it is a Conv3d, {OTHER}',
    ),
    'in one dimension': (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 3)),
        '0',
        f'it is a Conv1d, {OTHER}',
    ),
    'not square': (
        lambda: nn.Sequential(nn.Conv2d(4, 4, (1, 3))),
        '0',
        'its kernel is 1x3, and only square ones are chosen',
    ),
    'even': (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 2)),
        '0',
        'kernel size (2, 2) is not odd',
    ),
    'quantization-aware': (
        lambda: nn.Sequential(quantization.qat.Conv2d(4, 4, 3, qconfig=QAT)),
        '0',
        f'it is a torch.ao.nn.qat.modules.conv.Conv2d, {MORE}',
    ),
    'quantization-aware with its norm': (
        lambda: nn.Sequential(quantization.intrinsic.qat.ConvBn2d(4, 4, 3, qconfig=QAT)),
        '0',
        f'it is a ConvBn2d, {MORE}',
    ),
    'observed for quantization': (
        prepared,
        '0',
        'it holds activation_post_process besides weight and bias',
    ),
    'with a low-rank adapter': (
        lambda: nn.Sequential(LoraConv()),
        '0.base_layer',
        'it is inside a LoraConv, which re-parameterizes itself by merge()',
    ),
    'in a module that re-parameterizes itself': (
        lambda: nn.Sequential(repvgg_block()),
        '0.branch_3x3.conv',
        'it is inside a RepVGGBlock, which re-parameterizes itself by switch_to_deploy()',
    ),
    'with a hook': (
        lambda: nn.Sequential(hooked(conv())),
        '0',
        'hooks hang on it, which a block in its place would not call',
    ),
    'frozen': (
        lambda: nn.Sequential(conv().requires_grad_(False)),
        '0',
        'it is frozen',
    ),
}

#: What a training forward shows: how to make a model, and the reason; None if it grows.
SEEN: dict[str, tuple[Callable[[], nn.Module], str, str | None]] = {
    'called several times': (lambda: Twice(), 'conv', None),
    'its weight is used elsewhere too': (
        Borrowing,
        'conv',
        'its weight is used or changed outside of its own forward',
    ),
    'with a low-rank update of its weight': (
        AdaptedWeight,
        'conv',
        'its weight is used or changed outside of its own forward',
    ),
    'never called': (lambda: Never(), 'conv', 'its own forward was not called in training'),
    'of maps of one value': (
        lambda: Pooled(),
        'conv',
        'a training batch gave it less than two values for each channel',
    ),
}


def hooked(conv: nn.Conv2d) -> nn.Conv2d:
    """A conv with a forward hook."""
    conv.register_forward_hook(lambda *_: None)
    return conv


class Twice(nn.Module):
    """A conv that is called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu())


class Never(Twice):
    """A conv that is not called."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Pooled(Twice):
    """A conv of one value in each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:1].mean((2, 3), keepdim=True))
