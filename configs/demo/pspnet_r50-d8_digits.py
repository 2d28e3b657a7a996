"""The plain segmentor of the demo: PSPNet R50-D8 of mmseg, made for small images.

python tools/digits.py --forms segmentation classification writes the data.
"""

# -- Set this ------------------------------------------------------------------------------------
# The last checkpoint of demo/resnet50_digits.py.
checkpoint = 'work_dirs/resnet50_digits/epoch_3.pth'
# ------------------------------------------------------------------------------------------------

_base_ = '../segmentation/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'

max_iters = 160
size = (96, 96)

model = dict(
    pretrained=None,
    data_preprocessor=dict(size=size),
    # The stem of the classifier is one 7x7 conv, that of mmseg's ResNetV1c three 3x3 convs.
    backbone=dict(
        type='ResNet',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)

# The images are 192 pixels; half of that is seconds instead of tens of seconds for an iteration.
# No flip: a mirrored digit is none.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=size),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    _delete_=True,
    type='BaseSegDataset',
    data_root='data/digits',
    data_prefix=dict(img_path='images/train', seg_map_path='labels/train'),
    metainfo=dict(
        classes=('background', *'0123456789'),
        palette=[[0, 0, 0], *([25 * d, 255 - 25 * d, 128] for d in range(10))],
    ),
    pipeline=train_pipeline,
)
val_dataset = dict(
    dataset,
    data_prefix=dict(img_path='images/val', seg_map_path='labels/val'),
    pipeline=test_pipeline,
)
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=val_dataset)
test_dataloader = val_dataloader

train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=3e-4, weight_decay=0.05),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=20),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=max_iters),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=max_iters, save_optimizer=False),
)
randomness = dict(seed=0)
