# DyRep in stages C and D (Table 5): the classifier's checkpoint starts the backbone with its
# structure, which goes on evolving.
_base_ = './pspnet_r50_cityscapes.py'

# The stem of the classifier is one 7x7 conv, that of mmseg's ResNetV1c three 3x3 convs.
model = dict(
    pretrained=None,
    backbone=dict(
        type='ResNet',
        init_cfg=dict(
            type='dyrep_mm.DyRepPretrained',
            checkpoint='work_dirs/resnet50_dyrep_in1k/epoch_120.pth',
            prefix='backbone.',
        ),
    ),
)

custom_hooks = [dict(type='dyrep_mm.DyRepHook', interval=3500)]
