"""The plain stack of section 5.3, which no OpenMMLab library has as a backbone."""

from __future__ import annotations

from mmcv.cnn import ConvModule
from mmpretrain.models.backbones import RepVGG
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from torch import Tensor, nn

from dyrep_mm.registry import MODELS


@MODELS.register_module()
class PlainVGG(BaseBackbone):
    """A RepVGG without its branches: 3x3 conv, BN and ReLU, 22 to 28 times in a row.

    mmpretrain's own ``RepVGG(deploy=True)`` has the same convs without norms, for inference.

    Args:
        arch: Name of a RepVGG: ``'A2'``, ``'B2g4'``, ``'B3'``, ...
        base_channels: 64 in every RepVGG; fewer make a narrow one.
        norm_cfg: Config of the norms.
        init_cfg: Config of the weight initialisers.
    """

    def __init__(
        self,
        arch: str,
        base_channels: int = 64,
        norm_cfg: dict | None = None,
        init_cfg: dict | list | None = None,
    ):
        super().__init__(init_cfg or [{'type': 'Kaiming', 'layer': ['Conv2d']}])
        settings = RepVGG.arch_settings[arch]
        groups = settings['group_layer_map'] or {}
        widths = [int(base_channels * 2**i * f) for i, f in enumerate(settings['width_factor'])]
        stages = zip(widths, settings['num_blocks'], strict=True)
        plan = [(min(64, widths[0]), 2)]
        plan += [(width, 1 if i else 2) for width, count in stages for i in range(count)]
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
