# DBB in stage C (Table 5): a classifier trained with DBB starts the plain model.

# -- Set this ------------------------------------------------------------------------------------
# What classification/resnet50_dbb_8xb32-120e_in1k.py leaves, fused by tools/fuse.py.
checkpoint = 'work_dirs/resnet50_dbb_8xb32-120e_in1k/fused.pth'
# ------------------------------------------------------------------------------------------------

_base_ = './pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'

# The stem of the classifier is one 7x7 conv, that of mmseg's ResNetV1c three 3x3 convs.
model = dict(
    pretrained=None,
    backbone=dict(
        type='ResNet',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
)
