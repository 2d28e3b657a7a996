"""The plain stack of section 5.3, which no OpenMMLab library has as a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmcv.cnn import ConvModule
from mmpretrain.models.backbones import RepVGG
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from torch import Tensor, nn

from dyrep_mm.registry import MODELS


@MODELS.register_module()
class PlainVGG(BaseBackbone):
    """A RepVGG without its branches: 3x3 conv, BN and ReLU, again and again.

    mmpretrain's own ``RepVGG(deploy=True)`` has the same convs without norms, for inference.

    Args:
        arch: Name of a RepVGG: ``'A2'``, ``'B2g4'``, ``'B3'``, ...; or its settings, as mmpretrain
            has them: ``num_blocks`` and ``width_factor`` of each stage, and ``group_layer_map``
            or None.
        base_channels: 64 in every RepVGG; fewer make a narrow one.
        strides: Of the first conv, and of the first conv of each stage.
        norm_cfg: Config of the norms.
        init_cfg: Config of the weight initialisers.
    """

    def __init__(
        self,
        arch: str | Mapping,
        base_channels: int = 64,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        norm_cfg: dict | None = None,
        init_cfg: dict | list | None = None,
    ):
        super().__init__(init_cfg or [{'type': 'Kaiming', 'layer': ['Conv2d']}])
        settings = RepVGG.arch_settings[arch] if isinstance(arch, str) else arch
        groups = settings.get('group_layer_map') or {}
        widths = [int(base_channels * 2**i * f) for i, f in enumerate(settings['width_factor'])]
        first, *strides = strides
        stages = zip(widths, settings['num_blocks'], strides, strict=True)
        plan = [(min(64, widths[0]), first)]
        plan += [(width, 1 if i else s) for width, count, s in stages for i in range(count)]
        layers, inputs = [], 3
        for number, (outputs, stride) in enumerate(plan):
            layers.append(
                ConvModule(
                    inputs,
                    outputs,
                    3,
                    stride=stride,
                    padding=1,
                    groups=groups.get(number, 1),
                    norm_cfg=norm_cfg or {'type': 'BN'},
                )
            )
            inputs = outputs
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layers(x),)
