"""The zoos of mmpretrain, mmdet and mmseg, built small: what each model is made of."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mmengine.config import Config

LIBRARIES = ('mmpretrain', 'mmdet', 'mmseg')

VIT = {'embed_dims': 32, 'num_layers': 2, 'num_heads': 2, 'feedforward_channels': 64}
SWIN = {'embed_dims': 16, 'depths': [1, 1, 1, 1], 'num_heads': [1, 2, 4, 8]}
POOLS = {
    'layers': [1, 1, 1, 1],
    'embed_dims': [8, 16, 32, 64],
    'mlp_ratios': [4, 4, 4, 4],
    'layer_scale_init_value': 1e-5,
}
TWINS = {
    'embed_dims': [8, 16, 32, 64],
    'depths': [1, 1, 1, 1],
    'num_heads': [1, 2, 4, 8],
    'patch_sizes': [4, 2, 2, 2],
    'strides': [4, 2, 2, 2],
    'mlp_ratios': [2, 2, 2, 2],
    'sr_ratios': [8, 4, 2, 1],
}
NARROW = {'stem_channels': 8, 'base_channels': 8}
BASIC = {'depth': 18, **NARROW}
BOTTLENECK = {'depth': 50, 'stem_channels': 16, 'base_channels': 16}
GROUPED = {**BOTTLENECK, 'groups': 4}
FOUR_BRANCHES = {
    f'stage{i + 1}': {
        'num_modules': 1,
        'num_branches': max(i, 0) + 1,
        'block': 'BOTTLENECK' if i == 0 else 'BASIC',
        'num_blocks': (1,) * (i + 1),
        'num_channels': (8, 16, 32, 64)[: i + 1],
    }
    for i in range(4)
}
STDC = {
    'type': 'STDCNet',
    'stdc_type': 'STDCNet1',
    'in_channels': 3,
    'channels': (8, 16, 32, 64, 128),
    'bottleneck_type': 'cat',
    'norm_cfg': {'type': 'BN'},
    'act_cfg': {'type': 'ReLU'},
}
PVT = {
    'pretrain_img_size': 64,
    'embed_dims': 8,
    'num_layers': [1, 1, 1, 1],
    'num_heads': [1, 2, 4, 8],
}
SEG_VIT = {'img_size': 64, 'embed_dims': 32, 'num_layers': 2, 'num_heads': 2}

#: Arguments of every backbone class that the libraries register, few and narrow layers; ``_size``
#: and ``_channels`` are those of its images. A text says why a class is not built.
BACKBONES: dict[str, dict[str, dict[str, Any] | str]] = {
    'mmpretrain': {
        'AlexNet': {},
        'BEiTViT': {'arch': VIT, 'img_size': 64},
        'CSPDarkNet': {'depth': 53},
        'CSPResNeXt': {'depth': 50},
        'CSPResNet': {'depth': 50},
        'Conformer': {
            'arch': {'embed_dims': 32, 'num_heads': 2, 'channel_ratio': 1, 'depths': 12},
            'base_channels': 16,
        },
        'ConvMixer': {'arch': {'embed_dims': 16, 'depth': 2, 'patch_size': 7, 'kernel_size': 9}},
        'ConvNeXt': {'arch': {'depths': [1, 1, 1, 1], 'channels': [8, 16, 32, 64]}},
        'DaViT': {'arch': {**SWIN, 'embed_dims': 32}, 'pad_small_map': True},
        'DeiT3': {'arch': VIT, 'img_size': 64},
        'DenseNet': {'arch': {'growth_rate': 8, 'depths': [2, 2, 2, 2], 'init_channels': 16}},
        'DistilledVisionTransformer': {'arch': VIT, 'img_size': 64},
        'EdgeNeXt': {
            'arch': {
                'channels': [24, 48, 88, 168],
                'depths': [1, 2, 2, 2],
                'num_heads': [4, 4, 4, 4],
            }
        },
        'EfficientFormer': {
            'arch': {
                'layers': [1, 1, 1, 2],
                'embed_dims': [16, 32, 48, 64],
                'downsamples': [False, True, True, True],
                'vit_num': 1,
            },
            '_size': 224,
        },
        'EfficientNet': {'arch': 'b0'},
        'EfficientNetV2': {'arch': 'b0'},
        'HRNet': {'extra': FOUR_BRANCHES},
        'HiViT': {'arch': 'tiny', 'img_size': 64, 'out_indices': [11]},
        'HorNet': {
            'arch': {
                'base_dim': 16,
                'depths': [1, 1, 1, 1],
                'orders': [2, 3, 4, 5],
                'dw_cfg': [{'type': 'DW', 'kernel_size': 7}] * 4,
            }
        },
        'InceptionV3': {'_size': 96},
        'LeNet5': {'_size': 32, '_channels': 1},
        'LeViT': {'arch': '128s', 'img_size': 128, '_size': 128},
        'MViT': {
            'arch': {
                'embed_dims': 32,
                'num_layers': 4,
                'num_heads': 1,
                'downscale_indices': [1, 2, 3],
            },
            'img_size': 64,
        },
        'MixMIMTransformer': {'arch': SWIN, 'img_size': 64, 'window_size': [4, 4, 4, 2]},
        'MlpMixer': {
            'arch': {
                'embed_dims': 32,
                'num_layers': 2,
                'tokens_mlp_dims': 16,
                'channels_mlp_dims': 32,
            },
            'img_size': 64,
        },
        'MobileNetV2': {'widen_factor': 0.25},
        'MobileNetV3': {'arch': 'small_050'},
        'MobileOne': {'arch': 's0'},
        'MobileViT': {'arch': 'xx_small'},
        'PCPVT': {'arch': TWINS},
        'PoolFormer': {'arch': POOLS},
        'PyramidVig': {'arch': 'tiny', '_size': 224},
        'RIFormer': {'arch': POOLS},
        'RegNet': {'arch': 'regnetx_400mf'},
        'RepLKNet': {
            'arch': {
                'large_kernel_sizes': [31, 29, 27, 13],
                'layers': [1, 1, 1, 1],
                'channels': [8, 16, 32, 64],
                'small_kernel': 5,
                'dw_ratio': 1,
            }
        },
        'RepMLPNet': {
            'arch': {
                'channels': [16, 32, 64, 128],
                'depths': [1, 1, 1, 1],
                'sharesets_nums': [1, 4, 8, 8],
            },
            'img_size': 64,
        },
        'RepVGG': {'arch': 'A0'},
        'Res2Net': BOTTLENECK,
        'ResNeSt': BOTTLENECK,
        'ResNeXt': GROUPED,
        'ResNet': BASIC,
        'ResNetV1c': BASIC,
        'ResNetV1d': BASIC,
        'ResNet_CIFAR': BASIC,
        'RevVisionTransformer': {'arch': VIT, 'img_size': 64},
        'SEResNeXt': GROUPED,
        'SEResNet': BOTTLENECK,
        'SVT': {'arch': {**TWINS, 'window_sizes': [7, 7, 7, 7]}},
        'ShuffleNetV1': {},
        'ShuffleNetV2': {'widen_factor': 0.5},
        'SparseConvNeXt': {'arch': {'depths': [1, 1, 1, 1], 'channels': [8, 16, 32, 64]}},
        'SparseResNet': BOTTLENECK,
        'SwinTransformer': {'arch': SWIN, 'img_size': 64, 'window_size': 2},
        'SwinTransformerV2': {
            'arch': {**SWIN, 'extra_norm_every_n_blocks': 0},
            'img_size': 64,
            'window_size': 2,
        },
        'T2T_ViT': {
            'img_size': 64,
            'embed_dims': 64,
            'num_layers': 2,
            't2t_cfg': {'token_dims': 64, 'use_performer': False},
            'layer_cfgs': {'num_heads': 2, 'feedforward_channels': 128},
        },
        'TIMMBackbone': {'model_name': 'resnet18'},
        'TNT': {
            'arch': {
                'embed_dims_outer': 32,
                'embed_dims_inner': 8,
                'num_layers': 2,
                'num_heads_outer': 2,
                'num_heads_inner': 2,
            },
            'img_size': 64,
        },
        'TinyViT': {'arch': '5m', 'img_size': (64, 64)},
        'VAN': {
            'arch': {
                'embed_dims': [8, 16, 32, 64],
                'depths': [1, 1, 1, 1],
                'ffn_ratios': [4, 4, 4, 4],
            }
        },
        'VGG': {'depth': 11, 'norm_cfg': {'type': 'BN'}},
        'ViTEVA02': {'arch': VIT, 'img_size': 64},
        'ViTSAM': {
            'arch': {**VIT, 'global_attn_indexes': [1]},
            'img_size': 64,
            'out_channels': 32,
        },
        'Vig': {'arch': 'tiny', '_size': 224},
        'VisionTransformer': {'arch': VIT, 'img_size': 64},
        'XCiT': {
            'img_size': 64,
            'embed_dims': 32,
            'depth': 2,
            'cls_attn_layers': 1,
            'num_heads': 2,
        },
    },
    'mmdet': {
        'CSPDarknet': {'deepen_factor': 0.33, 'widen_factor': 0.25},
        'CSPNeXt': {'deepen_factor': 0.167, 'widen_factor': 0.25},
        'Darknet': {},
        'DetectoRS_ResNeXt': {
            **GROUPED,
            'conv_cfg': {'type': 'ConvAWS'},
            'sac': {'type': 'SAC', 'use_deform': True},
            'stage_with_sac': (False, True, True, True),
            'norm_eval': False,
            '_size': 128,
        },
        'DetectoRS_ResNet': {
            **BOTTLENECK,
            'conv_cfg': {'type': 'ConvAWS'},
            'sac': {'type': 'SAC', 'use_deform': True},
            'stage_with_sac': (False, True, True, True),
            'norm_eval': False,
            '_size': 128,
        },
        'EfficientNet': {'arch': 'b0'},
        'HRNet': {'extra': FOUR_BRANCHES},
        'HourglassNet': {
            'downsample_times': 2,
            'num_stacks': 1,
            'stage_channels': (16, 16, 24),
            'stage_blocks': (1, 1, 1),
            'feat_channel': 16,
        },
        'MobileNetV2': {'widen_factor': 0.25},
        'PyramidVisionTransformer': PVT,
        'PyramidVisionTransformerV2': PVT,
        'RegNet': {'arch': 'regnetx_400mf'},
        'Res2Net': BOTTLENECK,
        'ResNeSt': BOTTLENECK,
        'ResNeXt': GROUPED,
        'ResNet': BASIC,
        'ResNetV1d': BASIC,
        'SSDVGG': {'depth': 16, '_size': 128},
        'SwinTransformer': {
            'pretrain_img_size': 64,
            'embed_dims': 16,
            'depths': (1, 1, 1, 1),
            'num_heads': (1, 2, 4, 8),
        },
        'TridentResNet': {
            **BOTTLENECK,
            'num_stages': 3,
            'strides': (1, 2, 2),
            'dilations': (1, 1, 1),
            'out_indices': (2,),
            'num_branch': 3,
            'test_branch_idx': 1,
            'trident_dilations': (1, 2, 3),
        },
    },
    'mmseg': {
        'BEiT': SEG_VIT,
        'BiSeNetV1': {
            'backbone_cfg': {'type': 'ResNet', **BASIC},
            'spatial_channels': (8, 8, 8, 16),
            'context_channels': (16, 32, 64),
            'out_channels': 32,
        },
        'BiSeNetV2': {
            'detail_channels': (8, 8, 16),
            'semantic_channels': (4, 8, 8, 16),
            'bga_channels': 16,
        },
        'CGNet': {'num_channels': (8, 16, 32), 'num_blocks': (1, 2), 'reductions': (4, 8)},
        'DDRNet': {'channels': 8, 'ppm_channels': 16},
        'DeconvModule': 'it is an upsampling of UNet, which no image goes into',
        'ERFNet': {},
        'FastSCNN': {},
        'HRNet': {'extra': FOUR_BRANCHES},
        'ICNet': {
            'backbone_cfg': {'type': 'ResNetV1c', **BOTTLENECK, 'out_indices': (0, 1, 2, 3)},
            'layer_channels': (128, 512),
            'light_branch_middle_channels': 8,
            'psp_out_channels': 32,
            'out_channels': (16, 32, 32),
            '_size': 128,
        },
        'InterpConv': 'it is an upsampling of UNet, which no image goes into',
        'MAE': SEG_VIT,
        'MSCAN': {
            'embed_dims': [8, 16, 32, 64],
            'depths': [1, 1, 1, 1],
            'norm_cfg': {'type': 'BN'},
        },
        'MixVisionTransformer': {
            'embed_dims': 8,
            'num_layers': [1, 1, 1, 1],
            'num_heads': [1, 2, 4, 8],
        },
        'MobileNetV2': {'widen_factor': 0.25},
        'MobileNetV3': {},
        'PCPVT': {
            'embed_dims': [8, 16, 32, 64],
            'depths': [1, 1, 1, 1],
            'num_heads': [1, 2, 4, 8],
        },
        'PIDNet': {'channels': 8, 'ppm_channels': 16},
        'ResNeSt': BOTTLENECK,
        'ResNeXt': GROUPED,
        'ResNet': BASIC,
        'ResNetV1c': BASIC,
        'ResNetV1d': BASIC,
        'STDCContextPathNet': {
            'backbone_cfg': STDC,
            'last_in_channels': (128, 64),
            'out_channels': 32,
            'ffm_cfg': {'in_channels': 64, 'out_channels': 64, 'scale_factor': 4},
        },
        'STDCNet': {name: value for name, value in STDC.items() if name != 'type'},
        'SVT': {'embed_dims': [8, 16, 32], 'depths': [1, 1, 1], 'num_heads': [1, 2, 4]},
        'SwinTransformer': {
            'pretrain_img_size': 64,
            'embed_dims': 16,
            'depths': (1, 1, 1, 1),
            'num_heads': (1, 2, 4, 8),
        },
        'TIMMBackbone': {'model_name': 'resnet18', 'pretrained': False},
        'UNet': {'base_channels': 8},
        'VPD': 'it is built from a diffusion model that is installed apart',
        'VisionTransformer': SEG_VIT,
    },
}

#: Whole detectors, by the files of mmdet; a size where 64 pixels are too few.
DETECTORS: dict[str, dict[str, Any]] = {
    'atss/atss_r50_fpn_1x_coco': {},
    'autoassign/autoassign_r50-caffe_fpn_1x_coco': {},
    'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco': {},
    'centernet/centernet_r18_8xb16-crop512-140e_coco': {},
    'conditional_detr/conditional-detr_r50_8xb2-50e_coco': {},
    'dab_detr/dab-detr_r50_8xb2-50e_coco': {},
    'ddod/ddod_r50_fpn_1x_coco': {'size': 384},
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco': {},
    'detr/detr_r18_8xb2-500e_coco': {},
    'dino/dino-4scale_r50_8xb2-12e_coco': {'size': 256},
    'faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco': {},
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco': {},
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco': {},
    'foveabox/fovea_r50_fpn_4xb4-1x_coco': {},
    'free_anchor/freeanchor_r50_fpn_1x_coco': {},
    'fsaf/fsaf_r50_fpn_1x_coco': {},
    'gfl/gfl_r50_fpn_1x_coco': {},
    'grid_rcnn/grid-rcnn_r50_fpn_gn-head_1x_coco': {},
    'libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco': {'size': 128},
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco': {},
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco': {},
    'paa/paa_r50_fpn_1x_coco': {},
    'pafpn/faster-rcnn_r50_pafpn_1x_coco': {},
    'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco': {},
    'reppoints/reppoints-moment_r50_fpn_1x_coco': {},
    'retinanet/retinanet_r18_fpn_1x_coco': {},
    'rpn/rpn_r50_fpn_1x_coco': {},
    'rtmdet/rtmdet_tiny_8xb32-300e_coco': {},
    'solo/solo_r50_fpn_1x_coco': {},
    'solov2/solov2-light_r18_fpn_ms-3x_coco': {},
    'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco': {},
    'ssd/ssd300_coco': {'size': 300},
    'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco': {'size': 320},
    'tood/tood_r50_fpn_1x_coco': {},
    'tridentnet/tridentnet_r50-caffe_1x_coco': {},
    'vfnet/vfnet_r50_fpn_1x_coco': {},
    'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco': {},
    'yolof/yolof_r50-c5_8xb8-1x_coco': {},
    'yolox/yolox_tiny_8xb8-300e_coco': {},
}

#: Whole segmentors, by the files of mmseg.
SEGMENTORS: dict[str, dict[str, Any]] = {
    'ann/ann_r50-d8_4xb2-40k_cityscapes-512x1024': {},
    'apcnet/apcnet_r50-d8_4xb2-40k_cityscapes-512x1024': {},
    'bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024': {},
    'ccnet/ccnet_r50-d8_4xb2-40k_cityscapes-512x1024': {},
    'cgnet/cgnet_fcn_4xb4-60k_cityscapes-680x680': {},
    'danet/danet_r50-d8_4xb2-40k_cityscapes-512x1024': {},
    'ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024': {},
    'deeplabv3/deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024': {},
    'deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024': {},
    'dnlnet/dnl_r50-d8_4xb2-40k_cityscapes-512x1024': {},
    'emanet/emanet_r50-d8_4xb2-80k_cityscapes-512x1024': {},
    'encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024': {},
    'erfnet/erfnet_fcn_4xb4-160k_cityscapes-512x1024': {},
    'fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024': {},
    'fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024': {},
    'gcnet/gcnet_r50-d8_4xb2-40k_cityscapes-512x1024': {},
    'isanet/isanet_r50-d8_4xb2-40k_cityscapes-512x1024': {},
    'mobilenet_v3/mobilenet-v3-d8-scratch-s_lraspp_4xb4-320k_cityscapes-512x1024': {'size': 512},
    'nonlocal_net/nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024': {},
    'ocrnet/ocrnet_hr18_4xb2-40k_cityscapes-512x1024': {},
    'pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes': {},
    'psanet/psanet_r50-d8_4xb2-40k_cityscapes-512x1024': {},
    'pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024': {},
    'segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024': {},
    'sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024': {},
    'stdc/stdc1_4xb12-80k_cityscapes-512x1024': {},
    'unet/unet-s5-d16_fcn_4xb4-40k_chase-db1-128x128': {},
    'upernet/upernet_r50_4xb2-40k_cityscapes-512x1024': {},
}

#: Those of which neck and heads grow, in a run of their own.
WITH_HEADS = (
    'atss/atss_r50_fpn_1x_coco',
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco',
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco',
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco',
    'retinanet/retinanet_r18_fpn_1x_coco',
    'rtmdet/rtmdet_tiny_8xb32-300e_coco',
    'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco',
    'yolox/yolox_tiny_8xb8-300e_coco',
    'deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024',
    'pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024',
    'sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024',
    'upernet/upernet_r50_4xb2-40k_cityscapes-512x1024',
)


@dataclass(frozen=True)
class Case:
    """A model of a library, and where in it convs grow.

    Attributes:
        kind: ``backbone``, ``detector`` or ``segmentor``.
        library: Which has it.
        name: A class of backbones, or a config file without its ending.
        heads: Neck and heads grow instead of the backbone.
    """

    kind: str
    library: str
    name: str
    heads: bool = False

    def __str__(self) -> str:
        return f'{self.library}-{self.name.rpartition("/")[2]}{"-heads" * self.heads}'


CASES = [
    *(
        Case('backbone', library, name)
        for library in LIBRARIES
        for name, arguments in BACKBONES[library].items()
        if not isinstance(arguments, str)
    ),
    *(Case('detector', 'mmdet', name) for name in DETECTORS),
    *(Case('segmentor', 'mmseg', name) for name in SEGMENTORS),
    *(Case('detector', 'mmdet', name, True) for name in DETECTORS if name in WITH_HEADS),
    *(Case('segmentor', 'mmseg', name, True) for name in SEGMENTORS if name in WITH_HEADS),
]


def registered(library: str) -> set[str]:
    """Names of the backbone classes in the registry of a library."""
    import_module(f'{library}.models')
    found = import_module(f'{library}.registry').MODELS.module_dict
    return {n for n, kind in found.items() if kind.__module__.startswith(f'{library}.models.backb')}


def model_config(case: Case) -> tuple[dict[str, Any], int, int]:
    """The model of a case, and size and channels of its images."""
    if case.kind == 'backbone':
        arguments = dict(BACKBONES[case.library][case.name])
        size, channels = arguments.pop('_size', 64), arguments.pop('_channels', 3)
        normalized = {'mean': [127.0] * channels, 'std': [60.0] * channels}
        if case.library == 'mmpretrain':
            normalized['num_classes'] = None
        types = {
            'mmpretrain': 'ClsDataPreprocessor',
            'mmdet': 'DetDataPreprocessor',
            'mmseg': 'SegDataPreProcessor',
        }
        if case.library == 'mmseg':
            normalized['size'] = (size, size)
        model = {
            'type': 'Probe',
            'data_preprocessor': {'type': types[case.library], **normalized},
            'backbone': {'type': case.name, **arguments},
        }
        return copy.deepcopy(model), size, channels
    path = import_module(case.library).__path__[0]
    model = Config.fromfile(f'{path}/.mim/configs/{case.name}.py').model.to_dict()
    size = {**DETECTORS, **SEGMENTORS}[case.name].get('size', 64)
    model = without_files(model)
    narrow(model)
    preprocessor = model['data_preprocessor']
    preprocessor.pop('batch_augments', None)
    if case.library == 'mmseg':
        preprocessor['size'] = (size, size)
        preprocessor.pop('size_divisor', None)
        model['test_cfg'] = {'mode': 'whole'}
    return model, size, 3


def without_files(part: Any) -> Any:
    """A part of a config without pretrained weights and without norms of several processes."""
    if isinstance(part, dict):
        init = part.get('init_cfg')
        drop = {'pretrained'} | ({'init_cfg'} if 'Pretrained' in str(init) else set())
        kept = {k: without_files(v) for k, v in part.items() if k not in drop}
        return {**kept, 'type': 'BN'} if kept.get('type') == 'SyncBN' else kept
    if isinstance(part, (list, tuple)):
        return type(part)(without_files(value) for value in part)
    return part


def narrow(model: dict[str, Any]) -> None:
    """A quarter of the channels for a ResNet-50, and for all that takes its features."""
    backbone = model['backbone']
    if backbone['type'] not in ('ResNet', 'ResNetV1c', 'ResNetV1d'):
        return
    if backbone.get('depth') != 50:
        return
    backbone.update(base_channels=16, stem_channels=16)
    heads = [part for name, part in model.items() if name not in ('backbone', 'type')]
    wide = {256: 64, 512: 128, 1024: 256, 2048: 512}

    def narrowed(part: Any, is_first: bool) -> None:
        if isinstance(part, (list, tuple)):
            for value in part:
                narrowed(value, is_first)
        if not isinstance(part, dict):
            return
        for name, value in part.items():
            if name in ('in_channels', 'c1_in_channels', 'low_level_channels'):
                several = isinstance(value, (list, tuple))
                if several and len({*value} & wide.keys()) == len(value):  # an FPN repeats its own
                    part[name] = [wide[v] for v in value]
                elif (is_first and value in (1024, 2048)) or name == 'c1_in_channels':
                    part[name] = wide[value]
            elif isinstance(value, (dict, list, tuple)):
                narrowed(value, is_first)

    narrowed(heads, True)
