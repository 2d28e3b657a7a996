# CIFAR-10 as image files, one folder a class: DATA/train/CLASS/*.jpg, DATA/test/CLASS/*.jpg, with
# DATA from the environment variable CIFAR10.
_base_ = './cifar10_bs128.py'

# Files are read in BGR, which mmpretrain's own CIFAR-10 is not.
data_preprocessor = dict(to_rgb=True)
data_root = '{{$CIFAR10:data/cifar10}}'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train = dict(
    _delete_=True,
    type='CustomDataset',
    data_root=data_root,
    data_prefix='train',
    pipeline=train_pipeline,
)
test = dict(
    _delete_=True,
    type='CustomDataset',
    data_root=data_root,
    data_prefix='test',
    pipeline=test_pipeline,
)

train_dataloader = dict(dataset=train, num_workers=0, persistent_workers=False)
val_dataloader = dict(dataset=test, num_workers=0, persistent_workers=False)
test_dataloader = dict(dataset=test, num_workers=0, persistent_workers=False)
