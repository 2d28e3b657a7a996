# DBB in stage C (Table 5): a classifier trained with DBB and fused by tools/fuse.py starts
# the plain model.
_base_ = './pspnet_r50_cityscapes.py'

# The stem of the classifier is one 7x7 conv, that of mmseg's ResNetV1c three 3x3 convs.
model = dict(
    pretrained=None,
    backbone=dict(
        type='ResNet',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/resnet50_dbb_in1k/fused.pth',
            prefix='backbone.',
        ),
    ),
)
