"""The plain detector of the demo: Faster R-CNN R50-FPN of mmdet, made for small images.

python tools/digits.py writes the data.
"""

# -- Set this ------------------------------------------------------------------------------------
# The last checkpoint of demo/resnet50_digits.py.
checkpoint = 'work_dirs/resnet50_digits/epoch_3.pth'
# ------------------------------------------------------------------------------------------------

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

data_root = 'data/digits/'
max_iters = 160

model = dict(
    # Stage C in place of ImageNet; almost nothing is known yet, so every stage and norm trains.
    backbone=dict(
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
    # Digits are taller than wide and have 30 to 90 pixels; COCO has objects up to 500.
    rpn_head=dict(anchor_generator=dict(scales=[4, 6], ratios=[1.0, 1.5, 2.2])),
    # One box regression for all digits: ten would each see a tenth of the few examples.
    roi_head=dict(bbox_head=dict(num_classes=10, reg_class_agnostic=True)),
    # One to four objects in an image: a few dozen samples and proposals do, and save time.
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100)),
)

# No flip: a mirrored digit is none.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(192, 192), keep_ratio=True),
    dict(type='PackDetInputs'),
]
# The images are 192 pixels; the base would enlarge them to 800.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(192, 192), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
metainfo = dict(classes=tuple('0123456789'))
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='images/train/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='images/val/'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters
)
optim_wrapper = dict(
    # 160 iterations from random weights: mAP 0.44, and 0.20 with SGD and the lr of the base.
    optimizer=dict(_delete_=True, type='AdamW', lr=3e-4, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=20),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=max_iters),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(by_epoch=False, interval=max_iters, save_optimizer=False),
)
log_processor = dict(by_epoch=False, window_size=20)
randomness = dict(seed=0)
