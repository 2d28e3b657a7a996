# CIFAR-10 as image files, enlarged to 64x64 for networks with the stem of ImageNet.
_base_ = './cifar10-images_bs128.py'

enlarge = dict(type='Resize', scale=(64, 64))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    enlarge,
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), enlarge, dict(type='PackInputs')]
train_dataloader = dict(batch_size=256, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=256, dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(batch_size=256, dataset=dict(pipeline=test_pipeline))
