# DyRep in stages C and D (Table 5): the classifier's checkpoint starts the backbone with its
# structure, which goes on evolving.
_base_ = './pspnet_r50_dyrep-c_cityscapes.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='dyrep_mm.DyRepPretrained',
            checkpoint='work_dirs/resnet50_dyrep_in1k/epoch_120.pth',
        ),
    ),
)

custom_hooks = [dict(type='dyrep_mm.DyRepHook', interval=3500)]
