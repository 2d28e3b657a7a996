# PSPNet R18-D8 on CamVid, the plain row: its backbone starts from the plain classifier.

# -- Set this ------------------------------------------------------------------------------------
# The last checkpoint of study/resnet18_cifar10.py; STAGE_C is the folder of its study.
checkpoint = '{{$STAGE_C:work_dirs/stage-c}}/resnet18_cifar10/seed-0/epoch_3.pth'
# ------------------------------------------------------------------------------------------------

# `mmseg::` as a base looks for a distribution of the name mmsegmentation, the path for the package
# that is installed.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/_base_/models/pspnet_r50-d8.py',
    '../_base_/datasets/camvid.py',
    __import__('mmseg').__path__[0] + '/.mim/configs/_base_/default_runtime.py',
]

max_iters = 1104  # 24 epochs
norm_cfg = dict(type='BN', requires_grad=True)

model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(240, 320)),
    # The stem of the classifier is one 7x7 conv, that of mmseg's ResNetV1c three 3x3 convs.
    backbone=dict(
        type='ResNet',
        depth=18,
        norm_cfg=norm_cfg,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
    # Widths of the R18 configs of the library.
    decode_head=dict(in_channels=512, channels=128, num_classes=11, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=256, channels=64, num_classes=11, norm_cfg=norm_cfg),
)

train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters // 3)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=5e-4),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, end=max_iters),
]
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=10, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=max_iters // 3, max_keep_ckpts=1
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
