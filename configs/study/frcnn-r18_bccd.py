# Faster R-CNN R18-FPN on BCCD, the plain row: its backbone starts from the plain classifier.

# -- Set this ------------------------------------------------------------------------------------
# The last checkpoint of study/resnet18_cifar10.py; STAGE_C is the folder of its study.
checkpoint = '{{$STAGE_C:work_dirs/stage-c}}/resnet18_cifar10/seed-0/epoch_3.pth'
# ------------------------------------------------------------------------------------------------

_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '../_base_/datasets/bccd.py',
    'mmdet::_base_/default_runtime.py',
]

max_iters = 312  # 12 epochs

model = dict(
    # 32x32 images taught it little of cells: every stage and norm trains.
    backbone=dict(
        depth=18,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=dict(_delete_=True, type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
    # Half the channels behind the backbone: the detector takes half the time.
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=128),
    # Platelets have 20 pixels, cells 50 to 100; the smallest anchor of COCO's has 32.
    rpn_head=dict(in_channels=128, feat_channels=128, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=128),
        bbox_head=dict(in_channels=128, fc_out_channels=512, num_classes=3),
    ),
    # 14 objects in an image: fewer samples and proposals do, and save time.
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=1000, max_per_img=500),
        rcnn=dict(sampler=dict(num=128)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=300)),
)

train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters // 3)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, end=max_iters),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(by_epoch=False, interval=max_iters // 3, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False, window_size=20)
